"""Tensors for llama.cpp: their names, layout, types and bytes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
from numpy.typing import NDArray

from edge_stream.errors import EdgeStreamError
from edge_stream.families import ModelConfig, Place, RopeScaling

if TYPE_CHECKING:
    from edge_stream.converters.source import Source

OUTTYPES = ("f32", "f16", "bf16", "q8_0", "auto")
_TYPES = {
    "f32": gguf.GGMLQuantizationType.F32,
    "f16": gguf.GGMLQuantizationType.F16,
    "bf16": gguf.GGMLQuantizationType.BF16,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
    "mxfp4": gguf.GGMLQuantizationType.MXFP4,
}
BLOCK_ELEMENTS = 1 << 22  # elements converted at a time
_F16_MAX = 65504.0


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of the output: `name` in GGUF, made from `parts` one after the other (none: from `values`).

    parts: a tensor of the source, and where it goes.
    """

    name: str
    shape: tuple[int, ...]
    type: gguf.GGMLQuantizationType
    parts: tuple[tuple[str, Place], ...] = ()
    values: tuple[float, ...] = ()

    @property
    def source(self) -> str | None:
        """The source's tensors in words."""
        more = f" and {len(self.parts) - 1} more" if len(self.parts) > 1 else ""
        return f"{self.parts[0][0]}{more}" if self.parts else None

    @property
    def nbytes(self) -> int:
        """Bytes in the output."""
        block, size = gguf.GGML_QUANT_SIZES[self.type]
        return math.prod(self.shape) // block * size


def choose_outtype(source: Source, outtype: str, *, exact: bool = False) -> str:
    """Resolve `auto` as convert_hf_to_gguf.py does: f16 if the embedding is stored as f16, else bf16.

    exact: for an intermediate file to be quantised, `auto` is lossless (f32 unless all are f16, or all bf16).
    """
    if outtype != "auto":
        return outtype
    if exact:
        stored = {t.dtype for t in source.tensors.values() if len(t.shape) > 1}
        return stored.pop() if stored in ({"f16"}, {"bf16"}) else "f32"
    return "f16" if source.tensors["model.embed_tokens.weight"].dtype == "f16" else "bf16"


def plan_tensors(source: Source, outtype: str) -> list[PlannedTensor]:
    """Every tensor of the output. Raises EdgeStreamError for one that llama.cpp does not have."""
    model, gguf_name = source.model, namer(source.model)
    planned = [
        PlannedTensor(f"{name}.weight", (len(values),), _TYPES["f32"], values=values)
        for name, values in rope_tensors(model).items()
    ]
    parts: dict[str, list[tuple[str, Place]]] = {}
    for name in source.tensors:
        for place in model.family.gguf.places(model, name):
            parts.setdefault(gguf_name(name, place), []).append((name, place))
    for mapped, found in parts.items():
        name, place = found[0]
        info = source.tensors[name]
        shape = _placed_shape(info.shape, place)
        shape = (len(found), *shape) if place.stack else shape
        kind = _TYPES["mxfp4"] if info.dtype == "mxfp4" else type_of(mapped, shape, outtype)
        planned.append(PlannedTensor(mapped, shape, kind, tuple(found)))
    return planned


def namer(model: ModelConfig) -> Callable[[str, Place], str]:
    """A function from a tensor and a place of it to GGUF's name; it raises EdgeStreamError if there is none."""
    by_name = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    # an architecture that the gguf package does not know yet has Llama's names, and its family places the others
    names = gguf.get_tensor_name_map(by_name.get(model.arch, gguf.MODEL_ARCH.LLAMA), model.n_layer)

    def name_of(name: str, place: Place) -> str:
        direct = place.name.startswith("blk.")
        mapped = place.name if direct else names.get_name(place.name, try_suffixes=(".weight", ".bias"))
        if mapped is None:
            raise EdgeStreamError(f"llama.cpp's {model.arch} has no place for tensor {name}")
        return mapped

    return name_of


def _placed_shape(shape: tuple[int, ...], place: Place) -> tuple[int, ...]:
    """The shape of a tensor after its change, which is tried on zeros that take no memory."""
    if place.change is None:
        return (max(place.rows, shape[0]), *shape[1:]) if place.rows else shape
    zeros = np.broadcast_to(np.float32(0.0), shape[1:] if place.each else shape)
    changed = place.change(zeros).shape
    return (shape[0], *changed) if place.each else changed


# llama.cpp computes with these in float32 (convert_hf_to_gguf.py, llama_tensor_get_type)
_FLOAT32 = re.compile(
    r"(?<!weight)$|_norm\.weight$|ffn_gate_inp(_shexp)?\.weight$|ssm_conv1d\.weight$|shortconv\.conv\.weight$"
    r"|altup_(correct|predict)_coef\.weight$"
)


def type_of(name: str, shape: tuple[int, ...], outtype: str) -> gguf.GGMLQuantizationType:
    """Vectors and what llama.cpp needs so become float32; matrices with rows that do not divide into blocks float16."""
    if len(shape) < 2 or _FLOAT32.search(name):
        return _TYPES["f32"]
    block, _ = gguf.GGML_QUANT_SIZES[_TYPES[outtype]]
    return _TYPES[outtype] if shape[-1] % block == 0 else _TYPES["f16"]


