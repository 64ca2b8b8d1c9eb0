"""LFM2 with experts, but for the first layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from edge_stream.families import Keys, ModelConfig, Place, Shapes
from edge_stream.families._layers import expert_keys, expert_names, experts, mlp, read_experts, stacked
from edge_stream.families.lfm2 import FAMILY as LFM2
from edge_stream.families.lfm2 import keys, lacks, mixer, normal, places, read

_NAMES = ("w1", "w3", "w2")
_SIGMOID = 2  # llama.cpp's number for it


def _normal(config: dict[str, Any]) -> dict[str, Any]:
    return normal(expert_names(config) | {"block_auto_adjust_ff_dim": False})


def _read(config: Keys, n_layer: int) -> dict[str, Any]:
    if not (config.flag("use_expert_bias", True) and config.flag("norm_topk_prob", True)):
        config.refuse("use_expert_bias and norm_topk_prob must be true")
    if config.number("routed_scaling_factor", 1.0) != 1.0:
        config.refuse("routed_scaling_factor other than 1 is not supported")
    dense = config.count("num_dense_layers", 2, least=0)
    return read(config, n_layer) | read_experts(config) | {"n_dense": dense}


def _layer(model: ModelConfig, layer: int) -> Shapes:
    own, p = model.own, "feed_forward."
    if layer < own["n_dense"]:
        return mixer(model, layer) | mlp(model, p, names=_NAMES)
    router: Shapes = {f"{p}gate.weight": (own["n_expert"], model.n_embd), f"{p}expert_bias": (own["n_expert"],)}
    return mixer(model, layer) | router | experts(model, own["n_expert"], own["n_ff_expert"], p, _NAMES)


def _places(model: ModelConfig, name: str) -> tuple[Place, ...]:
    if one := stacked(name):
        return (Place(one.name.removeprefix("model."), stack=True),)
    return (Place(f"{name}.bias"),) if name.endswith("expert_bias") else places(model, name)


def _keys(model: ModelConfig) -> dict[str, Any]:
    dense = {"leading_dense_block_count": model.own["n_dense"], "expert_gating_func": _SIGMOID}
    return keys(model) | expert_keys(model) | dense


def _lacks(model: ModelConfig) -> str | None:
    return lacks(model) if model.tied else "has no output matrix of its own, and this checkpoint has one"


FAMILY = replace(
    LFM2,
    model_type="lfm2_moe",
    hf_class="Lfm2MoeForCausalLM",
    models="LFM2, LFM2.5 with experts",
    gguf=replace(LFM2.gguf, arch="lfm2moe", keys=_keys, places=_places, lacks=_lacks),
    normal=_normal,
    read=_read,
    layer=_layer,
    defaults=dict(LFM2.defaults) | {"num_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 1792},
)
