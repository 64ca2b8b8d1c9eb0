"""Logits of a converted MLC model, for `convert --verify`."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edge_stream.converters import reference
from edge_stream.converters.mlc import compile as compiler
from edge_stream.converters.mlc.readback import ReadBack
from edge_stream.errors import EdgeStreamError

if TYPE_CHECKING:
    from edge_stream.converters.source import Source


def engine_logits(
    folder: Path, source: Source, text: str, n_tokens: int, say: Callable[[str], None]
) -> tuple[list[int], NDArray[np.float64]]:
    """The first n_tokens tokens of a text, and their logits [n, n_vocab].

    The model runs on TVM's runtime, compiled for this machine if the folder has no lib.so. A model that cannot be
    compiled is computed in NumPy from the converted weights, with a note, which verifies only the weights.
    """
    tokens = tokenize(folder, text)[:n_tokens]
    config = json.loads((folder / "mlc-chat-config.json").read_text(encoding="utf-8"))
    lacking = compiler.unsupported_reason(source)
    if lacking:
        say(f"note: {lacking}; so the converted weights are verified, in NumPy, and no library")
        return tokens, reference.logits(ReadBack(folder, source, config["quantization"]), tokens)  # type: ignore[arg-type]
    compiler.require_tvm()
    from edge_stream.converters.mlc.runtime import MlcLibrary

    with tempfile.TemporaryDirectory(prefix="edge-stream-") as scratch:
        library = folder / "lib.so"
        if not library.exists():
            library = compiler.compile_library(folder, "cpu", lambda _line: None, out=Path(scratch))
        return tokens, MlcLibrary(folder, library).feed(tokens).astype(np.float64)


def tokenize(folder: Path, text: str) -> list[int]:
    """Tokenise with the folder's tokenizer.json, without adding special tokens."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the library raises plain Exception
        raise EdgeStreamError(f"tokenizer.json of {folder} cannot be read: {error}") from error
    return list(tokenizer.encode(text, add_special_tokens=False).ids)
