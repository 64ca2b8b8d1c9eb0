"""Qwen3.5 and 3.6: in three of four layers a gated delta net instead of attention; attention has gates.

Norm weights are stored minus 1. Where the delta net has more value heads than key heads, llama.cpp wants the value
heads of all keys in turn, not all those of one key together.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_stream.families import Family, Gguf, Keys, ModelConfig, Place, Shapes
from edge_stream.families._layers import attention, mlp, norms
from edge_stream.families._mamba import squeeze

_SECTIONS = [11, 11, 10]
_SIZES = ("conv_kernel_dim", "key_head_dim", "value_head_dim", "num_key_heads", "num_value_heads")


def read(keys: Keys, n_layer: int) -> dict[str, Any]:
    """Which layers are delta nets, and their sizes."""
    step = keys.count("full_attention_interval", 4)
    usual = ["full_attention" if (i + 1) % step == 0 else "linear_attention" for i in range(n_layer)]
    types = keys.kinds("layer_types", ("linear_attention", "full_attention"), n_layer, usual)
    rope = keys.get("rope_parameters", None) or keys.get("rope_scaling", None) or {}
    sizes: dict[str, Any] = {name: keys.count(f"linear_{name}") for name in _SIZES}
    if sizes["num_value_heads"] % sizes["num_key_heads"]:
        keys.refuse("linear_num_value_heads is no multiple of linear_num_key_heads")
    sections = rope.get("mrope_section") or _SECTIONS
    return sizes | {"delta": [kind == "linear_attention" for kind in types], "interval": step, "sections": sections}


def layer(model: ModelConfig, layer: int) -> Shapes:
    """The tensors of a layer."""
    return mixer(model, layer) | mlp(model)


def mixer(model: ModelConfig, layer: int) -> Shapes:
    """Norms, and attention or a delta net."""
    shapes, own, p = norms(model, "input_layernorm", "post_attention_layernorm"), model.own, "linear_attn."
    if not own["delta"][layer]:
        return shapes | attention(model, "head", gate=True)
    n_k, n_v = own["num_key_heads"], own["num_value_heads"]
    keys, values = own["key_head_dim"] * n_k, own["value_head_dim"] * n_v
    return shapes | {
        f"{p}in_proj_qkv.weight": (2 * keys + values, model.n_embd),
        f"{p}in_proj_z.weight": (values, model.n_embd),
        f"{p}in_proj_a.weight": (n_v, model.n_embd),
        f"{p}in_proj_b.weight": (n_v, model.n_embd),
        f"{p}conv1d.weight": (2 * keys + values, 1, own["conv_kernel_dim"]),
        f"{p}A_log": (n_v,),
        f"{p}dt_bias": (n_v,),
        f"{p}norm.weight": (own["value_head_dim"],),
        f"{p}out_proj.weight": (model.n_embd, values),
    }


def places(model: ModelConfig, name: str) -> tuple[Place, ...]:
    """Where a tensor goes."""
    if ".linear_attn." not in name:
        return (Place(name, (lambda a: a + 1) if name.endswith("norm.weight") else None),)
    own = model.own
    heads, width = own["num_key_heads"], own["value_head_dim"]
    n_qk = 2 * own["key_head_dim"] * heads
    ending = name.rpartition("linear_attn.")[2]
    if ending == "norm.weight":
        return (Place(name),)

    def turn(a: NDArray[Any], size: int = 1) -> NDArray[Any]:  # value heads of `size` rows, regrouped
        split = a.reshape(heads, -1, size, *a.shape[1:])
        return np.ascontiguousarray(split.swapaxes(0, 1)).reshape(a.shape)

    def tail(a: NDArray[Any]) -> NDArray[Any]:  # q and k come first
        return np.concatenate([a[:n_qk], turn(a[n_qk:], width)])

    changes = {
        "in_proj_qkv.weight": tail,
        "in_proj_z.weight": lambda a: turn(a, width),
        "conv1d.weight": lambda a: tail(squeeze(a)),
        "A_log": lambda a: turn(-np.exp(a)),
        "out_proj.weight": lambda a: turn(a.T, width).T,
    }
    return (Place(name.replace(".dt_bias", ".dt_proj.bias"), changes.get(ending, turn)),)


def keys(model: ModelConfig) -> dict[str, Any]:
    """Metadata."""
    own = model.own
    return {
        "ssm.conv_kernel": own["conv_kernel_dim"],
        "ssm.state_size": own["key_head_dim"],
        "ssm.group_count": own["num_key_heads"],
        "ssm.time_step_rank": own["num_value_heads"],
        "ssm.inner_size": own["value_head_dim"] * own["num_value_heads"],
        "attention.recurrent_layers": own["delta"],
        "full_attention_interval": own["interval"],
        "rope.dimension_sections": [*own["sections"], 0],
    }


def lacks(model: ModelConfig) -> str | None:
    """What llama.cpp cannot represent."""
    return None if len(set(model.own["delta"])) == 2 else "needs layers with a delta net and layers with attention"


FAMILY = Family(
    model_type="qwen3_5_text",
    aliases=("qwen3_5",),
    hf_class="Qwen3_5ForCausalLM",
    models="Qwen3.5, 3.6 (text)",
    gguf=Gguf(arch="qwen35", read_back=False, keys=keys, places=places, lacks=lacks),
    read=read,
    layer=layer,
    left_out=("mtp.", "model.visual.", "visual."),
    defaults={
        "rms_norm_eps": 1e-6,
        "head_dim": 256,
        "num_key_value_heads": 4,
        "partial_rotary_factor": 0.25,
        "max_position_embeddings": 32768,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
    },
)
