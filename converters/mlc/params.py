"""MLC's parameters of a model: their names, the checkpoint tensors they are made from, and their values.

Names: mlc-llm's model definitions and loaders, python/mlc_llm/model/*/*_{model,loader}.py. q, k and v are fused in most
models, gate and up in all, and norm weights stored minus 1 get it back. edge_stream/families has the rest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edge_stream.converters.mlc.quantization import Quantization, pack, to_dtype
from edge_stream.converters.mlc.tensor_cache import stored_nbytes
from edge_stream.errors import EdgeStreamError
from edge_stream.families import Mlc, ModelConfig

if TYPE_CHECKING:
    from edge_stream.converters.source import Source

_BLOCK_ELEMENTS = 1 << 21  # weights loaded and quantised at a time
BLOCK_BYTES = 24 * _BLOCK_ELEMENTS  # roughly the memory for that


@dataclass(frozen=True)
class Param:
    """A parameter before quantisation. parts: names in the checkpoint, concatenated along rows."""

    name: str  # MLC's, with .weight or .bias
    parts: tuple[str, ...]
    kind: str  # linear, experts (a matrix each), embedding, or plain (never quantised)
    offset: float = 0.0  # added to every element
    shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the converted model. dtype as the runtime holds it."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """In the shard."""
        return stored_nbytes(self.shape, self.dtype)


def stored_bytes(tensor: StoredTensor) -> int:
    """Bytes in memory."""
    return math.prod(tensor.shape) * np.dtype(tensor.dtype).itemsize


def list_params(source: Source) -> list[Param]:
    """Every parameter in model order. Raises EdgeStreamError for what MLC's model cannot represent."""
    model, family = source.model, source.model.family
    mlc = check_supported(model)

    def param(name: str, parts: tuple[str, ...] = (), kind: str = "") -> Param:
        shapes = [source.tensors[part].shape for part in parts or (name,)]
        shape = (sum(s[0] for s in shapes), *shapes[0][1:])
        offset = family.norm_offset if len(shape) == 1 and name.endswith("norm.weight") else 0.0
        kind = kind or ("linear" if len(shape) == 2 else "plain")
        return Param(mlc.rename(name), parts or (name,), kind, offset, shape)

    params = [param("model.embed_tokens.weight", kind="embedding")]
    for layer in range(model.n_layer):
        p = f"model.layers.{layer}."
        params.append(param(p + "input_layernorm.weight"))
        attn = p + "self_attn."
        if family.fused:
            params.append(param(attn + "qkv_proj.weight"))
        elif not mlc.qkv_name:
            params += [param(f"{attn}{c}_proj.weight") for c in "qkv"]
        else:
            for suffix in ("weight", "bias") if model.qkv_bias else ("weight",):
                parts = tuple(f"{attn}{c}_proj.{suffix}" for c in "qkv")
                params.append(param(f"{attn}{mlc.qkv_name}.{suffix}", parts))
        if family.qk_norm:
            params += [param(f"{attn}{c}_norm.weight") for c in "qk"]
        params.append(param(attn + "o_proj.weight"))
        params.append(param(p + "post_attention_layernorm.weight"))
        if family.post_norms:
            params.append(param(p + "pre_feedforward_layernorm.weight"))
            params.append(param(p + "post_feedforward_layernorm.weight"))
        if family.experts:
            params += _experts(source, layer)
            continue
        gate_up = () if family.fused else (p + "mlp.gate_proj.weight", p + "mlp.up_proj.weight")
        params.append(param(p + "mlp.gate_up_proj.weight", gate_up))
        params.append(param(p + "mlp.down_proj.weight"))
    params.append(param("model.norm.weight"))
    if not model.tied:
        params.append(param("lm_head.weight"))
    return params


