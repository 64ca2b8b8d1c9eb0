"""One turn of a conversation, step by step: recognise, render, read, write, log the answer, save.

Runs on the engine's thread only. What goes wrong in a turn ends that turn, and no other.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from edge_stream.errors import EdgeStreamError
from edge_stream.server import errors
from edge_stream.server.history.answer import log_answer
from edge_stream.server.history.prefix_matching import Log, flat_content, verify
from edge_stream.server.history.rendering import Piece, Rendered, Renderer
from edge_stream.server.scheduling.metrics import Metrics
from edge_stream.server.scheduling.sessions import Conversation, Conversations, Match
from edge_stream.server.scheduling.tasks import Delta, Done, Failed, Finished, Job, Stage, Started, TokenLogprobs

if TYPE_CHECKING:
    from edge_stream.engine import Engine
    from edge_stream.generation import Token
    from edge_stream.server.settings import Settings
    from edge_stream.stream import Stream

log = logging.getLogger("edge_stream.server")

_STOPPED = "the request was stopped before its answer began"


class Turns:
    """The turns that are going on. `wake` is called, from another thread, when a rendering is done."""

    def __init__(
        self,
        engine: Engine,
        settings: Settings,
        metrics: Metrics,
        conversations: Conversations,
        renderer: Renderer,
        pool: ThreadPoolExecutor,
        wake: Callable[[], None],
    ) -> None:
        self.engine, self.settings, self.metrics = engine, settings, metrics
        self.conversations, self.renderer = conversations, renderer
        self._pool, self._wake = pool, wake
        conversations.on_written = wake
        self.jobs: list[Job] = []

    def begin(self, job: Job, match: Match | None, slot: int) -> None:
        """Start a turn in a slot."""
        self.jobs.append(job)
        self._guard(job, self._begin, job, match, slot)

    def step(self) -> bool:
        """One token of every conversation that writes, one portion of one that reads. False if there was nothing."""
        for job in [j for j in self.jobs if j.rendering and j.rendering.done()]:
            self._guard(job, self._take_rendered, job)
        self.conversations.collect()
        for job in [j for j in self.jobs if j.stage is Stage.SAVING]:
            self._guard(job, self._save, job)
        writing = [j for j in self.jobs if j.stage is Stage.WRITING and self._is_read(j)]
        if writing:
            self._write(writing)
        reading = next((j for j in self.jobs if j.stage is Stage.READING), None)
        if reading:
            self._guard(reading, self._read, reading)
            if reading.stage is Stage.READING:  # the next one's turn
                self.jobs.remove(reading)
                self.jobs.append(reading)
        return bool(writing or reading)

    def _is_read(self, job: Job) -> bool:
        """Whether the client takes what it asked for; if not, its generation waits."""
        if job.n_behind < self.settings.limits.backlog:
            job.t_stalled = None
            return True
        job.t_stalled = job.t_stalled or time.monotonic()
        return False

    def cut_short(self, job: Job) -> None:
        """End a job whose client has gone or whose time is over, as well as it can be ended now."""
        if job.stage is Stage.WRITING:
            self._guard(job, self._end_choice, job, "length")
        elif job.stage is Stage.READING:
            self.give_up(job, errors.unavailable(_STOPPED, 5))
        # a rendering is short and cannot be interrupted: it is looked at again when it is done
        elif job.rendering and job.rendering.done():
            self._fail(job, errors.unavailable(_STOPPED, 5))

    def give_up(self, job: Job, error: errors.ApiError) -> None:
        """End a job with an error, its conversation back at the last entry of its log."""
        assert job.conversation is not None
        self._guard(job, self._taken_back, job.conversation)
        if job.stage is not Stage.ENDED:
            self._fail(job, error)

    def fail_all(self) -> None:
        """After a bug: end every job."""
        for job in list(self.jobs):
            try:
                self._fail(job, errors.ApiError(500, "an internal error: see the server's log", errors.SERVER))
            except Exception:
                log.exception("a job could not be ended")
                self.jobs.remove(job)

    def _guard(self, job: Job, work: Callable[..., object], *args: Any) -> None:
        """Do something for one job; what goes wrong ends that job only."""
        try:
            work(*args)
        except errors.ApiError as error:
            self._fail(job, error)
        except EdgeStreamError as error:
            refused = job.stage in (Stage.QUEUED, Stage.RENDERING)  # by the template, say
            self._fail(job, errors.invalid(str(error)) if refused else _server_error(error))
        except Exception as error:
            log.exception("an internal error")
            self._fail(job, _server_error(error))

    #
    # beginning
    #

    def _begin(self, job: Job, match: Match | None, slot: int) -> None:
        """Bring the conversation into its slot and have rendered what the request adds to it."""
        job.t_admitted = time.perf_counter()
        conversations = self.conversations
        if match and match.conversation.stream is None:
            try:
                conversations.restore(match.conversation, slot)
                job.restored = True
                self.metrics.restored.inc()
            except EdgeStreamError as error:
                log.error("a session could not be restored: %s", error)
                match = None
        if match and not self._is_true(match):
            if job.restored:
                conversations.set_aside(match.conversation)
            else:  # the file may be sound
                conversations.drop(match.conversation)
            match = None
        wish = job.wish
        last = match is not None and match.index + 1 == len(match.conversation.log.entries)
        conversation = self._continued(match, last, wish.name) if match else None
        if match is None or conversation is None:
            job.recognised = "new" if len(wish.history.units) <= 1 else "rebuilt"
            conversation = conversations.new(slot, wish.name)
            job.rendering = self._pool.submit(self.renderer.rebuilt, wish.history, self.engine.n_ctx)
        else:
            job.recognised = "continued" if last else "branched"
            entry = conversation.log.entries[-1]
            job.n_reused = entry.n_past
            job.rendering = self._pool.submit(self.renderer.continued, wish.history, entry, match.n_known)
        self.metrics.recognised.labels(job.recognised).inc()
        conversation.busy = True
        job.conversation = conversation
        job.stage = Stage.RENDERING
        job.rendering.add_done_callback(lambda _future: self._wake())

    def _continued(self, match: Match, last: bool, name: str | None) -> Conversation | None:
        """The conversation of a match, or a branch of it, at the matching entry; None if it cannot go back there.

        last: the entry is the newest. name: the request's.
        """
        conversation = match.conversation if last else self.conversations.branch(match, name)
        try:
            self.conversations.take_back(conversation, match.index)
        except EdgeStreamError as error:  # a recurrent state is kept at the newest messages only
            log.info("a conversation is read again: %s", error)
            self.conversations.drop(conversation)
            return None
        return conversation

    def _taken_back(self, conversation: Conversation) -> bool:
        """Bring the stream back to the last entry of its log, if it can go there."""
        assert conversation.stream is not None
        entry, stats = conversation.log.last, conversation.stream.stats
        if entry is None or stats.n_past - entry.n_past > stats.n_window:
            return False
        try:
            self.conversations.take_back(conversation, len(conversation.log.entries) - 1)
        except EdgeStreamError:
            return False
        return True

    def _is_true(self, match: Match) -> bool:
        """Whether the stream holds what the log says."""
        stream = match.conversation.stream
        assert stream is not None
        if verify(match.conversation.log, match.index, stream):
            return True
        log.error("a conversation's log and its stream disagree: it is built anew")
        self.metrics.disagreements.inc()
        return False

    def _take_rendered(self, job: Job) -> None:
        assert job.rendering is not None and job.conversation is not None
        rendered, job.rendering = job.rendering.result(), None
        conversation, wish = job.conversation, job.wish
        if rendered.n_tokens == 0:
            raise errors.invalid("there is nothing to read: the prompt is empty")
        if conversation.stream is None:
            assert conversation.slot is not None
            n_keep = self._n_keep(rendered, wish.history.system is not None)
            conversation.stream = self.engine.stream(
                n_keep=n_keep, n_boundary=(self.engine.n_ctx - n_keep) // 8, seq_id=conversation.slot
            )
        job.pieces, job.answer_start, job.close = rendered.pieces, rendered.answer_start, rendered.close
        job.n_to_read += rendered.n_tokens
        job.stage = Stage.READING
        if job.choice > 0:
            return
        job.n_dropped = rendered.n_dropped
        job.n_prompt = conversation.stream.stats.n_past + rendered.n_tokens
        units = wish.history.units
        if units and units[-1].kind == "assistant":
            job.answer_prefix = flat_content(units[-1].messages[0].get("content"))
        job.send(Started(job.info()))

    def _n_keep(self, rendered: Rendered, has_system: bool) -> int:
        """Sinks: a system prompt is pinned, up to half of the cache, so that memory has a bound."""
        n_keep = self.engine.n_keep
        if has_system and self.engine.sink_move == "bank":
            n_keep = max(n_keep, min(rendered.n_head, self.engine.n_ctx // 2))
        return n_keep

    #
    # steps
    #

    def _read(self, job: Job) -> None:
        """Feed the next portion of a prompt."""
        conversation = job.conversation
        assert conversation is not None and conversation.stream is not None
        stream = conversation.stream
        portion: list[int] = []
        ends: list[tuple[int, Piece]] = []
        room = self.settings.n_prefill
        if job.pieces and job.pieces[0].mark:
            job.pieces[0].mark = False
            stream.mark()
        while job.pieces and room and not job.pieces[0].mark:
            piece = job.pieces[0]
            part, piece.tokens = piece.tokens[:room], piece.tokens[room:]
            portion += part
            room -= len(part)
            if piece.tokens:
                break
            ends.append((len(portion), job.pieces.pop(0)))
        if not job.pieces and room:
            part, job.answer_start = job.answer_start[:room], job.answer_start[room:]
            portion += part
        before = stream.stats.n_past
        if portion:
            stream.feed(portion)
        job.n_read += len(portion)
        self.metrics.read.inc(len(portion))
        done = 0
        for end, piece in ends:
            conversation.log.fed(portion[done:end])
            done = end
            conversation.log.add(piece.key, before + end, piece.kind, piece.pending, piece.ended, piece.n_bytes)
        conversation.log.fed(portion[done:])
        conversation.saved = False
        if not job.pieces and not job.answer_start:
            self._start_writing(job)

    def _start_writing(self, job: Job) -> None:
        assert job.conversation is not None and job.conversation.stream is not None
        stream, wish = job.conversation.stream, job.wish
        stream.forget_sampling()
        sampling = wish.sampling
        if wish.n > 1 and sampling.seed >= 0:
            # choices differ, and each is what a request for it alone would give
            sampling = replace(sampling, seed=(sampling.seed + self._index(job)) % (2**32 - 1))
        job.writer = stream.writer(
            wish.max_tokens,
            sampling=sampling,
            stop=wish.stop,
            logprobs=wish.logprobs,
            ignore_eos=wish.ignore_eos,
            special=wish.tools is not None,
        )
        job.parser = wish.tools.fresh() if wish.tools else None
        job.text, job.answer, job.n_answer_bytes = [], [], 0
        job.t_writing = job.t_writing or time.perf_counter()
        job.stage = Stage.WRITING
        if job.writer.finished:  # nothing was to be written
            self._end_choice(job, "length")

    @staticmethod
    def _index(job: Job) -> int:
        """The choice that is written now: the first one last, since it is the one that clients go on with."""
        return job.wish.n - 1 - job.choice

    def _write(self, jobs: list[Job]) -> None:
        """Choose, feed in one batch, record."""
        chosen: list[tuple[Job, Stream, int, list[tuple[int, float]]]] = []
        for job in jobs:
            try:
                chosen.append(self._choose(job))
            except EdgeStreamError as error:
                # a grammar that allows nothing more ends the text
                if job.wish.sampling.grammar is None:
                    self._fail(job, _server_error(error))
                else:
                    self._guard(job, self._end_choice, job, "stop", "grammar")
        if not chosen:
            return
        together = [c for c in chosen if c[1].stats.n_sinks == c[1].stats.n_keep]
        try:
            if together:
                self.engine.feed_each([c[1] for c in together], [c[2] for c in together])
            for _job, stream, token, _top in chosen:
                if stream.stats.n_sinks < stream.stats.n_keep:  # sinks are read on their own
                    stream.feed([token])
        except EdgeStreamError as error:
            log.error("a decode failed: %s", error)
            for job, *_ in chosen:
                self._fail(job, _server_error(error))
            return
        self.metrics.written.inc(len(chosen))
        self.metrics.steps.inc()
        for job, _stream, token, top in chosen:
            self._guard(job, self._record, job, token, top)

    def _choose(self, job: Job) -> tuple[Job, Stream, int, list[tuple[int, float]]]:
        assert job.writer is not None
        stream = job.writer.stream
        top = _likeliest(stream, job.wish.top_logprobs) if job.wish.top_logprobs else []
        return job, stream, job.writer.choose(), top

    def _record(self, job: Job, token: int, top: list[tuple[int, float]]) -> None:
        assert job.writer is not None and job.conversation is not None
        record = job.writer.record()
        job.conversation.log.fed((token,))
        job.n_written += 1
        job.answer.append(token)
        if record.finish_reason != "eos":
            job.n_answer_bytes += len(job.piece(self.engine, token))
        calls: list[dict[str, Any]] = []
        text = record.text
        job.text.append(text)
        if job.parser:
            text, calls = job.parser.push(text)
            if record.finish_reason:
                rest, more = job.parser.flush()
                text, calls = text + rest, calls + more
        logprobs = TokenLogprobs(token, record.logprob, top) if record.logprob is not None else None
        info = _gauges(record) if job.wish.gauges else None
        job.send(Delta(self._index(job), text, token, calls or None, logprobs, info))
        if record.finish_reason:
            self._end_choice(job, "length" if record.finish_reason == "length" else "stop", record.finish_reason)

    #
    # ending
    #

    def _end_choice(self, job: Job, reason: str, how: str = "cut") -> None:
        """A choice is complete (or the client has gone): the next one, or the end of the turn."""
        assert job.conversation is not None
        if job.parser:
            if how in ("cut", "grammar"):  # what may have become a call is text
                rest, calls = job.parser.flush()
                if rest or calls:
                    job.send(Delta(self._index(job), rest, job.answer[-1], calls or None))
            if job.parser.calls:
                reason = "tool_calls"
        job.send(Finished(self._index(job), reason))
        if how != "cut" and job.choice + 1 < job.wish.n:
            self._again(job)
            return
        if any(job.text):
            log_answer(job, how, self.renderer)
        else:  # nothing was said: back to where the answer would have begun, if the stream can go there
            self._taken_back(job.conversation)
        while job.choice + 1 < job.wish.n:  # the choices that were not begun
            job.choice += 1
            job.send(Finished(self._index(job), "length"))
        self._settle(job)

    def _again(self, job: Job) -> None:
        """Take the stream back to before the answer, for another choice."""
        conversation = job.conversation
        assert conversation is not None and conversation.stream is not None and conversation.log.last
        entry = conversation.log.last
        job.choice += 1
        job.writer = None
        if self._taken_back(conversation):
            history = job.wish.history
            n_known = len(history.text or history.units)
            if history.units and history.units[-1].kind == "assistant":
                n_known -= 1
            job.rendering = self._pool.submit(self.renderer.continued, history, entry, n_known)
        else:  # the answer was longer than the window, say: what came before it must be read again
            assert conversation.slot is not None
            conversation.stream.close()
            conversation.stream, conversation.saved = None, False
            conversation.log = Log()
            job.rendering = self._pool.submit(self.renderer.rebuilt, job.wish.history, self.engine.n_ctx)
        job.stage = Stage.RENDERING
        job.rendering.add_done_callback(lambda _future: self._wake())

    def _settle(self, job: Job) -> None:
        """The end of a turn: an idle moment for the stream."""
        conversation = job.conversation
        assert conversation is not None and conversation.stream is not None
        job.t_end = time.perf_counter()
        conversation.stream.rebase()
        conversation.n_turns += not job.cancelled
        self.conversations.settle(conversation)
        job.done = Done(job.usage(), job.timings(), job.info())
        job.stage = Stage.SAVING
        # a turn that the client left is not worth a write now: the next one is, or leaving the slot
        if job.cancelled or self.conversations.store is None:
            self._finish(job)
        else:
            self._save(job)

    def _save(self, job: Job) -> None:
        """Copy the session as soon as there is room for a copy; end the job once it is written."""
        if job.saving is None:
            assert job.conversation is not None
            if not self.conversations.can_save(job.conversation):
                return
            job.saving = self.conversations.save(job.conversation)
            self._let_go(job)
        if job.saving is None or (job.saving.done() and job.saving.exception()):
            self.metrics.save_failures.inc()
        elif job.saving.done():
            self.metrics.save_seconds.observe(time.perf_counter() - job.t_end)
        else:
            return
        self.conversations.collect()
        self._finish(job)

    def _finish(self, job: Job) -> None:
        assert job.done is not None
        self._end(job)
        job.send(job.done)

    def _end(self, job: Job) -> None:
        job.stage = Stage.ENDED
        self.jobs.remove(job)
        self._let_go(job)

    @staticmethod
    def _let_go(job: Job) -> None:
        """Others may have the conversation and its slot."""
        if job.conversation:
            job.conversation.busy = False
            if job.conversation.stream:
                job.conversation.stream.forget_sampling()
        job.writer = job.conversation = None

    def _fail(self, job: Job, error: errors.ApiError) -> None:
        """End a job with an error. Its conversation is as it was last saved; one that has nothing is forgotten."""
        conversation = job.conversation
        if job in self.jobs:
            self._end(job)
        if conversation:
            entry = conversation.log.last
            intact = conversation.stream is not None and entry is not None and _is_at(conversation.stream, entry.n_past)
            if not intact:
                self.conversations.drop(conversation)
        job.send(Failed(error))


def _gauges(record: Token) -> dict[str, Any]:
    return {"n_past": record.n_past, "n_cached": record.n_cached, "tok_per_s": record.tok_per_s}


def _is_at(stream: Stream, n_past: int) -> bool:
    return stream.stats.n_past == n_past


def _server_error(error: Exception) -> errors.ApiError:
    return errors.ApiError(500, f"the answer failed: {error}", errors.SERVER)


def _likeliest(stream: Stream, n: int) -> list[tuple[int, float]]:
    """The n likeliest next tokens with the natural logs of their probabilities."""
    import numpy as np

    logits = stream.logits
    if logits is None:
        return []
    wide = logits.astype(np.float64)
    wide -= wide.max() + np.log(np.exp(wide - wide.max()).sum())
    n = min(n, len(wide))
    best = np.argpartition(-wide, n - 1)[:n]
    return [(int(i), float(wide[i])) for i in best[np.argsort(-wide[best], kind="stable")]]
