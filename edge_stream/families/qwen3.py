"""Qwen3 (dense): norms on q and k instead of Qwen2's biases."""

from __future__ import annotations

from typing import Any

from edge_stream.families import Family, Gguf, Mlc, ModelConfig


def _mlc_config(model: ModelConfig, config: dict[str, Any]) -> dict[str, Any]:
    return config | {"attention_bias": model.qkv_bias}


FAMILY = Family(
    model_type="qwen3",
    hf_class="Qwen3ForCausalLM",
    models="Qwen3 (dense)",
    gguf=Gguf(arch="qwen3"),
    mlc=Mlc(qkv_name="c_attn", qkv_bias=True, config=_mlc_config),
    qk_norm=True,
    window_flag="use_sliding_window",
    windowed=lambda layer, count: layer >= count("max_window_layers", least=0),
    defaults={"rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "head_dim": 128, "max_window_layers": 28},
)
