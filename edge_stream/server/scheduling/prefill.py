"""From a request to a prompt that is read: match its history, get a slot, render what is new, feed it in portions.

Runs on the engine's thread, except for the renderer, which has one of its own.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from edge_stream.errors import EdgeStreamError
from edge_stream.server import errors
from edge_stream.server.history.prefix_matching import PrefixLog, flat_content, verify
from edge_stream.server.history.rendering import Held, Piece, Rendered, Renderer
from edge_stream.server.scheduling.events import Reading, Scored, Started
from edge_stream.server.scheduling.metrics import Metrics
from edge_stream.server.scheduling.scoring import feed_scored
from edge_stream.server.scheduling.sessions import PrefixMatch, Session, Sessions
from edge_stream.server.scheduling.tasks import Stage, Task

if TYPE_CHECKING:
    from edge_stream.engine import Engine

log = logging.getLogger("edge_stream.server")


class Prefill:
    """Reads prompts of at most n_portion tokens at a time. `wake` is called, by another thread, after a rendering."""

    def __init__(
        self,
        engine: Engine,
        n_portion: int,
        metrics: Metrics,
        sessions: Sessions,
        renderer: Renderer,
        pool: ThreadPoolExecutor,
        wake: Callable[[], None],
    ) -> None:
        self.engine, self.n_portion, self.metrics = engine, n_portion, metrics
        self.sessions, self.renderer = sessions, renderer
        self._pool, self._wake = pool, wake

    def begin(self, task: Task, match: PrefixMatch | None, slot: int) -> None:
        """Bring the task's session into its slot, and have rendered what the request adds to it."""
        task.t_admitted = time.perf_counter()
        history, name = task.request.history, task.request.name
        if match and not self._load(task, match, slot):
            match = None
        is_last = match is not None and match.is_last
        session = self._continued(match, name) if match else None
        if match is None or session is None:
            task.history = "new" if len(history.units) <= 1 else "rebuilt"
            session = self.sessions.new(slot, name)
            self._render(task, self.renderer.rebuilt, history, self.engine.n_ctx)
        else:
            task.history = "continued" if is_last else "branched"
            self._render_more(task, session, match.n_known)
        self.metrics.requests.labels(task.history).inc()
        session.busy = True
        task.session = session

    def begin_choice(self, task: Task) -> None:
        """Take the stream back to before the answer, for another choice."""
        session, history = task.session, task.request.history
        assert session is not None
        task.choice += 1
        task.writer = None
        if self.sessions.undo(session):
            n_known = len(history.text or history.units)
            if history.is_continued:
                n_known -= 1
            self._render_more(task, session, n_known)
        else:  # the answer was longer than the window, say: what came before it must be read again
            self._start_over(task, session)

    def _start_over(self, task: Task, session: Session) -> None:
        """Read the history again, in an empty stream."""
        task.stream.close()
        session.stream, session.saved = None, False
        session.log = PrefixLog()
        if task.choice == 0:
            task.history = "rebuilt"
        self._render(task, self.renderer.rebuilt, task.request.history, self.engine.n_ctx)

    @staticmethod
    def _take_back(session: Session, n: int) -> bool:
        """Take back the newest n tokens, which the template renders otherwise now; False if the stream cannot."""
        assert session.stream is not None
        stats, tokens = session.stream.stats, session.stream.tokens()
        window = tokens[stats.n_sinks :] if stats.n_evicted else tokens
        try:
            session.stream.rewind(n)
        except EdgeStreamError:
            return False
        session.saved = False
        return session.log.go_back(stats.n_past - n, window[: len(window) - n])

    def _render_more(self, task: Task, session: Session, n_known: int) -> None:
        """Have rendered what comes after the session's last entry."""
        assert session.stream is not None
        held = Held.by(session.stream, session.log.entries)
        self._render(task, self.renderer.continued, task.request.history, n_known, held)

    def _render(self, task: Task, render: Callable[..., Rendered], *args: Any) -> None:
        task.rendering = self._pool.submit(render, *args)
        task.stage = Stage.RENDERING
        task.rendering.add_done_callback(lambda _future: self._wake())

    def _load(self, task: Task, match: PrefixMatch, slot: int) -> bool:
        """Bring a session into the slot. False if it cannot be restored, or does not hold what its log says."""
        session = match.session
        if session.stream is None:
            try:
                self.sessions.restore(session, slot)
            except EdgeStreamError as error:
                log.error("a session could not be restored: %s", error)
                return False
            task.restored = True
            self.metrics.restored.inc()
        assert session.stream is not None
        if verify(session.log, match.index, session.stream):
            return True
        log.error("a session's log does not match its stream: the history is read again")
        self.metrics.mismatches.inc()
        if task.restored:
            self.sessions.set_aside(session)
        else:  # its file may be intact
            self.sessions.drop(session)
        return False

    def _continued(self, match: PrefixMatch, name: str | None) -> Session | None:
        """The session of a match, or a branch of it, at the matching entry; None if it cannot go back there.

        name: the request's.
        """
        session = match.session if match.is_last else self.sessions.branch(match, name)
        try:
            self.sessions.rewind(session, match.index)
        except EdgeStreamError as error:  # a recurrent state is kept for the newest messages only
            log.info("a history is read again: %s", error)
            self.sessions.drop(session)
            return None
        return session

    def take_rendered(self, task: Task) -> None:
        """A rendering is done: begin to read. Raises ApiError if there is nothing to read."""
        assert task.rendering is not None and task.session is not None
        rendered, task.rendering = task.rendering.result(), None
        session, history = task.session, task.request.history
        if rendered.n_tokens == 0:
            raise errors.invalid("there is nothing to read: the prompt is empty")
        if rendered.n_back and not self._take_back(session, rendered.n_back):
            log.info("a history is read again: the stream cannot go back to where it differs")
            self._start_over(task, session)
            return
        if session.stream is None:
            assert session.slot is not None
            n_keep = self._n_keep(rendered, history.n_system > 0)
            session.stream = self.engine.stream(
                n_keep=n_keep, n_boundary=(self.engine.n_ctx - n_keep) // 8, seq_id=session.slot
            )
        task.pieces, task.answer_start = rendered.pieces, rendered.answer_start
        task.n_to_read += rendered.n_tokens
        task.stage = Stage.READING
        if task.choice > 0:
            return
        task.recalled = rendered.recalled
        task.n_dropped, task.n_reused = rendered.n_dropped, session.stream.stats.n_past
        task.n_prompt = task.n_reused + rendered.n_tokens
        self.metrics.llama.cached(task.n_reused)
        if history.is_continued:
            task.answer.prefix = flat_content(history.body["messages"][-1].get("content"))
        task.send(Started(task.info()))
        self._report(task)

    @staticmethod
    def _report(task: Task) -> None:
        if task.request.progress and task.choice == 0:
            ms = 1000 * (time.perf_counter() - task.t_admitted)
            timings = task.timings() if task.request.gauges else None
            task.send(Reading(task.n_prompt, task.n_reused, task.n_reused + task.n_read, ms, timings))

    def _n_keep(self, rendered: Rendered, has_system: bool) -> int:
        """Sinks: a system prompt is pinned, up to half of the cache, so that memory has a bound."""
        n_keep = self.engine.n_keep
        if has_system and self.engine.sink_move == "bank":
            n_keep = max(n_keep, min(rendered.n_head, self.engine.n_ctx // 2))
        return n_keep

    def read(self, task: Task) -> bool:
        """Feed the next portion of a prompt. True once all of it is read."""
        assert task.session is not None
        stream, log_ = task.stream, task.session.log
        portion: list[int] = []
        ends: list[tuple[int, Piece]] = []
        room = self.n_portion
        if task.pieces and task.pieces[0].mark:
            task.pieces[0].mark = False
            stream.mark()
        while task.pieces and room and not task.pieces[0].mark:
            piece = task.pieces[0]
            part, piece.tokens = piece.tokens[:room], piece.tokens[room:]
            portion += part
            room -= len(part)
            if piece.tokens:
                break
            ends.append((len(portion), task.pieces.pop(0)))
        if not task.pieces and room:
            part, task.answer_start = task.answer_start[:room], task.answer_start[room:]
            portion += part
        before, begin = stream.stats.n_past, time.perf_counter()
        if portion and task.request.score is not None and task.choice == 0:
            task.scored += feed_scored(stream, portion, task.request.score)
        elif portion:
            stream.feed_tokens(portion)
        task.n_read += len(portion)
        now = time.perf_counter()
        if task.choice == 0:
            task.t_read = now
        if portion:
            self._report(task)
            self.metrics.read.inc(len(portion))
            self.metrics.llama.read(len(portion), now - begin)
        done = 0
        for end, piece in ends:
            log_.fed(portion[done:end])
            done = end
            log_.add(piece.key, before + end, piece.kind, piece.pending, piece.n_bytes, piece.recalled, piece.n_gone)
        log_.fed(portion[done:])
        task.session.saved = False
        is_read = not task.pieces and not task.answer_start
        if is_read and task.scored and task.choice == 0:
            task.send(Scored(task.scored))
            task.scored = []
        return is_read
