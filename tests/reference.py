"""NumPy float64 reference of a decoder that streams with attention sinks and a sliding window.

This module is the ground truth of the test-suite, so it is written to be obviously right, not fast, and it
shares no code with the engines. It uses no cache trick at all: the keys are kept *without* their rotary
rotation, and at every decode all of them are rotated anew by their in-cache position (sinks 0..n_keep-1,
window n_keep.., then the chunk that is being decoded). There is nothing to slide, shift or rebase here, hence
nothing that could drift.

Semantics (``n_past`` counts the tokens seen since the stream began):

* before a chunk of ``m`` tokens is decoded, the oldest window tokens are evicted until
  ``sinks + window + m <= n_ctx``; the first ``n_keep`` tokens of the stream are never evicted;
* ``n_slide`` > 0 makes every eviction take at least ``n_slide`` tokens (at most the whole window);
* a chunk that starts while ``n_past < n_keep`` ends where the sinks end;
* every token attends to sinks + window + the earlier tokens of its own chunk. Sliding-window layers mask
  the keys whose in-cache distance is ``>= n_swa``;
* recalled tokens are held between sinks and window: in-cache positions n_keep.., the window follows. They are decoded
  as if only the sinks were cached, and take room from the window, whose oldest tokens are evicted for them.

Weights come from a GGUF file (F32, or F16 read as stored). Supported architectures: llama (also Mistral,
SmolLM2, Llama 3 with ``rope_freqs``), mistral3 (its queries grow in steps with the position), qwen2, qwen3, qwen3moe,
gemma3; rope scaling none, linear and YaRN. Layers of other kinds (without rotation, recurrent, M-RoPE) are in
reference_layers.py.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]
Chunk = int | Sequence[int]

ROPE_NORM = "norm"  # pairs (2i, 2i+1)
ROPE_NEOX = "neox"  # pairs (i, i + n_rot/2)

_ROPE_TYPE = {
    "llama": ROPE_NORM,
    "mistral3": ROPE_NORM,
    "qwen2": ROPE_NEOX,
    "qwen3": ROPE_NEOX,
    "qwen3moe": ROPE_NEOX,
    "gemma3": ROPE_NEOX,
}


# ---------------------------------------------------------------------------------------------------------
# configuration and weights
# ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Hyperparameters, named as llama.cpp names them. Per-layer facts are tuples of length ``n_layer``."""

    arch: str
    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_rot: int
    n_vocab: int
    n_ctx_train: int
    rms_eps: float
    rope_type: str
    rope_base: float = 10000.0
    rope_freq_scale: float = 1.0  # 1 / scaling factor
    rope_attn_factor: float = 1.0
    yarn: bool = False
    yarn_n_ctx_orig: int = 0
    yarn_beta_fast: float = 32.0
    yarn_beta_slow: float = 1.0
    yarn_log_mul: float = 0.0  # 0: YaRN's magnitude stays; 1: it is taken back
    temperature: float = 0.0  # queries at position p are multiplied by 1 + this * log(1 + p // yarn_n_ctx_orig)
    n_swa: int = 0
    swa_layers: tuple[bool, ...] = ()
    rope_base_swa: float = 10000.0
    n_expert_used: int = 0  # of the experts that each layer has in place of its feed-forward network
    # ggml's CPU backend looks GELU up in a float16 table; "table" reproduces that, "exact" is the function.
    gelu: str = "exact"

    @property
    def embd_scale(self) -> float:
        """Factor on the token embeddings (gemma multiplies by sqrt(n_embd))."""
        return float(np.sqrt(self.n_embd)) if self.arch == "gemma3" else 1.0

    @property
    def kq_scale(self) -> float:
        """Factor on the attention scores."""
        return float(1.0 / np.sqrt(self.head_dim))

    def is_swa(self, il: int) -> bool:
        """Whether layer ``il`` attends through a sliding window of ``n_swa`` positions."""
        return bool(self.swa_layers) and self.swa_layers[il]


@dataclass(frozen=True)
class Weights:
    """Tensors by GGUF name, float64. Matrices are [n_out, n_in], norms and biases are vectors."""

    tensors: dict[str, F64] = field(repr=False)

    def __getitem__(self, name: str) -> F64:
        return self.tensors[name]

    def get(self, name: str) -> F64 | None:
        """The tensor, or None where the model has none of that name."""
        return self.tensors.get(name)


