"""Gemma 3n: four streams of which each layer predicts and corrects (AltUp), low-rank residuals (LAuReL), an embedding
per layer, sparse activations, and in the last layers no keys and values of their own."""

from __future__ import annotations

from typing import Any

from edge_stream.families import Family, Gguf, Keys, ModelConfig, Place, Shapes
from edge_stream.families._layers import attention, mlp, norms

_KINDS = ("sliding_attention", "full_attention")
# what llama.cpp's graph has as constants (llama-hparams.h, models.h)
_ALTUP, _ACTIVE, _RANK, _WIDTH, _SOFTCAP = 4, 0, 64, 256, 30.0
_FIXED: dict[str, float] = {
    "altup_num_inputs": _ALTUP,
    "altup_active_idx": _ACTIVE,
    "laurel_rank": _RANK,
    "hidden_size_per_layer_input": _WIDTH,
    "final_logit_softcapping": _SOFTCAP,
}
_N_OWN = 20  # layers with keys and values of their own
_N_SPARSE, _SPARSITY, _DEVIATIONS = 10, 0.95, 1.6448533535003662


def _normal(config: dict[str, Any]) -> dict[str, Any]:
    """One width where all layers have the same, which transformers writes for each."""
    width = config.get("intermediate_size")
    if isinstance(width, list) and len({str(n) for n in width}) == 1:
        width = width[0]
    return config | {"intermediate_size": width}


def _read(keys: Keys, n_layer: int) -> dict[str, Any]:
    for name, value in _FIXED.items():
        if keys.number(name, value) != value:
            keys.refuse(f"{name} other than {value:g} is not supported by llama.cpp")
    if not keys.flag("altup_correct_scale", True):
        keys.refuse("altup_correct_scale = false is not supported")
    usual = [_KINDS[(i + 1) % 5 == 0] for i in range(n_layer)]
    kinds = keys.kinds("layer_types", _KINDS, n_layer, usual)
    shared = keys.count("num_kv_shared_layers", 15, least=0)
    if n_layer - shared != min(n_layer, _N_OWN) or (shared and kinds[_N_OWN - 2 : _N_OWN] != _KINDS):
        keys.refuse(
            f"llama.cpp's Gemma 3n has {_N_OWN} layers with keys of their own, the last of them with full attention, "
            f"the one before it with a window, and others that share these: num_kv_shared_layers = {shared} differs"
        )
    sparse = [_SPARSITY if i < _N_SPARSE else 0.0 for i in range(n_layer)]
    usual_sparse = sparse if n_layer > _N_SPARSE else [0.0] * n_layer  # transformers' default
    if keys.get("activation_sparsity_pattern", usual_sparse) != sparse:
        keys.refuse("activation_sparsity_pattern must be 0.95 in the first ten layers, and 0 in others")
    return {"n_own": n_layer - shared, "n_vocab_layer": keys.count("vocab_size_per_layer_input", 262144)}


def _layer(model: ModelConfig, layer: int) -> Shapes:
    n_embd = model.n_embd
    names = ("input", "post_attention", "pre_feedforward", "post_feedforward")
    attn = attention(model, qk_norm="head")
    if layer >= model.own["n_own"]:
        attn = {name: shape for name, shape in attn.items() if name.split(".")[1][:2] not in ("k_", "v_")}
    return (
        norms(model, *(f"{name}_layernorm" for name in names))
        | norms(model, "post_per_layer_input_norm", "altup.router_norm", "laurel.post_laurel_norm")
        | attn
        | mlp(model)
        | {
            "altup.correct_output_scale": (n_embd,),
            "altup.correction_coefs.weight": (_ALTUP, _ALTUP),
            "altup.prediction_coefs.weight": (_ALTUP**2, _ALTUP),
            "altup.modality_router.weight": (_ALTUP, n_embd),
            "laurel.linear_left.weight": (_RANK, n_embd),
            "laurel.linear_right.weight": (n_embd, _RANK),
            "per_layer_input_gate.weight": (_WIDTH, n_embd),
            "per_layer_projection.weight": (n_embd, _WIDTH),
        }
    )


