"""Gemma 2: norms before and after each block, soft caps on scores and logits, a sliding window in every other layer."""

from __future__ import annotations

from typing import Any

from edge_stream.families import Family, Gguf, Mlc, ModelConfig


def _lacks(model: ModelConfig) -> str | None:
    if model.attn_softcap and model.logit_softcap and model.sliding_window:
        return None
    return "needs both soft caps and a sliding window"


def _mlc_config(model: ModelConfig, config: dict[str, Any]) -> dict[str, Any]:
    return config | {
        "hidden_activation": model.family.activation,
        "query_pre_attn_scalar": model.attn_scale**-2,
        "attn_logit_softcapping": model.attn_softcap,
        "final_logit_softcapping": model.logit_softcap,
        "sliding_window": model.sliding_window,
    }


FAMILY = Family(
    model_type="gemma2",
    hf_class="Gemma2ForCausalLM",
    models="Gemma 2",
    gguf=Gguf(
        arch="gemma2",
        rope_scalings=("linear",),
        attn_softcap=True,
        logit_softcap=True,
        masks_window=True,
        wide_scale_n_layer=46,  # 27B
        config_keys={
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "sliding_window": 4096,
            "sliding_window_pattern": 2,
        },
        lacks=_lacks,
    ),
    mlc=Mlc(config=_mlc_config),
    activations=("gelu_pytorch_tanh",),
    post_norms=True,
    norm_offset=1.0,
    scaled_embedding=True,
    windowed=lambda layer, _count: layer % 2 == 0,
    defaults={
        "rms_norm_eps": 1e-6,
        "head_dim": 256,
        "tie_word_embeddings": True,
        "sliding_window": 4096,
        "max_position_embeddings": 8192,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "query_pre_attn_scalar": 256,
    },
)
