"""The sizes of a compiled decoder. No TVM here, which takes a second to import: a kept library runs without it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edge_stream.converters.config import read_rope_scaling
from edge_stream.families import RopeScaling, find_family


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
    rope_base_swa: float  # of sliding-window layers, which have no scaling
    rope_scaling: RopeScaling | None
    temperature: float  # how queries grow with the position beyond the original training length; 0: they do not
    rope_layers: tuple[bool, ...]  # which layers rotate q and k; (): all
    swa_layers: tuple[bool, ...]  # which layers see the last n_swa tokens only; (): none
    n_swa: int
    attn_scale: float  # factor on q.k, but for what yarn adds
    tied: bool
    qkv_bias: bool
    qk_norm: bool
    qkv_name: str  # "": q, k and v are separate
    post_norms: bool
    activation: str
    embed_scale: float
    prefill_chunk: int
    n_expert: int  # in place of every MLP; 0: none
    n_expert_used: int
    n_ff_expert: int

    @property
    def score_scale(self) -> float:
        """Factor on q.k; yarn's magnitude is on both."""
        return self.attn_scale * (self.rope_scaling.magnitude**2 if self.rope_scaling else 1.0)

    @property
    def rope_kinds(self) -> tuple[str, ...]:
        """How each layer rotates: full, sliding, none."""
        rope, swa = self.rope_layers or (True,) * self.n_layer, self.swa_layers or (False,) * self.n_layer
        return tuple(("sliding" if s else "full") if r else "none" for r, s in zip(rope, swa, strict=True))

    def window(self, layer: int) -> int:
        """How many tokens a layer sees; 0: all."""
        return self.n_swa if self.swa_layers and self.swa_layers[layer] else 0

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> DecoderConfig:
        """config: the whole of mlc-chat-config.json, as chat_config.build makes it."""
        m, family = config["model_config"], find_family(config["model_type"])
        if family is None:
            raise KeyError(config["model_type"])
        m = m | m.get("text_config", {})
        head_dim = m["head_dim"]
        rope = m["rope_parameters"] if "rope_parameters" in m else m["rope_scaling"]
        # a folder of mlc-llm's lacks it, and Gemma 3 is not computed without
        types = m["layer_types"] if family.own_swa_rope else m.get("layer_types", ())
        return cls(
            n_layer=m["num_hidden_layers"],
            n_embd=m["hidden_size"],
            n_ff=m["intermediate_size"],
            n_head=m["num_attention_heads"],
            n_head_kv=m["num_key_value_heads"],
            head_dim=head_dim,
            n_vocab=m["vocab_size"],
            norm_eps=m["rms_norm_eps"],
            rope_base=m["position_embedding_base"],
            rope_base_swa=m.get("rope_local_base_freq", m["position_embedding_base"]),
            rope_scaling=read_rope_scaling(m | {"rope_parameters": rope}, head_dim),
            temperature=float((rope or {}).get("llama_4_scaling_beta") or 0.0),
            rope_layers=tuple(bool(x) for x in m.get("no_rope_layers", ())),
            swa_layers=tuple(t == "sliding_attention" for t in types),
            n_swa=m["sliding_window"] if "sliding_attention" in types else 0,
            attn_scale=float(m.get("query_pre_attn_scalar", head_dim)) ** -0.5,
            tied=m["tie_word_embeddings"],
            qkv_bias=family.qkv_bias or m.get("attention_bias", False),
            qk_norm=family.qk_norm,
            qkv_name=family.mlc.qkv_name,
            post_norms=family.post_norms,
            activation=family.activation,
            embed_scale=float(m["hidden_size"]) ** 0.5 if family.scaled_embedding else 1.0,
            prefill_chunk=config["prefill_chunk_size"],
            n_expert=m["num_experts"] if family.experts else 0,
            n_expert_used=m["num_experts_per_tok"] if family.experts else 0,
            n_ff_expert=m["moe_intermediate_size"] if family.experts else 0,
        )
