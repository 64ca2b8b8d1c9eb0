"""Checkpoints whose weights are packed: dequantised on reading, some rows at a time; gpt-oss' MXFP4 also as it is.

Methods, by `quantization_config` in config.json: fp8 (Mistral, Qwen), compressed-tensors (floats, and integers packed
without zero points), gptq (4 and 8 bits), awq (4 bits), mxfp4. Formats: transformers' integrations, compressed_tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_stream.converters.safetensors_files import Entry
from edge_stream.converters.text import quoted
from edge_stream.errors import EdgeStreamError

Read = Callable[..., NDArray[Any]]  # (name, entry, start, stop)
Rows = Callable[[int, int], NDArray[np.float32]]
_UNUSED = ("activation_scale", "input_scale", "qscale_act", "k_scale", "v_scale", "output_scale")
_AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]  # where a word of eight has its columns (AutoAWQ)


@dataclass(frozen=True)
class Packed:
    """A tensor made of several. shape, dtype: as if it were stored plainly, or mxfp4."""

    shape: tuple[int, ...]
    dtype: str
    rows: Rows
    blocks: Callable[[int], NDArray[np.uint8]] | None = None  # mxfp4: an item of the first axis as ggml's blocks


Tensors = dict[str, "Entry | Packed"]


def unpack(tensors: Mapping[str, Entry], config: Any, read: Read) -> Tensors:
    """The tensors of a checkpoint, packed ones in place of their parts. config: its quantization_config, or None."""
    if config is None:
        return dict(tensors)
    method = config.get("quant_method") if isinstance(config, dict) else config
    makers: dict[Any, Callable[..., Tensors]] = {
        "fp8": _float8,
        "compressed-tensors": _compressed,
        "gptq": _gptq,
        "awq": _awq,
        "mxfp4": _mxfp4,
    }
    if method not in makers:
        raise EdgeStreamError(
            f"the checkpoint is quantised already, by {quoted(method, 40)}, which is not supported: "
            "convert the original"
        )
    kept = {name: entry for name, entry in tensors.items() if not name.endswith(_UNUSED)}
    return makers[method](kept, config, read)


def _parts(tensors: Mapping[str, Entry], base: str, *names: str) -> list[Entry]:
    for name in names:
        if base + name not in tensors:
            raise EdgeStreamError(f"the checkpoint has no tensor {quoted(base + name, 80)}, which {base[:-1]} needs")
    return [tensors[base + name] for name in names]


def _refuse(method: str, what: str, value: Any) -> EdgeStreamError:
    return EdgeStreamError(f"a checkpoint quantised by {method} with {what} {quoted(value, 40)} is not supported")


def _float8(tensors: Mapping[str, Entry], config: Mapping[str, Any], read: Read) -> Tensors:
    scales = ("weight_scale_inv", "weight_scale", "qscale_weight")
    found: Tensors = {name: entry for name, entry in tensors.items() if not name.endswith(scales)}
    block = config.get("weight_block_size")
    for name, entry in tensors.items():
        if name.endswith(".weight") and entry.dtype in ("f8_e4m3", "i8"):
            base = name.removesuffix("weight")
            scale = next((base + s for s in scales if base + s in tensors), None)
            if scale is None:
                raise EdgeStreamError(f"the checkpoint has no scale of {quoted(name, 80)}")
            found[name] = Packed(entry.shape, "f32", _scaled(name, entry, scale, tensors[scale], block, read))
    return found


def _scaled(name: str, entry: Entry, scale_name: str, scale: Entry, block: Any, read: Read) -> Rows:
    """Weights times a scale: one, one for each row, or one for each block of rows and columns."""
    rows, columns = entry.shape if len(entry.shape) == 2 else (-1, 1)
    if not (isinstance(block, list) and len(block) == 2 and all(type(b) is int and b > 0 for b in block)):
        block = [1, max(1, columns)]
    one = math.prod(scale.shape) == 1
    if scale.shape in ((rows,), (rows, 1)):
        block = [1, max(1, columns)]
    elif not one and scale.shape != (-(-rows // block[0]), -(-columns // block[1])):
        raise EdgeStreamError(f"tensor {scale_name} is {list(scale.shape)}, which does not fit {list(entry.shape)}")
    height, width = block

    def load(start: int, stop: int) -> NDArray[np.float32]:
        product: NDArray[np.float32] = read(name, entry, start, stop).astype(np.float32)
        if one:
            return product * read(scale_name, scale).astype(np.float32).reshape(())
        first = start // height  # the scales of these rows only
        factors = read(scale_name, scale, first, -(-stop // height)).astype(np.float32)
        factors = np.repeat(factors.reshape(-1, -(-columns // width)), height, axis=0)[start - first * height :]
        product *= np.repeat(factors[: stop - start], width, axis=1)[:, :columns]
        return product

    return load


def _compressed(tensors: Mapping[str, Entry], config: Mapping[str, Any], read: Read) -> Tensors:
    kind = config.get("format")
    groups = config.get("config_groups")
    weights = [g.get("weights") for g in groups.values() if isinstance(g, dict)] if isinstance(groups, dict) else []
    weight = next((w for w in weights if isinstance(w, dict)), {})
    if kind in ("float-quantized", "int-quantized", "naive-quantized"):
        block = weight.get("block_structure")
        return _float8(tensors, {"weight_block_size": block}, read)
    if kind != "pack-quantized" or len(weights) != 1:
        raise _refuse("compressed-tensors", "format", kind)
    bits = weight.get("num_bits")
    if bits not in (4, 8) or weight.get("symmetric") is not True or weight.get("actorder") not in (None, "static"):
        raise _refuse("compressed-tensors", "weights", f"{bits} bits, symmetric {weight.get('symmetric')}")
    endings = ("weight_packed", "weight_scale", "weight_shape")
    found: Tensors = {name: entry for name, entry in tensors.items() if not name.endswith(endings)}
    for name in tensors:
        if name.endswith(".weight_packed"):
            base = name.removesuffix("weight_packed")
            packed, scale, shape = _parts(tensors, base, *endings)
            n_rows, n_columns = (int(n) for n in read(base + "weight_shape", shape).reshape(-1)[:2])
            per_word = 32 // bits
            if packed.shape != (n_rows, -(-n_columns // per_word)) or len(scale.shape) != 2 or scale.shape[0] != n_rows:
                raise EdgeStreamError(f"tensor {quoted(name, 80)} does not fit its weight_shape {[n_rows, n_columns]}")

            def rows(
                start: int,
                stop: int,
                base: str = base,
                packed: Entry = packed,
                scale: Entry = scale,
                n: int = n_columns,
            ) -> NDArray[np.float32]:
                values = _words(read(base + "weight_packed", packed, start, stop), bits)[:, :n] - (1 << (bits - 1))
                factors = read(base + "weight_scale", scale, start, stop).astype(np.float32)
                product: NDArray[np.float32] = values * np.repeat(factors, n // factors.shape[1], axis=1)
                return product

            found[base + "weight"] = Packed((n_rows, n_columns), "f32", rows)
    return found


def _words(packed: NDArray[Any], bits: int) -> NDArray[np.float32]:
    """32-bit words [n, m] as the numbers that they hold, lowest bits first: [n, m * 32 / bits]."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    split = (packed.astype(np.uint32)[:, :, None] >> shifts) & np.uint32((1 << bits) - 1)
    numbers: NDArray[np.float32] = split.reshape(len(packed), -1).astype(np.float32)
    return numbers


