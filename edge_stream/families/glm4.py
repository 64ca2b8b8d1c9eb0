"""GLM-4 (dense): gate and up in one matrix, biases on q, k, v, half of each head rotated, norms around each block."""

from __future__ import annotations

from edge_stream.families import Family, Gguf, ModelConfig, Shapes
from edge_stream.families._layers import attention, norms


def _layer(model: ModelConfig, _layer: int) -> Shapes:
    names = ("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm")
    return (
        attention(model)
        | norms(model, *names)
        | {
            "mlp.gate_up_proj.weight": (2 * model.n_ff, model.n_embd),
            "mlp.down_proj.weight": (model.n_embd, model.n_ff),
        }
    )


FAMILY = Family(
    model_type="glm4",
    hf_class="Glm4ForCausalLM",
    models="GLM-4 0414 (9B, 32B), GLM-Z1",
    gguf=Gguf(arch="glm4", read_back=False, qkv_bias=True),
    layer=_layer,
    qkv_only_bias=True,
    defaults={
        "rms_norm_eps": 1.5625e-7,
        "attention_bias": True,
        "partial_rotary_factor": 0.5,
        "head_dim": 128,
        "num_key_value_heads": 2,
        "max_position_embeddings": 131072,
    },
)
