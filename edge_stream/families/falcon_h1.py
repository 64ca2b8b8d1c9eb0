"""Falcon-H1: attention and a Mamba-2 mixer side by side in every layer, with factors everywhere, which GGUF has in the
weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_stream.families import Family, Gguf, Keys, ModelConfig, Place, Shapes
from edge_stream.families._layers import attention, mlp, norms
from edge_stream.families._mamba import check, read_mamba

_FACTORS = ("embedding", "lm_head", "key", "attention_in", "attention_out", "ssm_in", "ssm_out")


def _read(keys: Keys, _n_layer: int) -> dict[str, Any]:
    check(keys)
    for name in ("mamba_proj_bias", "projectors_bias", "attention_bias"):
        if keys.flag(name, False):
            keys.refuse(f"{name} is not supported")
    normed = keys.flag("mamba_rms_norm", False)
    if normed and keys.flag("mamba_norm_before_gate", True):
        keys.refuse("mamba_norm_before_gate is not supported")
    inner = keys.get("mamba_d_ssm", None) or keys.count("mamba_expand", 2) * keys.count("hidden_size")
    own: dict[str, Any] = {name: keys.number(f"{name}_multiplier", 1.0, -1e9) for name in _FACTORS}
    own["mlp"] = keys.items("mlp_multipliers", float, 2, (1.0, 1.0))
    own["ssm"] = keys.items("ssm_multipliers", float, 5, (1.0,) * 5)
    own["mamba"] = read_mamba(keys, inner, normed)
    return own


def _layer(model: ModelConfig, _layer: int) -> Shapes:
    mixers: Shapes = attention(model) | model.own["mamba"].tensors(model, "mamba.")
    return norms(model, "input_layernorm", "pre_ff_layernorm") | mixers | mlp(model, "feed_forward.")


def _times(factor: float) -> Callable[[NDArray[Any]], NDArray[Any]]:
    return lambda a: a * np.float32(factor)


def _places(model: ModelConfig, name: str) -> tuple[Place, ...]:
    own, mamba = model.own, model.own["mamba"]
    if name == "model.embed_tokens.weight":
        embedding = Place(name, _times(own["embedding"]))
        if not model.tied or own["embedding"] == own["lm_head"]:
            return (embedding,)
        return (embedding, Place("lm_head.weight", _times(own["lm_head"])))
    if name == "model.norm.weight":
        return (Place("model.final_layernorm.weight"),)
    if name.endswith("mamba.in_proj.weight"):  # gate, x, B, C, time step
        sizes = (mamba.inner, mamba.inner, mamba.groups * mamba.state, mamba.groups * mamba.state, mamba.heads)
        factors = np.repeat(np.array(own["ssm"]) * own["ssm_in"], sizes).astype(np.float32)[:, None]
        return (Place(name, lambda a: a * factors),)
    factors_of = {
        "lm_head.weight": own["lm_head"],
        "q_proj.weight": own["attention_in"],
        "k_proj.weight": own["attention_in"] * own["key"],
        "v_proj.weight": own["attention_in"],
        "o_proj.weight": own["attention_out"],
        "mamba.out_proj.weight": own["ssm_out"],
        "gate_proj.weight": own["mlp"][0],
        "down_proj.weight": own["mlp"][1],
    }
    for ending, factor in factors_of.items():
        if name.endswith(ending) and factor != 1.0:
            return (Place(name, _times(factor)),)
    return ((mamba.place(name) if ".mamba." in name else None) or Place(name),)


FAMILY = Family(
    model_type="falcon_h1",
    hf_class="FalconH1ForCausalLM",
    models="Falcon-H1",
    gguf=Gguf(
        arch="falcon-h1",
        read_back=False,
        partial_rotary=False,
        keys=lambda model: model.own["mamba"].keys(),
        places=_places,
    ),
    read=_read,
    layer=_layer,
    prefixes={"model.final_layernorm.": "model.norm."},
    defaults={"rms_norm_eps": 1e-5, "num_key_value_heads": 8, "max_position_embeddings": 8192},
)
