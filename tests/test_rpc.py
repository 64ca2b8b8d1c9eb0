"""Streaming over llama.cpp's RPC backend: the same tokens as alone, and a server that dies costs no session."""

from __future__ import annotations

import contextlib
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import graph_cost
import pytest
import tiny_architectures
from click.testing import CliRunner
from test_graph_cost import check, counted

from edge_stream import EdgeStreamError, Sampling
from edge_stream.cli import cli
from edge_stream.converters.gguf_source import end_tokens
from edge_stream.embedder import Embedder
from edge_stream.hardware import devices

Load = Callable[..., Any]
Draw = Callable[..., list[int]]

OPTIONS = {"n_ctx": 64, "n_keep": 4, "n_slide": 1, "cache_type_k": "q8_0"}

pytestmark = pytest.mark.skipif(
    not devices.ggml().ggml_backend_reg_by_name(b"RPC"), reason="the libraries in use have no RPC backend"
)


@pytest.fixture
def servers() -> Iterator[list[tuple[str, subprocess.Popen[bytes]]]]:
    """Two RPC servers on loopback: (host:port, process)."""
    started = []
    for _ in range(2):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, "-m", "edge_stream.cli", "rpc-server", "-p", str(port), "-t", "1", "-d", "CPU"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        started.append((f"127.0.0.1:{port}", process))
    for endpoint, process in started:
        deadline = time.monotonic() + 60
        while True:
            assert process.poll() is None and time.monotonic() < deadline, "the server does not start"
            try:
                socket.create_connection(("127.0.0.1", int(endpoint.rpartition(":")[2]))).close()
                break
            except OSError:
                time.sleep(0.1)
    yield started
    for _, process in started:
        process.kill()
        process.wait()


def generated(stream: Any, n: int) -> list[int]:
    return [t.token for t in stream.generate(n, sampling=Sampling(temp=0), ignore_eos=True)]


def test_tokens_equal_the_local_run(servers: Any, load: Load, draw: Draw) -> None:
    """A layer on each server; three cache lengths beyond the end, with rebases."""
    options = OPTIONS | {"rebase_at": 100}
    with load("head64", **options, devices=["none"]).stream() as stream:
        stream.feed(draw(50))
        want, logits = generated(stream, 200), stream.logits
    engine = load("head64", **options, rpc=[endpoint for endpoint, _ in servers])
    assert [d.backend for d in engine.devices] == ["RPC", "RPC"]
    assert engine.cache_bytes(64)[0] == 0  # all of the cache is with the servers
    with engine.stream() as stream:
        stream.feed(draw(50))
        assert generated(stream, 200) == want
        assert abs(stream.logits - logits).max() < 1e-3
        assert stream.stats.n_slides > 150 and stream.stats.n_rebases > 3


@pytest.mark.skipif(not graph_cost.COUNTER.exists(), reason="the counter is built on Linux only (make build)")
@pytest.mark.parametrize("type_k", ["f16", "q8_0"])
def test_what_a_slide_adds_on_a_device(type_k: str, servers: Any, tiny: Callable[[str], Path]) -> None:
    """The graphs that a device gets differ from the CPU's: rotation and store of the sinks are one kernel there."""
    result = counted(tiny("head64"), "-ctk", type_k, "--rpc", servers[0][0])
    check(result, 2, hadamard=type_k == "q8_0", on_device=True)


def test_a_dead_server_costs_no_session(servers: Any, load: Load, draw: Draw, tmp_path: Path) -> None:
    path = tmp_path / "s.session"
    remote = load("head64", **OPTIONS, rpc=[endpoint for endpoint, _ in servers])
    stream = remote.stream()
    stream.feed(draw(100))
    stream.save(path, b"mine")
    saved = path.read_bytes()
    want = generated(stream, 50)

    endpoint, process = servers[1]
    process.kill()
    process.wait()
    with pytest.raises(EdgeStreamError, match=f"the RPC server at {endpoint} stopped answering"):
        stream.feed(draw(10))
    with pytest.raises(EdgeStreamError, match="stopped answering"):
        stream.save(path, b"later")
    assert path.read_bytes() == saved
    remote.close()

    with load("head64", **OPTIONS, devices=["none"]).restore(path) as restored:
        assert restored.user == b"mine"
        assert generated(restored, 50) == want
    # what is left goes on serving
    with load("head64", **OPTIONS, rpc=[servers[0][0]]).restore(path) as restored:
        assert generated(restored, 50) == want


@pytest.mark.parametrize(
    ("endpoint", "match"),
    [("127.0.0.1:1", "no RPC server answers at 127.0.0.1:1"), ("nonsense", "must be given as host:port")],
)
def test_no_server(endpoint: str, match: str, load: Load) -> None:
    with pytest.raises(EdgeStreamError, match=match):
        load("head64", rpc=[endpoint])


