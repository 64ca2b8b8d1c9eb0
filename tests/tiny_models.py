"""Tiny random GGUF models (F32), small enough to be made on the fly and decoded thousands of times.

They are random but not indifferent. q and k weights are scaled so that attention scores have a standard
deviation of about 2 (logits too), and a wrong position shows: leaving a gap of one position behind the first
four tokens of a 40-token text changes some logit by 1.8 to 3.1 in the variants of test_reference.py, and by
0.74 under linear scaling by 4, where one position is worth a quarter (measured; the test asserts 0.1). The
tests tolerate 1e-3 at most.

Every file carries a byte-level SentencePiece-style vocabulary (<unk> <s> </s> <0x00>..<0xFF>, then a few
pieces), so any text tokenises and round-trips.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

RopeScaling = tuple[str, float] | tuple[str, float, int] | None
PathLike = str | os.PathLike[str]

N_VOCAB = 320
N_CTX_TRAIN = 4096

UNK, BOS, EOS, FIRST_BYTE = 0, 1, 2, 3

# SentencePiece merges pairs, so each longer piece is reachable through shorter ones of this list.
_SPACE = "\u2581"
_PIECES = (
    *(_SPACE, "th", "he", "in", "er", "an", "re", "on", "at", "en", "nd", "ou", "st", "ll", "or", "is"),
    *("the", "and", "ing"),
    *(_SPACE + piece for piece in ("a", "i", "o", "s", "w", "in", "on", "the", "and")),
)


def build_vocab(n_vocab: int, special_tokens: Sequence[str] = ()) -> tuple[list[str], list[float], list[int]]:
    """Pieces, scores and token types, each of length ``n_vocab`` (>= 259 + len(special_tokens)).

    Order: <unk> <s> </s>, 256 bytes, ``special_tokens`` (control), text pieces, unreachable filler.
    """
    control, normal = int(gguf.TokenType.CONTROL), int(gguf.TokenType.NORMAL)
    tokens = ["<unk>", "<s>", "</s>"]
    types = [int(gguf.TokenType.UNKNOWN), control, control]
    tokens += [f"<0x{b:02X}>" for b in range(256)]
    types += [int(gguf.TokenType.BYTE)] * 256
    tokens += special_tokens
    types += [control] * len(special_tokens)
    if len(tokens) > n_vocab:
        raise ValueError(f"n_vocab={n_vocab} is too small: {len(tokens)} tokens are needed")
    tokens += _PIECES[: n_vocab - len(tokens)]
    tokens += [f"[x{i}]" for i in range(n_vocab - len(tokens))]
    types += [normal] * (n_vocab - len(types))
    scores = [0.0 if t != normal else -float(i) for i, t in enumerate(types)]
    return tokens, scores, types


class _Maker:
    """A GGUFWriter plus a seeded source of weights. Matrices are [n_out, n_in] float32."""

    def __init__(self, path: PathLike, arch: str, seed: int) -> None:
        self.path = Path(path)
        self.writer = gguf.GGUFWriter(self.path, arch)
        self.rng = np.random.default_rng(seed)

    def tensor(self, name: str, data: NDArray[Any]) -> None:
        self.writer.add_tensor(name, np.ascontiguousarray(data, dtype=np.float32))

    def linear(self, name: str, n_out: int, n_in: int, gain: float = 1.0, bias: float | None = None) -> None:
        """Random matrix that maps unit-RMS input to outputs of standard deviation ``gain``."""
        self.tensor(f"{name}.weight", self.rng.normal(0.0, gain / np.sqrt(n_in), (n_out, n_in)))
        if bias is not None:
            self.tensor(f"{name}.bias", self.rng.normal(0.0, bias, n_out))

    def norm(self, name: str, n: int, gain: float = 1.0, bias: bool = False) -> None:
        """Norm weights around ``gain``, uneven so that an omitted or swapped norm shows."""
        self.tensor(f"{name}.weight", gain * self.rng.uniform(0.8, 1.2, n))
        if bias:
            self.tensor(f"{name}.bias", self.rng.normal(0.0, 0.1, n))

    def vocab(self, n_vocab: int, chat_template: str | None, special_tokens: Sequence[str]) -> None:
        tokens, scores, types = build_vocab(n_vocab, special_tokens)
        w = self.writer
        w.add_tokenizer_model("llama")
        w.add_token_list(tokens)
        w.add_token_scores(scores)
        w.add_token_types(types)
        w.add_unk_token_id(UNK)
        w.add_bos_token_id(BOS)
        w.add_eos_token_id(EOS)
        w.add_add_bos_token(True)
        w.add_add_space_prefix(False)  # text -> tokens -> text is the identity
        if chat_template is not None:
            w.add_chat_template(chat_template)

    def finish(self) -> Path:
        self.writer.write_header_to_file()
        self.writer.write_kv_data_to_file()
        self.writer.write_tensors_to_file()
        self.writer.close()
        return self.path


def _rope_meta(w: gguf.GGUFWriter, n_rot: int, base: float, scaling: RopeScaling) -> None:
    w.add_rope_dimension_count(n_rot)
    w.add_rope_freq_base(base)
    if scaling is None:
        return
    kind, factor = scaling[0], float(scaling[1])
    w.add_rope_scaling_type({"linear": gguf.RopeScalingType.LINEAR, "yarn": gguf.RopeScalingType.YARN}[kind])
    w.add_rope_scaling_factor(factor)
    if len(scaling) == 3:  # yarn
        w.add_rope_scaling_orig_ctx_len(int(scaling[2]))


def _write_decoder(
    path: PathLike,
    arch: str,
    *,
    n_layer: int,
    n_embd: int | None,
    n_head: int,
    n_head_kv: int,
    head_dim: int,
    n_ff: int | None,
    n_vocab: int,
    n_ctx_train: int,
    rope_base: float,
    rope_scaling: RopeScaling,
    rope_factors: bool = False,
    tied: bool = False,
    qkv_bias: bool = False,
    qk_norm: bool = False,
    post_norms: bool = False,
    extra: dict[str, Any] | None = None,
    seed: int = 0,
    chat_template: str | None = None,
    special_tokens: Sequence[str] = (),
) -> Path:
    """The decoder that all rotary architectures here share.

    ``extra`` is metadata under the architecture's prefix: float, uint32 or array.
    """
    n_embd = n_embd or n_head * head_dim
    n_ff = n_ff or n_embd
    m = _Maker(path, arch, seed)
    w = m.writer
    w.add_name(f"tiny-{arch}")
    w.add_context_length(n_ctx_train)
    w.add_embedding_length(n_embd)
    w.add_block_count(n_layer)
    w.add_feed_forward_length(n_ff)
    w.add_head_count(n_head)
    w.add_head_count_kv(n_head_kv)
    w.add_key_length(head_dim)
    w.add_value_length(head_dim)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_vocab_size(n_vocab)
    _rope_meta(w, head_dim, rope_base, rope_scaling)
    for key, value in (extra or {}).items():
        if isinstance(value, float):
            w.add_float32(f"{arch}.{key}", value)
        elif isinstance(value, list):
            w.add_array(f"{arch}.{key}", value)
        else:
            w.add_uint32(f"{arch}.{key}", value)
    m.vocab(n_vocab, chat_template, special_tokens)

    # A tied embedding is also the output matrix, so it takes the output's scale.
    logit_gain = 2.0
    m.tensor(
        "token_embd.weight",
        m.rng.normal(0.0, logit_gain / np.sqrt(n_embd) if tied else 1.0, (n_vocab, n_embd)),
    )
    if not tied:
        m.linear("output", n_vocab, n_embd, logit_gain)
    m.norm("output_norm", n_embd)
    if rope_factors:  # like Llama 3: the fast pairs are left alone, the slow ones are slowed by up to 8
        m.tensor("rope_freqs.weight", np.geomspace(1.0, 8.0, head_dim // 2))

    qk_gain = 1.5  # scores q.k/sqrt(head_dim) of standard deviation 1.5^2
    for il in range(n_layer):
        p = f"blk.{il}."
        bias = 0.5 if qkv_bias else None
        m.norm(p + "attn_norm", n_embd)
        m.linear(p + "attn_q", n_head * head_dim, n_embd, qk_gain, bias)
        m.linear(p + "attn_k", n_head_kv * head_dim, n_embd, qk_gain, bias)
        m.linear(p + "attn_v", n_head_kv * head_dim, n_embd, 1.0, bias)
        m.linear(p + "attn_output", n_embd, n_head * head_dim, 1.5)
        if qk_norm:  # the norm decides the scale of q and k here
            m.norm(p + "attn_q_norm", head_dim, qk_gain)
            m.norm(p + "attn_k_norm", head_dim, qk_gain)
        m.norm(p + "ffn_norm", n_embd)
        m.linear(p + "ffn_gate", n_ff, n_embd)
        m.linear(p + "ffn_up", n_ff, n_embd)
        m.linear(p + "ffn_down", n_embd, n_ff)
        if post_norms:
            m.norm(p + "post_attention_norm", n_embd)
            m.norm(p + "post_ffw_norm", n_embd, 0.5)
    return m.finish()


# ---------------------------------------------------------------------------------------------------------
# models that stream
# ---------------------------------------------------------------------------------------------------------


def write_tiny_llama(
    path: PathLike,
    *,
    n_layer: int = 2,
    n_embd: int | None = None,
    n_head: int = 4,
    n_head_kv: int = 2,
    head_dim: int = 64,
    n_ff: int | None = None,
    n_vocab: int = N_VOCAB,
    n_ctx_train: int = N_CTX_TRAIN,
    rope_base: float = 10000.0,
    rope_scaling: RopeScaling = None,
    rope_factors: bool = False,
    tied: bool = False,
    seed: int = 0,
    arch: str = "llama",
    chat_template: str | None = None,
    special_tokens: Sequence[str] = (),
) -> Path:
    """RMSNorm, GQA, SwiGLU, rope NORM. ``n_embd`` and ``n_ff`` default to n_head * head_dim.

    ``rope_scaling``: ("linear", factor) or ("yarn", factor, n_ctx_orig). ``head_dim=16`` makes a cheap model,
    64 (default) one whose K and V can be quantised.
    """
    return _write_decoder(
        path,
        arch,
        n_layer=n_layer,
        n_embd=n_embd,
        n_head=n_head,
        n_head_kv=n_head_kv,
        head_dim=head_dim,
        n_ff=n_ff,
        n_vocab=n_vocab,
        n_ctx_train=n_ctx_train,
        rope_base=rope_base,
        rope_scaling=rope_scaling,
        rope_factors=rope_factors,
        tied=tied,
        seed=seed,
        chat_template=chat_template,
        special_tokens=special_tokens,
    )


def write_tiny_qwen2(
    path: PathLike,
    *,
    n_layer: int = 2,
    n_head: int = 4,
    n_head_kv: int = 2,
    head_dim: int = 64,
    n_ff: int | None = None,
    n_vocab: int = N_VOCAB,
    n_ctx_train: int = N_CTX_TRAIN,
    rope_base: float = 1000000.0,
    rope_scaling: RopeScaling = None,
    tied: bool = True,
    seed: int = 0,
    chat_template: str | None = None,
    special_tokens: Sequence[str] = (),
) -> Path:
    """Rope NEOX, QKV biases, tied embeddings. n_embd is n_head * head_dim (the architecture demands it)."""
    return _write_decoder(
        path,
        "qwen2",
        n_layer=n_layer,
        n_embd=None,
        n_head=n_head,
        n_head_kv=n_head_kv,
        head_dim=head_dim,
        n_ff=n_ff,
        n_vocab=n_vocab,
        n_ctx_train=n_ctx_train,
        rope_base=rope_base,
        rope_scaling=rope_scaling,
        tied=tied,
        qkv_bias=True,
        seed=seed,
        chat_template=chat_template,
        special_tokens=special_tokens,
    )


def write_tiny_qwen3(
    path: PathLike,
    *,
    n_layer: int = 2,
    n_embd: int | None = None,
    n_head: int = 4,
    n_head_kv: int = 2,
    head_dim: int = 64,
    n_ff: int | None = None,
    n_vocab: int = N_VOCAB,
    n_ctx_train: int = N_CTX_TRAIN,
    rope_base: float = 1000000.0,
    rope_scaling: RopeScaling = None,
    tied: bool = True,
    seed: int = 0,
    chat_template: str | None = None,
    special_tokens: Sequence[str] = (),
) -> Path:
    """Rope NEOX, QK-norm, no biases, tied embeddings."""
    return _write_decoder(
        path,
        "qwen3",
        n_layer=n_layer,
        n_embd=n_embd,
        n_head=n_head,
        n_head_kv=n_head_kv,
        head_dim=head_dim,
        n_ff=n_ff,
        n_vocab=n_vocab,
        n_ctx_train=n_ctx_train,
        rope_base=rope_base,
        rope_scaling=rope_scaling,
        tied=tied,
        qk_norm=True,
        seed=seed,
        chat_template=chat_template,
        special_tokens=special_tokens,
    )


def write_tiny_gemma3(
    path: PathLike,
    *,
    n_layer: int = 4,
    n_embd: int | None = None,
    n_head: int = 4,
    n_head_kv: int = 2,
    head_dim: int = 64,
    n_ff: int | None = None,
    n_vocab: int = N_VOCAB,
    n_ctx_train: int = N_CTX_TRAIN,
    sliding_window: int = 24,
    sliding_window_pattern: int | Sequence[bool] = 2,
    rope_base: float = 1000000.0,
    rope_base_swa: float = 10000.0,
    rope_scaling: RopeScaling = ("linear", 8.0),
    seed: int = 0,
    chat_template: str | None = None,
    special_tokens: Sequence[str] = (),
) -> Path:
    """Sliding-window layers (iSWA), QK-norm, pre and post norms, GELU, scaled and tied embeddings.

    ``sliding_window_pattern`` n: every n-th layer attends to everything (2: layers 1 and 3 of four), or one
    bool per layer, True = sliding window. Rope scaling applies to the full layers only.
    """
    pattern = sliding_window_pattern
    pattern = pattern if isinstance(pattern, int) else [bool(b) for b in pattern]
    return _write_decoder(
        path,
        "gemma3",
        n_layer=n_layer,
        n_embd=n_embd,
        n_head=n_head,
        n_head_kv=n_head_kv,
        head_dim=head_dim,
        n_ff=n_ff,
        n_vocab=n_vocab,
        n_ctx_train=n_ctx_train,
        rope_base=rope_base,
        rope_scaling=rope_scaling,
        tied=True,
        qk_norm=True,
        post_norms=True,
        extra={
            "attention.sliding_window": sliding_window,
            "attention.sliding_window_pattern": pattern,
            "rope.freq_base_swa": float(rope_base_swa),
        },
        seed=seed,
        chat_template=chat_template,
        special_tokens=special_tokens,
    )


# ---------------------------------------------------------------------------------------------------------
# models that a streaming engine must refuse (they load in llama.cpp)
# ---------------------------------------------------------------------------------------------------------


def write_tiny_qwen2vl(path: PathLike, *, n_layer: int = 2, head_dim: int = 32, seed: int = 0) -> Path:
    """M-RoPE: a token has four positions (text, height, width, extra)."""
    quarter = head_dim // 8
    return _write_decoder(
        path,
        "qwen2vl",
        n_layer=n_layer,
        n_embd=None,
        n_head=2,
        n_head_kv=2,
        head_dim=head_dim,
        n_ff=None,
        n_vocab=N_VOCAB,
        n_ctx_train=N_CTX_TRAIN,
        rope_base=1000000.0,
        rope_scaling=None,
        tied=True,
        qkv_bias=True,
        extra={"rope.dimension_sections": [2 * quarter, quarter, quarter, 0]},
        seed=seed,
    )


def write_tiny_gpt2(
    path: PathLike,
    *,
    n_layer: int = 2,
    n_embd: int = 64,
    n_head: int = 2,
    n_ctx_train: int = 256,
    seed: int = 0,
) -> Path:
    """Learned absolute positions."""
    m = _Maker(path, "gpt2", seed)
    w = m.writer
    w.add_name("tiny-gpt2")
    w.add_context_length(n_ctx_train)
    w.add_embedding_length(n_embd)
    w.add_block_count(n_layer)
    w.add_feed_forward_length(2 * n_embd)
    w.add_head_count(n_head)
    w.add_layer_norm_eps(1e-5)
    m.vocab(N_VOCAB, None, ())
    m.linear("token_embd", N_VOCAB, n_embd)
    m.linear("position_embd", n_ctx_train, n_embd)
    m.norm("output_norm", n_embd, bias=True)
    for il in range(n_layer):
        p = f"blk.{il}."
        m.norm(p + "attn_norm", n_embd, bias=True)
        m.linear(p + "attn_qkv", 3 * n_embd, n_embd, bias=0.1)
        m.linear(p + "attn_output", n_embd, n_embd, bias=0.1)
        m.norm(p + "ffn_norm", n_embd, bias=True)
        m.linear(p + "ffn_up", 2 * n_embd, n_embd, bias=0.1)
        m.linear(p + "ffn_down", n_embd, 2 * n_embd, bias=0.1)
    return m.finish()


def write_tiny_bert(
    path: PathLike,
    *,
    n_layer: int = 2,
    n_embd: int = 64,
    n_head: int = 2,
    n_ctx_train: int = 256,
    seed: int = 0,
) -> Path:
    """Embedding model: bidirectional attention, no cache, no logits."""
    m = _Maker(path, "bert", seed)
    w = m.writer
    w.add_name("tiny-bert")
    w.add_context_length(n_ctx_train)
    w.add_embedding_length(n_embd)
    w.add_block_count(n_layer)
    w.add_feed_forward_length(2 * n_embd)
    w.add_head_count(n_head)
    w.add_layer_norm_eps(1e-5)
    w.add_causal_attention(False)
    w.add_pooling_type(gguf.PoolingType.MEAN)
    w.add_token_type_count(2)
    m.vocab(N_VOCAB, None, ())
    m.linear("token_embd", N_VOCAB, n_embd)
    m.linear("token_types", 2, n_embd)
    m.linear("position_embd", n_ctx_train, n_embd)
    m.norm("token_embd_norm", n_embd, bias=True)
    for il in range(n_layer):
        p = f"blk.{il}."
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            m.linear(p + name, n_embd, n_embd, bias=0.1)
        m.norm(p + "attn_output_norm", n_embd, bias=True)
        m.linear(p + "ffn_up", 2 * n_embd, n_embd, bias=0.1)
        m.linear(p + "ffn_down", n_embd, 2 * n_embd, bias=0.1)
        m.norm(p + "layer_output_norm", n_embd, bias=True)
    return m.finish()


def write_tiny_mamba(path: PathLike, *, n_layer: int = 2, n_embd: int = 64, seed: int = 0) -> Path:
    """Recurrent: a state instead of cached keys."""
    d_conv, d_state, d_inner, dt_rank = 4, 16, 2 * n_embd, max(1, n_embd // 16)
    m = _Maker(path, "mamba", seed)
    w = m.writer
    w.add_name("tiny-mamba")
    w.add_context_length(N_CTX_TRAIN)
    w.add_embedding_length(n_embd)
    w.add_block_count(n_layer)
    w.add_feed_forward_length(0)
    w.add_head_count(0)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_ssm_conv_kernel(d_conv)
    w.add_ssm_inner_size(d_inner)
    w.add_ssm_state_size(d_state)
    w.add_ssm_time_step_rank(dt_rank)
    m.vocab(N_VOCAB, None, ())
    m.linear("token_embd", N_VOCAB, n_embd)
    m.norm("output_norm", n_embd)
    for il in range(n_layer):
        p = f"blk.{il}."
        m.norm(p + "attn_norm", n_embd)
        m.linear(p + "ssm_in", 2 * d_inner, n_embd)
        m.linear(p + "ssm_conv1d", d_inner, d_conv, bias=0.1)
        m.linear(p + "ssm_x", dt_rank + 2 * d_state, d_inner)
        m.linear(p + "ssm_dt", d_inner, dt_rank, bias=0.1)
        m.tensor(p + "ssm_a", -np.tile(np.arange(1.0, d_state + 1.0), (d_inner, 1)))
        m.tensor(p + "ssm_d", np.ones(d_inner))
        m.linear(p + "ssm_out", n_embd, d_inner)
    return m.finish()
