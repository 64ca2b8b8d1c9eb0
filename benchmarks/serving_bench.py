"""Shared by the server benchmarks: a server process, and a measuring client. Needs httpx (extra [test])."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from edge_stream.measure.stamp import stamp

MIB = 1 << 20


def free_port() -> int:
    """A free port."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class ServerProcess:
    """A server in its own process; `command` may contain {port}."""

    def __init__(self, command: list[str], log: Path | None = None) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = log.open("ab") if log else subprocess.DEVNULL
        self.process = subprocess.Popen(
            [part.format(port=self.port) for part in command], stdout=self._log, stderr=self._log
        )

    def wait(self, seconds: float = 120) -> None:
        """Wait until /health says ok."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise SystemExit(f"the server ended with status {self.process.returncode}")
            try:
                if httpx.get(self.url + "/health", timeout=2).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        raise SystemExit("the server did not begin")

    def rss(self) -> float:
        """Resident memory in MiB."""
        return self.memory()[0]

    def memory(self) -> tuple[float, float]:
        """Resident memory in MiB, and how much of it are pages of files, which the system can take back."""
        _, resident, shared, *_ = map(int, Path(f"/proc/{self.process.pid}/statm").read_text().split())
        page = os.sysconf("SC_PAGE_SIZE") / MIB
        return resident * page, shared * page

    def n_files(self) -> int:
        """Open file descriptors."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """SIGTERM, as a service manager sends it."""
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.kill()

    def __enter__(self) -> ServerProcess:
        self.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def edge_stream_command(model: str, session_dir: str | Path | None, *flags: str) -> list[str]:
    """`edge-stream serve` on {port}."""
    sessions = ["--no-sessions"] if session_dir is None else ["--session-dir", str(session_dir)]
    return [sys.executable, "-m", "edge_stream.cli", "serve", "-m", model, "--port", "{port}", *sessions, *flags]


@dataclass
class Answer:
    """One streamed answer. Seconds; status other than 200 has no text."""

    status: int
    text: str = ""
    ttft: float = 0.0
    seconds: float = 0.0
    timings: dict[str, Any] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    n_chunks: int = 0
    finished: bool = False


def chat(
    client: httpx.Client, messages: list[dict[str, str]], headers: dict[str, str] | None = None, **options: Any
) -> Answer:
    """Stream an answer and measure it."""
    body = {"messages": messages, "stream": True, **options}
    start = time.perf_counter()
    with client.stream("POST", "/v1/chat/completions", json=body, headers=headers or {}) as response:
        answer = Answer(response.status_code)
        if response.status_code != 200:
            answer.error = response.read().decode(errors="replace")
            return answer
        for line in response.iter_lines():
            if not line.startswith("data: "):
                continue
            if line == "data: [DONE]":
                answer.finished = True
                break
            chunk = json.loads(line[6:])
            if "error" in chunk:
                answer.status, answer.error = int(chunk["error"]["code"]), chunk["error"]["message"]
                return answer
            for choice in chunk["choices"]:
                text = choice["delta"].get("content")
                if text:
                    answer.ttft = answer.ttft or time.perf_counter() - start
                    answer.text += text
                    answer.n_chunks += 1
            answer.timings = chunk.get("timings") or answer.timings
            answer.info = chunk.get("edge_stream") or answer.info
    answer.seconds = time.perf_counter() - start
    return answer


def scratch() -> tempfile.TemporaryDirectory[str]:
    """A temporary folder for sessions."""
    return tempfile.TemporaryDirectory(prefix="edge-stream-bench-")


def print_stamp(*argv: str) -> None:
    """Machine, versions, date, command."""
    facts = stamp()
    print(
        f"\n{facts['test_time'][:10]}, {facts['cpu_info']}, {facts['n_cores']} threads, {facts['system']}; edge-stream "
        f"{facts['edge_stream']} ({facts['edge_stream_commit']}), llama.cpp {facts['build_commit']}."
    )
    print("`python " + " ".join(argv or sys.argv) + "`")
