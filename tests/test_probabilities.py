"""Negative log-likelihoods are those of float64, for a large vocabulary and for likelihoods at both ends."""

from __future__ import annotations

import numpy as np
import pytest

from edge_stream.probabilities import log_sum_exp, nll


@pytest.mark.parametrize("scale", [0.0, 0.1, 4.0, 60.0])
@pytest.mark.parametrize("n", [1, 2, 49_152, 262_144])
def test_as_in_float64(n: int, scale: float) -> None:
    logits = (np.random.default_rng(n).standard_normal(n) * scale - 30).astype(np.float32)
    exact = logits.astype(np.float64)
    log_sum = exact.max() + np.log(np.exp(exact - exact.max()).sum())
    assert log_sum_exp(logits) == pytest.approx(log_sum, abs=1e-6)
    for token in (0, n // 2, int(logits.argmax()), int(logits.argmin())):
        assert nll(logits, token) == pytest.approx(log_sum - exact[token], abs=1e-6)


def test_tokens_that_cannot_be() -> None:
    logits = np.array([0, -np.inf, -200], np.float32)
    assert nll(logits, 0) == 0
    assert nll(logits, 1) == np.inf
    assert nll(logits, 2) == 200
