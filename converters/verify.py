"""--verify: compare the converted model, run by its engine, with a float64 forward pass of the source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edge_stream.converters import reference

if TYPE_CHECKING:
    from edge_stream.converters.source import Source

TEXT = (
    "The lighthouse keeper counted 3,141 waves; then — naïvely — she wrote “again” in her log.\nif (x > 0) { return; }"
)


@dataclass(frozen=True)
class Difference:
    """The engine's logits minus the reference's, over all positions and tokens."""

    n_tokens: int
    max: float
    mean: float
    spread: float  # standard deviation of the reference's logits, for scale
    agreement: float  # share of positions with the same best token

    def __str__(self) -> str:
        return (
            f"verified: {self.n_tokens} tokens, logits' max difference {self.max:.3g}, mean {self.mean:.3g} "
            f"(their standard deviation is {self.spread:.3g}); same best token at {self.agreement:.0%} of positions"
        )


def compare(source: Source, tokens: Sequence[int], got: NDArray[np.floating[Any]]) -> Difference:
    """Compare an engine's logits [n, n_vocab] of tokens with the source's; the engine's vocabulary may be padded."""
    want = reference.logits(source, tokens)
    got = got[:, : want.shape[1]].astype(np.float64)
    error = np.abs(got - want)
    same = float(np.mean(got.argmax(axis=1) == want.argmax(axis=1)))
    return Difference(len(want), float(error.max()), float(error.mean()), float(want.std()), same)
