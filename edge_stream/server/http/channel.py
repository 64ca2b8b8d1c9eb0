"""Between the engine's thread and the coroutines that serve clients."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Sequence
from functools import partial
from typing import TypeVar

from fastapi import Request

from edge_stream.server.scheduling.events import Event, Failed, Progress
from edge_stream.server.scheduling.scheduler import Scheduler
from edge_stream.server.scheduling.tasks import GenerationRequest, make_task

T = TypeVar("T")


class Channel:
    """Carries the events of an HTTP request's tasks from the engine's thread to a coroutine, in order.

    A task whose events are not taken pauses (Limits.backlog), which bounds what is held here.
    """

    def __init__(self, scheduler: Scheduler, requests: Sequence[GenerationRequest]) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: deque[tuple[int, Event]] = deque()
        self._filled = asyncio.Event()
        self._scheduler = scheduler
        settings = scheduler.settings
        self.tasks = [make_task(request, settings, partial(self._emit, k), self) for k, request in enumerate(requests)]

    def _emit(self, k: int, event: Event) -> None:
        try:
            self._loop.call_soon_threadsafe(self._put, k, event)
        except RuntimeError:
            self.tasks[k].cancelled = True  # the loop is closed

    def _put(self, k: int, event: Event) -> None:
        self._events.append((k, event))
        self._filled.set()

    def submit(self) -> None:
        """Queue the tasks. Raises ApiError 503."""
        for task in self.tasks:
            self._scheduler.submit(task)

    async def peek(self) -> Progress:
        """Wait for the next event and leave it. Raises ApiError if there is no answer."""
        await self._filled.wait()
        _, event = self._events[0]
        if isinstance(event, Failed):
            raise event.error
        return event

    async def get(self) -> tuple[int, Progress]:
        """The next event, after the number of its task. Raises ApiError if there is no answer."""
        event = await self.peek()
        k, _ = self._events.popleft()
        self.tasks[k].n_taken += 1
        if not self._events:
            self._filled.clear()
            self._scheduler.wake()  # a generation that waited for its reader goes on
        return k, event

    def cancel(self) -> None:
        """End the tasks at the next token. Does nothing to those that are complete."""
        for task in self.tasks:
            task.cancelled = True
        self._scheduler.wake()


async def cancel_on_disconnect(request: Request, work: Awaitable[T]) -> T:
    """Await something, and cancel it if the client disconnects. Raises ClientDisconnected."""

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(disconnected())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnected
    finally:
        task.cancel()
        watch.cancel()


class ClientDisconnected(Exception):
    """Nobody waits for the answer."""
