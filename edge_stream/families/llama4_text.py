"""Llama 4: experts behind a sigmoid beside a shared one, chunked attention, and in every fourth layer no positions."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_stream.families import Family, Gguf, Keys, ModelConfig, Place, Shapes
from edge_stream.families._layers import attention, expert_keys, expert_names, mlp, norms, read_experts

_STEP = 4  # every fourth layer is not rotated and sees everything
_FIXED = {"attention_chunk_size": 8192, "floor_scale": 8192, "attn_scale": 0.1}  # llama.cpp knows no others
_PLAIN_EXPERTS = 128  # with so many, llama.cpp does not normalise q and k


def _normal(config: dict[str, Any]) -> dict[str, Any]:
    dense, expert = config.get("intermediate_size_mlp", 16384), config.get("intermediate_size", 8192)
    return expert_names(config) | {"intermediate_size": dense, "moe_intermediate_size": expert}


def _read(keys: Keys, n_layer: int) -> dict[str, Any]:
    step = keys.count("interleave_moe_layer_step", 1)
    usual = list(range(step - 1, n_layer, step))
    if keys.get("moe_layers", usual) != usual:
        keys.refuse("moe_layers must be every interleave_moe_layer_step-th layer")
    for name, value in _FIXED.items():
        if keys.number(name, value) != value:
            keys.refuse(f"{name} other than {value:g} is not supported by llama.cpp")
    rotated = [int((layer + 1) % _STEP != 0) for layer in range(n_layer)]
    if list(keys.items("no_rope_layers", int, n_layer, rotated) or rotated) != rotated:
        keys.refuse("no_rope_layers must leave out every fourth layer")
    if keys.get("no_rope_layer_interval", _STEP) != _STEP or not keys.get("attn_temperature_tuning", True):
        keys.refuse("no_rope_layer_interval other than 4 and models without attn_temperature_tuning are not supported")
    words = ["chunked_attention" if rotates else "full_attention" for rotates in rotated]
    if list(keys.kinds("layer_types", ("chunked_attention", "full_attention"), n_layer, words)) != words:
        keys.refuse("layer_types must be chunked_attention but for every fourth layer")
    own = read_experts(keys)
    if keys.flag("use_qk_norm", True) == (own["n_expert"] == _PLAIN_EXPERTS):
        keys.refuse(f"llama.cpp normalises queries and keys (use_qk_norm) except with {_PLAIN_EXPERTS} experts")
    return own | {"step": step}


def _layer(model: ModelConfig, layer: int) -> Shapes:
    own, n_embd, p = model.own, model.n_embd, "feed_forward."
    shapes = attention(model) | norms(model, "input_layernorm", "post_attention_layernorm")
    if (layer + 1) % own["step"]:
        return shapes | mlp(model, p)
    n, n_ff = own["n_expert"], own["n_ff_expert"]
    return (
        shapes
        | mlp(model, f"{p}shared_expert.", n_ff)
        | {
            f"{p}router.weight": (n, n_embd),
            f"{p}experts.gate_up_proj": (n, n_embd, 2 * n_ff),
            f"{p}experts.down_proj": (n, n_ff, n_embd),
        }
    )


def _places(_model: ModelConfig, name: str) -> tuple[Place, ...]:
    if name.endswith("experts.down_proj"):
        return (Place(f"{name}.weight", np.transpose, each=True),)
    if not name.endswith("experts.gate_up_proj"):
        return (Place(name),)

    def half(i: int) -> Any:
        def change(a: NDArray[Any]) -> NDArray[Any]:
            return np.split(a.T, 2)[i]

        return change

    p = name.removesuffix("gate_up_proj")
    return tuple(Place(f"{p}{n}_proj.weight", half(i), each=True) for i, n in enumerate(("gate", "up")))


FAMILY = Family(
    model_type="llama4_text",
    aliases=("llama4",),
    hf_class="Llama4ForCausalLM",
    models="Llama 4 (text)",
    gguf=Gguf(
        arch="llama4",
        read_back=False,
        rope_scalings=("llama3",),
        partial_rotary=False,
        keys=lambda model: expert_keys(model) | {"interleave_moe_layer_step": model.own["step"]},
        places=_places,
    ),
    normal=_normal,
    read=_read,
    layer=_layer,
    left_out=("vision_model.",),
    defaults={
        "rms_norm_eps": 1e-5,
        "head_dim": 128,
        "num_key_value_heads": 8,
        "num_experts_per_tok": 1,
        "num_experts": 16,
        "rope_theta": 500000.0,
        "max_position_embeddings": 131072,
    },
)
