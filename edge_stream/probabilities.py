"""Probabilities of tokens from logits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edge_stream.errors import no_numbers

if TYPE_CHECKING:
    from numpy.typing import NDArray


def log_sum_exp(logits: NDArray[np.float32]) -> float:
    """The natural log of the sum of their exponentials, within 1e-6. logits: [n_vocab].

    Exponentials are in float32, and summed in float64: with a vocabulary of 262,144 that takes a tenth of the time.
    Raises EdgeStreamError if a logit is NaN or infinity, or all are -infinity.
    """
    peak = logits.max()
    if not np.isfinite(peak):
        raise no_numbers("the model")
    return float(peak) + float(np.log(np.exp(logits - peak).sum(dtype=np.float64)))


def nll(logits: NDArray[np.float32], token: int) -> float:
    """Negative log-likelihood of a token in nats, within 1e-6. logits: [n_vocab]. Raises as log_sum_exp does."""
    return log_sum_exp(logits) - float(logits[token])
