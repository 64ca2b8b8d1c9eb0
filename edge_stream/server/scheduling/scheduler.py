"""One thread owns the engine: it recognises conversations, reads prompts in small portions, and writes one token of
every conversation per step, all in one batch (continuous batching).

Portions of a prompt have the same size whether or not others are being served, so that what a conversation reads and
writes does not depend on its neighbours.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from edge_stream.server import errors
from edge_stream.server.history.rendering import Renderer
from edge_stream.server.history.session_store import SessionStore
from edge_stream.server.scheduling.generation_loop import Turns
from edge_stream.server.scheduling.metrics import Metrics
from edge_stream.server.scheduling.sessions import Conversations
from edge_stream.server.scheduling.tasks import Failed, Job, Stage, Wish

if TYPE_CHECKING:
    from edge_stream.engine import Engine
    from edge_stream.server.settings import Settings

log = logging.getLogger("edge_stream.server")

T = TypeVar("T")


class Scheduler:
    """Start it with `start`; `submit` and `call` may be used from any thread, everything else is the engine's own."""

    def __init__(self, engine: Engine, settings: Settings, metrics: Metrics) -> None:
        self.engine, self.settings, self.metrics = engine, settings, metrics
        self.store = None
        if settings.session_dir is not None:
            self.store = SessionStore(settings.session_dir, engine, settings.session_bytes)
        self.conversations = Conversations(engine, self.store)
        self.renderer = Renderer(engine)
        # a template may take seconds: meanwhile the others go on writing
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="render")
        self.turns = Turns(engine, settings, metrics, self.conversations, self.renderer, self._pool, wake=self.wake)
        self._wake = threading.Condition()
        self._poked = False
        self._inbox: deque[Job] = deque()
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._queue: list[Job] = []
        self._n_waiting = 0
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Take a job, or raise ApiError 503 if too many are waiting."""
        with self._wake:
            if self._closing:
                raise errors.unavailable("the server is shutting down", 5)
            if self._n_waiting >= self.settings.limits.queue:
                self.metrics.refused.inc()
                raise errors.unavailable(f"{self._n_waiting} requests are waiting already: try again later")
            self._n_waiting += 1
            self._inbox.append(job)
            self.wake()

    def wake(self) -> None:
        """Something changed: a job was cancelled, a reader caught up, a rendering is done."""
        with self._wake:
            self._poked = True
            self._wake.notify()

    def call(self, work: Callable[[], T]) -> Future[T]:
        """Have something done by the engine's thread, between two steps."""
        future: Future[T] = Future()
        with self._wake:
            if self._closing:
                raise errors.unavailable("the server is shutting down", 5)
            self._calls.append((work, future))
            self.wake()
        return future

    def render(self, work: Callable[[Renderer], T]) -> Future[T]:
        """Have something rendered by the renderer's thread."""
        return self._pool.submit(work, self.renderer)

    def drain(self) -> None:
        """End what is going on at the next token, take nothing new."""
        with self._wake:
            self._closing = True
            self.wake()

    def stop(self) -> None:
        """Drain, save every conversation, and end the thread."""
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
            except Exception:  # a bug must not leave a server that hears but does not answer
                log.exception("an internal error")
                self.turns.fail_all()
        for slot in range(self.engine.n_parallel):
            self.conversations.vacate(slot)
        for _work, future in self._calls:
            if future.set_running_or_notify_cancel():
                future.set_exception(errors.unavailable("the server is shutting down", 5))
        if self.store:
            self.store.close()

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
        worked = self.turns.step()
        with self._wake:
            busy = bool(self.turns.jobs or self._queue or self._inbox)
            if self._closing and not busy:
                return False
            if not worked and not self._poked:
                self._wake.wait(0.5 if busy else None)  # time limits are looked at now and then
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
        """End jobs whose client has gone, whose time is over, or that a shutdown cuts short."""
        now = time.monotonic()
        for job in list(self._queue):
            if job.cancelled or self._closing or now > job.deadline:
                self._queue.remove(job)
                self._left_queue()
                if not job.cancelled:
                    job.send(Failed(errors.unavailable("the request waited too long for its turn", 5)))
                job.stage = Stage.ENDED
        for job in list(self.turns.jobs):
            job.timed_out = now > job.deadline
            if job.cancelled or self._closing or job.timed_out:
                self.turns.cut_short(job)
            elif self._keeps_others_out(job, now):
                self.turns.give_up(job, errors.ApiError(408, "the answer was not read while other requests waited"))

    def _keeps_others_out(self, job: Job, now: float) -> bool:
        """Whether a job has waited for its reader too long while other requests wait for a slot."""
        if job.t_stalled is None or now <= job.t_stalled + self.settings.limits.stall_seconds:
            return False
        return any(waiting.request is not job.request for waiting in self._queue)

    def _admit(self) -> None:
        """Give slots to waiting jobs, first come first served; one whose conversation is busy lets others pass."""
        for job in list(self._queue):
            name = job.wish.name
            named = self.conversations.named(name) if name is not None else None
            if named and named.busy:
                continue
            match = self.conversations.find(job.wish.history, name)
            slot = match.conversation.slot if match else None
            if slot is None:
                slot = self.conversations.idle_slot()
            if slot is None:
                break
            self._queue.remove(job)
            self._left_queue()
            self.turns.begin(job, match, slot)

    def _left_queue(self) -> None:
        with self._wake:
            self._n_waiting -= 1

    #
    # facts
    #

    def slots(self) -> list[dict[str, Any]]:
        """What /slots shows; call it on the engine's thread."""
        out = []
        for i, conversation in enumerate(self.conversations.slots):
            job = next((j for j in self.turns.jobs if j.conversation and j.conversation.slot == i), None)
            facts: dict[str, Any] = {"id": i, "n_ctx": self.engine.n_ctx, "is_processing": job is not None}
            if conversation:
                stats = conversation.stream.stats if conversation.stream else None
                facts |= {
                    "conversation": conversation.name or conversation.id,
                    "n_turns": conversation.n_turns,
                    "n_past": stats.n_past if stats else 0,
                    "n_cached": stats.n_cached if stats else 0,
                    "stage": job.stage.name.lower() if job else "idle",
                }
            out.append(facts)
        return out

    def counts(self) -> dict[str, int]:
        """How many conversations are where."""
        everything = list(self.conversations.all.values())
        return {
            "slots": self.engine.n_parallel,
            "busy": sum(c.busy for c in everything),
            "in_slots": sum(c.slot is not None for c in everything),
            "known": len(everything),
            "waiting": self._n_waiting,
            "disk_bytes": sum(c.n_bytes for c in everything),
        }


def make_job(wish: Wish, settings: Settings, emit: Callable[[Any], None], request: object = None) -> Job:
    """A job whose time begins now. request: the same for all jobs of one request."""
    return Job(wish, emit, time.monotonic() + settings.limits.request_seconds, request or object())
