"""A server over a tiny model, in this process, and a client for it."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from edge_stream import Engine
from edge_stream.server.http.app import make_app
from edge_stream.server.http.header_timeout import HeaderTimeoutProtocol
from edge_stream.server.scheduling.metrics import Metrics
from edge_stream.server.scheduling.scheduler import Scheduler
from edge_stream.server.settings import Limits, Settings

# A random model writes bytes that are no text; a grammar makes it write words, and end.
WORDS = 'root ::= [a-z]{1,6} (" " [a-z]{1,6}){1,3} "."'


class Client(httpx.Client):
    """Shorthands."""

    def chat(self, messages: list[dict[str, Any]], *, name: str | None = None, **options: Any) -> dict[str, Any]:
        """A whole answer."""
        headers = {"X-Conversation": name} if name else {}
        answer = self.post("/v1/chat/completions", json={"messages": messages, **options}, headers=headers)
        assert answer.status_code == 200, answer.text
        return answer.json()  # type: ignore[no-any-return]

    def turn(self, messages: list[dict[str, Any]], text: str, **options: Any) -> dict[str, Any]:
        """Say something; both messages are added to the history."""
        messages.append({"role": "user", "content": text})
        answer = self.chat(messages, **({"grammar": WORDS, "max_tokens": 40} | options))
        messages.append(answer["choices"][0]["message"])
        return answer


class Served:
    """A running server."""

    def __init__(self, engine: Engine, scheduler: Scheduler, url: str) -> None:
        self.engine, self.scheduler, self.url = engine, scheduler, url
        self.client = Client(base_url=url, timeout=60)

    def on_engine(self, work: Any) -> Any:
        """Run something on the engine's thread."""
        return self.scheduler.call(work).result(30)

    def wait_idle(self) -> None:
        """Until nothing is being read or written."""
        while self.on_engine(lambda: len(self.scheduler.loop.tasks) + self.scheduler.counts()["waiting"]):
            time.sleep(0.01)


@contextmanager
def serve(engine: Engine, session_dir: Path | None = None, **changes: Any) -> Iterator[Served]:
    """A server in a thread of its own. changes: fields of Settings and of Limits."""
    limits = {k: v for k, v in changes.items() if k in Limits.__dataclass_fields__}
    others = {k: v for k, v in changes.items() if k not in limits}
    settings = Settings(**{"aliases": ("tiny",), **others}, session_dir=session_dir, limits=replace(Limits(), **limits))
    scheduler = Scheduler(engine, settings, Metrics())
    config = uvicorn.Config(
        make_app(scheduler, settings),
        http=HeaderTimeoutProtocol,
        ws="none",
        log_level="warning",
        timeout_graceful_shutdown=5,
    )
    server = uvicorn.Server(config)
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.005)
        served = Served(engine, scheduler, f"http://127.0.0.1:{sock.getsockname()[1]}")
        try:
            yield served
        finally:
            served.client.close()
            scheduler.drain()
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()