def test_not_an_rpc_server(load: Load) -> None:
    """Something else answers: it closes the connection instead of greeting."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        code = "import socket, sys; s = socket.socket(fileno=int(sys.argv[1]))\nwhile True: s.accept()[0].close()"
        closer = subprocess.Popen([sys.executable, "-c", code, str(other.fileno())], pass_fds=[other.fileno()])
        try:
            with pytest.raises(EdgeStreamError, match=r"no RPC server of this llama\.cpp's version answers"):
                load("head64", rpc=[f"127.0.0.1:{other.getsockname()[1]}"])
        finally:
            closer.kill()
            closer.wait()


def test_unknown_device(load: Load) -> None:
    with pytest.raises(EdgeStreamError, match="device Nothing0 is unknown: this build and machine offer"):
        load("head64", devices=["Nothing0"])
    with pytest.raises(EdgeStreamError, match="split_mode = diagonal is unknown"):
        load("head64", split_mode="diagonal")


def test_command_line(servers: Any, tiny: Any) -> None:
    flags = ["-m", str(tiny("head64")), "-c", "64", "-p", "the end", "-n", "80", "--temp", "0", "--ignore-eos"]
    rpc = ["--rpc", ",".join(endpoint for endpoint, _ in servers)]
    outputs = []
    for extra in ([], rpc):
        command = [sys.executable, "-m", "edge_stream.cli", "run", *flags, *extra]
        outputs.append(subprocess.run(command, capture_output=True, check=True).stdout)
    assert outputs[0] == outputs[1] != b""
    info = subprocess.run(
        [sys.executable, "-m", "edge_stream.cli", "info", *rpc], capture_output=True, text=True, check=True
    )
    assert info.stdout.count("RPC") >= 2


@pytest.mark.parametrize(
    ("kinds", "used"),
    [
        ({"GPU0": "integrated GPU"}, ["RPC0", "GPU0"]),
        ({"GPU0": "integrated GPU", "GPU1": "GPU"}, ["RPC0", "GPU1"]),
        ({}, ["RPC0"]),
    ],
)
def test_gpus_beside_a_server_are_those_llama_cpp_would_use(
    kinds: dict[str, str], used: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama.cpp: servers first, then GPUs, integrated ones where there is no other. RPC1 is an earlier model's."""

    def device(name: str, kind: str, backend: str) -> devices.Device:
        return devices.Device(name, name, kind, backend, total=1, free=1, handle=1)

    there = [device("CPU", "CPU", "CPU"), *(device(name, kind, "Vulkan") for name, kind in kinds.items())]
    there += [device("RPC0", "GPU", "RPC"), device("RPC1", "GPU", "RPC")]
    monkeypatch.setattr(devices, "devices", lambda: there)
    monkeypatch.setattr(devices, "_registered", {"a:1": ["RPC0"], "b:1": ["RPC1"]})
    monkeypatch.setattr(devices, "add_rpc_server", lambda _endpoint: ["RPC0"])
    chosen = devices.choose(None, ["a:1"])
    assert chosen is not None and [d.name for d in chosen] == used


