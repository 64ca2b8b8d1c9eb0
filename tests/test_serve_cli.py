"""`edge-stream serve` as a program: what it refuses, what it says, how it ends."""

from __future__ import annotations

import logging
import shutil
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
import uvicorn
from click.testing import CliRunner
from serving_bench import ServerProcess, edge_stream_command, free_port
from starlette.applications import Starlette

from edge_stream.cli.serve import main
from edge_stream.server.scheduling.scheduler import Scheduler
from edge_stream.server.serve import _Server


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--host", "0.0.0.0"], "--api-key"),
        (["--api-key", " , "], "--api-key is empty"),
        (["--timeout", "nan"], "nan"),
    ],
)
def test_flags_that_are_refused(flags: list[str], said: str, tiny: Callable[[str], Path]) -> None:
    done = CliRunner().invoke(main, ["-m", str(tiny("chat")), *flags])
    assert done.exit_code == 2 and said in done.output


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_https(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    make = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
    subprocess.run([*make.split(), "-keyout", key, "-out", certificate], check=True, capture_output=True)
    flags = ["-c", "96", "-np", "1", "-t", "1", "--ssl-key-file", str(key), "--ssl-cert-file"]
    sessions = tmp_path / "sessions"
    bad = edge_stream_command(str(tiny("chat")), sessions, *flags, str(key), "--port", "0")
    done = subprocess.run([part.format(port=0) for part in bad], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "the certificate or its key cannot be used" in done.stderr.splitlines()[-1]
    log, port = tmp_path / "log", free_port()
    command = [
        part.format(port=port) for part in edge_stream_command(str(tiny("chat")), sessions, *flags, str(certificate))
    ]
    with log.open("w") as out, subprocess.Popen(command, stderr=out) as process:
        try:
            while "listening on https://" not in log.read_text():
                assert process.poll() is None, log.read_text()
                time.sleep(0.05)
            context = ssl.create_default_context(cafile=str(certificate))
            with httpx.Client(verify=context, timeout=30) as client:
                assert client.get(f"https://127.0.0.1:{port}/health").json() == {"status": "ok"}
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0


def test_a_server_listens_once_it_says_so(caplog: pytest.LogCaptureFixture) -> None:
    config = uvicorn.Config(Starlette(), log_level="warning", lifespan="off")
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        server = _Server(config, Scheduler.__new__(Scheduler), "there")

        class Client(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                if record.getMessage() == "listening on there":
                    socket.create_connection(sock.getsockname(), timeout=5).close()
                    server.should_exit = True

        log, client = logging.getLogger("edge_stream.server"), Client()
        log.addHandler(client)
        try:
            with caplog.at_level(logging.INFO, log.name):
                server.run(sockets=[sock])
        finally:
            log.removeHandler(client)
    assert "listening on there" in caplog.messages


def test_a_server_begins_says_what_it_costs_and_ends_well(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = edge_stream_command(str(tiny("chat")), tmp_path / "sessions", "-c", "96", "-np", "2", "-t", "1")
    with ServerProcess(command, log=log) as server:
        said = log.read_text()
        assert "2 conversations of 96 tokens at once; memory" in said and "-fa auto: off" in said
        messages = [{"role": "user", "content": "Hello"}]
        body = {"messages": messages, "max_tokens": 4, "ignore_eos": True}
        answer = httpx.post(server.url + "/v1/chat/completions", json=body, timeout=30).json()
        assert answer["edge_stream"]["n_past"] > 4
        # neither the folder nor the address can be had twice
        for flags, why in ((["--port", "0"], "another server keeps its sessions"), ([], "cannot listen on")):
            sessions = tmp_path / "sessions" if flags else tmp_path / "others"
            second = edge_stream_command(str(tiny("chat")), sessions, "-c", "96", "-np", "2", "-t", "1", *flags)
            second = [part.format(port=server.port) for part in second]
            done = subprocess.run(second, capture_output=True, text=True, timeout=60)
            assert done.returncode == 1 and why in done.stderr
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0
        assert len(list((tmp_path / "sessions").rglob("*.session"))) == 1
        with socket.socket() as sock:
            assert sock.connect_ex(("127.0.0.1", server.port)) != 0
