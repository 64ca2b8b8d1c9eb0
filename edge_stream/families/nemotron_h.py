"""Nemotron-H and Nemotron 3 Nano: a layer is a Mamba-2 mixer, attention without rotation, an MLP, or experts.

transformers keeps the time step above time_step_min; NVIDIA's own code and llama.cpp do not.
"""

from __future__ import annotations

from typing import Any

from edge_stream.families import Family, Gguf, Keys, ModelConfig, Place, Shapes
from edge_stream.families._layers import attention, norms, stacked
from edge_stream.families._mamba import Mamba2, check

_LETTERS = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}
_KINDS = {"linear_attention": "mamba", "full_attention": "attention"}  # transformers 5's words


def _normal(config: dict[str, Any]) -> dict[str, Any]:
    config = config | {
        "rms_norm_eps": config.get("layer_norm_epsilon", 1e-5),
        "hidden_act": config.get("mlp_hidden_act", "relu2"),
    }
    pattern = config.get("hybrid_override_pattern")
    if isinstance(pattern, str):
        config["layers_block_type"] = [_LETTERS.get(letter, letter) for letter in pattern]
    kinds = config.get("layers_block_type")
    if isinstance(kinds, list):
        config["layers_block_type"] = [_KINDS.get(kind, kind) if isinstance(kind, str) else kind for kind in kinds]
        config.setdefault("num_hidden_layers", len(kinds))
    return config


def _read(keys: Keys, n_layer: int) -> dict[str, Any]:
    kinds = keys.kinds("layers_block_type", tuple(_LETTERS.values()), n_layer)
    check(keys)
    for name in ("mamba_proj_bias", "use_bias"):
        if keys.flag(name, False):
            keys.refuse(f"{name} is not supported")
    if keys.get("moe_latent_size", None) is not None:
        keys.refuse("moe_latent_size is not supported")
    own: dict[str, Any] = {
        "kinds": kinds,
        "mamba": Mamba2(
            keys.count("conv_kernel", 4),
            keys.count("ssm_state_size", 128),
            keys.count("mamba_num_heads", 128),
            keys.count("mamba_head_dim", 64),
            keys.count("n_groups", 8),
            keys.flag("use_conv_bias", True),
        ),
    }
    if "moe" in kinds:
        own |= {
            "n_expert": keys.count("n_routed_experts", 8),
            "n_expert_used": keys.count("num_experts_per_tok", 2),
            "n_shared": keys.count("n_shared_experts", 1),
            "n_ff_expert": keys.count("moe_intermediate_size", 7688),
            "n_ff_shared": keys.count("moe_shared_expert_intermediate_size", 7688),
            "weights_norm": keys.flag("norm_topk_prob", True),
            "weights_scale": keys.number("routed_scaling_factor", 1.0),
            "n_group": keys.count("n_group", 1),
        }
        if keys.count("topk_group", 1) != own["n_group"]:
            keys.refuse("topk_group must be n_group: llama.cpp does not choose among groups of experts")
    return own


def _layer(model: ModelConfig, layer: int) -> Shapes:
    own, n_embd, p = model.own, model.n_embd, "mixer."
    kind, shapes = own["kinds"][layer], norms(model, "norm")
    if kind == "mamba":
        mixer: Shapes = own["mamba"].tensors(model, p)
        return shapes | mixer
    if kind == "attention":
        return shapes | attention(model, p=p)
    if kind == "mlp":
        return shapes | _mlp(model, p, model.n_ff)
    n = own["n_expert"]
    shapes |= {f"{p}gate.weight": (n, n_embd), f"{p}gate.e_score_correction_bias": (n,)}
    for i in range(n):
        shapes |= _mlp(model, f"{p}experts.{i}.", own["n_ff_expert"])
    return shapes | _mlp(model, f"{p}shared_experts.", own["n_ff_shared"])


def _mlp(model: ModelConfig, p: str, n_ff: int) -> Shapes:
    return {f"{p}up_proj.weight": (n_ff, model.n_embd), f"{p}down_proj.weight": (model.n_embd, n_ff)}


def _places(model: ModelConfig, name: str) -> tuple[Place, ...]:
    if one := stacked(name):
        return (Place(one.name.replace(".mixer.", ".mlp."), stack=True),)
    name = name.replace("model.layers.", "backbone.layers.").replace(
        "e_score_correction_bias", "e_score_correction.bias"
    )
    name = {
        "model.embed_tokens.weight": "backbone.embeddings.weight",
        "model.norm.weight": "backbone.norm_f.weight",
    }.get(name, name)
    return ((model.own["mamba"].place(name) if ".mixer." in name else None) or Place(name),)


def _keys(model: ModelConfig) -> dict[str, Any]:
    own, kinds = model.own, model.own["kinds"]
    found: dict[str, Any] = own["mamba"].keys() | {
        "attention.layer_norm_epsilon": model.norm_eps,
        "attention.head_count_kv": [model.n_head_kv if kind == "attention" else 0 for kind in kinds],
        "feed_forward_length": [model.n_ff if kind == "mlp" else 0 for kind in kinds],
        "rope.scaling.finetuned": False,  # not rotated
        "rope.freq_base": None,
    }
    if "moe" in kinds:
        found |= {
            "attention.layer_norm_rms_epsilon": None,
            "feed_forward_length": [own["n_ff_expert"] if kind == "moe" else 0 for kind in kinds],
            "expert_count": own["n_expert"],
            "expert_used_count": own["n_expert_used"],
            "expert_feed_forward_length": own["n_ff_expert"],
            "expert_shared_feed_forward_length": own["n_ff_shared"],
            "expert_shared_count": own["n_shared"],
            "expert_weights_norm": own["weights_norm"],
            "expert_weights_scale": own["weights_scale"],
            "expert_group_count": own["n_group"],
            "expert_group_used_count": own["n_group"],
        }
    return found


def _lacks(model: ModelConfig) -> str | None:
    kinds = model.own["kinds"]
    if not {"mamba", "attention"} <= set(kinds):
        return "needs layers with a Mamba-2 mixer and layers with attention"
    return "has MLPs or experts, not both" if {"moe", "mlp"} <= set(kinds) else None


FAMILY = Family(
    model_type="nemotron_h",
    hf_class="NemotronHForCausalLM",
    models="Nemotron-H, Nemotron Nano 2, Nemotron 3 Nano",
    gguf=Gguf(
        arch="nemotron_h",
        arch_of=lambda model: "nemotron_h_moe" if "moe" in model.own["kinds"] else "nemotron_h",
        read_back=False,
        permuted=True,
        rope_scalings=(),
        keys=_keys,
        places=_places,
        lacks=_lacks,
    ),
    activations=("relu2",),
    normal=_normal,
    read=_read,
    layer=_layer,
    prefixes={
        "backbone.embeddings.": "model.embed_tokens.",
        "backbone.norm_f.": "model.norm.",
        "backbone.": "model.",
    },
    left_out=("mtp.",),
    defaults={"head_dim": 128, "num_key_value_heads": 8, "max_position_embeddings": 4096},
)
