"""Granite 3 and 4 (dense): Llama with factors on embeddings, attention, residuals and logits."""

from __future__ import annotations

from typing import Any

from edge_stream.families import Family, Gguf, Keys, ModelConfig


def read(keys: Keys, _n_layer: int) -> dict[str, Any]:
    """The factors."""
    names = ("attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling")
    return {name: keys.number(name, 1.0, 1e-9) for name in names}


def scales(model: ModelConfig) -> dict[str, Any]:
    """The factors as llama.cpp names them."""
    return {
        "attention.scale": model.own["attention_multiplier"],
        "embedding_scale": model.own["embedding_multiplier"],
        "residual_scale": model.own["residual_multiplier"],
        "logit_scale": model.own["logits_scaling"],
    }


FAMILY = Family(
    model_type="granite",
    hf_class="GraniteForCausalLM",
    models="Granite 3.x, 4 (dense)",
    gguf=Gguf(
        arch="granite",
        read_back=False,
        permuted=True,
        partial_rotary=False,
        free_head_dim=False,
        qkv_bias=True,
        o_bias=True,
        keys=scales,
    ),
    read=read,
    defaults={"rms_norm_eps": 1e-6},
)
