"""Mistral's own form of a checkpoint: params.json, consolidated*.safetensors, tekken.json. Read as Hugging Face's form.

Rows of q and k are in pairs, as llama.cpp has them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from edge_stream.errors import EdgeStreamError
from edge_stream.families.ministral3 import FAMILY as MINISTRAL3
from edge_stream.families.mistral import FAMILY as MISTRAL

FILE = "params.json"
WEIGHTS = "consolidated.safetensors"
# towers for images
LEFT_OUT = ("vision_encoder.", "vision_language_adapter.", "patch_merger.", "pre_mm_projector_norm.")
_KEYS = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "hidden_dim": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "tied_embeddings": "tie_word_embeddings",
}
_NAMES = {
    r"^tok_embeddings\.": "model.embed_tokens.",
    r"^output\.": "lm_head.",
    r"^norm\.": "model.norm.",
    r"^layers\.": "model.layers.",
    r"\.attention\.w([qkvo])\.": r".self_attn.\1_proj.",
    r"\.attention_norm\.": ".input_layernorm.",
    r"\.ffn_norm\.": ".post_attention_layernorm.",
    r"\.feed_forward\.w1\.": ".mlp.gate_proj.",
    r"\.feed_forward\.w2\.": ".mlp.down_proj.",
    r"\.feed_forward\.w3\.": ".mlp.up_proj.",
}


def as_config(params: Any) -> dict[str, Any]:
    """The equivalent config.json. Raises EdgeStreamError if params.json describes another kind of model."""
    if not isinstance(params, dict):
        raise EdgeStreamError(f"{FILE} is not a JSON object")
    if params.get("moe") or params.get("q_lora_rank"):
        raise EdgeStreamError(f"{FILE} describes a model with experts or latent attention, which is not supported")
    config = {new: params[old] for old, new in _KEYS.items() if old in params}
    config |= {key: params[key] for key in ("head_dim", "vocab_size", "rope_theta") if key in params}
    length = params.get("max_position_embeddings", params.get("max_seq_len"))
    config |= {
        "model_type": (MINISTRAL3 if params.get("llama_4_scaling") else MISTRAL).model_type,
        "sliding_window": params.get("sliding_window"),
        "max_position_embeddings": 128_000 if length is None else length,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    rope = _rope(params)
    if rope:
        config["rope_parameters"] = rope
    quantization = params.get("quantization")
    if quantization is not None:
        kind = quantization.get("qformat_weight") if isinstance(quantization, dict) else quantization
        if kind != "fp8_e4m3":
            raise EdgeStreamError(f"{FILE}: the weights are quantised as {kind!r}, which is not supported")
        config["quantization_config"] = {"quant_method": "fp8"}
    return config


def _rope(params: Mapping[str, Any]) -> dict[str, Any]:
    yarn, scaling = params.get("yarn"), params.get("llama_4_scaling")
    if yarn is None and scaling is None:
        return {}
    if not isinstance(yarn, dict) or not isinstance(scaling or {}, dict):
        raise EdgeStreamError(f"{FILE}: yarn or llama_4_scaling is not a JSON object")
    rope = {
        "rope_type": "yarn",
        "rope_theta": params.get("rope_theta", 10000.0),
        "factor": yarn.get("factor"),
        "original_max_position_embeddings": yarn.get("original_max_position_embeddings"),
        "beta_fast": yarn.get("beta"),
        "beta_slow": yarn.get("alpha"),
        "llama_4_scaling_beta": (scaling or {}).get("beta"),
    }
    if not yarn.get("apply_scale", True):
        rope |= {"mscale": 1.0, "mscale_all_dim": 1.0}
    original = (scaling or {}).get("original_max_position_embeddings", rope["original_max_position_embeddings"])
    if original != rope["original_max_position_embeddings"]:
        raise EdgeStreamError(f"{FILE}: yarn and llama_4_scaling name different original_max_position_embeddings")
    return rope


def name_of(stored: str) -> str:
    """Hugging Face's name of a tensor."""
    for pattern, name in _NAMES.items():
        stored = re.sub(pattern, name, stored)
    return stored
