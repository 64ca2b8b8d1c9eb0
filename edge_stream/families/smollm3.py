"""SmolLM3: Llama in which every fourth layer does not rotate q and k."""

from __future__ import annotations

from typing import Any

from edge_stream.families import Family, Gguf, Keys, Mlc, ModelConfig

_STEP = 4  # llama.cpp knows no other


def _rotated(keys: Keys, n_layer: int) -> list[bool]:
    if keys.get("no_rope_layers", None) is not None:  # 1: rotated
        return [bool(x) for x in keys.items("no_rope_layers", int, n_layer)]
    step = keys.count("no_rope_layer_interval", _STEP)
    return [(layer + 1) % step != 0 for layer in range(n_layer)]


def _lacks(model: ModelConfig) -> str | None:
    usual = tuple((layer + 1) % _STEP != 0 for layer in range(model.n_layer))
    return None if model.rope_layers == usual else "leaves every fourth layer without rotation, and no other"


def _mlc_config(model: ModelConfig, config: dict[str, Any]) -> dict[str, Any]:
    return config | {"no_rope_layers": [int(rotates) for rotates in model.rope_layers]}


FAMILY = Family(
    model_type="smollm3",
    hf_class="SmolLM3ForCausalLM",
    models="SmolLM3",
    gguf=Gguf(arch="smollm3", permuted=True, partial_rotary=False, qkv_bias=False, lacks=_lacks),
    mlc=Mlc(
        lacks=lambda model: "has no sliding windows, which this checkpoint has" if model.sliding_window else None,
        config=_mlc_config,
        note="mlc-llm has no SmolLM3: the folder is for edge-stream's engine",
    ),
    rotated=_rotated,
    window_flag="use_sliding_window",
    windowed=lambda layer, _count: (layer + 1) % _STEP == 0,
    defaults={"rms_norm_eps": 1e-6, "rope_theta": 2e6, "tie_word_embeddings": True, "max_position_embeddings": 32768},
)
