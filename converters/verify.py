"""--verify: the converted model, in its own engine, against a float64 forward pass of the source."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edge_stream.converters import reference

if TYPE_CHECKING:
    from edge_stream.converters.source import Source

TEXT = (
    "The lighthouse keeper counted 3,141 waves; then — naïvely — she wrote “again” in her log.\nif (x > 0) { return; }"
)
_N_TOKENS = 48


@dataclass(frozen=True)
class Difference:
    """Logits of the engine less those of the reference, over all positions and tokens."""

    n_tokens: int
    max: float
    mean: float
    spread: float  # standard deviation of the reference's logits, to judge the others by
    agreement: float  # share of positions with the same best token

    def __str__(self) -> str:
        return (
            f"verified: {self.n_tokens} tokens, logits' max difference {self.max:.3g}, mean {self.mean:.3g} "
            f"(their standard deviation is {self.spread:.3g}); same best token at {self.agreement:.0%} of positions"
        )


def compare(got: np.ndarray, want: np.ndarray) -> Difference:
    """Compare logits [n, n_vocab]; the engine's vocabulary may be padded."""
    got = got[:, : want.shape[1]].astype(np.float64)
    error = np.abs(got - want)
    same = float(np.mean(got.argmax(axis=1) == want.argmax(axis=1)))
    return Difference(len(want), float(error.max()), float(error.mean()), float(want.std()), same)


def verify(source: Source, target: str, path: Path, say: Callable[[str], None]) -> Difference:
    """Load the result of a conversion and compare it with the source on a short text.

    path: a GGUF file (the first of its parts), or the folder of an MLC model. The difference of a quantised model is
    that of its quantisation. Raises EdgeStreamError if the result cannot be loaded.
    """
    from edge_stream import Engine

    if target == "mlc":
        mlc = importlib.import_module("edge_stream.converters.mlc.verify")
        tokens, got = mlc.engine_logits(path, source, TEXT, _N_TOKENS, say)  # list of int, [n, n_vocab]
    else:
        with Engine.load(path, n_ctx=256, cache_type_k="f32", cache_type_v="f32", flash_attn="off") as engine:
            tokens = engine.tokenize(TEXT, add_bos=engine.add_bos)[:_N_TOKENS]
            got = engine.stream().logits_of(tokens)
    difference = compare(got, reference.logits(source, tokens))
    say(str(difference))
    return difference
