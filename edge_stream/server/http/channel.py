"""Between the engine's thread and the coroutines that serve clients."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Sequence
from functools import partial
from typing import TypeVar

from fastapi import Request

from edge_stream.server.scheduling.scheduler import Scheduler, make_job
from edge_stream.server.scheduling.tasks import Event, Failed, Wish

T = TypeVar("T")


class Channel:
    """Carries the records of a request's jobs from the engine's thread to a coroutine, in the order they come.

    A job whose records are not taken pauses (Limits.backlog), so that this holds so many of each job at most.
    """

    def __init__(self, scheduler: Scheduler, wishes: Sequence[Wish]) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: deque[tuple[int, Event]] = deque()
        self._filled = asyncio.Event()
        self._scheduler = scheduler
        settings = scheduler.settings
        self.jobs = [make_job(wish, settings, partial(self._emit, k), self) for k, wish in enumerate(wishes)]

    def _emit(self, k: int, event: Event) -> None:
        try:
            self._loop.call_soon_threadsafe(self._put, k, event)
        except RuntimeError:
            self.jobs[k].cancelled = True  # the loop is closed

    def _put(self, k: int, event: Event) -> None:
        self._events.append((k, event))
        self._filled.set()

    def submit(self) -> None:
        """Queue the jobs. Raises ApiError 503."""
        for job in self.jobs:
            self._scheduler.submit(job)

    async def peek(self) -> Event:
        """Wait for the next record and leave it. Raises ApiError if there is no answer."""
        await self._filled.wait()
        _, event = self._events[0]
        if isinstance(event, Failed):
            raise event.error
        return event

    async def get(self) -> tuple[int, Event]:
        """The next record, after the number of its job. Raises ApiError if there is no answer."""
        event = await self.peek()
        k, _ = self._events.popleft()
        self.jobs[k].n_taken += 1
        if not self._events:
            self._filled.clear()
            self._scheduler.wake()  # a generation that waited for its reader goes on
        return k, event

    def cancel(self) -> None:
        """The client has gone: stop at the next token. Does nothing to what is complete."""
        for job in self.jobs:
            job.cancelled = True
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
