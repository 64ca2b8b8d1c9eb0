"""Start the server: bind, log the memory it takes, serve, and save everything at the end."""

from __future__ import annotations

import logging
import signal
import socket
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn

from edge_stream.errors import EdgeStreamError
from edge_stream.measure.metrics import MIB
from edge_stream.server.http.app import make_app
from edge_stream.server.http.header_timeout import HeaderTimeoutProtocol
from edge_stream.server.scheduling.metrics import Metrics
from edge_stream.server.scheduling.scheduler import Scheduler

if TYPE_CHECKING:
    from edge_stream.engine import Engine
    from edge_stream.server.settings import Settings

log = logging.getLogger("edge_stream.server")

_GRACE_SECONDS = 10  # for open connections, once every answer has ended


class _Server(uvicorn.Server):
    """uvicorn waits for open connections at shutdown, so endless answers have to be ended first."""

    def __init__(self, config: uvicorn.Config, scheduler: Scheduler) -> None:
        super().__init__(config)
        self._scheduler = scheduler

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """SIGINT, SIGTERM: shut down with status 0; a second SIGINT does not wait for connections."""
        self._scheduler.drain()
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True


def memory(engine: Engine) -> dict[str, float]:
    """Maximum memory of the server in MiB, by purpose. It does not grow with the length of conversations."""
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
    """Serve until SIGINT or SIGTERM. Raises EdgeStreamError if the address cannot be bound."""
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
        known = len(scheduler.sessions.all)
        log.info(
            "conversations are kept in %s (%d known, at most %.1f GiB)",
            scheduler.store.folder,
            known,
            settings.session_bytes / 2**30,
        )
    if not settings.api_keys and not settings.is_loopback:
        log.warning("anyone who can reach %s can use this server: there is no API key", settings.host)
    key, certificate = settings.ssl_files or (None, None)
    config = uvicorn.Config(
        make_app(scheduler, settings),
        ssl_keyfile=key,
        ssl_certfile=certificate,
        http=HeaderTimeoutProtocol,
        ws="none",
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=settings.limits.connections,
        timeout_graceful_shutdown=_GRACE_SECONDS,
    )
    port = sock.getsockname()[1]
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    try:
        config.load()  # reads the certificate
    except (OSError, ValueError) as error:
        raise EdgeStreamError(f"the certificate or its key cannot be used: {error}") from error
    log.info("listening on http%s://%s:%d", "s" * config.is_ssl, host, port)
    try:
        _Server(config, scheduler).run(sockets=[sock])
    finally:
        scheduler.stop()
        sock.close()


def _raise_file_limit(n_connections: int) -> None:
    """Every connection is a file, and many systems allow only 1,024 by default."""
    try:
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = n_connections + 256
        if soft < wanted:
            top = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (top, hard))
    except (ImportError, ValueError, OSError):
        pass
