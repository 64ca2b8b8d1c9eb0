"""gpt-oss: experts with biases, a sink per head, a sliding window in every other layer.

Experts of a layer are in one tensor, gate and up alternating. Published checkpoints store them as MXFP4, and they stay
so; in others they are transposed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_stream.families import Family, Gguf, Keys, ModelConfig, Place, Shapes
from edge_stream.families._layers import attention, expert_keys, expert_names, norms, read_experts


def _normal(config: dict[str, Any]) -> dict[str, Any]:
    used = config.get("num_experts_per_tok", config.get("experts_per_token", 4))
    width = config.get("intermediate_size")
    config = expert_names(config) | {"num_experts_per_tok": used, "moe_intermediate_size": width}
    rope = config.get("rope_parameters") or config.get("rope_scaling")
    return config if rope else config | {"rope_scaling": _ROPE}


_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def _read(keys: Keys, _n_layer: int) -> dict[str, Any]:
    if keys.number("swiglu_limit", 7.0) != 7.0 or keys.number("swiglu_alpha", 1.702) != 1.702:
        keys.refuse("swiglu_limit other than 7 and swiglu_alpha other than 1.702 are not supported")
    return read_experts(keys)


def _layer(model: ModelConfig, _layer: int) -> Shapes:
    n, n_ff, n_embd = model.own["n_expert"], model.n_ff, model.n_embd
    flip = -1 if model.own.get("mxfp4") else 1
    return (
        attention(model)
        | norms(model, "input_layernorm", "post_attention_layernorm")
        | {
            "self_attn.sinks": (model.n_head,),
            "mlp.router.weight": (n, n_embd),
            "mlp.router.bias": (n,),
            "mlp.experts.gate_up_proj": (n, *(n_embd, 2 * n_ff)[::flip]),
            "mlp.experts.gate_up_proj_bias": (n, 2 * n_ff),
            "mlp.experts.down_proj": (n, *(n_ff, n_embd)[::flip]),
            "mlp.experts.down_proj_bias": (n, n_embd),
        }
    )


def _places(model: ModelConfig, name: str) -> tuple[Place, ...]:
    if name.endswith(".sinks"):
        return (Place(f"{name}.weight"),)
    rows = (lambda a: a) if model.own.get("mxfp4") else np.transpose  # MXFP4 is stored as it is used

    def every_other(first: int) -> Any:
        def change(a: NDArray[Any]) -> NDArray[Any]:
            return rows(a)[first::2]

        return change

    p, _, ending = name.rpartition(".")
    if ending == "down_proj":
        return (Place(f"{name}.weight", rows, each=True),)
    if ending == "down_proj_bias":
        return (Place(f"{p}.down_proj.bias"),)
    if ending == "gate_up_proj":
        return tuple(Place(f"{p}.{n}_proj.weight", every_other(i), each=True) for i, n in enumerate(("gate", "up")))
    if ending == "gate_up_proj_bias":
        halves = {"gate": lambda a: a[:, ::2], "up": lambda a: a[:, 1::2]}
        return tuple(Place(f"{p}.{n}_proj.bias", change) for n, change in halves.items())
    return (Place(name),)


def _keys(model: ModelConfig) -> dict[str, Any]:
    return expert_keys(model) | {"attention.sliding_window_pattern": None}  # llama.cpp knows it


def _lacks(model: ModelConfig) -> str | None:
    usual = tuple(layer % 2 == 0 for layer in range(model.n_layer))
    return None if model.swa_layers == usual else "needs a sliding window in every other layer, the first included"


FAMILY = Family(
    model_type="gpt_oss",
    hf_class="GptOssForCausalLM",
    models="gpt-oss (MXFP4 stays MXFP4)",
    gguf=Gguf(
        arch="gpt-oss",
        read_back=False,
        rope_scalings=("yarn",),
        rounds_yarn=True,
        partial_rotary=False,
        qkv_bias=True,
        o_bias=True,
        masks_window=True,
        keys=_keys,
        places=_places,
        lacks=_lacks,
    ),
    normal=_normal,
    read=_read,
    layer=_layer,
    windowed=lambda layer, _count: layer % 2 == 0,
    defaults={
        "rms_norm_eps": 1e-5,
        "head_dim": 64,
        "num_key_value_heads": 8,
        "sliding_window": 128,
        "attention_bias": True,
        "rope_theta": 150000.0,
        "max_position_embeddings": 131072,
    },
)
