"""Start the server: bind, log the memory it takes, serve, and save everything at the end."""

from __future__ import annotations

import asyncio
import errno
import gc
import logging
import signal
import socket
from types import FrameType
from typing import TYPE_CHECKING, Any

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

_RESERVED_FILES = 48  # descriptors that are not for connections: sessions, the log, and those being refused
_LEAST_CONNECTIONS = 4
_BURST, _BACKLOG = 16, 2048  # connections that are taken at once, and that wait in the system
_GRACE_SECONDS = 10  # for open connections, once every answer has ended


class _Server(uvicorn.Server):
    """uvicorn waits for open connections at shutdown, so endless answers have to be ended first."""

    def __init__(self, config: uvicorn.Config, scheduler: Scheduler, url: str) -> None:
        super().__init__(config)
        self._scheduler, self._url = scheduler, url

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen, and say so: whoever waits for that line connects at once.

        asyncio takes as many connections at once as may wait, and where descriptors end meanwhile it reports each of
        them, over and over (Python 3.11). So few are taken at once, and many may wait.
        """
        asyncio.get_running_loop().set_exception_handler(_on_loop_error)
        await super().startup(sockets)
        for sock in sockets or ():
            sock.listen(_BACKLOG)
        if self.started:
            log.info("listening on %s", self._url)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """SIGINT, SIGTERM: shut down with status 0; a second SIGINT does not wait for connections."""
        self._scheduler.drain()
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True


def _on_loop_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """What asyncio has no caller to tell. Of a lack of descriptors one line is enough."""
    error = context.get("exception")
    if isinstance(error, MemoryError):
        log.error("a connection was ended: there is not enough memory")
    elif isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS):
        log.error("a connection could not be taken: %s", error.strerror)
    else:
        loop.default_exception_handler(context)


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
    n_files = _raise_file_limit(settings.limits.connections)
    HeaderTimeoutProtocol.max_connections = max(_LEAST_CONNECTIONS, n_files - _RESERVED_FILES)
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
        backlog=_BURST,
    )
    port = sock.getsockname()[1]
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    try:
        config.load()  # reads the certificate
    except (OSError, ValueError) as error:
        raise EdgeStreamError(f"the certificate or its key cannot be used: {error}") from error
    # A long history is thousands of objects: while they are made, Python would look through all of the libraries' too.
    gc.collect()
    gc.freeze()
    try:
        _Server(config, scheduler, f"http{'s' * config.is_ssl}://{host}:{port}").run(sockets=[sock])
    finally:
        scheduler.stop()
        sock.close()


def _raise_file_limit(n_connections: int) -> int:
    """How many files may be open. Every connection is one, and many systems allow only 1,024 by default."""
    wanted = n_connections + 256
    try:
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            top = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (top, hard))
            soft = top
        return wanted if soft == resource.RLIM_INFINITY else soft
    except (ImportError, ValueError, OSError):
        return wanted
