"""A time limit for the head of a request, and a limit of connections, which uvicorn lacks."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol


class HeaderTimeoutProtocol(H11Protocol):
    """uvicorn's HTTP/1.1, closing connections whose first line and headers take longer than header_seconds.

    Also those beyond max_connections.
    """

    header_seconds = 20.0
    max_connections = 1 << 30  # beyond it, one is closed at once: the process needs file descriptors for other things
    _timer: asyncio.TimerHandle | None = None
    _is_refused = False

    def connection_made(self, transport: Any) -> None:
        """A client connected."""
        if len(self.connections) >= self.max_connections:
            self._is_refused = True
            transport.abort()
            return
        super().connection_made(transport)
        self._start_timer()

    def on_response_complete(self) -> None:
        """The next request on the connection may come."""
        super().on_response_complete()
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client disconnected."""
        if self._is_refused:
            return
        if self._timer:
            self._timer.cancel()
        super().connection_lost(exc)

    def _start_timer(self) -> None:
        if self._timer:
            self._timer.cancel()
        self._timer = self.loop.call_later(self.header_seconds, self._on_timeout)

    def _on_timeout(self) -> None:
        if (self.cycle is None or self.cycle.response_complete) and not self.transport.is_closing():
            self.transport.close()
