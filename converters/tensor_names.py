"""The tensors that a checkpoint must have, by their Hugging Face names."""

from __future__ import annotations

from edge_stream.families import ModelConfig


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint of this configuration: Hugging Face name -> shape (rows, columns)."""
    family = config.family
    n_q, n_kv = config.n_head * config.head_dim, config.n_head_kv * config.head_dim
    n_embd, n_ff = config.n_embd, config.n_ff
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.n_vocab, n_embd)}
    for layer in range(config.n_layer):
        p = f"model.layers.{layer}."
        if family.layer is not None:
            shapes |= {p + name: shape for name, shape in family.layer(config, layer).items()}
            continue
        shapes[p + "input_layernorm.weight"] = (n_embd,)
        if family.fused:
            shapes[p + "self_attn.qkv_proj.weight"] = (n_q + 2 * n_kv, n_embd)
        else:
            for name, rows in (("q", n_q), ("k", n_kv), ("v", n_kv)):
                shapes[p + f"self_attn.{name}_proj.weight"] = (rows, n_embd)
                if config.qkv_bias:
                    shapes[p + f"self_attn.{name}_proj.bias"] = (rows,)
        shapes[p + "self_attn.o_proj.weight"] = (n_embd, n_q)
        if config.o_bias:
            shapes[p + "self_attn.o_proj.bias"] = (n_embd,)
        if family.qk_norm:
            shapes[p + "self_attn.q_norm.weight"] = (config.head_dim,)
            shapes[p + "self_attn.k_norm.weight"] = (config.head_dim,)
        shapes[p + "post_attention_layernorm.weight"] = (n_embd,)
        if family.post_norms:
            shapes[p + "pre_feedforward_layernorm.weight"] = (n_embd,)
            shapes[p + "post_feedforward_layernorm.weight"] = (n_embd,)
        if family.fused:
            shapes[p + "mlp.gate_up_proj.weight"] = (2 * n_ff, n_embd)
        else:
            shapes[p + "mlp.gate_proj.weight"] = (n_ff, n_embd)
            shapes[p + "mlp.up_proj.weight"] = (n_ff, n_embd)
        shapes[p + "mlp.down_proj.weight"] = (n_embd, n_ff)
    shapes["model.norm.weight"] = (n_embd,)
    shapes |= family.outside(config)
    if not config.tied:
        shapes["lm_head.weight"] = (config.n_vocab, n_embd)
    return shapes
