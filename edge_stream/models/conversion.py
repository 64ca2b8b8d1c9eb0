"""What `convert` needs beyond the converters, which do not import the engine: open the model that the user named as a
Source, and load the result to compare it with the source.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_stream.converters import source as sources
from edge_stream.errors import UnsupportedModelError
from edge_stream.models import names
from edge_stream.paths import given_path

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edge_stream.converters.source import Source
    from edge_stream.converters.verify import Difference

_N_TOKENS = 48  # compared by --verify


def open_source(src: str) -> Source:
    """Open a Hugging Face folder, `hf:user/repo`, a GGUF file, or `demo`. Raises EdgeStreamError in one sentence."""
    if src.startswith("hf:"):
        from edge_stream.converters.hub import download

        return sources.open_source(download(src), name=src.rpartition("/")[2])
    path = given_path(src)
    return sources.open_source(path if path.is_dir() or sources.is_pickle(path) else names.resolve(src))


def adapter_folder(src: str) -> Path | None:
    """The folder of a LoRA adapter, downloaded if need be; None if src is something else."""
    if not (src.startswith("hf:") or given_path(src).is_dir()):
        return None
    from edge_stream.converters.hub import download
    from edge_stream.converters.lora import is_adapter

    folder = download(src) if src.startswith("hf:") else given_path(src)
    return folder if is_adapter(folder) else None


def unread_gguf(src: str) -> Path | None:
    """The GGUF file that src names, if its architecture is not one that converters read."""
    from edge_stream.families import families, gguf_families
    from edge_stream.native import bindings
    from edge_stream.native.gguf_header import GgufHeader

    path = given_path(src)
    if not path.is_file() or sources.is_pickle(path):
        return None
    bindings.library().es_log_set(False)
    with GgufHeader(path) as header:
        arch = header.text("general.architecture")
    return path if arch in {f.gguf.arch for f in families().values()} - gguf_families().keys() else None


def verify(source: Source, target: str, path: Path, say: Callable[[str], None]) -> Difference:
    """Load a converted model and compare its logits with the source's on a short text.

    path: a GGUF file (the first part of a split one) or an MLC folder. A quantised model's difference includes its
    quantisation error. Raises EdgeStreamError if the result cannot be loaded.
    """
    from edge_stream.converters.verify import TEXT, compare

    got: NDArray[np.floating[Any]]
    if target == "mlc":
        tokens, got = _mlc_logits(path, source, TEXT, say)
    else:
        tokens, got = _llama_logits(path, TEXT)
    difference = compare(source, tokens, got)
    say(str(difference))
    return difference


def _mlc_logits(
    folder: Path, source: Source, text: str, say: Callable[[str], None]
) -> tuple[list[int], NDArray[np.floating[Any]]]:
    """The first tokens of a text and their logits: by the folder's lib.so, or by the MLC engine.

    A model that this engine cannot run is computed in NumPy, with a note, which verifies only the weights.
    """
    from edge_stream import Engine
    from edge_stream.converters.mlc import verify as without_engine

    tokens = without_engine.tokenize(folder, text)[:_N_TOKENS]
    if (folder / "lib.so").exists():
        return tokens, without_engine.library_logits(folder, tokens)
    try:
        with Engine.load(folder, n_ctx=256, cache_type_k="f32", cache_type_v="f32") as engine:
            return tokens, engine.stream().logits_of(tokens)
    except UnsupportedModelError as error:
        say(f"note: {error}; so the converted weights are verified, in NumPy, and no engine")
        config = json.loads((folder / names.MLC_CONFIG).read_text(encoding="utf-8"))
        return tokens, without_engine.weights_logits(folder, source, config["quantization"], tokens)


def _llama_logits(path: Path, text: str) -> tuple[list[int], NDArray[np.float32]]:
    """The first tokens of a text and their logits, [n, n_vocab]."""
    from edge_stream import Engine

    with Engine.load(path, n_ctx=256, cache_type_k="f32", cache_type_v="f32", flash_attn="off") as engine:
        tokens = engine.tokenize(text, add_bos=engine.add_bos)[:_N_TOKENS]
        return tokens, engine.stream().logits_of(tokens)
