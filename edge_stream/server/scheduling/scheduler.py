"""One thread owns the engine: it reads prompts in small portions, and writes one token of every answer per step, all
in one batch (continuous batching).

Portions of a prompt have the same size whether or not others are being served, so that a conversation's text does not
depend on its neighbours.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from edge_stream.errors import EdgeStreamError
from edge_stream.server import errors
from edge_stream.server.history.rendering import Renderer
from edge_stream.server.history.session_store import SessionStore
from edge_stream.server.scheduling.events import Failed
from edge_stream.server.scheduling.generation_loop import GenerationLoop
from edge_stream.server.scheduling.metrics import Metrics
from edge_stream.server.scheduling.prefill import Prefill
from edge_stream.server.scheduling.sessions import Sessions
from edge_stream.server.scheduling.tasks import Stage, Task

if TYPE_CHECKING:
    from edge_stream.engine import Engine
    from edge_stream.server.settings import Settings

log = logging.getLogger("edge_stream.server")

T = TypeVar("T")


class Scheduler:
    """Queue and engine thread. Any thread may use `start`, `submit`, `call`, `render`, `wake`, `drain` and `stop`."""

    def __init__(self, engine: Engine, settings: Settings, metrics: Metrics) -> None:
        self.engine, self.settings, self.metrics = engine, settings, metrics
        self.store = self._open_store()
        self.sessions = Sessions(engine, self.store)
        self.renderer = Renderer(engine, settings.chat, settings.n_recall)
        # a template may take seconds, while other answers are written
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="render")
        prefill = Prefill(engine, settings.n_prefill, metrics, self.sessions, self.renderer, self._pool, self.wake)
        self.loop = GenerationLoop(settings, prefill)
        self.sessions.on_written = self.wake
        self._wake = threading.Condition()
        self._poked = False
        self._inbox: deque[Task] = deque()
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._queue: list[Task] = []
        self._n_waiting = 0
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def _open_store(self) -> SessionStore | None:
        folder, settings = self.settings.session_dir, self.settings
        return SessionStore(folder, self.engine, settings.session_bytes, settings.chat.tag) if folder else None

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, task: Task) -> None:
        """Take a task, or raise ApiError 503 if too many are waiting."""
        with self._wake:
            if self._closing:
                raise errors.unavailable("the server is shutting down", 5)
            if self._n_waiting >= self.settings.limits.queue:
                self.metrics.refused.inc()
                raise errors.unavailable(f"{self._n_waiting} requests are waiting already: try again later")
            self._n_waiting += 1
            self._inbox.append(task)
            self.wake()

    def wake(self) -> None:
        """Tell the thread of a change: a task was cancelled, a reader caught up, a rendering is done."""
        with self._wake:
            self._poked = True
            self._wake.notify()

    def call(self, work: Callable[[], T]) -> Future[T]:
        """Run something on the engine's thread, between two steps."""
        future: Future[T] = Future()
        with self._wake:
            if self._closing:
                raise errors.unavailable("the server is shutting down", 5)
            self._calls.append((work, future))
            self.wake()
        return future

    def render(self, work: Callable[[Renderer], T]) -> Future[T]:
        """Run something on the renderer's thread."""
        return self._pool.submit(work, self.renderer)

    def drain(self) -> None:
        """End every answer at the next token; take no new requests."""
        with self._wake:
            self._closing = True
            self.wake()

    def stop(self) -> None:
        """Drain, save every session, and end the thread."""
        self.drain()
        if self._thread.ident is not None:
            self._thread.join()
        self._pool.shutdown()

    #
    # the loop
    #

    def _run(self) -> None:
        while True:
            try:
                if not self._round():
                    break
            except Exception as error:  # a bug must not leave a server that accepts requests and answers none
                lacking = errors.exhausted(error)
                if lacking:
                    log.error("all answers failed: %s", lacking)
                else:
                    log.exception("an internal error")
                self.loop.fail_all(lacking)
        self._vacate()
        for _work, future in self._calls:
            if future.set_running_or_notify_cancel():
                future.set_exception(errors.unavailable("the server is shutting down", 5))
        if self.store:
            self.store.close()

    def _vacate(self) -> None:
        """Save what the slots hold, and free them."""
        for slot in range(self.engine.n_parallel):
            try:
                self.sessions.vacate(slot)
            except Exception:  # the other slots are still to be saved
                log.exception("the conversation in slot %d could not be saved", slot)

    def set_adapters(self, scales: Sequence[float]) -> None:
        """Have all conversations computed with other scales of the adapters; call it on the engine's thread.

        Each set of scales is a model of its own, with its own sessions on disk. Raises ApiError while an answer is
        being written.
        """
        old = [scale for _, scale in self.engine.backend.options.lora]
        if list(scales) == old:
            return
        if self.loop.tasks:
            raise errors.unavailable("adapters are of all conversations: they change when none is being answered")
        self._vacate()
        self.engine.set_adapters(scales)
        try:
            store = self._open_store()
        except EdgeStreamError:
            self.engine.set_adapters(old)
            raise
        if self.store:
            self.store.close()
        self.store = store
        self.sessions.reset(store)

    def _round(self) -> bool:
        """One step, or a wait for something to do. False at the end."""
        with self._wake:
            self._poked = False
            self._queue += self._inbox
            self._inbox.clear()
            calls, self._calls = self._calls, deque()
        for work, future in calls:
            self._do(work, future)
        self._sweep()
        self._admit()
        worked = self.loop.step()
        with self._wake:
            busy = bool(self.loop.tasks or self._queue or self._inbox)
            if self._closing and not busy:
                return False
            if not worked and not self._poked:
                self._wake.wait(0.5 if busy else None)  # time limits are checked now and then
        return True

    @staticmethod
    def _do(work: Callable[[], Any], future: Future[Any]) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    def _sweep(self) -> None:
        """End tasks whose client has gone or whose time is over; all of them at shutdown."""
        now = time.monotonic()
        why = "the server is shutting down" if self._closing else "the request waited too long in the queue"
        for task in list(self._queue):
            if task.cancelled or self._closing or now > task.deadline:
                self._queue.remove(task)
                self._left_queue()
                if not task.cancelled:
                    task.send(Failed(errors.unavailable(why, 5)))
                task.stage = Stage.ENDED
        for task in list(self.loop.tasks):
            task.timed_out = now > task.deadline
            if task.cancelled or self._closing or task.timed_out:
                self.loop.cut_short(task)
            elif self._blocks_others(task, now):
                self.loop.give_up(task, errors.ApiError(408, "the answer was not read while other requests waited"))

    def _blocks_others(self, task: Task, now: float) -> bool:
        """Whether a task has waited for its reader too long while other requests wait for a slot."""
        if task.t_stalled is None or now <= task.t_stalled + self.settings.limits.stall_seconds:
            return False
        return any(waiting.group is not task.group for waiting in self._queue)

    def _admit(self) -> None:
        """Give slots to waiting tasks in order, passing over those whose session is busy or that wait for the disk."""
        self.sessions.collect()
        for task in list(self._queue):
            name = task.request.name
            named = self.sessions.named(name) if name is not None else None
            if named and named.busy:
                continue
            wanted = task.request.slot
            if wanted is not None and self.sessions.is_busy(wanted):
                continue
            match = self.sessions.find(task.request.history, name) if task.request.reuse else None
            slot = match.session.slot if match else None
            if wanted is not None and slot != wanted:
                match = match if slot is None else None  # what another slot holds stays there
                slot = wanted
            if slot is None:
                slot = self.sessions.idle_slot()
            if slot is None:
                break
            if self.sessions.must_wait(match, slot):
                continue
            self._queue.remove(task)
            self._left_queue()
            self.loop.begin(task, match, slot)

    def _left_queue(self) -> None:
        with self._wake:
            self._n_waiting -= 1

    #
    # facts
    #

    def slots(self) -> list[dict[str, Any]]:
        """What /slots shows; call it on the engine's thread."""
        out = []
        for i, session in enumerate(self.sessions.slots):
            task = next((t for t in self.loop.tasks if t.session and t.session.slot == i), None)
            facts: dict[str, Any] = {"id": i, "n_ctx": self.engine.n_ctx, "is_processing": task is not None}
            if session:
                stats = session.stream.stats if session.stream else None
                facts |= {
                    "conversation": session.name or session.id,
                    "n_turns": session.n_turns,
                    "n_past": stats.n_past if stats else 0,
                    "n_cached": stats.n_cached if stats else 0,
                    "stage": task.stage.name.lower() if task else "idle",
                }
            out.append(facts)
        return out

    def counts(self) -> dict[str, int]:
        """What the gauges of /metrics show."""
        everything = list(self.sessions.all.values())
        return {
            "slots": self.engine.n_parallel,
            "busy": sum(s.busy for s in everything),
            "in_slots": sum(s.slot is not None for s in everything),
            "known": len(everything),
            "waiting": self._n_waiting,
            "disk_bytes": sum(size for size, _ in self.store.files().values()) if self.store else 0,
        }
