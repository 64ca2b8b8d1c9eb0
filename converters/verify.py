"""--verify: compare the converted model, run by its engine, with a float64 forward pass of the source.

The forward pass is reference.py's for decoders of Llama's kind, and transformers' for the others.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edge_stream.converters import reference
from edge_stream.errors import EdgeStreamError, no_numbers

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


def check(source: Source) -> None:
    """Raise EdgeStreamError if a source cannot be compared: before it is converted."""
    if source.model.family.computed:
        return
    if any(importlib.util.find_spec(name) is None for name in ("torch", "transformers")):
        raise EdgeStreamError(
            f"--verify of {source.model.family.model_type} compares with transformers: pip install torch transformers"
        )
    if getattr(source, "folder", None) is None or not (source.folder / "config.json").exists():  # type: ignore[attr-defined]
        raise EdgeStreamError(f"--verify of {source.model.family.model_type} needs a Hugging Face folder")


def _logits(source: Source, tokens: Sequence[int]) -> NDArray[np.float64]:
    if source.model.family.computed:
        return reference.logits(source, tokens)
    check(source)
    import torch
    import transformers

    folder = source.folder  # type: ignore[attr-defined]
    try:
        kind = transformers.AutoModelForCausalLM
        if "vision_config" in json.loads((folder / "config.json").read_text(encoding="utf-8")):
            kind = transformers.AutoModelForImageTextToText
        model = kind.from_pretrained(folder, dtype=torch.float32, local_files_only=True, attn_implementation="eager")
        with torch.no_grad():
            found: NDArray[np.float64] = model(torch.tensor([list(tokens)])).logits[0].double().numpy()
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise EdgeStreamError(f"transformers cannot run {source.name}: {reason}") from error
    return found


def compare(source: Source, tokens: Sequence[int], got: NDArray[np.floating[Any]]) -> Difference:
    """Compare an engine's logits [n, n_vocab] of tokens with the source's; the engine's vocabulary may be padded.

    Raises EdgeStreamError if some of either are NaN or infinite.
    """
    want = _logits(source, tokens)
    got = got[:, : want.shape[1]].astype(np.float64)
    for logits, what in ((want, source.name), (got, "the converted model")):
        if not np.isfinite(logits).all():
            raise no_numbers(what)
    error = np.abs(got - want)
    same = float(np.mean(got.argmax(axis=1) == want.argmax(axis=1)))
    return Difference(len(want), float(error.max()), float(error.mean()), float(want.std()), same)
