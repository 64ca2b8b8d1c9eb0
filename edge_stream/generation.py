"""Generation: a record for each token, and when to stop."""

from __future__ import annotations

import ctypes as C
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edge_stream.loop_guard import Loop, LoopGuard
from edge_stream.native import bindings
from edge_stream.text import StopMatcher, Utf8Assembler

if TYPE_CHECKING:
    from edge_stream.stream import Stream


@dataclass(frozen=True)
class Token:
    """One generated token.

    text: what can be shown now, whole UTF-8 characters only (may be empty). logprob: natural log of the model's
    unmodified probability, if requested. finish_reason: None, or on the last record `stop` (a stop string), `eos`,
    `length` or `repetition` (the loop guard; `loop` says of what). n_past: tokens seen since the stream's start, after
    a loop without what was taken back. n_cached: tokens in the cache. tok_per_s: mean speed since the generation began.
    reasoning: the token belongs to the model's thinking.
    """

    text: str
    token: int
    logprob: float | None
    finish_reason: str | None
    n_past: int
    n_cached: int
    tok_per_s: float
    reasoning: bool = False
    loop: Loop | None = None


class Writer:
    """Generates step by step: `next`, or `choose` a token, feed it, take its `record`. Made by Stream.writer.

    piece: bytes of the newest token.
    """

    def __init__(
        self,
        stream: Stream,
        max_tokens: int,
        matcher: StopMatcher,
        logprobs: bool,
        ignore_eos: bool,
        special: bool = False,
        stop_pieces: Mapping[int, bytes] | None = None,
        loop_guard: bool = False,
    ) -> None:
        self.stream = stream
        self._stop_pieces = stop_pieces or {}
        self.finished = max_tokens == 0
        self._max_tokens, self._logprobs, self._ignore_eos, self._special = max_tokens, logprobs, ignore_eos, special
        self._text, self._matcher = Utf8Assembler(), matcher
        self._guard = LoopGuard() if loop_guard else None
        self._native, self._chosen = bindings.library(), bindings.GeneratedToken()
        self.piece = b""
        self._start = time.perf_counter()
        self._n = 0

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended the text."""
        return self._matcher.found

    def next(self) -> Token:
        """Choose a token and feed it, in one native call. Ctrl-C meanwhile waits for callbacks.deliver."""
        self._call(self._native.es_stream_next, self.stream.handle, self.stream.sampler, late=True)
        return self._record(self._chosen.n_past, self._chosen.n_cached)

    def choose(self) -> int:
        """The next token, sampled from the stream's logits."""
        self._call(self._native.es_sampler_choose, self.stream.sampler, self.stream.handle)
        return int(self._chosen.token)

    def candidates(self) -> list[tuple[int, float]]:
        """The tokens that the newest was chosen from, with probabilities after all transforms, the likeliest first."""
        size = self.stream.backend.vocabulary.size
        found = (bindings.Candidate * size)()
        n = self._native.es_sampler_candidates(self.stream.sampler, found, size)
        return [(one.token, one.probability) for one in found[:n]]

    def record(self) -> Token:
        """The record of the chosen token, once it has been fed."""
        stats = self.stream.stats
        return self._record(stats.n_past, stats.n_cached)

    def _call(self, function: object, *handles: C.c_void_p, late: bool = False) -> None:
        self.stream.call(function, *handles, self._special, self._logprobs, C.byref(self._chosen), late=late)
        self.piece = self._stop_pieces.get(self._chosen.token) or C.string_at(self._chosen.piece, self._chosen.n_piece)

    def _record(self, n_past: int, n_cached: int) -> Token:
        chosen = self._chosen
        self._n += 1
        eos = chosen.is_eog and not self._ignore_eos
        shown, stopped = self._matcher.push(self._text.push(b"" if eos else self.piece))
        finish = "stop" if stopped else "eos" if eos else None
        loop = self._guard.watch(chosen.token, self.stream) if self._guard and not finish else None
        if loop:
            finish, stats = "repetition", self.stream.stats
            n_past, n_cached = stats.n_past, stats.n_cached
        elif not finish and self._n == self._max_tokens:
            finish = "length"
        if finish in ("eos", "length", "repetition"):
            shown += self._matcher.push(self._text.flush())[0] + self._matcher.flush()
        self.finished = finish is not None
        return Token(
            text=shown,
            token=chosen.token,
            logprob=chosen.logprob if self._logprobs else None,
            finish_reason=finish,
            n_past=n_past,
            n_cached=n_cached,
            tok_per_s=self._n / max(time.perf_counter() - self._start, 1e-9),
            loop=loop,
        )
