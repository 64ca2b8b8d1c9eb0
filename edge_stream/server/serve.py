"""Bind, say what it costs, serve, and save everything at the end."""

from __future__ import annotations

import logging
import signal
import socket
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn

from edge_stream.errors import EdgeStreamError
from edge_stream.measure.metrics import MIB
from edge_stream.server.app import make_app
from edge_stream.server.guard import PatientProtocol
from edge_stream.server.metrics import Metrics
from edge_stream.server.scheduler import Scheduler

if TYPE_CHECKING:
    from edge_stream.engine import Engine
    from edge_stream.server.settings import Settings

log = logging.getLogger("edge_stream.server")

_GRACE_SECONDS = 10  # for connections, once every answer has been ended


class _Server(uvicorn.Server):
    """uvicorn waits for open connections at the end; answers without end must be told to end first."""

    def __init__(self, config: uvicorn.Config, scheduler: Scheduler) -> None:
        super().__init__(config)
        self._scheduler = scheduler

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """SIGINT, SIGTERM: an orderly end, with status 0; a second SIGINT does not wait for connections."""
        self._scheduler.drain()
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True


def memory(engine: Engine) -> dict[str, float]:
    """MiB that the server takes at most, by purpose. Nothing of it grows with the length of conversations."""
    cache = engine.n_ctx * engine.kv_bytes_per_token
    # float32 keys of at most half a cache, where the bank moves them
    pinned = engine.n_ctx // 2 * engine.kv_bytes_per_token * 2 if engine.sink_move == "bank" else 0
    return {
        "weights": engine.n_bytes / MIB,
        "cache": engine.n_parallel * cache / MIB,
        "pinned prompts, at most": engine.n_parallel * pinned / MIB,
        "sessions while they are saved, at most": 2 * cache / MIB,
    }


def serve(engine: Engine, settings: Settings) -> None:
    """Serve until SIGINT or SIGTERM. Raises EdgeStreamError if the address cannot be had."""
    _raise_file_limit(settings.limits.connections)
    scheduler = Scheduler(engine, settings, Metrics())
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    sock = socket.socket(family)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((settings.host, settings.port))
    except (OSError, OverflowError) as error:
        raise EdgeStreamError(f"cannot listen on {settings.host}:{settings.port}: {error}") from error
    need = memory(engine)
    log.info(
        "%s: %d conversations of %d tokens at once; memory %.0f MiB: %s",
        settings.alias,
        engine.n_parallel,
        engine.n_ctx,
        sum(need.values()),
        ", ".join(f"{what} {mib:.0f}" for what, mib in need.items()),
    )
    if scheduler.store:
        known = len(scheduler.conversations.all)
        log.info(
            "conversations are kept in %s (%d known, at most %.1f GiB)",
            scheduler.store.folder,
            known,
            settings.session_bytes / 2**30,
        )
    if not settings.api_keys and not settings.is_loopback:
        log.warning("anybody who can reach %s can use this server: there is no API key", settings.host)
    config = uvicorn.Config(
        make_app(scheduler, settings),
        http=PatientProtocol,
        ws="none",
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=settings.limits.connections,
        timeout_graceful_shutdown=_GRACE_SECONDS,
    )
    port = sock.getsockname()[1]
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    log.info("listening on http://%s:%d", host, port)
    try:
        _Server(config, scheduler).run(sockets=[sock])
    finally:
        scheduler.stop()
        sock.close()


def _raise_file_limit(n_connections: int) -> None:
    """Every connection is a file; many systems allow 1,024 of them until asked."""
    try:
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = n_connections + 256
        if soft < wanted:
            top = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (top, hard))
    except (ImportError, ValueError, OSError):
        pass
