"""The tasks in slots, step by step: read a portion of one prompt, write one token of every answer, log, save.

Runs on the engine's thread only. An error ends the task it belongs to, and no other.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from edge_stream.chat.core import Addition
from edge_stream.errors import EdgeStreamError
from edge_stream.native import bindings
from edge_stream.server import errors
from edge_stream.server.history.answer import log_answer
from edge_stream.server.scheduling.events import Delta, Done, Failed, Finished, TokenLogprobs
from edge_stream.server.scheduling.line_limits import LineLimits
from edge_stream.server.scheduling.prefill import Prefill
from edge_stream.server.scheduling.scoring import Top, likeliest, log_softmax
from edge_stream.server.scheduling.sessions import PrefixMatch
from edge_stream.server.scheduling.tasks import Stage, Task

if TYPE_CHECKING:
    from edge_stream.server.settings import Settings
    from edge_stream.stream import Stream, StreamStats

log = logging.getLogger("edge_stream.server")

_STOPPED = "the request was stopped before its answer began"


class GenerationLoop:
    """The tasks that are not queued. They share the prefill's engine, sessions, renderer and metrics."""

    def __init__(self, settings: Settings, prefill: Prefill) -> None:
        self.settings, self.prefill = settings, prefill
        self.engine, self.metrics = prefill.engine, prefill.metrics
        self.sessions, self.renderer = prefill.sessions, prefill.renderer
        self.tasks: list[Task] = []

    def begin(self, task: Task, match: PrefixMatch | None, slot: int) -> None:
        """Start a task in a slot."""
        self.tasks.append(task)
        self._guard(task, self.prefill.begin, task, match, slot)

    def step(self) -> bool:
        """One token of every answer being written, one portion of one prompt. False if there was nothing to do."""
        for task in [t for t in self.tasks if t.rendering and t.rendering.done()]:
            self._guard(task, self.prefill.take_rendered, task)
        self.sessions.collect()
        for task in [t for t in self.tasks if t.stage is Stage.SAVING]:
            self._guard(task, self._save, task)
        writing = [t for t in self.tasks if t.stage is Stage.WRITING and not self._is_stalled(t)]
        if writing:
            self._write(writing)
        reading = next((t for t in self.tasks if t.stage is Stage.READING), None)
        if reading:
            self._guard(reading, self._read, reading)
            if reading.stage is Stage.READING:  # the next step reads another prompt
                self.tasks.remove(reading)
                self.tasks.append(reading)
        return bool(writing or reading)

    def _is_stalled(self, task: Task) -> bool:
        """Whether the client is so far behind that its generation waits."""
        stalled = task.n_behind >= self.settings.limits.backlog
        task.t_stalled = (task.t_stalled or time.monotonic()) if stalled else None
        return stalled

    def cut_short(self, task: Task) -> None:
        """End a task early (client gone, time over, shutdown), with what it has written."""
        if task.stage is Stage.WRITING:
            self._guard(task, self._end_choice, task, "length")
        elif task.stage is Stage.READING:
            self.give_up(task, errors.unavailable(_STOPPED, 5))
        # a rendering is short and cannot be interrupted: it is looked at again when it is done
        elif task.rendering and task.rendering.done():
            self._fail(task, errors.unavailable(_STOPPED, 5))

    def give_up(self, task: Task, error: errors.ApiError) -> None:
        """End a task with an error, its session back at the last entry of its log."""
        assert task.session is not None
        self._guard(task, self.sessions.undo, task.session)
        if task.stage is not Stage.ENDED:
            self._fail(task, error)

    def fail_all(self, why: errors.ApiError | None = None) -> None:
        """End every task. why: None after a bug."""
        for task in list(self.tasks):
            try:
                bug = errors.ApiError(500, "an internal error: see the server's log", errors.SERVER)
                self._fail(task, why or bug)
            except Exception:
                log.exception("a task could not be ended")
                self.tasks.remove(task)

    def _guard(self, task: Task, work: Callable[..., object], *args: Any) -> None:
        """Do something for one task; an error ends that task only."""
        try:
            work(*args)
        except errors.ApiError as error:
            self._fail(task, error)
        except EdgeStreamError as error:
            refused = task.stage in (Stage.QUEUED, Stage.RENDERING)  # by the template, say
            lacking = errors.exhausted(error)
            self._fail(task, lacking or (errors.invalid(str(error)) if refused else _server_error(error)))
        except Exception as error:
            if (lacking := errors.exhausted(error)) is not None:
                log.error("an answer failed: %s", str(error) or "there is not enough memory")
            else:
                log.exception("an internal error")
            self._fail(task, lacking or _server_error(error))

    #
    # steps
    #

    def _read(self, task: Task) -> None:
        is_read = self.prefill.read(task)
        self._count_decode([task])
        if is_read:
            self._start_writing(task)

    def _count_decode(self, tasks: list[Task]) -> None:
        """A batch with tokens of these tasks was decoded."""
        n_busy = sum(task.stage in (Stage.READING, Stage.WRITING) for task in self.tasks)
        self.metrics.llama.decoded(n_busy, max(task.stream.stats.n_past for task in tasks))

    def _count_drafts(self, tasks: list[Task], before: list[StreamStats]) -> int:
        """Count what was drafted for each task. How many of their tokens had been, and so took no decode."""
        n_taken = 0
        for task, old in zip(tasks, before, strict=True):
            new = task.stream.stats
            added = [getattr(new, name) - getattr(old, name) for name in ("n_drafts", "n_drafted", "n_accepted")]
            task.n_drafted += added[1]
            task.n_accepted += added[2]
            self.metrics.llama.drafted(*added)
            n_taken += added[2]
        return n_taken

    def _start_writing(self, task: Task) -> None:
        stream, request = task.stream, task.request
        stream.forget_sampling()
        sampling = request.sampling
        if request.n > 1 and sampling.seed >= 0:
            # choices differ, and each is what a request for it alone would give
            sampling = replace(sampling, seed=(sampling.seed + task.index) % (2**32 - 1))
        task.writer = stream.writer(
            request.max_tokens,
            sampling=sampling,
            stop=request.stop,
            logprobs=request.logprobs,
            ignore_eos=request.ignore_eos,
            special=request.is_parsed,
            stop_pieces=request.stop_pieces,
            loop_guard=request.loop_guard,
        )
        task.lines = LineLimits(request.n_indent, request.max_ms) if request.n_indent or request.max_ms else None
        task.answer.stop_pieces = request.stop_pieces
        task.answer.begin(request.parser(task.answer.prefix))
        task.stage = Stage.WRITING
        if task.writer.finished:  # nothing was to be written
            self._end_choice(task, "length")

    def _write(self, tasks: list[Task]) -> None:
        """Choose a token for every task, feed them in one batch, record them."""
        chosen: list[tuple[Task, int, Top]] = []
        for task in tasks:
            assert task.writer is not None
            try:
                n_top, after = task.request.top_logprobs, task.request.after_sampling
                top = _likeliest(task.stream, n_top) if n_top and not after else []
                token = task.writer.choose()
                task.t_chosen = time.perf_counter()
                chosen.append((task, token, task.writer.candidates() if after else top))
            except EdgeStreamError as error:
                # a grammar that allows nothing more ends the text
                no_rules = task.request.sampling.grammar is None and task.request.sampling.chat is None
                if error.status == bindings.DECODE:  # no numbers, which its cache keeps
                    self._fail(task, _server_error(error), keep=False)
                elif no_rules or errors.exhausted(error):
                    self._fail(task, _server_error(error))
                elif error.status == bindings.STOPPED:
                    self._fail(task, errors.invalid(str(error)))
                else:
                    self._guard(task, self._end_choice, task, "stop", "grammar")
        if not chosen:
            return
        before = [task.stream.stats for task, *_ in chosen]
        try:
            self._feed([(task.stream, token) for task, token, _ in chosen])
        except EdgeStreamError as error:
            log.error("a decode failed: %s", error)
            for task, *_ in chosen:
                self._fail(task, _server_error(error))
            return
        self.metrics.written.inc(len(chosen))
        self.metrics.steps.inc()
        if not self._count_drafts([task for task, *_ in chosen], before):
            self._count_decode([task for task, *_ in chosen])
        for task, token, top in chosen:
            self._guard(task, self._record, task, token, top)

    def _feed(self, pairs: list[tuple[Stream, int]]) -> None:
        """Feed a token to each stream: in one batch, but for streams that do not hold all their sinks yet."""
        batch: list[tuple[Stream, int]] = []
        single: list[tuple[Stream, int]] = []
        for stream, token in pairs:
            stats = stream.stats
            (batch if stats.n_sinks == stats.n_keep else single).append((stream, token))
        if batch:
            self.engine.feed_each([stream for stream, _ in batch], [token for _, token in batch])
        for stream, token in single:
            stream.feed([token])

    def _record(self, task: Task, token: int, top: Top) -> None:
        assert task.writer is not None and task.session is not None
        record, answer = task.writer.record(), task.answer
        task.session.log.fed((token,))
        task.n_written += 1
        task.n_steps += bool(answer.tokens)
        answer.tokens.append(token)
        if record.finish_reason != "eos":
            answer.n_bytes += len(task.writer.piece)
        text, finish = record.text, record.finish_reason
        if task.lines and finish not in ("eos", "repetition"):
            text, is_over = task.lines.push(text, 1000 * (time.perf_counter() - task.t_read))
            finish = "line" if is_over else finish
        if record.loop:
            answer.loop = record.loop
            task.session.log.taken_back(record.loop.n_taken)
        answer.parts.append(text)
        added = answer.parser.push(text, last=finish is not None) if answer.parser else Addition(text)
        logprobs = TokenLogprobs(token, record.logprob, top) if record.logprob is not None else None
        if task.request.after_sampling:
            logprobs = TokenLogprobs(token, dict(top)[token], [t for t in top if t[1] > 0][: task.request.top_logprobs])
        info = timings = None
        if task.request.gauges:
            info = {"n_past": record.n_past, "n_cached": record.n_cached, "tok_per_s": record.tok_per_s}
            timings = task.timings()
        task.send(_delta(task.index, token, added, logprobs, info, timings))
        if finish:
            self._end_choice(task, "length" if finish in ("length", "line") else "stop", finish)

    #
    # ending
    #

    def _end_choice(self, task: Task, reason: str, how: str = "cut") -> None:
        """A choice is complete, or cut short: begin the next one, or end the turn. how: see log_answer."""
        assert task.session is not None
        parser = task.answer.parser
        if parser:
            if how in ("cut", "grammar"):  # what was held back as the start of a call is text
                task.send(_delta(task.index, None, parser.push("", last=True)))
            if reason == "stop" and parser.message.get("tool_calls"):
                reason = "tool_calls"
        stop_string = task.writer.stop_string if task.writer else None
        task.send(Finished(task.index, reason, how, stop_string, task.answer.loop))
        if how != "cut" and task.choice + 1 < task.request.n:
            self.prefill.begin_choice(task)
            return
        if any(task.answer.parts):
            log_answer(task.answer, how, task.request.history, task.stream, task.session.log, self.engine)
        else:  # nothing was written: back to where the answer would have begun, if the stream can go there
            self.sessions.undo(task.session)
        while task.choice + 1 < task.request.n:  # the choices that were not begun
            task.choice += 1
            task.send(Finished(task.index, "length", "cut"))
        self._end_turn(task)

    def _end_turn(self, task: Task) -> None:
        """The stream is idle now: rebase and save it."""
        assert task.session is not None
        task.t_end = time.perf_counter()
        task.stream.rebase()
        task.session.n_turns += task.request.keep and not task.cancelled
        self.sessions.settle(task.session)
        task.done = Done(task.usage(), task.timings(), task.info())
        task.stage = Stage.SAVING
        # a turn that the client left is saved with the next one, or when its session leaves the slot
        if task.cancelled or not task.request.keep or self.sessions.store is None:
            self._finish(task)
        else:
            self._save(task)

    def _save(self, task: Task) -> None:
        """Copy the session as soon as there is room for a copy; end the task once it is written."""
        if task.saving is None:
            assert task.session is not None
            if not self.sessions.can_save(task.session):
                return
            task.saving = self.sessions.save(task.session)
            self._release(task)
        if task.saving is None or (task.saving.done() and task.saving.exception()):
            self.metrics.save_failures.inc()
        elif task.saving.done():
            self.metrics.save_seconds.observe(time.perf_counter() - task.t_end)
        else:
            return
        self.sessions.collect()
        self._finish(task)

    def _finish(self, task: Task) -> None:
        assert task.done is not None
        self._end(task)
        task.send(task.done)

    def _end(self, task: Task) -> None:
        task.stage = Stage.ENDED
        self.tasks.remove(task)
        self.metrics.llama.predicted(task.n_written, task.n_steps, task.write_seconds)
        self._release(task)

    @staticmethod
    def _release(task: Task) -> None:
        """Others may have the session and its slot."""
        if task.session:
            task.session.busy = False
            if task.session.stream:
                task.session.stream.forget_sampling()
        task.writer = task.session = None

    def _fail(self, task: Task, error: errors.ApiError, keep: bool = True) -> None:
        """End a task with an error. Its session stays if it is at the end of its log, and is else as last saved.

        keep: False if it must not stay.
        """
        session = task.session
        if task in self.tasks:
            self._end(task)
        if session:
            entry, stream = session.log.last, session.stream
            if not keep or stream is None or entry is None or stream.stats.n_past != entry.n_past:
                self.sessions.drop(session)
        task.send(Failed(error))


def _server_error(error: Exception) -> errors.ApiError:
    return errors.exhausted(error) or errors.ApiError(500, f"the answer failed: {error}", errors.SERVER)


def _delta(
    index: int,
    token: int | None,
    added: Addition,
    logprobs: TokenLogprobs | None = None,
    info: dict[str, Any] | None = None,
    timings: dict[str, Any] | None = None,
) -> Delta:
    return Delta(
        index, added.content, token, added.tool_calls or None, logprobs, info, added.reasoning, timings=timings
    )


def _likeliest(stream: Stream, n: int) -> Top:
    """The n likeliest next tokens."""
    logits = stream.logits
    return [] if logits is None else likeliest(log_softmax(logits), n)
