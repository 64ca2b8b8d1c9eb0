"""A forward pass in NumPy float64, as transformers defines it: the reference for converted models.

Independent of llama.cpp and TVM, without a cache. Weights are read a few rows at a time, so memory does not grow with
the model. Slow: for short texts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edge_stream.families import ModelConfig, RopeScaling

if TYPE_CHECKING:
    from edge_stream.converters.source import Source

F64 = NDArray[np.float64]
_BLOCK_ELEMENTS = 1 << 22


def logits(source: Source, tokens: Sequence[int]) -> F64:
    """Logits of every position, [len(tokens), n_vocab] float64."""
    model, family = source.model, source.model.family
    x = np.stack(
        [source.load("model.embed_tokens.weight", t, t + 1)[0].astype(np.float64) for t in tokens]
    )  # [n, n_embd]
    if family.scaled_embedding:
        # transformers rounds the factor to the weights' dtype, which is negligible in float32
        x *= math.sqrt(model.n_embd)
    x *= model.own.get("embedding_multiplier", 1.0)
    residual = model.own.get("residual_multiplier", 1.0)
    cos, sin = rope_table(model, len(tokens), model.rope_base, model.rope_scaling)
    cos_swa, sin_swa = rope_table(model, len(tokens), model.rope_base_swa, None)
    for layer in range(model.n_layer):
        p = f"model.layers.{layer}."
        swa = model.swa_layers[layer]
        table = (cos_swa, sin_swa) if swa and family.own_swa_rope else (cos, sin)
        if model.rope_layers and not model.rope_layers[layer]:
            table = np.ones_like(cos), np.zeros_like(sin)
        h = attention(source, p + "self_attn.", norm(source, p + "input_layernorm.weight", x), table, swa)
        if family.post_norms:
            x = x + norm(source, p + "post_attention_layernorm.weight", h)
            h = mlp(source, p + "mlp.", norm(source, p + "pre_feedforward_layernorm.weight", x))
            x = x + norm(source, p + "post_feedforward_layernorm.weight", h)
        else:
            x = x + h * residual
            forward = experts if family.experts else mlp
            x = x + forward(source, p + "mlp.", norm(source, p + "post_attention_layernorm.weight", x)) * residual
    x = norm(source, "model.norm.weight", x)
    out = linear(source, "model.embed_tokens.weight" if model.tied else "lm_head.weight", x)
    out /= model.own.get("logits_scaling", 1.0)
    return model.logit_softcap * np.tanh(out / model.logit_softcap) if model.logit_softcap else out


def linear(source: Source, name: str, x: F64, bias: str | None = None) -> F64:
    """x [n, n_in] times the transposed matrix [n_out, n_in]: [n, n_out]."""
    rows, columns = source.tensors[name].shape
    out = np.empty((len(x), rows))
    step = max(1, _BLOCK_ELEMENTS // columns)
    if bias is None and source.model.family.gguf.permuted:
        step = max(1, step // source.model.head_dim) * source.model.head_dim
    for start in range(0, rows, step):
        out[:, start : start + step] = x @ source.load(name, start, min(rows, start + step)).astype(np.float64).T
    return out if bias is None else out + source.load(bias).astype(np.float64)


def norm(source: Source, name: str, x: F64) -> F64:
    """RMSNorm over the last axis."""
    weight = source.load(name).astype(np.float64) + source.model.family.norm_offset
    normed: F64 = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + source.model.norm_eps) * weight
    return normed


def attention(source: Source, p: str, x: F64, table: tuple[F64, F64], swa: bool) -> F64:
    """Causal self-attention over x [n, n_embd], within the sliding window if swa."""
    model, family = source.model, source.model.family
    n, d = len(x), model.head_dim
    n_q, n_kv = model.n_head * d, model.n_head_kv * d
    if family.fused:
        q, k, v = np.split(linear(source, p + "qkv_proj.weight", x), [n_q, n_q + n_kv], axis=1)
    else:
        q, k, v = (
            linear(source, f"{p}{c}_proj.weight", x, f"{p}{c}_proj.bias" if model.qkv_bias else None) for c in "qkv"
        )
    q, k, v = (t.reshape(n, -1, d).swapaxes(0, 1) for t in (q, k, v))  # [heads, n, d]
    if family.qk_norm:
        q, k = norm(source, p + "q_norm.weight", q), norm(source, p + "k_norm.weight", k)
    q, k = rotate(q, *table), rotate(k, *table)
    if model.own.get("temperature") and model.rope_scaling:  # grows in steps beyond the original length
        steps = np.floor(np.arange(n) / model.rope_scaling.n_ctx_orig)
        q = q * (1.0 + model.own["temperature"] * np.log1p(steps))[:, None]
    share = model.n_head // model.n_head_kv
    k, v = np.repeat(k, share, axis=0), np.repeat(v, share, axis=0)
    scores = q @ k.swapaxes(1, 2) * model.own.get("attention_multiplier", model.attn_scale)  # [heads, n, n]
    if model.attn_softcap:
        scores = model.attn_softcap * np.tanh(scores / model.attn_softcap)
    distance = np.arange(n)[:, None] - np.arange(n)[None, :]
    visible = (distance >= 0) & ((distance < model.sliding_window) if swa else True)
    scores = np.where(visible, scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    mixed = (weights @ v).swapaxes(0, 1).reshape(n, n_q)
    return linear(source, p + "o_proj.weight", mixed, p + "o_proj.bias" if model.o_bias else None)


def mlp(source: Source, p: str, x: F64) -> F64:
    """down(activation(gate(x)) * up(x))."""
    if source.model.family.fused:
        gate, up = np.split(linear(source, p + "gate_up_proj.weight", x), 2, axis=1)
    else:
        gate, up = linear(source, p + "gate_proj.weight", x), linear(source, p + "up_proj.weight", x)
    if source.model.family.activation == "silu":
        gate = gate * 0.5 * (1.0 + np.tanh(0.5 * gate))
    else:
        gate = 0.5 * gate * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (gate + 0.044715 * gate**3)))
    return linear(source, p + "down_proj.weight", gate * up)


def experts(source: Source, p: str, x: F64) -> F64:
    """The sum of the best experts' MLPs, by their share of the router's softmax, which is made to add up to 1."""
    own, out = source.model.own, np.zeros_like(x)
    scores = linear(source, p + "gate.weight", x)  # [n, experts]
    chosen = np.argsort(-scores, axis=1, kind="stable")[:, : own["n_expert_used"]]
    weights = np.exp(np.take_along_axis(scores, chosen, 1) - scores.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    for expert in np.unique(chosen):
        rows, which = np.nonzero(chosen == expert)
        if own.get("fused"):
            both, down = (
                source.load(f"{p}experts.{name}", expert, expert + 1)[0].astype(np.float64)
                for name in ("gate_up_proj", "down_proj")
            )
            gate, up = np.split(x[rows] @ both.T, 2, axis=1)
            h = (gate * 0.5 * (1.0 + np.tanh(0.5 * gate)) * up) @ down.T
        else:
            h = mlp(source, f"{p}experts.{expert}.", x[rows])
        out[rows] += h * weights[rows, which][:, None]
    return out


def rotate(x: F64, cos: F64, sin: F64) -> F64:
    """Rotate x [heads, n, d] by cos, sin [n, n_rot/2]: pairs (i, i + n_rot/2); dimensions from n_rot on stay."""
    half = cos.shape[1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)


def rope_table(model: ModelConfig, n: int, base: float, scaling: RopeScaling | None) -> tuple[F64, F64]:
    """Cosine and sine of positions 0..n-1, each [n, n_rot/2] (transformers, modeling_rope_utils.py)."""
    frequency = base ** (-np.arange(0, model.n_rot, 2, dtype=np.float64) / model.n_rot)
    magnitude = 1.0
    if scaling is not None:
        frequency, magnitude = _scaled(frequency, scaling, n, base, model.n_rot), scaling.magnitude
    angle = np.arange(n, dtype=np.float64)[:, None] * frequency
    return np.cos(angle) * magnitude, np.sin(angle) * magnitude


def _scaled(frequency: F64, s: RopeScaling, n: int, base: float, n_rot: int) -> F64:
    if s.kind == "linear":
        return frequency / s.factor
    if s.kind == "longrope":
        divisors: F64 = np.array(s.long_factor if n > s.n_ctx_orig else s.short_factor)
        return frequency / divisors
    if s.kind == "llama3":
        wavelength = 2.0 * math.pi / frequency
        low, high = s.n_ctx_orig / s.low_freq_factor, s.n_ctx_orig / s.high_freq_factor
        smooth = (s.n_ctx_orig / wavelength - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
        between = (1.0 - smooth) * frequency / s.factor + smooth * frequency
        return np.where(wavelength < high, frequency, np.where(wavelength > low, frequency / s.factor, between))

    def dimension(turns: float) -> float:  # the pair with this many turns within the original context
        return n_rot * math.log(s.n_ctx_orig / (turns * 2.0 * math.pi)) / (2.0 * math.log(base))

    first = max(0, math.floor(dimension(s.beta_fast)))
    last = min(n_rot - 1, math.ceil(dimension(s.beta_slow)))
    ramp = np.clip((np.arange(n_rot // 2) - first) / max(0.001, last - first), 0.0, 1.0)
    return frequency / s.factor * ramp + frequency * (1.0 - ramp)
