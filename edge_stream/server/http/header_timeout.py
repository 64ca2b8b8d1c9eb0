"""A time limit for the head of a request, which uvicorn lacks."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol


class HeaderTimeoutProtocol(H11Protocol):
    """uvicorn's HTTP/1.1, closing connections whose first line and headers take longer than header_seconds."""

    header_seconds = 20.0
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """A client connected."""
        super().connection_made(transport)
        self._start_timer()

    def on_response_complete(self) -> None:
        """The next request on the connection may come."""
        super().on_response_complete()
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client disconnected."""
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
