"""Cohere 2 (Command R7B): attention and MLP side by side, LayerNorm, a window in three of four layers, the others
without rotation. q and k are stored in the order that llama.cpp rotates.
"""

from __future__ import annotations

from typing import Any

from edge_stream.families import Family, Gguf, Keys, ModelConfig, Shapes
from edge_stream.families._layers import attention, mlp, norms


def _normal(config: dict[str, Any]) -> dict[str, Any]:
    return config | {"rms_norm_eps": config.get("layer_norm_eps", 1e-5)}


def _keys(model: ModelConfig) -> dict[str, Any]:
    return {
        "attention.layer_norm_epsilon": model.norm_eps,
        "attention.layer_norm_rms_epsilon": None,
        "attention.sliding_window_pattern": None,  # llama.cpp knows it
        "logit_scale": model.own["logit_scale"],
        "rope.scaling.type": "none",
    }


def _read(keys: Keys, _n_layer: int) -> dict[str, Any]:
    if keys.number("rotary_pct", 1.0) != 1.0 or not keys.flag("use_parallel_block", True):
        keys.refuse("rotary_pct and use_parallel_block other than in Command R7B are not supported")
    if keys.flag("use_qk_norm", False):
        keys.refuse("use_qk_norm is not supported")
    return {"logit_scale": keys.number("logit_scale")}


def _lacks(model: ModelConfig) -> str | None:
    if not model.tied:
        return "has no output matrix of its own, and this checkpoint has one"
    usual = tuple((layer + 1) % 4 != 0 for layer in range(model.n_layer))
    return None if model.swa_layers == usual else "needs a sliding window in three of four layers"


def _layer(model: ModelConfig, _layer: int) -> Shapes:
    return norms(model, "input_layernorm") | attention(model) | mlp(model)


FAMILY = Family(
    model_type="cohere2",
    hf_class="Cohere2ForCausalLM",
    models="Command R7B, Command A",
    gguf=Gguf(
        arch="cohere2",
        read_back=False,
        rope_scalings=(),
        partial_rotary=False,
        free_head_dim=False,
        masks_window=True,
        keys=_keys,
        lacks=_lacks,
    ),
    normal=_normal,
    read=_read,
    layer=_layer,
    windowed=lambda layer, count: (layer + 1) % count("sliding_window_pattern", 4) != 0,
    defaults={"sliding_window": 4096, "logit_scale": 0.0625, "tie_word_embeddings": True},
)
