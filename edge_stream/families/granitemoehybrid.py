"""Granite 4: Mamba-2 layers with some of attention, or attention in all; experts or one MLP.

llama.cpp has three architectures for these. gate and up are one matrix.
"""

from __future__ import annotations

from typing import Any

from edge_stream.families import Family, Gguf, Keys, ModelConfig, Place, Shapes, granite
from edge_stream.families._layers import attention, norms
from edge_stream.families._mamba import check, read_mamba

_TYPES = ("mamba", "linear_attention", "attention", "full_attention")


def _normal(config: dict[str, Any]) -> dict[str, Any]:
    # without experts, the shared MLP is the only one
    shared = None if config.get("num_local_experts", 8) else config.get("shared_intermediate_size")
    return config | {"head_dim": None} | ({"intermediate_size": shared} if shared else {})


def _read(keys: Keys, n_layer: int) -> dict[str, Any]:
    types = keys.kinds("layer_types", _TYPES, n_layer, ["mamba"] * n_layer)
    attends = [kind in ("attention", "full_attention") for kind in types]
    n = keys.count("num_local_experts", 8, least=0)
    own: dict[str, Any] = granite.read(keys, n_layer) | {
        "attention": attends,
        "n_expert": n,
        "n_expert_used": keys.count("num_experts_per_tok", 2, least=0),
        "n_ff_shared": keys.count("shared_intermediate_size", 1024),
        "rotates": keys.get("position_embedding_type", None) == "rope",
    }
    if not all(attends):
        check(keys)
        if keys.flag("mamba_proj_bias", False):
            keys.refuse("mamba_proj_bias is not supported")
        own["mamba"] = read_mamba(keys, keys.count("mamba_expand", 2) * keys.count("hidden_size"))
    return own


def _layer(model: ModelConfig, layer: int) -> Shapes:
    own, n_embd = model.own, model.n_embd
    mixer = attention(model) if own["attention"][layer] else own["mamba"].tensors(model, "mamba.")
    shapes = norms(model, "input_layernorm", "post_attention_layernorm") | mixer
    shapes |= {
        "shared_mlp.input_linear.weight": (2 * own["n_ff_shared"], n_embd),
        "shared_mlp.output_linear.weight": (n_embd, own["n_ff_shared"]),
    }
    if own["n_expert"]:
        p, n = "block_sparse_moe.", own["n_expert"]
        shapes |= {
            f"{p}router.layer.weight": (n, n_embd),
            f"{p}input_linear.weight": (n, 2 * model.n_ff, n_embd),
            f"{p}output_linear.weight": (n, n_embd, model.n_ff),
        }
    return shapes


def places(model: ModelConfig, name: str) -> tuple[Place, ...]:
    """Where a tensor goes."""
    p, routed = name.rpartition("_m")[0].rpartition(".")[0], "block_sparse_moe." in name
    if routed:
        p = name.partition(".block_sparse_moe.")[0]
    if name.endswith("_linear.weight"):
        where = f"{p}.mlp.experts." if routed else f"{p}.mlp.shared_expert." if model.own["n_expert"] else f"{p}.mlp."
        if name.endswith("output_linear.weight"):
            return (Place(f"{where}down_proj.weight"),)
        halves = {"gate": lambda a: a[: len(a) // 2], "up": lambda a: a[len(a) // 2 :]}
        return tuple(Place(f"{where}{n}_proj.weight", half, each=routed) for n, half in halves.items())
    mamba = model.own.get("mamba")
    return ((mamba.place(name) if mamba and ".mamba." in name else None) or Place(name),)


def keys(model: ModelConfig) -> dict[str, Any]:
    """Metadata."""
    own, found = model.own, granite.scales(model)
    if not all(own["attention"]):
        found |= own["mamba"].keys()
        found["attention.head_count_kv"] = [model.n_head_kv if full else 0 for full in own["attention"]]
    if own["n_expert"]:
        found |= {"expert_count": own["n_expert"], "expert_used_count": own["n_expert_used"]}
        found["expert_shared_feed_forward_length"] = own["n_ff_shared"]
    return found | {"rope.scaling.finetuned": own["rotates"]}  # whether q and k are rotated at all


def _arch(model: ModelConfig) -> str:
    if not all(model.own["attention"]):
        return "granitehybrid"
    return "granitemoe" if model.own["n_expert"] else "granite"


def _lacks(model: ModelConfig) -> str | None:
    return None if any(model.own["attention"]) else "needs layers with attention"


FAMILY = Family(
    model_type="granitemoehybrid",
    hf_class="GraniteMoeHybridForCausalLM",
    models="Granite 4 (hybrid, or attention only; with and without experts)",
    gguf=Gguf(
        arch="granitehybrid",
        arch_of=_arch,
        read_back=False,
        permuted=True,
        partial_rotary=False,
        free_head_dim=False,
        keys=keys,
        places=places,
        lacks=_lacks,
    ),
    normal=_normal,
    read=_read,
    layer=_layer,
    defaults={"rms_norm_eps": 1e-6},
)
