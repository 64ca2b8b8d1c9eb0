"""How many sinks a model needs: table 2 of Xiao et al. 2023 for any model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edge_stream.errors import EdgeStreamError
from edge_stream.measure.ppl import Progress, read

TOLERANCE = 1.01  # times the best perplexity


def table(
    model: str,
    tokens: Sequence[int],
    counts: Sequence[int],
    n_ctx: int,
    chunk: int,
    settings: dict[str, Any],
    progress: Progress,
) -> list[dict[str, Any]]:
    """A row of `eval ppl` per number of sinks, at the same cache size.

    Raises EdgeStreamError if the text fits the cache, where sinks make no difference.
    """
    if len(tokens) <= n_ctx + 1:
        raise EdgeStreamError(
            f"{len(tokens)} tokens do not outgrow a cache of {n_ctx}: give a longer text or a smaller -c"
        )
    rows = []
    for n_keep in counts:
        mode = "stream" if n_keep else "window"

        def show(_what: str, done: int, total: int, n_keep: int = n_keep) -> None:
            progress(f"{n_keep} sinks: tokens", done, total)

        reading = read(model, mode, tokens, n_ctx=n_ctx, n_keep=n_keep, chunk=chunk, settings=settings, progress=show)
        rows.append({key: value for key, value in reading.report().items() if key != "segments"})
    return rows


def recommend(rows: Sequence[dict[str, Any]]) -> int:
    """The smallest n_keep within TOLERANCE of the best perplexity after the cache filled. Raises EdgeStreamError."""
    known = [row for row in rows if row["ppl_after_fill"] is not None]
    if not known:
        raise EdgeStreamError("no perplexity could be measured")
    best = min(row["ppl_after_fill"] for row in known)
    return min(int(row["n_keep"]) for row in known if row["ppl_after_fill"] <= best * TOLERANCE)
