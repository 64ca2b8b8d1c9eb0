"""Perplexity along a stream."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_stream.errors import EdgeStreamError
from edge_stream.measure.modes import keep_of
from edge_stream.measure.reader_process import ReaderProcess
from edge_stream.measure.table import rounded

if TYPE_CHECKING:
    from numpy.typing import NDArray

_BLOCK = 256  # tokens that are scored at a time
_N_MEMORY = 200  # samples of memory along the text

Progress = Callable[[str, int, int], None]


@dataclass
class Reading:
    """A text read in one mode. nll: [n_tokens - 1] float64 nats; item i is that of token i + 1, NaN: not scored.

    n_fill: the cache size that was asked for (dense has a larger one). stopped: why reading ended early. every: one
    token or block in so many was scored. bos: that the model's texts begin with, -1: none. memory: (tokens read, MiB).
    """

    mode: str
    n_ctx: int
    n_fill: int
    n_keep: int
    n_tokens: int
    nll: NDArray[np.float64]
    seconds: float
    rss_start_mib: float | None
    rss_end_mib: float | None
    stopped: str | None
    every: int = 1
    bos: int = -1
    memory: list[tuple[int, float]] = field(default_factory=list)

    def report(self, segment: int = 0) -> dict[str, Any]:
        """The row of `eval ppl`. segment: tokens per segment (0: a tenth of the text).

        ppl_after_fill: of the tokens past the cache (dense: of the same tokens).
        """
        size = segment or max(1, math.ceil(len(self.nll) / 10))
        segments = [
            {
                "start": start + 1,
                "end": min(start + size, len(self.nll)) + 1,
                "ppl": rounded(perplexity(self.nll[start : start + size]), 4),
                "rss_mib": self._memory_at(start + size + 1),
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
            # a mode that skips tokens has no comparable speed
            "tok_per_s": rounded(self.n_tokens / self.seconds, 2) if self.every == 1 else None,
            "stopped": self.stopped,
        }

    def _memory_at(self, n: int) -> float | None:
        """The last sample of memory within n tokens."""
        seen = [mib for at, mib in self.memory if at <= n]
        return rounded(seen[-1], 2) if seen else None


def at_samples(readings: Sequence[Reading]) -> dict[str, float | None]:
    """Perplexity by mode at the tokens past the cache that all modes scored; modes that ended early are left out.

    For a comparison with modes that scored samples only.
    """
    whole = [reading for reading in readings if not reading.stopped]
    common = np.all([np.isfinite(reading.nll) for reading in whole], axis=0)
    common[: readings[0].n_fill] = False
    return {reading.mode: rounded(perplexity(reading.nll[common]), 4) for reading in whole}


def perplexity(nll: NDArray[np.float64]) -> float | None:
    """exp of the mean of the scored tokens; None if there are none, or if it is too large for a float."""
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
    block_every: int = 1,
    tail: int = 0,
    progress: Progress = lambda _what, _done, _total: None,
) -> Reading:
    """Read tokens in a process of its own and score all but the first.

    chunk: tokens per decode. Mode dense stops at the training length unless beyond_training; its cache is as large as
    the text. Past the cache, mode recompute scores every every-th token, and the other modes every block_every-th block
    of some 256 tokens and the last tail tokens. rss_start_mib: memory when the cache was first full, else at the end.
    """
    size = max(n_ctx, len(tokens)) if mode == "dense" else n_ctx
    stopped = None
    if mode == "dense" and not beyond_training:
        with ReaderProcess(model, mode, min(n_ctx, 64), n_keep, settings) as probe:
            trained = int(probe.facts["n_ctx_train"])
        if len(tokens) > trained:
            stopped = f"the training length, {trained} tokens"
            tokens, size = tokens[:trained], max(1, trained)
    with ReaderProcess(model, mode, size, n_keep, settings) as process:
        started = time.perf_counter()
        out = np.full(len(tokens), np.nan)
        rss_start = None
        unread: list[int] = []  # a scored token is read with the next ones: one recomputation for all
        at, sampled, n_blocks = 0, 0, 0
        memory: list[tuple[int, float]] = []
        while at < len(tokens):
            end = _block_end(at, len(tokens), n_ctx, chunk)
            if mode == "recompute" and at >= n_ctx and every > 1:
                end = min(at + every, len(tokens))
                unread += tokens[at : end - 1]
                if unread:
                    process.call("feed", unread)
                out[end - 1] = process.call("score_next", tokens[end - 1])
                unread = [tokens[end - 1]]
            elif at >= n_ctx and end <= len(tokens) - tail and n_blocks % block_every:
                for start in range(at, end, chunk):
                    process.call("feed", list(tokens[start : min(start + chunk, end)]))
            else:
                out[at:end] = process.call("score", list(tokens[at:end]), chunk)
            at = end
            n_blocks += 1
            if at >= n_ctx and rss_start is None:
                rss_start = process.call("rss")
            if at - sampled >= len(tokens) / _N_MEMORY or at == len(tokens):
                memory.append((at, process.call("rss")))
                sampled = at
            progress(f"{mode}: tokens", at, len(tokens))
        seconds = time.perf_counter() - started
        rss_end = process.call("rss")
        bos = int(process.facts["bos"])
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
        every=every if mode == "recompute" else block_every,
        bos=bos,
        memory=[(at, mib) for at, mib in memory if mib is not None],
    )


def fresh_tail(
    model: str,
    tokens: Sequence[int],
    n: int,
    whole: Reading,
    *,
    chunk: int,
    settings: dict[str, Any],
    progress: Progress = lambda _what, _done, _total: None,
) -> dict[str, Any]:
    """The last n tokens as a long stream (whole) and as a fresh one scores them.

    The fresh stream begins n_ctx tokens before them, so that its cache is full too. ratio: whole's perplexity over the
    fresh one's. Raises EdgeStreamError if the text is too short, or was not read to its end.
    """
    if whole.n_tokens < len(tokens):
        raise EdgeStreamError(f"mode {whole.mode} did not read the last {n} tokens: it ended at {whole.stopped}")
    begin = len(tokens) - n - whole.n_fill
    if begin <= 0:
        raise EdgeStreamError(f"{len(tokens)} tokens are too few for the last {n} and {whole.n_fill} before them")
    text = [*tokens[:1], *tokens[begin:]] if tokens[0] == whole.bos else tokens[begin:]

    def show(_what: str, done: int, total: int) -> None:
        progress(f"{whole.mode}, begun at token {begin}: tokens", done, total)

    fresh = read(
        model,
        whole.mode,
        text,
        n_ctx=whole.n_fill,
        n_keep=whole.n_keep,
        chunk=chunk,
        settings=settings,
        beyond_training=True,
        progress=show,
    )
    long, short = perplexity(whole.nll[-n:]), perplexity(fresh.nll[-n:])
    return {
        "last": n,
        "fresh_start": begin,
        "ppl_last": rounded(long, 4),
        "ppl_last_fresh": rounded(short, 4),
        "ratio": rounded(long / short, 4) if long and short else None,
        "mean_abs_nll_difference": rounded(float(np.nanmean(np.abs(whole.nll[-n:] - fresh.nll[-n:]))), 4),
    }


def _block_end(at: int, n: int, n_ctx: int, chunk: int) -> int:
    """The end of the block that begins at `at`: whole chunks, with a block that ends when the cache is full."""
    end = min(at + max(chunk, _BLOCK - _BLOCK % chunk if chunk < _BLOCK else chunk), n)
    return n_ctx if at < n_ctx < end and n_ctx % chunk == 0 else end
