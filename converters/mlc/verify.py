"""Logits of a converted MLC model without an engine, for `convert --verify`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edge_stream.converters import reference
from edge_stream.converters.mlc.readback import ReadBack
from edge_stream.errors import EdgeStreamError

if TYPE_CHECKING:
    from edge_stream.converters.source import Source


def library_logits(folder: Path, tokens: Sequence[int]) -> NDArray[np.float64]:
    """Logits [n, n_vocab] by the folder's lib.so, on TVM's runtime."""
    from edge_stream.converters.mlc.runtime import MlcLibrary

    return MlcLibrary(folder).feed(tokens).astype(np.float64)


def weights_logits(folder: Path, source: Source, quantization: str, tokens: Sequence[int]) -> NDArray[np.float64]:
    """Logits [n, n_vocab] by a forward pass in NumPy over the converted weights."""
    return reference.logits(ReadBack(folder, source, quantization), tokens)  # type: ignore[arg-type]


def tokenize(folder: Path, text: str) -> list[int]:
    """Tokenise with the folder's tokenizer.json, without adding special tokens."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the library raises plain Exception
        raise EdgeStreamError(f"tokenizer.json of {folder} cannot be read: {error}") from error
    return list(tokenizer.encode(text, add_special_tokens=False).ids)
