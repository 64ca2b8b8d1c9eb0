"""Between the engine's thread and the coroutines that serve clients."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from fastapi import Request

from edge_stream.server.generation import Event, Failed, Job, Wish
from edge_stream.server.scheduler import Scheduler, make_job

T = TypeVar("T")


class Channel:
    """Carries a job's records from the engine's thread to a coroutine."""

    def __init__(self, scheduler: Scheduler, wish: Wish) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Event] = asyncio.Queue()
        self._scheduler = scheduler
        self.job: Job = make_job(wish, scheduler.settings, self._emit)
        self._first: Event | None = None

    def _emit(self, event: Event) -> None:
        try:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, event)
        except RuntimeError:
            self.job.cancelled = True  # the loop is closed

    def submit(self) -> None:
        """Queue the job. Raises ApiError 503."""
        self._scheduler.submit(self.job)

    async def get(self) -> Event:
        """The next record. Raises ApiError if there is no answer."""
        event = await self._queue.get()
        self.job.n_taken += 1
        if self._queue.empty():
            self._scheduler.wake()  # a generation that waited for its reader goes on
        if isinstance(event, Failed):
            raise event.error
        return event

    def cancel(self) -> None:
        """The client has gone: stop at the next token."""
        self.job.cancelled = True
        self._scheduler.wake()


async def or_gone(request: Request, work: Awaitable[T]) -> T:
    """Wait for something while the client is there. Raises ClientGone."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        task.cancel()
        watch.cancel()


class ClientGone(Exception):
    """Nobody waits for the answer."""
