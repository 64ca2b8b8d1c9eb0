"""A machine that has no more of something: one sentence, a proper status, and it goes on when there is some again.

What needs a small disk, or minutes, is in benchmarks/poor_machine.py.
"""

from __future__ import annotations

import argparse
import errno
import os
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from cli_runner import Loader, Run
from click.testing import CliRunner
from serving import serve

from edge_stream.cli import cli
from edge_stream.engine import Engine
from edge_stream.errors import EdgeStreamError, cannot_import
from edge_stream.native import bindings
from edge_stream.server.errors import exhausted
from edge_stream.server.http.header_timeout import HeaderTimeoutProtocol

Load = Callable[..., Engine]
OPTIONS: dict[str, Any] = {"max_tokens": 4, "ignore_eos": True, "seed": 1}
HELLO = [{"role": "user", "content": "Hello"}]
poor_machine = pytest.importorskip("poor_machine")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "error: there is not enough memory\n"),
        (
            MemoryError("Unable to allocate 9. GiB\nfor an array"),
            "error: there is not enough memory: Unable to allocate 9. GiB\n",
        ),
        (OSError(errno.EMFILE, os.strerror(errno.EMFILE)), "error: Too many open files\n"),
        (OSError(errno.EMFILE, os.strerror(errno.EMFILE), "a\nb"), "error: a\\nb: Too many open files\n"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x"), "error: x: No space left on device\n"),
    ],
)
def test_a_command_ends_in_a_sentence(loader: Loader, run: Run, error: Exception, said: str) -> None:
    loader.error = error
    result = run("run", "-m", "x.gguf", "-p", "Hello")
    assert result.exit_code == 1 and result.stderr == said


def test_other_errors_are_bugs(loader: Loader) -> None:
    loader.error = OSError(errno.EBADF, "Bad file descriptor")
    result = CliRunner().invoke(cli, ["run", "-m", "x.gguf", "-p", "Hello"])
    assert result.exception is loader.error


def test_a_package_that_does_not_load_is_not_missing() -> None:
    missing = ModuleNotFoundError("No module named 'gguf'", name="gguf")
    assert str(cannot_import(missing, "convert", "convert")) == "convert needs gguf: pip install 'edge-stream[convert]'"
    broken = ImportError("x.so: failed to map segment from shared object")
    assert str(cannot_import(broken, "convert", "convert")).endswith(f"cannot be loaded: {broken}")


def test_what_is_a_lack_of_something() -> None:
    for lack in (MemoryError(), OSError(errno.EMFILE, "x"), EdgeStreamError("x", bindings.MEMORY)):
        error = exhausted(lack)
        assert error and error.code == 503 and error.headers["Retry-After"] == "5"
    for other in (OSError(errno.ENOENT, "x"), EdgeStreamError("x"), ValueError()):
        assert exhausted(other) is None


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.EMFILE, "Too many open files")])
@pytest.mark.parametrize("where", ["prefill.read", "loop._record", "loop.step"])
def test_an_answer_that_cannot_go_on(
    load: Load, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, where: str, error: Exception
) -> None:
    """503, one line in the log, and the next one is answered."""
    with serve(load("chat", n_ctx=96)) as served:
        served.client.chat(HELLO, **OPTIONS)
        place, name = where.split(".")
        owner = served.scheduler.loop if place == "loop" else served.scheduler.loop.prefill
        real = getattr(owner, name)

        def fail(*args: Any) -> Any:
            if name == "step" and not served.scheduler.loop.tasks:
                return real(*args)
            monkeypatch.setattr(owner, name, real)
            raise error

        monkeypatch.setattr(owner, name, fail)
        answer = served.client.post("/v1/chat/completions", json={"messages": [*HELLO], **OPTIONS})
        assert answer.status_code == 503 and answer.headers["Retry-After"], answer.text
        assert "at the moment" in answer.json()["error"]["message"]
        assert not [record for record in caplog.records if record.exc_info]
        assert served.client.chat(HELLO, **OPTIONS)["usage"]["completion_tokens"] == 4


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.EMFILE, "Too many open files")])
def test_a_conversation_that_cannot_be_saved_is_answered(
    load: Load, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path, error: Exception
) -> None:
    with serve(load("chat", n_ctx=96), tmp_path) as served:
        store, n = served.scheduler.store, 0
        assert store

        def files() -> None:
            nonlocal n
            n += 1
            raise error

        with monkeypatch.context() as broken:
            broken.setattr(store, "files", files)
            served.client.chat(HELLO, **OPTIONS)
        assert n > 0 and not list(store.folder.glob("*.session"))
        assert "a conversation could not be saved" in caplog.text
        assert not [record for record in caplog.records if record.exc_info]
        served.client.chat([{"role": "user", "content": "Hello again"}], **OPTIONS)
        served.wait_idle()
        assert list(store.folder.glob("*.session"))


def test_connections_beyond_the_limit_are_closed(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(load("chat", n_ctx=96)) as served:
        served.client.chat(HELLO, **OPTIONS)  # on a connection that stays
        monkeypatch.setattr(HeaderTimeoutProtocol, "max_connections", 5)
        address = served.url.removeprefix("http://").split(":")
        socks = [socket.create_connection((address[0], int(address[1])), timeout=30) for _ in range(4)]
        refused = socket.create_connection((address[0], int(address[1])), timeout=30)
        with refused, suppress(ConnectionResetError):
            assert refused.recv(1) == b""
        served.client.chat(HELLO, **OPTIONS)
        for sock in socks:
            sock.close()
        with httpx.Client(base_url=served.url, timeout=30, transport=httpx.HTTPTransport(retries=0)) as client:
            while True:
                try:
                    assert client.get("/health").status_code == 200
                    break
                except httpx.TransportError:  # the others are not gone yet
                    continue


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs prlimit and a preload")
@pytest.mark.parametrize("name", ["descriptors", "memory-serve", "slow-disk"])
def test_scenarios_of_the_benchmark(tiny: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    args = argparse.Namespace(model=str(tiny("chat")), tries=3)
    assert poor_machine.SCENARIOS[name](args, tmp_path)
