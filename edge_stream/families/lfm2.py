"""LFM2: short convolutions with gates in most layers, attention in the others."""

from __future__ import annotations

from typing import Any

from edge_stream.families import Family, Gguf, Keys, ModelConfig, Place, Shapes
from edge_stream.families._layers import attention, mlp, norms
from edge_stream.families._mamba import squeeze


def normal(config: dict[str, Any]) -> dict[str, Any]:
    """Llama's names; and the MLP's width, which older configurations state before it is adjusted."""
    config = dict(config)
    for old, new in (("tie_embedding", "tie_word_embeddings"), ("block_ff_dim", "intermediate_size")):
        if config.get(old) is not None:
            config[new] = config[old]
    config["rms_norm_eps"] = config.get("norm_eps", 1e-5)
    width, factor, multiple = (
        config.get(name, default)
        for name, default in (
            ("intermediate_size", 12288),
            ("block_ffn_dim_multiplier", 1.0),
            ("block_multiple_of", 256),
        )
    )
    counts = all(type(x) is int and x > 0 for x in (width, multiple))
    if counts and config.get("block_auto_adjust_ff_dim", True) and isinstance(factor, (int, float)):
        config["intermediate_size"] = -(-int(factor * int(2 * width / 3)) // multiple) * multiple
    return config


def read(keys: Keys, n_layer: int) -> dict[str, Any]:
    """Which layers have attention, and the convolution's kernel."""
    if keys.flag("conv_bias", False):
        keys.refuse("conv_bias is not supported")
    full = keys.get("full_attn_idxs", None)
    usual = ["full_attention" if full is None or i in full else "conv" for i in range(n_layer)]
    types = keys.kinds("layer_types", ("conv", "full_attention"), n_layer, usual)
    return {"attention": [kind == "full_attention" for kind in types], "kernel": keys.count("conv_L_cache", 3)}


def mixer(model: ModelConfig, layer: int) -> Shapes:
    """Norms, and attention or a convolution."""
    shapes, n = norms(model, "operator_norm", "ffn_norm"), model.n_embd
    if not model.own["attention"][layer]:
        return shapes | {
            "conv.conv.weight": (n, 1, model.own["kernel"]),
            "conv.in_proj.weight": (3 * n, n),
            "conv.out_proj.weight": (n, n),
        }
    names = {"o_proj": "out_proj", "q_norm": "q_layernorm", "k_norm": "k_layernorm"}
    found = attention(model, "head")
    for old, new in names.items():
        found = {name.replace(f".{old}.", f".{new}."): shape for name, shape in found.items()}
    return shapes | found


def places(_model: ModelConfig, name: str) -> tuple[Place, ...]:
    """Where a tensor goes."""
    if name == "model.norm.weight":
        return (Place("model.embedding_norm.weight"),)
    return (Place(name, squeeze if name.endswith("conv.conv.weight") else None),)


def keys(model: ModelConfig) -> dict[str, Any]:
    """Metadata."""
    return {
        "attention.head_count_kv": [model.n_head_kv if full else 0 for full in model.own["attention"]],
        "shortconv.l_cache": model.own["kernel"],
    }


def lacks(model: ModelConfig) -> str | None:
    """What llama.cpp cannot represent."""
    both = len(set(model.own["attention"])) == 2
    return None if both else "needs layers with a convolution and layers with attention"


FAMILY = Family(
    model_type="lfm2",
    hf_class="Lfm2ForCausalLM",
    models="LFM2, LFM2.5",
    gguf=Gguf(
        arch="lfm2",
        read_back=False,
        free_head_dim=False,
        partial_rotary=False,
        keys=keys,
        places=places,
        lacks=lacks,
    ),
    normal=normal,
    read=read,
    layer=lambda model, layer: mixer(model, layer) | mlp(model, "feed_forward.", names=("w1", "w3", "w2")),
    prefixes={"model.embedding_norm.": "model.norm."},
    defaults={
        "num_key_value_heads": 8,
        "max_position_embeddings": 128000,
        "tie_word_embeddings": True,
        "rope_theta": 1e6,
    },
)
