"""Packs the matrices of a checkpoint as published ones are: what is stored, and the values that it stands for.

Written forwards, from numbers to bits; converters/packed.py reads backwards.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Stored = dict[str, tuple[str, Array]]  # name -> safetensors' dtype, values
_FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
_FP4 += [-x for x in _FP4]
_KINDS = {"F32": "<f4", "F16": "<f2", "U8": "u1", "F8_E4M3": "u1", "I32": "<i4", "I64": "<i8"}


def float8(bits: int) -> float:
    """A float8 e4m3 of finite values."""
    sign, exponent, fraction = -1.0 if bits & 128 else 1.0, bits >> 3 & 15, bits & 7
    return sign * (fraction / 8 * 2.0**-6 if exponent == 0 else (1 + fraction / 8) * 2.0 ** (exponent - 7))


def _to_float8(values: Array) -> tuple[Array, Array]:
    table = np.array([float8(b) if b & 127 != 127 else np.inf for b in range(256)])
    codes = np.abs(values[..., None] - table).argmin(axis=-1).astype(np.uint8)
    return codes, table[codes]


def fp8(name: str, w: Array, block: tuple[int, int] | None = None) -> tuple[Stored, Array]:
    """One scale, or one for each block."""
    rows, columns = block or w.shape
    grid = (-(-w.shape[0] // rows), -(-w.shape[1] // columns))
    scale = np.random.default_rng(len(name)).uniform(0.001, 0.004, grid).astype(np.float32)
    full = np.repeat(np.repeat(scale, rows, axis=0)[: w.shape[0]], columns, axis=1)[:, : w.shape[1]]
    codes, values = _to_float8(w / full)
    stored = scale if block else scale.reshape(())
    return {f"{name}.weight": ("F8_E4M3", codes), f"{name}.weight_scale_inv": ("F32", stored)}, values * full


def fp8_rows(name: str, w: Array) -> tuple[Stored, Array]:
    """compressed-tensors' float-quantized: one scale for each row."""
    scale = (np.abs(w).max(axis=1, keepdims=True) / 448).astype(np.float32)
    codes, values = _to_float8(w / scale)
    return {f"{name}.weight": ("F8_E4M3", codes), f"{name}.weight_scale": ("F32", scale)}, values * scale


def _pack(numbers: Array, bits: int, axis: int) -> Array:
    """Numbers of some bits in 32-bit words along an axis, lowest first."""
    per = 32 // bits
    moved = np.moveaxis(numbers.astype(np.uint64), axis, -1)
    words = (moved.reshape(*moved.shape[:-1], -1, per) << (np.arange(per, dtype=np.uint64) * bits)).sum(axis=-1)
    return np.ascontiguousarray(np.moveaxis(words.astype(np.uint32).view(np.int32), -1, axis))


def compressed(name: str, w: Array, size: int = 32) -> tuple[Stored, Array]:
    """compressed-tensors' pack-quantized: 4 bits, symmetric."""
    scale = (np.abs(w).reshape(len(w), -1, size).max(axis=-1) / 7).astype(np.float32)
    full = np.repeat(scale, size, axis=1)
    q = np.clip(np.round(w / full), -8, 7)
    stored: Stored = {
        f"{name}.weight_packed": ("I32", _pack(q + 8, 4, 1)),
        f"{name}.weight_scale": ("F32", scale),
        f"{name}.weight_shape": ("I64", np.array(w.shape)),
    }
    return stored, q * full


def _grouped(w: Array, size: int, group: Array) -> tuple[Array, Array, Array, Array]:
    """Numbers 0..15 [in, out], zeros and scales [groups, out], values [out, in]."""
    n = w.shape[1] // size
    zeros = np.random.default_rng(1).integers(4, 12, (n, len(w)))
    scales = np.full((n, len(w)), np.abs(w).max() / 8, dtype=np.float16)
    full, zero = scales.astype(np.float64)[group], zeros[group]
    q = np.clip(np.round(w.T / full) + zero, 0, 15).astype(np.int64)
    return q, zeros, scales, ((q - zero) * full).T


