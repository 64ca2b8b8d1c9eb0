"""Gemma 4: heads of another size in layers of full attention, embeddings for every layer, layers that share keys and
values with an earlier one, experts beside the MLP; each as the model has it.
"""

from __future__ import annotations

from typing import Any

from edge_stream.families import Family, Gguf, Keys, ModelConfig, Place, Shapes
from edge_stream.families._layers import mlp, norms

_KINDS = ("sliding_attention", "full_attention")
_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
}
_UNROTATED = 1e30  # a divisor that leaves no rotation


def _normal(config: dict[str, Any]) -> dict[str, Any]:
    """Only the share of rotated pairs is special about `proportional` positions."""
    rope = config.get("rope_parameters") or _ROPE
    config = config | {"rope_parameters": rope}
    full = rope.get("full_attention") if isinstance(rope, dict) else None
    if not isinstance(rope, dict) or not isinstance(full, dict) or full.get("rope_type") != "proportional":
        return config
    rest = {key: value for key, value in full.items() if key not in ("rope_type", "partial_rotary_factor")}
    share = full.get("partial_rotary_factor", 1.0)
    return config | {"rope_parameters": rope | {"full_attention": rest}, "full_rotary_share": share}


def _read(keys: Keys, n_layer: int) -> dict[str, Any]:
    usual = ["full_attention" if (i + 1) % 6 == 0 else "sliding_attention" for i in range(n_layer)]
    kinds = keys.kinds("layer_types", _KINDS, n_layer, usual)
    if keys.get("use_bidirectional_attention", None) == "all":
        keys.refuse("use_bidirectional_attention = 'all' is not supported")
    # transformers 5 writes what differs by layer, published configurations by kind of layer
    layers = keys.get("per_layer_config", None)
    given = next((v for i, v in sorted(layers.items()) if isinstance(v, dict)), {}) if isinstance(layers, dict) else {}
    equal = keys.flag("attention_k_eq_v", False)
    head_dim = given.get("head_dim", keys.count("global_head_dim", 512, least=2))
    n_kv = given.get("num_key_value_heads", keys.get("num_global_key_value_heads", None) if equal else None)
    n_kv = keys.count("num_key_value_heads", 4) if n_kv is None else n_kv
    for value in (head_dim, n_kv):
        if type(value) is not int or not 0 < value < 1 << 20:
            keys.refuse("heads of full attention have no valid size or number")
    pairs = head_dim // 2
    rotated = int(head_dim * keys.number("full_rotary_share", 1.0) / 2)
    shared = keys.count("num_kv_shared_layers", 0, least=0)
    if shared >= n_layer:
        keys.refuse(f"num_kv_shared_layers = {shared} leaves no layer with keys of its own")
    own: dict[str, Any] = {
        "full": [kind == "full_attention" for kind in kinds],
        "head_dim_full": head_dim,
        "n_kv_full": n_kv,
        "k_is_v": equal,
        "n_shared": shared,
        "wide": keys.flag("use_double_wide_mlp", False),
        "n_embd_layer": keys.count("hidden_size_per_layer_input", 256, least=0),
        "n_vocab_layer": keys.count("vocab_size_per_layer_input", 262144),
        "rope_freqs": (1.0,) * rotated + (_UNROTATED,) * (pairs - rotated),
        "n_expert": 0,
    }
    if keys.flag("enable_moe_block", False):
        names = {"n_expert": "num_experts", "n_expert_used": "top_k_experts", "n_ff_expert": "moe_intermediate_size"}
        own |= {name: keys.count(key) for name, key in names.items()}
    return own


def _layer(model: ModelConfig, layer: int) -> Shapes:
    own, n_embd = model.own, model.n_embd
    full, shares = own["full"][layer], layer >= model.n_layer - own["n_shared"]
    head_dim = own["head_dim_full"] if full else model.head_dim
    n_kv = (own["n_kv_full"] if full else model.n_head_kv) * head_dim
    around = ("input", "post_attention", "pre_feedforward", "post_feedforward")
    shapes = norms(model, *(f"{name}_layernorm" for name in around)) | {
        "layer_scalar": (1,),
        "self_attn.q_proj.weight": (model.n_head * head_dim, n_embd),
        "self_attn.q_norm.weight": (head_dim,),
        "self_attn.o_proj.weight": (n_embd, model.n_head * head_dim),
    }
    if not shares:
        shapes |= {"self_attn.k_proj.weight": (n_kv, n_embd), "self_attn.k_norm.weight": (head_dim,)}
        if not (full and own["k_is_v"]):
            shapes["self_attn.v_proj.weight"] = (n_kv, n_embd)
    shapes |= mlp(model, n_ff=2 * model.n_ff if shares and own["wide"] else model.n_ff)
    if own["n_embd_layer"]:
        shapes |= norms(model, "post_per_layer_input_norm") | {
            "per_layer_input_gate.weight": (own["n_embd_layer"], n_embd),
            "per_layer_projection.weight": (n_embd, own["n_embd_layer"]),
        }
    if own["n_expert"]:
        names = ("pre_feedforward_layernorm_2", "post_feedforward_layernorm_1", "post_feedforward_layernorm_2")
        n, n_ff = own["n_expert"], own["n_ff_expert"]
        shapes |= norms(model, *names) | {
            "router.scale": (n_embd,),
            "router.proj.weight": (n, n_embd),
            "router.per_expert_scale": (n,),
            "experts.gate_up_proj": (n, 2 * n_ff, n_embd),
            "experts.down_proj": (n, n_embd, n_ff),
        }
    return shapes