def _experts(source: Source, layer: int) -> Iterator[Param]:
    """The router, and the experts' matrices stacked: gate's rows, then up's, of the first one, of the second, ..."""
    own, p = source.model.own, f"model.layers.{layer}.mlp."
    n, n_ff, n_embd = own["n_expert"], own["n_ff_expert"], source.model.n_embd
    each = {"gate_up": ("gate_proj.weight", "up_proj.weight"), "down": ("down_proj.weight",)}
    shapes = {"gate_up": (n, 2 * n_ff, n_embd), "down": (n, n_embd, n_ff)}
    yield Param(p + "gate.weight", (p + "gate.weight",), "plain", 0.0, (n, n_embd))
    for name, parts in each.items():
        whole = (f"{p}experts.{name}_proj",)
        single = tuple(f"{p}experts.{i}.{part}" for i in range(n) for part in parts)
        yield Param(f"{p}moe_{name}_proj.weight", whole if own.get("fused") else single, "experts", 0.0, shapes[name])


def check_supported(model: ModelConfig) -> Mlc:
    """The family in MLC. Raises EdgeStreamError if MLC would compute something different from the checkpoint."""
    family, mlc = model.family, model.family.mlc
    name = family.hf_class.removesuffix("ForCausalLM")
    if not mlc.known:
        raise EdgeStreamError(f"MLC has no model of {name}")
    if model.o_bias or (model.qkv_bias and not mlc.qkv_bias):
        raise EdgeStreamError(f"MLC's {name} has no place for the attention biases of this checkpoint")
    scaling = model.rope_scaling
    if scaling is not None and scaling.kind not in mlc.rope_scalings:
        raise EdgeStreamError(f"MLC's {name} does not support rope scaling {scaling.kind}, which this checkpoint needs")
    lacking = mlc.lacks(model)
    if lacking is not None:
        raise EdgeStreamError(f"MLC's {name} {lacking}")
    return mlc


def stored_tensors(param: Param, q: Quantization) -> list[StoredTensor]:
    """The stored tensors of a parameter: itself, or q_weight and q_scale."""
    if param.kind == "plain" or not q.bits:
        return [StoredTensor(param.name, param.shape, q.dtype)]
    *n, rows, columns = param.shape
    weight, scale = q.shapes(rows, columns)
    if q.transposed and param.kind == "linear":
        weight, scale = weight[::-1], scale[::-1]
    base = param.name.removesuffix(".weight")
    return [
        StoredTensor(base + ".q_weight", (*n, *weight), "uint32"),
        StoredTensor(base + ".q_scale", (*n, *scale), q.dtype),
    ]


def convert_param(source: Source, param: Param, q: Quantization) -> Iterator[tuple[StoredTensor, NDArray[Any]]]:
    """Load a parameter a few rows at a time, and yield its stored tensors."""
    stored = stored_tensors(param, q)
    made = [np.empty(t.shape, t.dtype) for t in stored]
    arrays = [array.reshape(-1, array.shape[-1]) if param.kind == "experts" else array for array in made]
    row = 0
    for block in _row_blocks(source, param, q):
        rows = slice(row, row + len(block))
        row += len(block)
        if len(stored) == 1:
            arrays[0][rows] = block
            continue
        for array, part in zip(arrays, pack(block, q), strict=True):
            if q.transposed and param.kind == "linear":
                array[:, rows] = part.T
            else:
                array[rows] = part
    yield from zip(stored, made, strict=True)


def _row_blocks(source: Source, param: Param, q: Quantization) -> Iterator[NDArray[np.floating[Any]]]:
    for part in param.parts:
        shape = source.tensors[part].shape
        columns = math.prod(shape[1:])
        # whole heads, so that a GGUF source can undo its row order in every block
        unit = source.model.head_dim if len(shape) == 2 else shape[0] if len(shape) == 1 else 1
        step = max(1, _BLOCK_ELEMENTS // columns // unit) * unit
        for start in range(0, shape[0], step):
            block = source.load(part, start, min(shape[0], start + step))
            if param.offset:
                block = block.astype(np.float32) + np.float32(param.offset)
            yield to_dtype(block.reshape(-1, shape[-1]) if len(shape) == 3 else block, q.dtype, part)
