"""The sizes of a compiled decoder. No TVM here, which takes a second to import: a kept library runs without it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from edge_stream.families import families


@dataclass(frozen=True)
class DecoderConfig:
    """From mlc-chat-config.json."""

    n_layer: int
    n_embd: int
    n_ff: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_vocab: int
    norm_eps: float
    rope_base: float
    rope_scaling: dict[str, Any] | None
    tied: bool
    qkv_bias: bool
    qk_norm: bool
    qkv_name: str
    prefill_chunk: int

    @classmethod
    def read(cls, config: dict[str, Any]) -> DecoderConfig:
        """config: the whole of mlc-chat-config.json, as chat_config.build makes it."""
        m, family = config["model_config"], families()[config["model_type"]]
        return cls(
            n_layer=m["num_hidden_layers"],
            n_embd=m["hidden_size"],
            n_ff=m["intermediate_size"],
            n_head=m["num_attention_heads"],
            n_head_kv=m["num_key_value_heads"],
            head_dim=m["head_dim"],
            n_vocab=m["vocab_size"],
            norm_eps=m["rms_norm_eps"],
            rope_base=m["position_embedding_base"],
            rope_scaling=m["rope_scaling"],
            tied=m["tie_word_embeddings"],
            qkv_bias=family.qkv_bias or m.get("attention_bias", False),
            qk_norm=family.qk_norm,
            qkv_name=family.mlc.qkv_name,
            prefill_chunk=config["prefill_chunk_size"],
        )
