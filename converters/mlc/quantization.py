"""MLC's group quantisation in NumPy: packing, as in `mlc_llm convert_weight`, and unpacking.

Along the columns of a matrix [N, K], each group of `group_size` weights shares one scale, max|w| / max_int, in the
model's dtype. A weight is stored as round(w / scale + max_int), limited to 0..2 max_int and rounded half to even, with
every operation in the model's dtype. `32 // bits` of them make a uint32, the first in its lowest bits. The last group
is padded with zero bits. Source: mlc-llm, python/mlc_llm/quantization/{quantization,group_quantization,utils}.py.

A group of zeros has scale 0, and 0 / 0 is not a number: TVM's max and min then pick 0, so MLC writes zero bits and
scale 0, which unpack to (-max_int) * 0 = -0. So do we. A group whose scale underflows to 0 saturates and unpacks to 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_stream.errors import EdgeStreamError

F32 = NDArray[np.float32]
U32 = NDArray[np.uint32]


@dataclass(frozen=True)
class Quantization:
    """One of MLC's quantisations. bits 0: weights are kept in the model's dtype."""

    name: str
    dtype: str  # of activations, scales and unquantised weights: float16 or float32
    bits: int = 0
    group_size: int = 0
    transposed: bool = False  # matrices of linear layers are stored [K, N] ("KN"), embeddings never

    @property
    def per_word(self) -> int:
        """Weights in a uint32."""
        return 32 // self.bits

    @property
    def max_int(self) -> int:
        """Added to a scaled weight to make it non-negative."""
        return int(2 ** (self.bits - 1)) - 1

    def shapes(self, rows: int, columns: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Shapes of q_weight and q_scale of a [rows, columns] matrix, not transposed."""
        groups = -(-columns // self.group_size)
        return (rows, groups * self.group_size // self.per_word), (rows, groups)


QUANTIZATIONS = {
    q.name: q
    for q in (
        Quantization("q0f16", "float16"),
        Quantization("q0f32", "float32"),
        Quantization("q3f16_1", "float16", 3, 40),
        Quantization("q4f16_0", "float16", 4, 32, transposed=True),
        Quantization("q4f16_1", "float16", 4, 32),
        Quantization("q4f32_1", "float32", 4, 32),
    )
}


def find_quantization(name: str) -> Quantization:
    """By MLC's name. Raises EdgeStreamError for one that is not supported."""
    if name not in QUANTIZATIONS:
        raise EdgeStreamError(f"quantization {name} is unknown: use one of {', '.join(QUANTIZATIONS)}")
    return QUANTIZATIONS[name]


def to_dtype(weight: NDArray[np.floating[Any]], dtype: str, name: str) -> NDArray[np.floating[Any]]:
    """Cast to the model's dtype. Raises EdgeStreamError if a finite weight becomes infinite in float16."""
    with np.errstate(over="ignore"):
        cast = weight.astype(dtype, copy=False)
    if dtype == "float16" and not np.isfinite(cast).all():
        raise EdgeStreamError(f"{name} holds weights beyond float16's range: use a quantization with f32 in its name")
    return cast


def pack(weight: NDArray[np.floating[Any]], q: Quantization) -> tuple[U32, NDArray[np.floating[Any]]]:
    """Quantise rows [n, K] of the model's dtype: q_weight [n, words] uint32 and q_scale [n, groups], not transposed."""
    n, k = weight.shape
    (_, words), (_, groups) = q.shapes(n, k)
    dtype = np.dtype(q.dtype)
    # NumPy's float16 is slow; float32 rounded to float16 after each step gives the same result, 4x faster
    values = np.zeros((n, groups * q.group_size), np.float32)
    values[:, :k] = weight
    grouped = values.reshape(n, groups, q.group_size)
    scale = np.abs(grouped).max(axis=2).astype(dtype) / dtype.type(q.max_int)
    round_to_dtype = _round_to_float16 if dtype == np.float16 else _no_rounding
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        grouped /= scale.astype(np.float32)[:, :, None]
        round_to_dtype(grouped)
        grouped += np.float32(q.max_int)
        round_to_dtype(grouped)
        np.rint(grouped, out=grouped)
    np.fmax(grouped, np.float32(0), out=grouped)  # the nan of 0 / 0 becomes 0 here
    np.fmin(grouped, np.float32(2 * q.max_int), out=grouped)
    levels = values.astype(np.uint8)
    levels[:, k:] = 0  # padding is zero bits, not a zero weight
    if q.bits == 4:  # two to a byte, the first in its lower half
        return (levels[:, 0::2] | (levels[:, 1::2] << np.uint8(4))).view("<u4"), scale
    parts = levels.reshape(n, words, q.per_word)
    packed = np.zeros((n, words), np.uint32)
    for i in range(q.per_word):
        packed |= parts[:, :, i].astype(np.uint32) << np.uint32(i * q.bits)
    return packed, scale


def _round_to_float16(values: F32) -> None:
    """Round float32 values to float16's 11 bits in place, half to even.

    Ignores float16's coarser steps below 2^-14 and its upper limit: the addition and clipping that follow hide both.
    """
    bits = values.view(np.uint32)
    bits += ((bits >> np.uint32(13)) & np.uint32(1)) + np.uint32(0xFFF)
    bits &= np.uint32(0xFFFFE000)


def _no_rounding(_values: F32) -> None:
    pass


def unpack(packed: U32, scale: NDArray[np.floating[Any]], columns: int, q: Quantization) -> F32:
    """Dequantise q_weight [n, words] and q_scale [n, groups] (not transposed) to [n, columns] float32.

    The product is rounded to the model's dtype first, as in MLC's kernels.
    """
    shifts = np.arange(q.per_word, dtype=np.uint32) * np.uint32(q.bits)
    values = (packed[:, :, None] >> shifts) & np.uint32(2**q.bits - 1)
    whole = values.reshape(len(packed), -1).astype(q.dtype) - np.dtype(q.dtype).type(q.max_int)
    grouped = whole.reshape(len(packed), -1, q.group_size) * scale.astype(q.dtype)[:, :, None]
    unpacked: F32 = grouped.reshape(len(packed), -1)[:, :columns].astype(np.float32)
    return unpacked
