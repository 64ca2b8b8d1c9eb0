"""Qwen3.5 and 3.6 with experts, and one that every token uses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from edge_stream.families import Keys, ModelConfig, Place, Shapes
from edge_stream.families._layers import expert_keys, expert_names, mlp, place_experts, read_experts, routed
from edge_stream.families.qwen3_5_text import FAMILY as QWEN3_5
from edge_stream.families.qwen3_5_text import keys, mixer, places, read

_DEFAULTS = {
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "intermediate_size": 512,
    "num_key_value_heads": 2,
}


def _read(config: Keys, n_layer: int) -> dict[str, Any]:
    shared = {"n_ff_shared": config.count("shared_expert_intermediate_size")}
    return read(config, n_layer) | read_experts(config) | shared


def _layer(model: ModelConfig, layer: int) -> Shapes:
    gate: Shapes = {"mlp.shared_expert_gate.weight": (1, model.n_embd)}
    return mixer(model, layer) | routed(model) | mlp(model, "mlp.shared_expert.", model.own["n_ff_shared"]) | gate


def _keys(model: ModelConfig) -> dict[str, Any]:
    return keys(model) | expert_keys(model) | {"expert_shared_feed_forward_length": model.own["n_ff_shared"]}


def _places(model: ModelConfig, name: str) -> tuple[Place, ...]:
    return place_experts(name) or places(model, name)


FAMILY = replace(
    QWEN3_5,
    model_type="qwen3_5_moe_text",
    aliases=("qwen3_5_moe",),
    hf_class="Qwen3_5MoeForCausalLM",
    models="Qwen3.5, 3.6 with experts (text)",
    gguf=replace(QWEN3_5.gguf, arch="qwen35moe", keys=_keys, places=_places),
    normal=expert_names,
    read=_read,
    layer=_layer,
    defaults=dict(QWEN3_5.defaults) | _DEFAULTS,
)
