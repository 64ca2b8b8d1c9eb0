"""Granite SWA: Granite with a learned sink per head in every layer, and a sliding window in most.

With factors of 1, no sliding window and sinks of 0 it is Llama with softmax1: what `train --sink softmax1` writes.
"""

from __future__ import annotations

from typing import Any

from edge_stream.families import Family, Gguf, Keys, ModelConfig, Place, Shapes
from edge_stream.families._layers import attention, mlp, norms
from edge_stream.families.granite import read, scales

_EVERYTHING = 1 << 24  # tokens; llama.cpp multiplies it by the number of sequences, in 32 bits


def _normal(config: dict[str, Any]) -> dict[str, Any]:
    """One base of rotation for all layers that rotate: llama.cpp has one."""
    bases = config.get("layer_rope_theta")
    found = {base for base in bases if base} if isinstance(bases, list) else set()
    if len(found) != 1:
        return config
    rope = config.get("rope_parameters")
    base = {"rope_theta": found.pop()}
    return config | ({"rope_parameters": rope | base} if isinstance(rope, dict) else base)


def _rotated(keys: Keys, n_layer: int) -> list[bool]:
    if keys.get("layer_rope_theta", None) is None:
        return [True] * n_layer
    bases = keys.items("layer_rope_theta", float, n_layer)  # 0: not rotated
    if len({base for base in bases if base}) > 1:
        keys.refuse("llama.cpp has one base of rotation for all layers of this model, not several (layer_rope_theta)")
    return [base != 0 for base in bases]


def _keys(model: ModelConfig) -> dict[str, Any]:
    keys = scales(model) | {"attention.rope_pattern": None if all(model.rope_layers) else list(model.rope_layers)}
    if any(model.swa_layers):
        return keys
    # llama.cpp aborts unless some layer has a window: it gets one that is wider than any cache
    wide = [layer == 0 for layer in range(model.n_layer)]
    return keys | {"attention.sliding_window": _EVERYTHING, "attention.sliding_window_pattern": wide}


def _layer(model: ModelConfig, _layer: int) -> Shapes:
    sinks: Shapes = {"self_attn.sinks": (model.n_head,)}
    return attention(model) | sinks | norms(model, "input_layernorm", "post_attention_layernorm") | mlp(model)


def _places(_model: ModelConfig, name: str) -> tuple[Place, ...]:
    return (Place(f"blk.{name.split('.')[2]}.attn_sinks.weight" if name.endswith(".sinks") else name),)


FAMILY = Family(
    model_type="granite_swa",
    hf_class="GraniteSWAForCausalLM",
    models="Granite SWA; Llama trained with softmax1",
    gguf=Gguf(
        arch="granite_swa",
        read_back=False,
        permuted=True,
        partial_rotary=False,
        free_head_dim=False,
        o_bias=True,
        qkv_bias=True,
        masks_window=True,
        keys=_keys,
        places=_places,
    ),
    normal=_normal,
    read=read,
    layer=_layer,
    rotated=_rotated,
    windowed=lambda layer, _count: layer % 4 != 0,
    defaults={
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "max_position_embeddings": 8192,
        "sliding_window": 128,
    },
)