def gptq(name: str, w: Array, size: int = 32) -> tuple[Stored, Array]:
    """4 bits, zeros stored less 1, columns in groups out of order (desc_act)."""
    group = np.random.default_rng(2).permutation(np.arange(w.shape[1]) // size)
    q, zeros, scales, values = _grouped(w, size, group)
    stored: Stored = {
        f"{name}.qweight": ("I32", _pack(q, 4, 0)),
        f"{name}.qzeros": ("I32", _pack(zeros - 1, 4, 1)),
        f"{name}.scales": ("F16", scales),
        f"{name}.g_idx": ("I32", group),
    }
    return stored, values


def awq(name: str, w: Array, size: int = 32) -> tuple[Stored, Array]:
    """4 bits; the eight columns of a word in AWQ's order."""
    q, zeros, scales, values = _grouped(w, size, np.arange(w.shape[1]) // size)
    order = [0, 2, 4, 6, 1, 3, 5, 7]  # which column a place of a word holds

    def words(numbers: Array) -> Array:
        return _pack(numbers.reshape(len(numbers), -1, 8)[:, :, order].reshape(len(numbers), -1), 4, 1)

    stored: Stored = {
        f"{name}.qweight": ("I32", words(q)),
        f"{name}.qzeros": ("I32", words(zeros)),
        f"{name}.scales": ("F16", scales),
    }
    return stored, values


def mxfp4(name: str, w: Array) -> tuple[Stored, Array]:
    """gpt-oss' experts [n, rows, columns]: blocks of 32 with a power of two."""
    blocks = w.reshape(*w.shape[:2], -1, 32)
    exponent = np.floor(np.log2(np.abs(blocks).max(axis=-1))) - 1
    full = (2.0**exponent)[..., None]
    codes = np.abs((blocks / full)[..., None] - np.array(_FP4)).argmin(axis=-1)
    packed = (codes[..., ::2] | codes[..., 1::2] << 4).astype(np.uint8)
    stored: Stored = {
        f"{name}_blocks": ("U8", packed),
        f"{name}_scales": ("U8", (exponent + 127).astype(np.uint8)),
    }
    return stored, (np.array(_FP4)[codes] * full).reshape(w.shape)


Packer = Callable[[str, Array], tuple[Stored, Array]]
_CT = {"quant_method": "compressed-tensors"}
_INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
# name -> quantization_config, what packs a matrix
METHODS: dict[str, tuple[dict[str, Any], Packer]] = {
    "fp8": ({"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}, fp8),
    "fp8-blocks": (
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [24, 40]},
        lambda name, w: fp8(name, w, (24, 40)),
    ),
    "ct-float": (_CT | {"format": "float-quantized", "config_groups": {"group_0": {"weights": {}}}}, fp8_rows),
    "ct-int4": (_CT | {"format": "pack-quantized", "config_groups": {"group_0": {"weights": _INT4}}}, compressed),
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True}, gptq),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}, awq),
}


def save(path: Path, tensors: Stored) -> None:
    """A safetensors file; no library writes all of these types from NumPy."""
    header, blobs, offset = {}, [], 0
    for name, (kind, values) in tensors.items():
        blob = np.ascontiguousarray(values, dtype=_KINDS[kind]).tobytes()
        header[name] = {"dtype": kind, "shape": list(values.shape), "data_offsets": [offset, offset + len(blob)]}
        blobs.append(blob)
        offset += len(blob)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(blobs))


def pack_folder(folder: Path, tensors: dict[str, Array], method: str) -> dict[str, Array]:
    """Write a checkpoint's weights packed, and say so in config.json; the values that they stand for."""
    config, packer = METHODS[method]
    stored: Stored = {}
    values = dict(tensors)
    for name, w in tensors.items():
        if w.ndim == 2 and name.endswith("_proj.weight"):
            parts, values[name] = packer(name.removesuffix(".weight"), w.astype(np.float64))
            stored |= parts
        else:
            stored[name] = ("F32", w)
    save(folder / "model.safetensors", stored)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": config}))
    return values
