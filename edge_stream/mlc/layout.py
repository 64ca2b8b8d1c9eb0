"""Rearrange weights from MLC's layout into the blocks of rows that the CPU kernels read."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_stream.converters.mlc.quantization import Quantization
from edge_stream.mlc.kernels import Lanes


def block_rows(matrix: NDArray[Any], out: NDArray[Any]) -> None:
    """Copy matrix [rows, columns] to out [blocks, columns, block]; missing rows are left unchanged.

    Makes no second copy of a large matrix.
    """
    width, (rows, columns) = out.shape[2], matrix.shape
    whole = rows // width
    out[:whole] = matrix[: whole * width].reshape(whole, width, columns).swapaxes(1, 2)
    if whole < len(out):
        out[whole, :, : rows - whole * width] = matrix[whole * width :].T


def blocked_shape(name: str, shape: tuple[int, ...], dtype: str, q: Quantization, lanes: Lanes) -> tuple[Any, str]:
    """A stored tensor's shape and dtype in the decoder. Vectors keep their shape; float16 becomes float32."""
    if len(shape) == 1:
        return shape, "float32"
    *n, rows, columns = shape[::-1] if _transposed(name, q) else shape
    blocks = -(-rows // lanes.block) * (n[0] if n else 1)  # every expert begins a block
    return (blocks, columns, lanes.block), dtype if dtype == "uint32" else "float32"


def fill(name: str, stored: NDArray[Any], out: NDArray[Any], q: Quantization) -> None:
    """Copy a stored tensor into the decoder's, which has its blocked_shape."""
    if stored.ndim == 1:
        out[:] = stored
    elif stored.ndim == 3:
        for expert, blocks in zip(stored, np.split(out, len(stored)), strict=True):
            block_rows(expert, blocks)
    else:
        block_rows(stored.T if _transposed(name, q) else stored, out)


def _transposed(name: str, q: Quantization) -> bool:
    """q4f16_0 stores the matrices of linear layers, but not embeddings, as [columns, rows]."""
    return q.transposed and name.endswith((".q_weight", ".q_scale")) and "embed_tokens" not in name
