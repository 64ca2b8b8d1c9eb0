"""EXAONE 4: norms after attention and MLP, and on q and k; in the 32B a window, without it no rotation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edge_stream.families import Family, Gguf, Keys, ModelConfig, Shapes
from edge_stream.families._layers import attention, mlp, norms

_WINDOWED = 64  # layers of the one model that llama.cpp gives a window


def _pattern(layer: int, pattern: object) -> bool:
    """Whether a layer has the window: `LLLG` names the kinds in turn, 4 is every fourth without."""
    if isinstance(pattern, str) and pattern:
        return pattern[layer % len(pattern)] == "L"
    return isinstance(pattern, int) and pattern > 0 and (layer + 1) % pattern != 0


def _normal(config: dict[str, Any]) -> dict[str, Any]:
    n_layer, pattern = config.get("num_hidden_layers", 32), config.get("sliding_window_pattern", 4)
    if config.get("layer_types") is not None or not isinstance(n_layer, int):
        return config
    kinds = ["sliding_attention" if _pattern(i, pattern) else "full_attention" for i in range(min(n_layer, 1000))]
    return config | {"layer_types": kinds}


def _rotated(keys: Keys, n_layer: int) -> Sequence[bool]:
    if not keys.get("sliding_window", 0):
        return ()
    kinds = keys.kinds("layer_types", ("sliding_attention", "full_attention"), n_layer)
    return [kind == "sliding_attention" for kind in kinds]


def _layer(model: ModelConfig, _layer: int) -> Shapes:
    after = norms(model, "post_attention_layernorm", "post_feedforward_layernorm")
    return attention(model, "head") | after | mlp(model)


def _lacks(model: ModelConfig) -> str | None:
    if model.rope_layers and model.n_layer != _WINDOWED:
        return f"has a sliding window in models of {_WINDOWED} layers only"
    if model.rope_layers and model.rope_layers != tuple((i + 1) % 4 != 0 for i in range(model.n_layer)):
        return "has a sliding window in three of four layers only"
    return None


FAMILY = Family(
    model_type="exaone4",
    hf_class="Exaone4ForCausalLM",
    models="EXAONE 4",
    gguf=Gguf(
        arch="exaone4",
        read_back=False,
        rope_scalings=("llama3",),
        partial_rotary=False,
        free_head_dim=False,
        masks_window=True,
        keys=lambda model: {"attention.sliding_window_pattern": list(model.rope_layers) or None},
        lacks=_lacks,
    ),
    normal=_normal,
    rotated=_rotated,
    layer=_layer,
    windowed=lambda _layer, _count: True,  # layer_types says which
    defaults={"rms_norm_eps": 1e-5, "sliding_window": 4096},
)
