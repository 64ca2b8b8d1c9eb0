"""Gemma 1 and CodeGemma: GELU, scaled embeddings, norm weights stored minus 1."""

from __future__ import annotations

from typing import Any

from edge_stream.families import Family, Gguf, Mlc, ModelConfig


def _lacks(model: ModelConfig) -> str | None:
    return None if model.tied else "has no output matrix of its own, and this checkpoint has one"


def _mlc_config(model: ModelConfig, config: dict[str, Any]) -> dict[str, Any]:
    return config | {"hidden_activation": model.family.activation, "attention_bias": model.qkv_bias}


FAMILY = Family(
    model_type="gemma",
    hf_class="GemmaForCausalLM",
    models="Gemma 1 and 1.1, CodeGemma",
    gguf=Gguf(arch="gemma", rope_scalings=("linear",), lacks=_lacks),
    mlc=Mlc(lacks=_lacks, config=_mlc_config),
    # published configs say gelu but mean the tanh form
    activations=("gelu_pytorch_tanh", "gelu"),
    norm_offset=1.0,
    scaled_embedding=True,
    defaults={
        "rms_norm_eps": 1e-6,
        "num_key_value_heads": 16,
        "head_dim": 256,
        "tie_word_embeddings": True,
        "max_position_embeddings": 8192,
    },
)
