"""The architectures that can be converted: how each differs from Llama, and which tensors its checkpoints have.

A decoder here is: embedding; per layer RMSNorm, rotary attention with grouped queries, RMSNorm, gated MLP; RMSNorm;
output matrix. Tensor names and config keys are those of Hugging Face transformers (modeling_llama.py,
modeling_mistral.py, modeling_qwen2.py, modeling_qwen3.py, modeling_phi3.py, modeling_gemma2.py, modeling_gemma3.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from edge_stream.errors import EdgeStreamError

if TYPE_CHECKING:
    from edge_stream.converters.config import ModelConfig


@dataclass(frozen=True)
class Architecture:
    """What sets an architecture apart from Llama. Names as in config.json unless said otherwise."""

    model_type: str
    hf_class: str  # the one in config.json's `architectures`
    gguf_arch: str  # general.architecture in GGUF
    activation: str = "silu"  # of the MLP's gate: silu, or gelu_pytorch_tanh
    permuted: bool = False  # GGUF holds the rows of q and k in pair order (2i, 2i + 1), Hugging Face (i, i + d/2)
    fused: bool = False  # one qkv_proj and one gate_up_proj matrix
    qkv_bias: bool = False  # q, k, v have biases whatever the config says
    qk_norm: bool = False  # RMSNorm over each head of q and k
    post_norms: bool = False  # norms after attention and MLP as well as before
    norm_offset: float = 0.0  # the weight of a norm is stored less this
    scaled_embedding: bool = False  # embeddings are multiplied by sqrt(hidden_size)
    # what transformers' config class assumes where config.json is silent
    defaults: Mapping[str, Any] = field(default_factory=dict)


_GEMMA: dict[str, Any] = {
    "activation": "gelu_pytorch_tanh",
    "post_norms": True,
    "norm_offset": 1.0,
    "scaled_embedding": True,
}

ARCHITECTURES: dict[str, Architecture] = {
    a.model_type: a
    for a in (
        # Llama 1, 2, 3; SmolLM and SmolLM2 are Llama with tied embeddings
        Architecture("llama", "LlamaForCausalLM", "llama", permuted=True, defaults={"rms_norm_eps": 1e-6}),
        # v0.1 has sliding_window 4096, later ones null; llama.cpp has no architecture of its own for it
        Architecture(
            "mistral",
            "MistralForCausalLM",
            "llama",
            permuted=True,
            defaults={"rms_norm_eps": 1e-6, "sliding_window": 4096, "num_key_value_heads": 8},
        ),
        Architecture(
            "qwen2",
            "Qwen2ForCausalLM",
            "qwen2",
            qkv_bias=True,
            defaults={"rms_norm_eps": 1e-6, "max_position_embeddings": 32768},
        ),
        Architecture(
            "qwen3",
            "Qwen3ForCausalLM",
            "qwen3",
            qk_norm=True,
            defaults={"rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "head_dim": 128},
        ),
        Architecture("phi3", "Phi3ForCausalLM", "phi3", fused=True, defaults={"rms_norm_eps": 1e-5}),
        Architecture(
            "gemma2",
            "Gemma2ForCausalLM",
            "gemma2",
            **_GEMMA,
            defaults={
                "rms_norm_eps": 1e-6,
                "head_dim": 256,
                "tie_word_embeddings": True,
                "sliding_window": 4096,
                "max_position_embeddings": 8192,
                "attn_logit_softcapping": 50.0,
                "final_logit_softcapping": 30.0,
                "query_pre_attn_scalar": 256,
            },
        ),
        Architecture(
            "gemma3_text",
            "Gemma3ForCausalLM",
            "gemma3",
            **_GEMMA,
            qk_norm=True,
            defaults={
                "rms_norm_eps": 1e-6,
                "vocab_size": 262208,
                "num_attention_heads": 8,
                "num_key_value_heads": 4,
                "head_dim": 256,
                "tie_word_embeddings": True,
                "sliding_window": 4096,
                "sliding_window_pattern": 6,
                "max_position_embeddings": 131072,
                "rope_theta": 1000000.0,
                "rope_local_base_freq": 10000.0,
                "query_pre_attn_scalar": 256,
            },
        ),
    )
}


def find_architecture(config: Mapping[str, Any]) -> Architecture:
    """The architecture that a config.json (its text part) names. Raises EdgeStreamError if it is not one of ours."""
    model_type = config.get("model_type")
    if model_type in ("gemma3", "gemma3_text"):
        return ARCHITECTURES["gemma3_text"]
    if isinstance(model_type, str) and model_type in ARCHITECTURES:
        return ARCHITECTURES[model_type]
    known = ", ".join(ARCHITECTURES)
    raise EdgeStreamError(f"config.json: model_type {model_type!r} is not supported (supported: {known})")


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint of this configuration: Hugging Face name -> shape (rows, columns)."""
    arch = config.architecture
    n_q, n_kv = config.n_head * config.head_dim, config.n_head_kv * config.head_dim
    n_embd, n_ff = config.n_embd, config.n_ff
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.n_vocab, n_embd)}
    for layer in range(config.n_layer):
        p = f"model.layers.{layer}."
        shapes[p + "input_layernorm.weight"] = (n_embd,)
        if arch.fused:
            shapes[p + "self_attn.qkv_proj.weight"] = (n_q + 2 * n_kv, n_embd)
        else:
            for name, rows in (("q", n_q), ("k", n_kv), ("v", n_kv)):
                shapes[p + f"self_attn.{name}_proj.weight"] = (rows, n_embd)
                if config.qkv_bias:
                    shapes[p + f"self_attn.{name}_proj.bias"] = (rows,)
        shapes[p + "self_attn.o_proj.weight"] = (n_embd, n_q)
        if config.o_bias:
            shapes[p + "self_attn.o_proj.bias"] = (n_embd,)
        if arch.qk_norm:
            shapes[p + "self_attn.q_norm.weight"] = (config.head_dim,)
            shapes[p + "self_attn.k_norm.weight"] = (config.head_dim,)
        shapes[p + "post_attention_layernorm.weight"] = (n_embd,)
        if arch.post_norms:
            shapes[p + "pre_feedforward_layernorm.weight"] = (n_embd,)
            shapes[p + "post_feedforward_layernorm.weight"] = (n_embd,)
        if arch.fused:
            shapes[p + "mlp.gate_up_proj.weight"] = (2 * n_ff, n_embd)
        else:
            shapes[p + "mlp.gate_proj.weight"] = (n_ff, n_embd)
            shapes[p + "mlp.up_proj.weight"] = (n_ff, n_embd)
        shapes[p + "mlp.down_proj.weight"] = (n_embd, n_ff)
    shapes["model.norm.weight"] = (n_embd,)
    if not config.tied:
        shapes["lm_head.weight"] = (config.n_vocab, n_embd)
    return shapes
