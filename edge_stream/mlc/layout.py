"""Weights as MLC stores them, rearranged into the blocks of rows that the CPU kernels read."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from edge_stream.converters.mlc.quantization import Quantization
from edge_stream.mlc.kernels import Lanes


def block_rows(matrix: NDArray[Any], out: NDArray[Any]) -> None:
    """matrix [rows, columns] into out [blocks, columns, block]; missing rows are left as they are.

    Some blocks at a time, so that no second copy of a large matrix is made.
    """
    width, (rows, columns) = out.shape[2], matrix.shape
    whole = rows // width
    out[:whole] = matrix[: whole * width].reshape(whole, width, columns).swapaxes(1, 2)
    if whole < len(out):
        out[whole, :, : rows - whole * width] = matrix[whole * width :].T


def blocked_shape(name: str, shape: tuple[int, ...], dtype: str, q: Quantization, lanes: Lanes) -> tuple[Any, str]:
    """Shape and dtype in the decoder of a stored tensor. Vectors keep their shape; there is no float16 any more."""
    if len(shape) == 1:
        return shape, "float32"
    rows, columns = shape[::-1] if _transposed(name, q) else shape
    return (-(-rows // lanes.block), columns, lanes.block), dtype if dtype == "uint32" else "float32"


def fill(name: str, stored: NDArray[Any], out: NDArray[Any], q: Quantization) -> None:
    """Put a stored tensor into the decoder's, of blocked_shape."""
    if stored.ndim == 1:
        out[:] = stored
    else:
        block_rows(stored.T if _transposed(name, q) else stored, out)


def _transposed(name: str, q: Quantization) -> bool:
    """q4f16_0 stores matrices of linear layers as [columns, rows], embeddings not."""
    return q.transposed and name.endswith((".q_weight", ".q_scale")) and "embed_tokens" not in name