def read_metadata(reader: gguf.GGUFReader) -> dict[str, Any]:
    """The file's keys and values."""
    return {name: f.contents() for name, f in reader.fields.items() if not name.startswith("GGUF.")}


def load_weights(path: str | os.PathLike[str], rope_types: Mapping[str, str] = _ROPE_TYPE) -> tuple[Weights, Config]:
    """Read a GGUF file. Raises ValueError for an architecture, scaling or tensor type it does not know.

    ``rope_types``: the known architectures and how they pair dimensions.
    """
    reader = gguf.GGUFReader(Path(path), "r")
    meta = read_metadata(reader)
    arch = meta["general.architecture"]
    if arch not in rope_types:
        raise ValueError(f"the reference does not implement architecture {arch!r}")

    tensors: dict[str, F64] = {}
    for t in reader.tensors:
        if t.tensor_type not in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
            raise ValueError(f"{t.name} is {t.tensor_type.name}: the reference reads F32 and F16 only")
        tensors[t.name] = np.array(t.data, dtype=np.float64)

    def key(name: str, default: Any = None) -> Any:
        value = meta.get(f"{arch}.{name}", default)
        if value is None:
            raise ValueError(f"the file has no {arch}.{name}")
        return value

    n_embd, n_head, n_layer = key("embedding_length"), key("attention.head_count"), key("block_count")
    n_head_kv = key("attention.head_count_kv", n_head)
    if isinstance(n_head_kv, list):  # 0 for the layers without attention
        n_head_kv = max(n_head_kv)
    head_dim = key("attention.key_length", n_embd // n_head)
    if key("attention.value_length", head_dim) != head_dim:
        raise ValueError("key and value heads of different sizes are not implemented")

    scaling = key("rope.scaling.type", "linear")
    if scaling not in ("none", "linear", "yarn"):
        raise ValueError(f"rope scaling {scaling!r} is not implemented")
    factor = key("rope.scaling.factor", 0.0) or 1.0
    n_ctx_train = key("context_length")

    n_swa = key("attention.sliding_window", 0) if arch == "gemma3" else 0
    swa_layers: tuple[bool, ...] = ()
    if n_swa:
        pattern = key("attention.sliding_window_pattern", 6)
        if isinstance(pattern, list):
            swa_layers = tuple(bool(x) for x in pattern[:n_layer])
        else:  # every pattern-th layer attends to everything
            swa_layers = tuple(pattern == 0 or il % pattern < pattern - 1 for il in range(n_layer))

    config = Config(
        arch=arch,
        n_layer=n_layer,
        n_embd=n_embd,
        n_head=n_head,
        n_head_kv=n_head_kv,
        head_dim=head_dim,
        n_rot=key("rope.dimension_count", head_dim),
        n_vocab=tensors["token_embd.weight"].shape[0],
        n_ctx_train=n_ctx_train,
        rms_eps=key("attention.layer_norm_rms_epsilon"),
        rope_type=rope_types[arch],
        rope_base=key("rope.freq_base", 10000.0),
        rope_freq_scale=1.0 if scaling == "none" else 1.0 / factor,
        rope_attn_factor=key("rope.scaling.attn_factor", 1.0),
        yarn=scaling == "yarn",
        yarn_n_ctx_orig=key("rope.scaling.original_context_length", n_ctx_train),
        yarn_log_mul=key("rope.scaling.yarn_log_multiplier", 0.0),
        temperature=key("attention.temperature_scale", 0.0),
        n_swa=n_swa,
        swa_layers=swa_layers,
        rope_base_swa=key("rope.freq_base_swa", 10000.0),
        n_expert_used=key("expert_used_count", 0),
    )
    return Weights(tensors), config


# ---------------------------------------------------------------------------------------------------------
# rotary positions
# ---------------------------------------------------------------------------------------------------------


def _yarn_corr_dims(
    n_rot: int, n_ctx_orig: int, base: float, beta_fast: float, beta_slow: float
) -> tuple[float, float]:
    """First and last pair index of the ramp between extrapolated (fast) and interpolated (slow) pairs."""

    def dim(n_turns: float) -> float:
        return float(n_rot * np.log(n_ctx_orig / (n_turns * 2.0 * np.pi)) / (2.0 * np.log(base)))

    return max(0.0, float(np.floor(dim(beta_fast)))), min(n_rot - 1.0, float(np.ceil(dim(beta_slow))))


def rope_table(config: Config, n_pos: int, *, swa: bool = False, factors: F64 | None = None) -> tuple[F64, F64]:
    """Cosine and sine of positions 0..n_pos-1, each [n_pos, n_rot/2] float64, magnitude included.

    ``factors`` [n_rot/2] divide the angles (Llama 3). Sliding-window layers have a base of their own and no
    frequency scaling.
    """
    n_rot = config.n_rot
    base = config.rope_base_swa if swa else config.rope_base
    freq_scale = 1.0 if swa else config.rope_freq_scale
    pair = np.arange(n_rot // 2, dtype=np.float64)
    angle = np.arange(n_pos, dtype=np.float64)[:, None] * base ** (-2.0 * pair / n_rot)
    if factors is not None:
        angle = angle / factors[: n_rot // 2]

    theta = freq_scale * angle
    magnitude = config.rope_attn_factor
    if config.yarn:
        low, high = _yarn_corr_dims(n_rot, config.yarn_n_ctx_orig, base, config.yarn_beta_fast, config.yarn_beta_slow)
        ramp = 1.0 - np.clip((pair - low) / max(0.001, high - low), 0.0, 1.0)  # 1 = extrapolate
        theta = theta * (1.0 - ramp) + angle * ramp
        # The context cancels the factor that the rope kernel is going to apply, with the *model's* scale: on
        # layers with the same scale what remains is 1 + 0.1 ln(factor), elsewhere it differs.
        factor = 1.0 / config.rope_freq_scale
        mscale = 1.0 if factor <= 1.0 else 0.1 * np.log(factor) + 1.0
        magnitude *= mscale / (1.0 + 0.1 * np.log(factor))
        if factor > 1.0:
            magnitude /= 1.0 + 0.1 * config.yarn_log_mul * np.log(factor)
        magnitude *= 1.0 + 0.1 * np.log(1.0 / freq_scale)
    return np.cos(theta) * magnitude, np.sin(theta) * magnitude


def rotate(x: F64, cos: F64, sin: F64, rope_type: str) -> F64:
    """Rotate ``x`` [n_heads, n_tokens, head_dim] by per-token cos/sin [n_tokens, n_rot/2]; same shape back.

    Only the first n_rot dimensions turn.
    """
    half = cos.shape[1]
    out = x.copy()
    if rope_type == ROPE_NORM:
        a, b = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    else:
        a, b = slice(0, half), slice(half, 2 * half)
    out[..., a] = x[..., a] * cos - x[..., b] * sin
    out[..., b] = x[..., a] * sin + x[..., b] * cos
    return out


# ---------------------------------------------------------------------------------------------------------
# small functions
# ---------------------------------------------------------------------------------------------------------


def rms_norm(x: F64, weight: F64, eps: float) -> F64:
    """RMSNorm over the last axis, any leading shape."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def silu(x: F64) -> F64:
    """Swish, x * sigmoid(x), in the tanh form, which cannot overflow."""
    return x * 0.5 * (1.0 + np.tanh(0.5 * x))


def gelu_tanh(x: F64, mode: str = "exact") -> F64:
    """GELU, tanh form. ``mode="table"`` rounds argument and value to float16 in (-10, 10) like ggml-cpu."""

    def exact(v: F64) -> F64:
        return 0.5 * v * (1.0 + np.tanh(0.79788456080286535587989211986876 * v * (1.0 + 0.044715 * v * v)))

    if mode == "exact":
        return exact(x)
    inside = np.abs(x) < 10.0
    rounded = np.where(inside, x, 0.0).astype(np.float16).astype(np.float64)
    return np.where(inside, exact(rounded).astype(np.float16).astype(np.float64), np.where(x > 0, x, 0.0))


def softmax(x: F64) -> F64:
    """Softmax over the last axis; -inf entries get exactly 0."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def log_softmax(x: F64) -> F64:
    """Log-probabilities over the last axis."""
    shifted = x - x.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


# ---------------------------------------------------------------------------------------------------------
# which tokens are in the cache
# ---------------------------------------------------------------------------------------------------------


class Window:
    """Bookkeeping of the cached tokens, tensor-free.

    ``cached`` lists the stream indices (0 = first token of the stream) in cache order: sinks, then window.
    """

    def __init__(self, n_ctx: int, n_keep: int, n_slide: int = 0) -> None:
        if not 0 <= n_keep < n_ctx:
            raise ValueError(f"need 0 <= n_keep < n_ctx, got n_keep={n_keep}, n_ctx={n_ctx}")
        if n_slide < 0:
            raise ValueError(f"n_slide must not be negative, got {n_slide}")
        self.n_ctx, self.n_keep, self.n_slide = n_ctx, n_keep, n_slide
        self.n_past = 0
        self.n_recalled = 0
        self.cached: list[int] = []

    @property
    def n_sinks(self) -> int:
        """Sinks cached so far (n_keep once the stream is that long)."""
        return min(self.n_keep, len(self.cached))

    def plan(self, n_tokens: int, chunk: Chunk) -> list[int]:
        """Sizes of the chunks in which the next ``n_tokens`` are decoded.

        An int is the largest chunk. A sequence gives every size and must add up to ``n_tokens``; one of its
        entries that crosses the end of the sinks is split there.
        """
        sizes = [] if isinstance(chunk, int) else [int(c) for c in reversed(chunk)]  # a stack
        if any(c <= 0 for c in sizes) or (isinstance(chunk, int) and chunk <= 0):
            raise ValueError(f"chunk sizes must be positive, got {chunk}")
        if not isinstance(chunk, int) and sum(sizes) != n_tokens:
            raise ValueError(f"the chunks add up to {sum(sizes)}, not to {n_tokens} tokens")
        plan: list[int] = []
        at, end = self.n_past, self.n_past + n_tokens
        while at < end:
            m = min(chunk if isinstance(chunk, int) else sizes.pop(), end - at)
            if at < self.n_keep < at + m:
                if not isinstance(chunk, int):  # an int is not topped up: the next chunk is whole again
                    sizes.append(at + m - self.n_keep)
                m = self.n_keep - at
            if at >= self.n_keep and self.n_keep + m > self.n_ctx:
                raise ValueError(f"a chunk of {m} does not fit n_ctx={self.n_ctx} beside {self.n_keep} sinks")
            plan.append(m)
            at += m
        return plan

    def admit(self, m: int) -> int:
        """Evict what must go before ``m`` tokens, append them; returns how many were evicted."""
        evict = self.make_room(m)
        self.cached.extend(range(self.n_past, self.n_past + m))
        self.n_past += m
        return evict

    def make_room(self, m: int) -> int:
        """Evict until there is room for ``m`` tokens; returns how many were evicted."""
        need = len(self.cached) + self.n_recalled + m - self.n_ctx
        n_window = len(self.cached) - self.n_sinks
        evict = 0
        if need > 0:
            evict = min(max(need, self.n_slide), n_window)
            if evict < need:
                raise ValueError(f"{m} tokens do not fit n_ctx={self.n_ctx} beside {self.n_sinks} sinks")
            del self.cached[self.n_sinks : self.n_sinks + evict]
        return evict


def default_chunk(n_ctx: int, n_keep: int, n_batch: int = 512) -> int:
    """The chunk size in which a long prompt is fed: min(n_batch, (n_ctx - n_keep) / 4), at least 1."""
    return max(1, min(n_batch, (n_ctx - n_keep) // 4))


# ---------------------------------------------------------------------------------------------------------
# the stream
# ---------------------------------------------------------------------------------------------------------


class ReferenceStream:
    """One token stream through the model.

    K and V are held per layer as [n_head_kv, n_cached, head_dim] float64; K *before* the rotation. ``rope``
    holds the (cos, sin) tables by in-cache position, under False for full layers and True for sliding-window
    ones.
    """

    def __init__(self, weights: Weights, config: Config, n_ctx: int, n_keep: int = 4, n_slide: int = 0) -> None:
        self.weights, self.config = weights, config
        self.window = Window(n_ctx, n_keep, n_slide)
        empty = np.zeros((config.n_head_kv, 0, config.head_dim))
        self._k: list[F64] = [empty] * config.n_layer
        self._v: list[F64] = [empty] * config.n_layer
        factors = weights.get("rope_freqs.weight") if config.arch == "llama" else None
        self.rope = {swa: rope_table(config, n_ctx, swa=swa, factors=factors) for swa in (False, True)}

    @property
    def n_past(self) -> int:
        """Tokens seen since the stream began."""
        return self.window.n_past

    @property
    def cached(self) -> list[int]:
        """Stream indices of the cached tokens: sinks, then window."""
        return list(self.window.cached)

    def feed(self, tokens: Sequence[int], chunk: Chunk = 1) -> F64:
        """Decode ``tokens`` in chunks (see ``Window.plan``); logits [n_tokens, n_vocab] float64."""
        ids = np.asarray(tokens, dtype=np.int64)
        out = np.empty((len(ids), self.config.n_vocab))
        start = 0
        for m in self.window.plan(len(ids), chunk):
            out[start : start + m] = self._decode(ids[start : start + m])
            start += m
        return out

    def recall(self, tokens: Sequence[int]) -> None:
        """Hold ``tokens`` between sinks and window, instead of what was held there."""
        self.unrecall()
        n_sinks = self.window.n_sinks
        self._remove(n_sinks, self.window.make_room(len(tokens)))
        held = self._k, self._v
        self._k, self._v = ([x[:, :n_sinks] for x in kv] for kv in held)
        self._run(np.asarray(tokens, dtype=np.int64))
        for kv, before in zip((self._k, self._v), held, strict=True):
            kv[:] = [np.concatenate([x, y[:, n_sinks:]], axis=1) for x, y in zip(kv, before, strict=True)]
        self.window.n_recalled = len(tokens)

    def unrecall(self) -> None:
        """Hold nothing there."""
        self.window.n_recalled, n = 0, self.window.n_recalled
        self._remove(self.window.n_sinks, n)

    def _remove(self, start: int, n: int) -> None:
        self._k, self._v = ([np.delete(x, slice(start, start + n), axis=1) for x in kv] for kv in (self._k, self._v))

    def _decode(self, ids: NDArray[np.int64]) -> F64:
        """One chunk: evict, run every layer; logits [m, n_vocab]."""
        n_sinks = self.window.n_sinks
        evicted = self.window.admit(len(ids))
        self._remove(n_sinks + self.window.n_recalled, evicted)
        return self._run(ids)

    def _run(self, ids: NDArray[np.int64]) -> F64:
        """Every layer, over what is cached and ``ids``; logits [m, n_vocab]."""
        cfg, w = self.config, self.weights
        x = w["token_embd.weight"][ids] * cfg.embd_scale  # [m, n_embd]
        for il in range(cfg.n_layer):
            x = self._layer(il, x)
        x = rms_norm(x, w["output_norm.weight"], cfg.rms_eps)
        head = w.get("output.weight")
        return x @ (w["token_embd.weight"] if head is None else head).T

    def _layer(self, il: int, x: F64) -> F64:
        """Layer ``il`` over the chunk [m, n_embd]; same shape back."""
        cfg, w, p = self.config, self.weights, f"blk.{il}."
        attn = self._attention(il, rms_norm(x, w[p + "attn_norm.weight"], cfg.rms_eps))
        post = w.get(p + "post_attention_norm.weight")
        x = x + (attn if post is None else rms_norm(attn, post, cfg.rms_eps))

        ffn = self._feed_forward(il, rms_norm(x, w[p + "ffn_norm.weight"], cfg.rms_eps))
        post = w.get(p + "post_ffw_norm.weight")
        return x + (ffn if post is None else rms_norm(ffn, post, cfg.rms_eps))

    def _feed_forward(self, il: int, h: F64) -> F64:
        """The gated network of layer ``il`` over ``h`` [m, n_embd]; same shape back."""

        def linear(name: str, x: F64) -> F64:
            bias = self.weights.get(f"blk.{il}.ffn_{name}.bias")
            y: F64 = x @ self.weights[f"blk.{il}.ffn_{name}.weight"].T
            return y if bias is None else y + bias

        if self.config.n_expert_used:
            return self._experts(il, h)
        gate = linear("gate", h)
        gate = gelu_tanh(gate, self.config.gelu) if self.config.arch == "gemma3" else silu(gate)
        return linear("down", gate * linear("up", h))

    def _experts(self, il: int, h: F64) -> F64:
        """The same of experts: each token's best ones, weighted by a softmax over their scores."""
        w, out = self.weights, np.zeros_like(h)
        scores = h @ w[f"blk.{il}.ffn_gate_inp.weight"].T
        for row, (token, score) in enumerate(zip(h, scores, strict=True)):
            best = np.argsort(score)[::-1][: self.config.n_expert_used]
            share = np.exp(score[best] - score[best].max())
            for expert, weight in zip(best, share / share.sum(), strict=True):
                gate, up, down = (w[f"blk.{il}.ffn_{name}_exps.weight"][expert] for name in ("gate", "up", "down"))
                out[row] += weight * (down @ (silu(gate @ token) * (up @ token)))
        return out

    def _project(self, il: int, name: str, x: F64, n_heads: int) -> F64:
        """q, k or v of the chunk: [m, n_embd] -> [n_heads, m, head_dim], bias and QK-norm applied."""
        w, cfg = self.weights, self.config
        y = x @ w[f"blk.{il}.attn_{name}.weight"].T
        bias = w.get(f"blk.{il}.attn_{name}.bias")
        if bias is not None:
            y = y + bias
        y = y.reshape(len(x), n_heads, cfg.head_dim).transpose(1, 0, 2)
        norm = w.get(f"blk.{il}.attn_{name}_norm.weight")
        return y if norm is None else rms_norm(y, norm, cfg.rms_eps)

    def _attention(self, il: int, x: F64) -> F64:
        """Attention of the chunk ``x`` [m, n_embd] over cache and chunk; [m, n_embd]."""
        cfg = self.config
        q = self._project(il, "q", x, cfg.n_head)
        k, v = self._project(il, "k", x, cfg.n_head_kv), self._project(il, "v", x, cfg.n_head_kv)
        out: F64 = self._attend(il, q, k, v) @ self.weights[f"blk.{il}.attn_output.weight"].T
        bias = self.weights.get(f"blk.{il}.attn_output.bias")
        return out if bias is None else out + bias

    def _rotation(self, il: int) -> tuple[F64, F64] | None:
        """Cosine and sine by in-cache position for layer ``il``; None if it does not rotate."""
        return self.rope[self.config.is_swa(il)]

    def _attend(self, il: int, q: F64, k: F64, v: F64) -> F64:
        """The chunk's heads [n_heads, m, head_dim], not yet rotated, over cache and chunk; [m, n_head * head_dim]."""
        cfg = self.config
        m = q.shape[1]
        self._k[il] = np.concatenate([self._k[il], k], axis=1)
        self._v[il] = np.concatenate([self._v[il], v], axis=1)
        k, n = self._k[il], self._k[il].shape[1]

        # In-cache positions are simply 0..n-1: the list of keys *is* sinks, window, chunk in order.
        rotation = self._rotation(il)
        if rotation is not None:
            cos, sin = rotation
            q = rotate(q, cos[n - m : n], sin[n - m : n], cfg.rope_type)
            if cfg.temperature:
                q = q * (1.0 + cfg.temperature * np.log1p(np.arange(n - m, n) // cfg.yarn_n_ctx_orig))[:, None]
            k = rotate(k, cos[:n], sin[:n], cfg.rope_type)

        distance = np.arange(n - m, n)[:, None] - np.arange(n)[None, :]  # p_q - p_k, [m, n]
        masked = distance < 0
        if cfg.is_swa(il):
            masked = masked | (distance >= cfg.n_swa)

        # GQA: the q heads of a group share a k/v head: [n_head_kv, group, m, d] x [n_head_kv, 1, n, d]
        q = q.reshape(cfg.n_head_kv, cfg.n_head // cfg.n_head_kv, m, cfg.head_dim)
        scores = q @ k[:, None].transpose(0, 1, 3, 2) * cfg.kq_scale
        probs = softmax(np.where(masked, -np.inf, scores))
        out: F64 = probs @ self._v[il][:, None]  # [n_head_kv, group, m, head_dim]
        return out.reshape(cfg.n_head, m, cfg.head_dim).transpose(1, 0, 2).reshape(m, -1)


class Reference:
    """A loaded model: makes streams, and answers the dense (nothing evicted) question."""

    def __init__(self, weights: Weights, config: Config) -> None:
        self.weights, self.config = weights, config

    def stream(self, n_ctx: int, n_keep: int = 4, n_slide: int = 0) -> ReferenceStream:
        """A fresh stream."""
        return ReferenceStream(self.weights, self.config, n_ctx, n_keep, n_slide)

    def dense(self, tokens: Sequence[int]) -> F64:
        """Logits [n_tokens, n_vocab] of the whole text in one chunk with full causal attention."""
        n = len(tokens)
        return self.stream(n + 1, 0).feed(tokens, n)

    def with_gelu(self, mode: str) -> Reference:
        """The same model with GELU ``"exact"`` or ``"table"`` (how ggml-cpu computes it)."""
        return Reference(self.weights, replace(self.config, gelu=mode))


def load_reference(path: str | os.PathLike[str]) -> Reference:
    """Read a GGUF file into a float64 reference model."""
    return Reference(*load_weights(path))
