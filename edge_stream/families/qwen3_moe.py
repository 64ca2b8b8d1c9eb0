"""Qwen3 with experts in place of every MLP."""

from __future__ import annotations

from typing import Any

from edge_stream.families import Family, Gguf, Keys, Mlc, ModelConfig, Place, Shapes
from edge_stream.families._layers import (
    attention,
    expert_keys,
    expert_names,
    norms,
    place_experts,
    read_experts,
    routed,
)


def read(keys: Keys, n_layer: int) -> dict[str, Any]:
    """The experts."""
    if not keys.flag("norm_topk_prob", False):
        keys.refuse("norm_topk_prob = false is not supported: llama.cpp makes the experts' weights add up to 1")
    if keys.count("decoder_sparse_step", 1) != 1 or keys.get("mlp_only_layers", None):
        keys.refuse("layers without experts (decoder_sparse_step, mlp_only_layers) are not supported")
    return read_experts(keys)


def layer(model: ModelConfig, _layer: int) -> Shapes:
    """The tensors of a layer."""
    return norms(model, "input_layernorm", "post_attention_layernorm") | attention(model, "head") | routed(model)


def places(model: ModelConfig, name: str) -> tuple[Place, ...]:
    """Experts go into one tensor."""
    return place_experts(name, model.own.get("transposed", False)) or (Place(name),)


def _mlc_config(model: ModelConfig, config: dict[str, Any]) -> dict[str, Any]:
    own = model.own
    return config | {
        "attention_bias": model.qkv_bias,
        "num_experts": own["n_expert"],
        "num_experts_per_tok": own["n_expert_used"],
        "moe_intermediate_size": own["n_ff_expert"],
        "decoder_sparse_step": 1,
        "norm_topk_prob": True,
    }


FAMILY = Family(
    model_type="qwen3_moe",
    hf_class="Qwen3MoeForCausalLM",
    models="Qwen3 with experts (30B-A3B, 235B-A22B, Coder)",
    gguf=Gguf(arch="qwen3moe", read_back=False, keys=expert_keys, places=places),
    mlc=Mlc(qkv_name="c_attn", qkv_bias=True, config=_mlc_config),
    qk_norm=True,
    experts=True,
    normal=expert_names,
    read=read,
    layer=layer,
    window_flag="use_sliding_window",
    windowed=lambda layer, count: layer >= count("max_window_layers", least=0),
    defaults={"rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "max_window_layers": 28, "head_dim": 128},
)