def test_a_server_is_used_by_the_model_that_named_it_only(
    servers: Any, load: Load, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    """It stays registered, and may be gone: later models, also of embeddings and of apps, do not ask it."""
    endpoint, process = servers[0]
    load("gqa", rpc=[endpoint]).close()
    process.kill()
    process.wait()
    assert load("gqa").devices == []
    with Embedder(tiny("chat"), "mean") as embedder:
        assert embedder.embed([1, 2]).shape == (1, embedder.n_embd)
    export = CliRunner().invoke(cli, ["export-ios", "-m", str(tiny("chat")), "-o", str(tmp_path / "out")])
    assert export.exit_code == 0, export.output
    assert end_tokens(tiny("chat"))
    tiny_architectures.make(tmp_path / "smollm3.gguf", "smollm3")  # as any test after this one


class Liar:
    """A server that answers as a real one of one device would, but for some of its answers.

    lies: by command, the answer's bytes (with their length in front), or None for silence; an empty one ends the
    connection. drip: seconds between the bytes of every answer.
    """

    HELLO, ALLOC, ALIGNMENT, MAX_SIZE, BASE, HASH, GET, COPY, MEMORY, SIZE, COUNT = 14, 0, 1, 2, 3, 7, 8, 9, 11, 13, 15

    def __init__(self, lies: dict[int, bytes | None], drip: float = 0.0) -> None:
        self.lies, self.drip, self.stopped = lies, drip, threading.Event()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self.serve, daemon=True).start()

    def close(self) -> None:
        self.stopped.set()
        self.listener.close()

    def serve(self) -> None:
        while not self.stopped.is_set():
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self.converse, args=(connection,), daemon=True).start()

    def converse(self, connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as file, contextlib.suppress(OSError):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while len(head := file.read(9)) == 9:
                command, size = struct.unpack("<BQ", head)
                body = file.read(size)
                lies = command in self.lies
                answer = self.lies[command] if lies else self.honest(command, body)
                if answer is None:
                    self.stopped.wait()
                if not answer and lies:
                    return
                for piece in [answer] if not self.drip else [bytes([byte]) for byte in answer or b""]:
                    connection.sendall(piece or b"")
                    self.stopped.wait(self.drip)

    def honest(self, command: int, body: bytes) -> bytes:
        """The answer, with its length; b"" if there is none."""
        number = {self.ALIGNMENT: 64, self.MAX_SIZE: 1 << 30, self.BASE: 1 << 32, self.SIZE: 0}
        if command in number:
            return sized(number[command].to_bytes(8, "little"))
        if command == self.HELLO:
            return sized(bytes([*VERSION, 0]) + bytes(24))
        if command == self.COUNT:
            return sized((1).to_bytes(4, "little"))
        if command == self.ALLOC:
            return sized((1).to_bytes(8, "little") + body[4:12])
        if command == self.MEMORY:
            return sized((1 << 30).to_bytes(8, "little") * 2)
        if command == self.GET:
            return sized(bytes(int.from_bytes(body[-8:], "little")))
        return sized(b"\0") if command in (self.HASH, self.COPY) else b""


VERSION = (7, 0, 0)  # ggml-rpc.h: RPC_PROTO_*_VERSION


def sized(answer: bytes) -> bytes:
    return len(answer).to_bytes(8, "little") + answer


def number(value: int) -> bytes:
    return sized(value.to_bytes(8, "little"))


def reads(endpoint: str, path: Path) -> tuple[int, str]:
    """What a user sees of a model on that server: exit status and the error's last line."""
    command = [sys.executable, "-m", "edge_stream.cli", "run", "-m", str(path), "-c", "64", "--rpc", endpoint]
    command += ["-p", "the end", "-n", "80", "--temp", "0", "--ignore-eos"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    return done.returncode, (done.stderr.strip().splitlines() or [""])[-1]


def test_the_liar_is_believed_where_it_does_not_lie(tiny: Callable[[str], Path]) -> None:
    liar = Liar({})
    try:
        assert reads(liar.endpoint, tiny("head64"))[0] == 0
    finally:
        liar.close()


@pytest.mark.parametrize(
    "lies",
    [
        {Liar.HELLO: b""},
        {Liar.HELLO: sized(b"\xff" * 28)},
        {Liar.COUNT: sized(b"\0" * 4)},
        {Liar.COUNT: sized(b"\xff" * 4)},
        {Liar.COUNT: (1 << 60).to_bytes(8, "little")},
        {Liar.ALIGNMENT: number(0)},
        {Liar.ALIGNMENT: number(3)},
        {Liar.ALIGNMENT: b""},
        {Liar.MAX_SIZE: number(0)},
        {Liar.ALLOC: sized(bytes(16))},
        {Liar.ALLOC: sized(b"\x01" + bytes(15))},
        {Liar.ALLOC: b""},
        {Liar.BASE: number(0)},
        {Liar.BASE: number(2**64 - 1)},
        {Liar.BASE: number((1 << 32) + 1)},
        {Liar.SIZE: number(2**64 - 1)},
        {Liar.SIZE: b"\x08"},
        {Liar.MEMORY: b""},
        {Liar.GET: b""},
        {Liar.GET: number(7)},
    ],
    ids=str,
)
def test_a_server_that_lies_is_an_error_of_one_sentence(
    lies: dict[int, bytes | None], tiny: Callable[[str], Path]
) -> None:
    liar = Liar(lies)
    try:
        status, said = reads(liar.endpoint, tiny("head64"))
    finally:
        liar.close()
    assert status == 1, said
    assert said.startswith(("error: ", "Error: ")) and "GGML_ASSERT" not in said, said


@pytest.mark.parametrize(
    ("lies", "drip"),
    [({Liar.HELLO: None}, 0), ({Liar.ALIGNMENT: None}, 0), ({}, 3)],
    ids=["no greeting", "no alignment", "a byte every 3 s"],
)
def test_a_server_that_is_silent_is_given_up(
    lies: dict[int, bytes | None], drip: float, tiny: Callable[[str], Path]
) -> None:
    """After 10 s without a byte, or at a pace that would never end."""
    liar = Liar(lies, drip)
    try:
        status, said = reads(liar.endpoint, tiny("head64"))
    finally:
        liar.close()
    assert status == 1 and said.startswith(("error: ", "Error: ")), said
