"""Perplexity along a stream."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_stream.measure.modes import keep_of
from edge_stream.measure.table import rounded
from edge_stream.measure.worker import Worker

if TYPE_CHECKING:
    from numpy.typing import NDArray

N_SEGMENTS = 10
_STEP = 256  # tokens between two signs of life

Progress = Callable[[str, int, int], None]


@dataclass
class Reading:
    """A text read in one mode. nll: [n_tokens - 1] float64 nats, item i is that of token i + 1; NaN: not scored."""

    mode: str
    n_ctx: int
    n_fill: int  # the cache size that was asked for: dense has a larger one
    n_keep: int
    n_tokens: int
    nll: NDArray[np.float64]
    seconds: float
    rss_start_mib: float | None
    rss_end_mib: float | None
    stopped: str | None
    every: int = 1

    def report(self, segment: int = 0) -> dict[str, Any]:
        """The row of `eval ppl`. segment: tokens per segment (0: a tenth of the text).

        ppl_after_fill: of the tokens predicted after the first eviction (dense: of the same tokens).
        """
        size = segment or max(1, math.ceil(len(self.nll) / N_SEGMENTS))
        segments = [
            {
                "start": start + 1,
                "end": min(start + size, len(self.nll)) + 1,
                "ppl": rounded(perplexity(self.nll[start : start + size]), 4),
            }
            for start in range(0, len(self.nll), size)
        ]
        return {
            "mode": self.mode,
            "n_ctx": self.n_ctx,
            "n_keep": self.n_keep,
            "n_tokens": self.n_tokens,
            "n_scored": int(np.isfinite(self.nll).sum()),
            "ppl": rounded(perplexity(self.nll), 4),
            "ppl_after_fill": rounded(perplexity(self.nll[self.n_fill :]), 4),
            "segments": segments,
            "rss_start_mib": rounded(self.rss_start_mib, 2),
            "rss_end_mib": rounded(self.rss_end_mib, 2),
            "tok_per_s": rounded(self.n_tokens / self.seconds, 2) if self.every == 1 else None,
            "stopped": self.stopped,
        }


def perplexity(nll: NDArray[np.float64]) -> float | None:
    """exp of the mean of what was scored; None if nothing was, or if it is too large for a float."""
    known = nll[np.isfinite(nll)]
    if not len(known):
        return None
    mean = float(known.mean())
    return math.exp(mean) if mean < 700 else None


def read(
    model: str,
    mode: str,
    tokens: Sequence[int],
    *,
    n_ctx: int,
    n_keep: int,
    chunk: int = 1,
    settings: dict[str, Any],
    beyond_training: bool = False,
    every: int = 1,
    progress: Progress = lambda _what, _done, _total: None,
) -> Reading:
    """Read tokens in a process of the mode's own and score each of them but the first.

    chunk: tokens per decode. dense stops at the training length unless beyond_training; its cache has the size of the
    text. every: in mode recompute, beyond the cache, only each every-th token is scored (the others' NLL is NaN).
    rss_start_mib: memory when the cache is full for the first time, or at the end if that never happens.
    """
    size = max(n_ctx, len(tokens)) if mode == "dense" else n_ctx
    stopped = None
    if mode == "dense" and not beyond_training:
        with Worker(model, mode, min(n_ctx, 64), n_keep, settings) as probe:
            trained = int(probe.facts["n_ctx_train"])
        if len(tokens) > trained:
            stopped = f"the training length, {trained} tokens"
            tokens, size = tokens[:trained], max(1, trained)
    with Worker(model, mode, size, n_keep, settings) as worker:
        started = time.perf_counter()
        out = np.full(len(tokens), np.nan)
        rss_start = None
        unread: list[int] = []  # a token that was predicted is read with the next ones: one re-computation for all
        at = 0
        while at < len(tokens):
            end = _stop(at, len(tokens), n_ctx, chunk)
            if mode == "recompute" and at >= n_ctx and every > 1:
                end = min(at + every, len(tokens))
                unread += tokens[at : end - 1]
                if unread:
                    worker.call("feed", unread)
                out[end - 1] = worker.call("score_next", tokens[end - 1])
                unread = [tokens[end - 1]]
            else:
                out[at:end] = worker.call("score", list(tokens[at:end]), chunk)
            at = end
            if at >= n_ctx and rss_start is None:
                rss_start = worker.call("rss")
            progress(f"{mode}: tokens", at, len(tokens))
        seconds = time.perf_counter() - started
        rss_end = worker.call("rss")
    return Reading(
        mode=mode,
        n_ctx=size,
        n_fill=n_ctx,
        n_keep=keep_of(mode, n_keep),
        n_tokens=len(tokens),
        nll=out[1:],
        seconds=seconds,
        rss_start_mib=rss_end if rss_start is None else rss_start,
        rss_end_mib=rss_end,
        stopped=stopped,
        every=every if mode == "recompute" else 1,
    )


def _stop(at: int, n: int, n_ctx: int, chunk: int) -> int:
    """Where to pause after `at`: whole chunks, and at the moment when the cache is full."""
    end = min(at + max(chunk, _STEP - _STEP % chunk if chunk < _STEP else chunk), n)
    return n_ctx if at < n_ctx < end and n_ctx % chunk == 0 else end
