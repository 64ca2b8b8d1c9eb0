"""Phi-3, Phi-3.5 and Phi-4: q, k and v in one matrix, gate and up in another; longrope; partial rotation."""

from __future__ import annotations

from typing import Any

from edge_stream.families import Family, Gguf, Mlc, ModelConfig, ReservedName

_MLC_NAMES = {
    "model.layers.": "transformer.h.",
    "model.embed_tokens.": "transformer.embd.",
    "model.norm.": "transformer.norm.",
    "input_layernorm.": "ln.",
    "self_attn.o_proj.": "mixer.out_proj.",
    "self_attn.qkv_proj.": "mixer.qkv_proj.",
}


def _mlc_name(name: str) -> str:
    for llama, phi in _MLC_NAMES.items():
        name = name.replace(llama, phi)
    return name


def _mlc_config(model: ModelConfig, config: dict[str, Any]) -> dict[str, Any]:
    scaling = model.rope_scaling
    return config | {
        "original_max_position_embeddings": scaling.n_ctx_orig if scaling else model.n_ctx_train,
        "max_position_embeddings": model.n_ctx_train,
        "partial_rotary_factor": model.n_rot / model.head_dim,
    }


FAMILY = Family(
    model_type="phi3",
    hf_class="Phi3ForCausalLM",
    models="Phi-3, Phi-3.5 (longrope), Phi-4, Phi-4-mini",
    gguf=Gguf(
        arch="phi3",
        rope_scalings=("longrope", "yarn", "linear"),
        free_head_dim=False,
        window_key=True,  # llama.cpp ignores the size, but tells Phi-4 from Phi-3 by a 0
        # llama-vocab.cpp looks these tokens up for any model of that name
        reserved_name=ReservedName("phi-?3", "Phi-3", frozenset({"<unk>", "<s>", "</s>", "<|endoftext|>"})),
    ),
    mlc=Mlc(rope_scalings=("longrope",), rename=_mlc_name, config=_mlc_config),
    fused=True,
    windowed=lambda _layer, _count: True,
    defaults={"rms_norm_eps": 1e-5},
)