def _outside(model: ModelConfig) -> Shapes:
    shapes: Shapes = {
        "model.embed_tokens_per_layer.weight": (model.own["n_vocab_layer"], model.n_layer * _WIDTH),
        "model.per_layer_model_projection.weight": (model.n_layer * _WIDTH, model.n_embd),
        "model.per_layer_projection_norm.weight": (_WIDTH,),
    }
    for name in ("altup_projections", "altup_unembed_projections"):
        shapes |= {f"model.{name}.{i}.weight": (model.n_embd, model.n_embd) for i in range(_ALTUP - 1)}
    return shapes


def _unused(model: ModelConfig, name: str) -> bool:
    """Keys and values of layers that share another's."""
    parts = name.split(".")
    layer = int(parts[2]) if parts[:2] == ["model", "layers"] and parts[2].isdecimal() else 0
    return layer >= model.own["n_own"] and parts[4][:2] in ("k_", "v_")


def _places(model: ModelConfig, name: str) -> tuple[Place, ...]:
    parts = name.split(".")
    if parts[1] in ("altup_projections", "altup_unembed_projections"):
        return (Place(f"model.{parts[1]}.weight", stack=True),)
    if parts[1] == "embed_tokens_per_layer":
        return (Place(name, rows=model.n_vocab),)  # tokens of images and sound have none
    if ".self_attn." in name and parts[4][:2] in ("k_", "v_") and _N_OWN - 2 <= int(parts[2]) < _N_OWN:
        # llama.cpp demands keys and values of all layers, and does not use those of layers that share these
        swa = model.swa_layers
        sharing = [i for i in range(_N_OWN, model.n_layer) if swa[i] == swa[int(parts[2])]]
        return tuple(Place(name.replace(f".{parts[2]}.", f".{i}.", 1)) for i in (int(parts[2]), *sharing))
    return (Place(f"{name}.weight" if name.endswith("_scale") else name),)


def _keys(model: ModelConfig) -> dict[str, Any]:
    return {
        "altup.active_idx": _ACTIVE,
        "altup.num_inputs": _ALTUP,
        "embedding_length_per_layer_input": _WIDTH,
        "attention.shared_kv_layers": model.n_layer - model.own["n_own"],
        "activation_sparsity_scale": [_DEVIATIONS if i < _N_SPARSE else -float("inf") for i in range(model.n_layer)],
    }


def _notes(_model: ModelConfig) -> list[str]:
    return ["llama.cpp divides the variance of activations that are made sparse by their number minus 1, not by it"]


def _lacks(model: ModelConfig) -> str | None:
    if model.own["n_vocab_layer"] > model.n_vocab:
        return "has no more embeddings per layer than tokens"
    return None if len(set(model.swa_layers)) == 2 else "needs layers with a sliding window and layers without"


FAMILY = Family(
    model_type="gemma3n_text",
    aliases=("gemma3n",),
    hf_class="Gemma3nForCausalLM",
    models="Gemma 3n (text)",
    gguf=Gguf(
        arch="gemma3n",
        read_back=False,
        rope_scalings=(),
        logit_softcap=True,
        masks_window=True,
        keys=_keys,
        places=_places,
        no_adapter=(
            *("embed_tokens_per_layer.weight", "per_layer_model_projection.weight", "modality_router.weight"),
            *(f"projections.{i}.weight" for i in range(_ALTUP - 1)),
        ),
        lacks=_lacks,
        notes=_notes,
    ),
    activations=("gelu_pytorch_tanh",),
    normal=_normal,
    read=_read,
    layer=_layer,
    outside=_outside,
    unused=_unused,
    own_swa_rope=True,
    windowed=lambda layer, _count: (layer + 1) % 5 != 0,
    left_out=("model.vision_tower.", "model.audio_tower.", "model.embed_vision.", "model.embed_audio."),
    defaults={
        "rms_norm_eps": 1e-6,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "tie_word_embeddings": True,
        "sliding_window": 512,
        "vocab_size": 262400,
        "final_logit_softcapping": _SOFTCAP,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "max_position_embeddings": 32768,
    },
)