def _gptq(tensors: Mapping[str, Entry], config: Mapping[str, Any], read: Read) -> Tensors:
    bits, offset = config.get("bits"), 0 if config.get("checkpoint_format") == "gptq_v2" else 1
    if bits not in (4, 8):
        raise _refuse("gptq", "bits", bits)

    def whole(base: str, parts: list[Entry]) -> NDArray[np.float32]:
        qweight, qzeros, scales = (
            read(base + n, e) for n, e in zip(("qweight", "qzeros", "scales"), parts, strict=True)
        )
        values = _words(np.ascontiguousarray(qweight.T), bits)  # [out, in]
        zeros = _words(qzeros, bits) + offset  # [groups, out]
        index = tensors.get(base + "g_idx")
        size = values.shape[1] // len(zeros)
        group = np.arange(values.shape[1]) // size if index is None else read(base + "g_idx", index).astype(np.int64)
        if group.min(initial=0) < 0 or group.max(initial=0) >= len(zeros) or group.shape != values.shape[1:]:
            raise EdgeStreamError(f"tensor {quoted(base + 'g_idx', 80)} names a group that does not exist")
        weight: NDArray[np.float32] = (values - zeros.T[:, group]) * scales.astype(np.float32).T[:, group]
        return weight

    return _transposed(tensors, whole, lambda q: (q.shape[1], q.shape[0] * 32 // bits))


def _awq(tensors: Mapping[str, Entry], config: Mapping[str, Any], read: Read) -> Tensors:
    bits, version = config.get("bits"), str(config.get("version", "gemm")).lower()
    if bits != 4 or version != "gemm":
        raise _refuse("awq", "bits and version", f"{bits}, {version}")

    def words(packed: NDArray[Any]) -> NDArray[np.float32]:
        split = _words(packed, 4).reshape(len(packed), -1, 8)
        return split[:, :, _AWQ_ORDER].reshape(len(packed), -1)

    def whole(base: str, parts: list[Entry]) -> NDArray[np.float32]:
        qweight, qzeros, scales = (
            read(base + n, e) for n, e in zip(("qweight", "qzeros", "scales"), parts, strict=True)
        )
        values, zeros = words(qweight), words(qzeros)  # [in, out], [groups, out]
        size = len(values) // len(zeros)
        weight = (values - np.repeat(zeros, size, axis=0)) * np.repeat(scales.astype(np.float32), size, axis=0)
        return np.ascontiguousarray(weight.T)

    return _transposed(tensors, whole, lambda q: (q.shape[1] * 8, q.shape[0]))


def _transposed(
    tensors: Mapping[str, Entry],
    whole: Callable[[str, list[Entry]], NDArray[np.float32]],
    shape_of: Callable[[Entry], tuple[int, ...]],
) -> Tensors:
    """gptq's and awq's tensors: qweight, qzeros and scales, in by out. Decoded whole; the last one is kept."""
    endings = ("qweight", "qzeros", "scales")
    found: Tensors = {n: e for n, e in tensors.items() if not n.endswith(tuple(f".{x}" for x in (*endings, "g_idx")))}
    last: dict[str, NDArray[np.float32]] = {}
    for name in tensors:
        if name.endswith(".qweight"):
            base = name.removesuffix("qweight")
            parts = _parts(tensors, base, *endings)
            if any(len(entry.shape) != 2 for entry in parts) or parts[1].shape[0] < 1:
                raise EdgeStreamError(f"tensor {quoted(name, 80)} and its scales are not matrices")

            def rows(start: int, stop: int, base: str = base, parts: list[Entry] = parts) -> NDArray[np.float32]:
                if base not in last:
                    last.clear()
                    try:
                        last[base] = whole(base, parts)
                    except ValueError as error:
                        raise EdgeStreamError(f"the parts of {quoted(base + 'weight', 80)} do not fit") from error
                return last[base][start:stop]

            found[base + "weight"] = Packed(shape_of(parts[0]), "f32", rows)
    return found


def _mxfp4(tensors: Mapping[str, Entry], _config: Mapping[str, Any], read: Read) -> Tensors:
    found: Tensors = {n: e for n, e in tensors.items() if not n.endswith(("_blocks", "_scales"))}
    for name in tensors:
        if name.endswith("_blocks"):
            base = name.removesuffix("blocks")
            blocks, scales = _parts(tensors, base, "blocks", "scales")
            if len(blocks.shape) != 4 or blocks.shape != (*scales.shape, 16) or blocks.dtype != "u8":
                raise EdgeStreamError(f"tensor {quoted(name, 80)} does not hold blocks of 32 for its scales")

            def block(i: int, base: str = base, blocks: Entry = blocks, scales: Entry = scales) -> NDArray[np.uint8]:
                pairs = read(base + "blocks", blocks, i, i + 1)[0]  # [rows, n, 16]: elements 2j and 2j + 1 in a byte
                codes = np.stack([pairs & 15, pairs >> 4], axis=-1).reshape(*pairs.shape[:2], 32)
                ggml = codes[..., :16] | (codes[..., 16:] << 4)  # ggml: elements j and j + 16
                scale = read(base + "scales", scales, i, i + 1)[0][..., None]
                return np.concatenate([scale, ggml], axis=-1).reshape(len(pairs), -1)

            def rows(start: int, stop: int, block: Callable[[int], NDArray[np.uint8]] = block) -> NDArray[np.float32]:
                import gguf

                kind = gguf.GGMLQuantizationType.MXFP4
                return np.stack([gguf.quants.dequantize(block(i), kind) for i in range(start, stop)])

            shape = (*blocks.shape[:2], blocks.shape[2] * 32)
            found[base.removesuffix("_")] = Packed(shape, "mxfp4", rows, block)
    return found
