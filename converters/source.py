"""Source: one interface to a checkpoint, whether a Hugging Face folder or a GGUF file.

Writers see Hugging Face's names and layout. Tensors are loaded on demand and can be read a few rows at a time, so that
memory does not grow with the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from edge_stream.errors import EdgeStreamError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edge_stream.converters.vocab import Vocab
    from edge_stream.families import ModelConfig


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's description. dtype: as the source stores it, f32, f16, bf16, or a ggml type's name."""

    name: str  # Hugging Face's, e.g. model.layers.0.self_attn.q_proj.weight
    shape: tuple[int, ...]  # (rows, columns) of a matrix, as in PyTorch
    dtype: str

    @property
    def n_elements(self) -> int:
        """Product of the shape."""
        count = 1
        for size in self.shape:
            count *= size
        return count


class Source(Protocol):
    """An opened checkpoint."""

    @property
    def name(self) -> str:
        """A short name: the folder's, the repository's, or general.name."""
        ...

    @property
    def config(self) -> Mapping[str, Any]:
        """config.json (the text part), or one rebuilt from GGUF metadata."""
        ...

    @property
    def model(self) -> ModelConfig:
        """The same, validated and typed."""
        ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """By Hugging Face name: exactly those of tensor_names.expected_tensors(model), in that order."""
        ...

    @property
    def tokenizer_files(self) -> Mapping[str, Path | bytes]:
        """tokenizer.json, tokenizer.model, tokenizer_config.json, ... if present; rebuilt ones as bytes."""
        ...

    @property
    def chat_templates(self) -> Mapping[str, str]:
        """The model's own chat templates (Jinja) by name, see chat_templates.py."""
        ...

    @property
    def generation_config(self) -> Mapping[str, Any]:
        """generation_config.json, {} if there is none."""
        ...

    @property
    def left_out(self) -> Sequence[str]:
        """Names of tensors that are not part of the language model."""
        ...

    def load(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[np.floating[Any]]:
        """Rows start..stop of a tensor (all by default), freshly allocated, Hugging Face layout.

        float16 if stored as f16, else float32: bf16 is widened exactly, quantised types are dequantised.
        Raises EdgeStreamError if the file ends early or holds NaN or infinity.
        """
        ...

    def load_mxfp4(self, name: str, item: int) -> NDArray[np.uint8]:
        """An item of the first axis of a tensor of dtype mxfp4, as rows of ggml's blocks (17 bytes for 32 values)."""
        ...

    def vocab(self) -> Vocab:
        """The vocabulary in GGUF's terms. Raises EdgeStreamError if llama.cpp has no equivalent."""
        ...

    def close(self) -> None:
        """Close the files."""
        ...


def open_source(path: Path, name: str | None = None) -> Source:
    """Open a Hugging Face folder or a GGUF file. name: the folder's, if it differs from its path."""
    if path.is_dir():
        from edge_stream.converters.hf_source import HfSource

        return HfSource(path, name)
    if is_pickle(path):
        raise EdgeStreamError(f"{path} is a pickle file, which can run code when read: convert it to safetensors first")
    from edge_stream.converters.gguf_source import GgufSource

    return GgufSource(path)


def is_pickle(path: Path) -> bool:
    """Whether the suffix is that of PyTorch's pickled weights, which are never loaded."""
    return path.suffix.lower() in (".bin", ".pt", ".pth", ".ckpt")
