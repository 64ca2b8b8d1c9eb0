"""Probabilities of a prompt's tokens, and the likeliest in their places."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from edge_stream.probabilities import log_sum_exp
from edge_stream.server.scheduling.events import TokenLogprobs

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edge_stream.stream import Stream

Top = list[tuple[int, float]]  # the likeliest tokens and the natural logs of their probabilities


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Natural logs of the probabilities, [n_vocab]."""
    return logits.astype(np.float64) - log_sum_exp(logits)


def likeliest(logprobs: NDArray[np.float64], n: int) -> Top:
    """The n likeliest tokens, the likeliest first."""
    n = min(n, len(logprobs))
    best = np.argpartition(-logprobs, n - 1)[:n] if n else np.empty(0, int)
    return [(int(i), float(logprobs[i])) for i in best[np.argsort(-logprobs[best], kind="stable")]]


def feed_scored(stream: Stream, tokens: Sequence[int], n_top: int) -> list[TokenLogprobs]:
    """Feed tokens; returns each with its probability given all before, and the n_top likeliest in its place."""
    before = stream.logits
    rows = [None if before is None else log_softmax(before)]
    out: list[TokenLogprobs] = []

    def see(i: int, logits: NDArray[np.float32]) -> None:
        take(i)
        rows[0] = log_softmax(logits)

    def take(i: int) -> None:
        row = rows[0]
        if row is None:
            out.append(TokenLogprobs(tokens[i], None, []))
        else:
            out.append(TokenLogprobs(tokens[i], float(row[tokens[i]]), likeliest(row, n_top)))

    stream.feed_tokens(tokens, see)
    return out
