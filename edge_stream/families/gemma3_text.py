"""Gemma 3: norms on q and k, and in most layers a sliding window with its own rope base."""

from __future__ import annotations

from typing import Any

from edge_stream.families import Family, Gguf, Mlc, ModelConfig

_SIZES = ("context_window_size", "prefill_chunk_size", "sliding_window_size", "attention_sink_size", "vocab_size")


def _mlc_config(model: ModelConfig, config: dict[str, Any]) -> dict[str, Any]:
    text = config | {
        "hidden_activation": model.family.activation,
        "query_pre_attn_scalar": model.attn_scale**-2,
        "sliding_window": model.sliding_window,
        "rope_local_base_freq": model.rope_base_swa,
        "layer_types": [("full", "sliding")[swa] + "_attention" for swa in model.swa_layers],
    }
    return {"text_config": text, "is_text_model": True} | {key: config[key] for key in _SIZES}


def _mlc_lacks(model: ModelConfig) -> str | None:
    return "has no soft caps, which this checkpoint has" if model.logit_softcap or model.attn_softcap else None


FAMILY = Family(
    model_type="gemma3_text",
    aliases=("gemma3",),
    hf_class="Gemma3ForCausalLM",
    models="Gemma 3; the text part of multimodal checkpoints",
    gguf=Gguf(
        arch="gemma3",
        rope_scalings=("linear",),
        logit_softcap=True,
        masks_window=True,
        wide_scale_n_layer=62,  # 27B
        config_keys={
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "sliding_window": None,
            "sliding_window_pattern": 6,
            "rope_local_base_freq": 10000.0,
        },
    ),
    mlc=Mlc(
        qkv_name="",
        rope_scalings=("linear",),
        lacks=_mlc_lacks,
        rename=lambda name: f"language_model.{name}",
        config=_mlc_config,
        note="mlc-llm's own Gemma 3 has neither sliding windows nor their rope base: use edge-stream's engine",
    ),
    activations=("gelu_pytorch_tanh",),
    qk_norm=True,
    post_norms=True,
    norm_offset=1.0,
    scaled_embedding=True,
    own_swa_rope=True,
    windowed=lambda layer, count: (layer + 1) % count("sliding_window_pattern") != 0,
    defaults={
        "rms_norm_eps": 1e-6,
        "vocab_size": 262208,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "tie_word_embeddings": True,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "max_position_embeddings": 131072,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "query_pre_attn_scalar": 256,
    },
)