def _outside(model: ModelConfig) -> Shapes:
    width = model.own["n_embd_layer"]
    if not width:
        return {}
    return {
        "model.embed_tokens_per_layer.weight": (model.own["n_vocab_layer"], model.n_layer * width),
        "model.per_layer_model_projection.weight": (model.n_layer * width, model.n_embd),
        "model.per_layer_projection_norm.weight": (width,),
    }


def _unused(model: ModelConfig, name: str) -> bool:
    """Keys and values of layers that share another's; buffers."""
    parts = name.split(".")
    shares = parts[:2] == ["model", "layers"] and parts[2].isdecimal()
    return shares and int(parts[2]) >= model.n_layer - model.own["n_shared"] and parts[4][:2] in ("k_", "v_")


def _places(_model: ModelConfig, name: str) -> tuple[Place, ...]:
    layer = name.split(".")[2]
    if name.endswith("router.scale"):
        return (Place(f"blk.{layer}.ffn_gate_inp.scale"),)
    if name.endswith("per_expert_scale"):
        return (Place(f"blk.{layer}.ffn_down_exps.scale"),)
    return (Place(f"{name}.weight" if name.endswith(("layer_scalar", "experts.gate_up_proj", "down_proj")) else name),)


def _keys(model: ModelConfig) -> dict[str, Any]:
    own = model.own
    keys: dict[str, Any] = {
        "attention.shared_kv_layers": own["n_shared"],
        "embedding_length_per_layer_input": own["n_embd_layer"],
        "attention.key_length": own["head_dim_full"],
        "attention.value_length": own["head_dim_full"],
        "attention.key_length_swa": model.head_dim,
        "attention.value_length_swa": model.head_dim,
        "final_logit_softcapping": model.logit_softcap,  # llama.cpp takes 30 if there is none
        "rope.dimension_count": own["head_dim_full"],
        "rope.dimension_count_swa": model.n_rot,
    }
    if own["n_kv_full"] != model.n_head_kv:
        keys["attention.head_count_kv"] = [own["n_kv_full"] if full else model.n_head_kv for full in own["full"]]
    if own["wide"]:
        first = model.n_layer - own["n_shared"]
        keys["feed_forward_length"] = [model.n_ff * (2 if i >= first else 1) for i in range(model.n_layer)]
    if own["n_expert"]:
        keys["expert_count"] = own["n_expert"]
        keys["expert_used_count"] = own["n_expert_used"]
        keys["expert_feed_forward_length"] = own["n_ff_expert"]
    return keys


def _lacks(model: ModelConfig) -> str | None:
    own = model.own
    if own["n_embd_layer"] and own["n_vocab_layer"] != model.n_vocab:
        return "needs an embedding per layer for every token (vocab_size_per_layer_input)"
    return None if len(set(own["full"])) == 2 else "needs layers with a sliding window and layers without"


FAMILY = Family(
    model_type="gemma4_text",
    aliases=("gemma4",),
    hf_class="Gemma4ForCausalLM",
    models="Gemma 4 (text)",
    gguf=Gguf(
        arch="gemma4",
        read_back=False,
        rope_scalings=(),
        logit_softcap=True,
        masks_window=True,
        tokenizer="gemma4",
        keys=_keys,
        places=_places,
        no_adapter=("embed_tokens_per_layer.weight", "per_layer_model_projection.weight"),
        lacks=_lacks,
    ),
    activations=("gelu_pytorch_tanh",),
    normal=_normal,
    read=_read,
    layer=_layer,
    outside=_outside,
    unused=_unused,
    own_swa_rope=True,
    windowed=lambda layer, _count: (layer + 1) % 6 != 0,
    left_out=("model.vision_tower.", "model.audio_tower.", "model.embed_vision.", "model.embed_audio."),
    defaults={
        "rms_norm_eps": 1e-6,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "tie_word_embeddings": True,
        "sliding_window": 512,
        "max_position_embeddings": 131072,
    },
)