def rope_tensors(model: ModelConfig) -> dict[str, tuple[float, ...]]:
    """Divisors of the rotary frequencies that GGUF stores as tensors, by name without suffix."""
    scaling = model.rope_scaling
    if model.own.get("rope_freqs"):
        return {"rope_freqs": model.own["rope_freqs"]}
    if scaling is not None and scaling.kind == "llama3":
        return {"rope_freqs": llama3_divisors(scaling, model.rope_base, model.n_rot)}
    if scaling is not None and scaling.kind == "longrope":
        return {"rope_factors_long": scaling.long_factor, "rope_factors_short": scaling.short_factor}
    return {}


def llama3_divisors(scaling: RopeScaling, base: float, n_rot: int) -> tuple[float, ...]:
    """Llama 3.1's scaling as one divisor per pair: 1 for short wavelengths, factor for long ones, a blend between.

    Formula: transformers, modeling_rope_utils.py, _compute_llama3_parameters.
    """
    wavelength = 2 * np.pi * base ** (np.arange(0, n_rot, 2, dtype=np.float64) / n_rot)
    turns = scaling.n_ctx_orig / wavelength  # within the original context
    width = scaling.high_freq_factor - scaling.low_freq_factor  # 0 in Llama 4 Scout: nothing is in between
    blend = np.clip((turns - scaling.low_freq_factor) / (width or 1e-9), 0.0, 1.0)
    return tuple(float(x) for x in 1.0 / ((1.0 - blend) / scaling.factor + blend))


def encode(source: Source, tensor: PlannedTensor) -> Iterator[NDArray[Any]]:
    """The tensor's bytes in parts, in order: arrays of float32, float16, uint16 (bf16) or uint8 (blocks)."""
    if not tensor.parts:
        yield np.array(tensor.values, dtype=np.float32)
        return
    for name, place in tensor.parts:
        if tensor.type == _TYPES["mxfp4"]:
            for i in range(source.tensors[name].shape[0]):
                blocks = source.load_mxfp4(name, i)
                yield place.change(blocks) if place.change else blocks
        elif place.change is None:
            yield from _encode_rows(source, name, tensor)
            shape = source.tensors[name].shape
            for _ in range(place.rows - shape[0] if place.rows else 0):
                yield as_type(np.zeros((1, *shape[1:]), np.float32), tensor, name)
        elif place.each:
            for i in range(source.tensors[name].shape[0]):
                yield as_type(place.change(source.load(name, i, i + 1)[0].astype(np.float32)), tensor, name)
        else:
            yield as_type(place.change(source.load(name).astype(np.float32)), tensor, name)


def _encode_rows(source: Source, name: str, tensor: PlannedTensor) -> Iterator[NDArray[Any]]:
    """A tensor some rows at a time, so that memory does not grow with it."""
    model, shape = source.model, source.tensors[name].shape
    pairs = in_pairs(model, name)
    offset = model.family.norm_offset if name.endswith("norm.weight") else 0.0
    rows, width = shape[0], math.prod(shape[1:])
    step = max(1, BLOCK_ELEMENTS // max(1, width))
    if pairs:
        step = max(1, step // model.head_dim) * model.head_dim  # whole heads
    for start in range(0, rows, step):
        values = source.load(name, start, min(rows, start + step))
        if pairs:
            values = to_pairs(values, model.head_dim)
        if offset:
            values = values.astype(np.float32) + np.float32(offset)
        yield as_type(values, tensor, name)


def is_qk(name: str) -> bool:
    """Whether a tensor holds queries or keys before they are rotated."""
    return name.endswith(("q_proj.weight", "k_proj.weight", "q_proj.bias", "k_proj.bias"))


def in_pairs(model: ModelConfig, name: str) -> bool:
    """Whether llama.cpp has the rows of a tensor in another order, see to_pairs."""
    return model.family.gguf.permuted and is_qk(name)


def to_pairs(values: NDArray[Any], head_dim: int) -> NDArray[Any]:
    """Rows of q or k from halves (i, i + d/2), Hugging Face's order, to neighbours (2i, 2i + 1), llama.cpp's."""
    split = values.reshape(-1, 2, head_dim // 2, *values.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(values.shape)


def to_halves(values: NDArray[Any], head_dim: int) -> NDArray[Any]:
    """The inverse of to_pairs."""
    split = values.reshape(-1, head_dim // 2, 2, *values.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(values.shape)


def as_type(values: NDArray[Any], tensor: PlannedTensor, name: str) -> NDArray[Any]:
    """Values in a tensor's type. Raises EdgeStreamError if it cannot hold them. name: for the message."""
    if tensor.type == _TYPES["f16"] and values.dtype != np.float16:
        largest = max(float(values.max(initial=0.0)), -float(values.min(initial=0.0)))
        if largest > _F16_MAX:
            raise EdgeStreamError(f"tensor {name} holds {largest:g}, which float16 cannot: use --outtype bf16 or f32")
        return values.astype(np.float16)
    values = values if values.dtype == np.float32 else values.astype(np.float32)
    if tensor.type == _TYPES["f32"] or tensor.type == _TYPES["f16"]:
        return values if tensor.type == _TYPES["f32"] else values.astype(np.float16)
    if tensor.type == _TYPES["bf16"]:
        return round_bf16(values)
    parts = np.array_split(values, max(1, values.size // (1 << 20)))  # the quantiser makes several float copies
    return np.concatenate([gguf.quants.quantize(part, tensor.type) for part in parts if part.size])


def round_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """bfloat16 bit patterns, rounded to nearest even. For finite values."""
    bits = values.view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    odd += np.uint32(0x7FFF)
    odd += bits
    odd >>= np.uint32(16)
    rounded: NDArray[np.uint16] = odd.astype(np.uint16)
    return rounded
