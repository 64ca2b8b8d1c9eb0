"""NumPy float64 reference of the layers that Llama does not have; reference.py, extended.

* layers without rotation: smollm3 (every fourth), granitehybrid (all, or none)
* recurrent layers beside or instead of attention: lfm2 (short convolution), granitehybrid and falcon-h1 (Mamba-2),
  qwen35 (gated delta rule; its attention is gated too, and rotates some of a head's dimensions only)
* M-RoPE: qwen2vl (sections one after the other), qwen3vl and qwen35 (interleaved), with text

Attention layers see sinks, window and chunk at in-cache positions, as in reference.py. Recurrent layers have read the
whole stream: nothing is evicted from a state. What a layer computes is written down from llama.cpp's graphs, one token
after the other.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Protocol

import gguf
import numpy as np
from reference import (
    F64,
    ROPE_NEOX,
    ROPE_NORM,
    Config,
    Reference,
    ReferenceStream,
    Weights,
    load_weights,
    read_metadata,
    rms_norm,
    rope_table,
    silu,
)

# M-RoPE pairs dimensions like NEOX, whether or not its sections are interleaved
ROPE_TYPES = {
    "smollm3": ROPE_NORM,
    "lfm2": ROPE_NEOX,
    "granitehybrid": ROPE_NORM,
    "falcon-h1": ROPE_NEOX,
    "qwen2vl": ROPE_NEOX,
    "qwen3vl": ROPE_NEOX,
    "qwen35": ROPE_NEOX,
}
INTERLEAVED = ("qwen3vl", "qwen35")

# the weights that normalise the input of the feed-forward network
_FFN_NORM = {"falcon-h1": "ffn_norm", "qwen35": "post_attention_norm.weight"}


def sigmoid(x: F64) -> F64:
    """The logistic function, in the tanh form, which cannot overflow."""
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def softplus(x: F64) -> F64:
    """log(1 + exp(x)), which cannot overflow either."""
    return np.logaddexp(0.0, x)


def l2_norm(x: F64, eps: float) -> F64:
    """``x`` [..., n] divided by its length (build_gdn_l2_norm)."""
    length: F64 = np.sqrt(np.sum(x * x, axis=-1, keepdims=True) + eps)
    return x / length


# ---------------------------------------------------------------------------------------------------------
# configuration
# ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerConfig(Config):
    """What these architectures have besides. Scales of 0 mean none, as in llama.cpp."""

    attention: tuple[bool, ...] = ()  # which layers have it
    recurrent: tuple[bool, ...] = ()
    rotated: tuple[bool, ...] = ()
    sections: tuple[int, ...] = ()  # M-RoPE: how many pairs turn by the first, second, third, fourth position
    embedding_scale: float = 0.0
    residual_scale: float = 0.0
    attention_scale: float = 0.0
    logit_scale: float = 0.0
    d_inner: int = 0
    d_state: int = 0
    n_group: int = 0
    n_head_state: int = 0  # llama.cpp: dt_rank

    @property
    def embd_scale(self) -> float:
        return self.embedding_scale or 1.0

    @property
    def kq_scale(self) -> float:
        return self.attention_scale or super().kq_scale


def load(path: str | os.PathLike[str]) -> tuple[Weights, LayerConfig]:
    """Read a GGUF file. Raises ValueError for what is not implemented."""
    weights, base = load_weights(path, ROPE_TYPES)
    meta = read_metadata(gguf.GGUFReader(Path(path), "r"))
    arch, n_layer = base.arch, base.n_layer
    if base.yarn:
        raise ValueError("YaRN is not implemented for these architectures")
    if arch == "lfm2":  # llama.cpp: LLM_TENSOR_OUTPUT_NORM_LFM2
        weights = Weights({**weights.tensors, "output_norm.weight": weights["token_embd_norm.weight"]})

    layers = range(n_layer)
    attention, recurrent, rotated = [True] * n_layer, [False] * n_layer, [True] * n_layer
    if arch in ("lfm2", "granitehybrid"):
        n_head_kv = meta[f"{arch}.attention.head_count_kv"]
        attention = [n > 0 for n in n_head_kv] if isinstance(n_head_kv, list) else attention
        recurrent = [not has for has in attention]
    elif arch == "qwen35":
        interval = meta.get("qwen35.full_attention_interval", 4)
        attention = [(il + 1) % interval == 0 for il in layers]
        recurrent = [not has for has in attention]
    elif arch == "falcon-h1":
        recurrent = [True] * n_layer
    if arch == "smollm3":
        rotated = [(il + 1) % 4 != 0 for il in layers]
    elif arch == "granitehybrid":
        rotated = [bool(meta.get("granitehybrid.rope.scaling.finetuned", True))] * n_layer

    def key(name: str, *archs: str) -> float:
        """A number of the file's, for the architectures whose graph reads it; else 0."""
        return float(meta.get(f"{arch}.{name}", 0.0)) if arch in archs else 0.0

    state = ("granitehybrid", "falcon-h1", "qwen35")
    config = LayerConfig(
        **{f.name: getattr(base, f.name) for f in fields(base)},
        attention=tuple(attention),
        recurrent=tuple(recurrent),
        rotated=tuple(rotated),
        sections=tuple(meta.get(f"{arch}.rope.dimension_sections", ())),
        embedding_scale=key("embedding_scale", "granitehybrid"),
        residual_scale=key("residual_scale", "granitehybrid"),
        attention_scale=key("attention.scale", "granitehybrid"),
        logit_scale=key("logit_scale", "granitehybrid"),
        d_inner=int(key("ssm.inner_size", *state)),
        d_state=int(key("ssm.state_size", *state)),
        n_group=int(key("ssm.group_count", *state)),
        n_head_state=int(key("ssm.time_step_rank", *state)),
    )
    return weights, config


def still_pairs(n_pairs: int, sections: Sequence[int], interleaved: bool) -> list[bool]:
    """Which of a head's rotated pairs turn by a token's fourth position, which is 0 in text: those stay still.

    As ggml_mrope_cache_init distributes them. The first three positions of a text token are the same, so that the other
    pairs turn as in plain RoPE (llm_graph_input_pos::set_input). Interleaved sections leave some pairs to the fourth
    position even if its own section is empty: 61 and 62 in Qwen3-VL, whose sections are 24, 20, 20 and 0.
    """
    first, second, third, _ = sections
    still = []
    for pair in range(n_pairs):
        sector = pair % sum(sections)
        if interleaved:
            still.append(sector >= 3 * (first, second, third)[sector % 3])
        else:
            still.append(sector >= first + second + third)
    return still


# ---------------------------------------------------------------------------------------------------------
# recurrent layers
# ---------------------------------------------------------------------------------------------------------


class Recurrence(Protocol):
    """A layer that keeps a state of the tokens it has read."""

    def __call__(self, x: F64) -> F64:
        """Read ``x`` [m, n_embd], tokens in order; [m, n_embd]."""


class Convolution:
    """Every channel's weighted sum over its last inputs (ggml_ssm_conv). The state is those inputs."""

    def __init__(self, kernel: F64) -> None:
        """``kernel`` [n_channels, n_inputs], the newest input last."""
        self.kernel = kernel
        self.past = np.zeros((kernel.shape[1] - 1, kernel.shape[0]))

    def __call__(self, x: F64) -> F64:
        """[m, n_channels] -> the same shape."""
        inputs = np.concatenate([self.past, x])
        self.past = inputs[len(x) :]
        recent = np.stack([inputs[i : i + len(x)] for i in range(self.kernel.shape[1])], axis=2)
        y: F64 = np.sum(recent * self.kernel, axis=2)
        return y


class ShortConvolution:
    """LFM2 (build_shortconv_block)."""

    def __init__(self, weights: Weights, _config: LayerConfig, il: int) -> None:
        self.weights, self.prefix = weights, f"blk.{il}.shortconv."
        self.convolution = Convolution(weights[self.prefix + "conv.weight"])

    def __call__(self, x: F64) -> F64:
        b, c, x = np.split(x @ self.weights[self.prefix + "in_proj.weight"].T, 3, axis=1)
        y: F64 = (c * self.convolution(b * x)) @ self.weights[self.prefix + "out_proj.weight"].T
        return y


class Mamba2:
    """build_mamba2_layer and ggml_ssm_scan with one decay per head. ``state`` is [n_head, head_dim, d_state]."""

    def __init__(self, weights: Weights, config: LayerConfig, il: int) -> None:
        self.weights, self.config, self.prefix = weights, config, f"blk.{il}.ssm_"
        self.convolution = Convolution(weights[self.prefix + "conv1d.weight"])
        n_head = config.n_head_state
        self.state = np.zeros((n_head, config.d_inner // n_head, config.d_state))

    def __call__(self, x: F64) -> F64:
        cfg, w, p, m = self.config, self.weights, self.prefix, len(x)
        n_head, n_group, d_inner, d_state = cfg.n_head_state, cfg.n_group, cfg.d_inner, cfg.d_state
        z, xbc, dt = np.split(x @ w[p + "in.weight"].T, [d_inner, 2 * d_inner + 2 * n_group * d_state], axis=1)
        xbc = silu(self.convolution(xbc) + w[p + "conv1d.bias"])
        x, b, c = np.split(xbc, [d_inner, d_inner + n_group * d_state], axis=1)
        x = x.reshape(m, n_head, -1)
        # neighbouring heads share a group
        b = np.repeat(b.reshape(m, n_group, d_state), n_head // n_group, axis=1)
        c = np.repeat(c.reshape(m, n_group, d_state), n_head // n_group, axis=1)
        dt = softplus(dt + w[p + "dt.bias"])  # [m, n_head]
        decay = np.exp(dt * w[p + "a"].reshape(n_head))

        y: F64 = np.empty_like(x)
        for t in range(m):
            new = np.einsum("h,hi,hs->his", dt[t], x[t], b[t])
            self.state = decay[t][:, None, None] * self.state + new
            y[t] = np.einsum("his,hs->hi", self.state, c[t])
        y = (y + x * w[p + "d"].reshape(n_head, 1)).reshape(m, d_inner) * silu(z)
        norm = w.get(p + "norm.weight")
        if norm is not None:  # each group by itself
            y = rms_norm(y.reshape(m, n_group, -1), norm.reshape(n_group, -1), cfg.rms_eps).reshape(m, d_inner)
        y = y @ w[p + "out.weight"].T
        return y


class DeltaNet:
    """Qwen 3.5 (build_layer_attn_linear, build_delta_net_autoregressive). ``state`` is [n_head, d_value, d_key]."""

    def __init__(self, weights: Weights, config: LayerConfig, il: int) -> None:
        self.weights, self.config, self.prefix = weights, config, f"blk.{il}."
        self.convolution = Convolution(weights[self.prefix + "ssm_conv1d.weight"])
        n_head = config.n_head_state
        self.state = np.zeros((n_head, config.d_inner // n_head, config.d_state))

    def __call__(self, x: F64) -> F64:
        cfg, w, p, m = self.config, self.weights, self.prefix, len(x)
        n_head, n_key_head, d_key = cfg.n_head_state, cfg.n_group, cfg.d_state
        beta = sigmoid(x @ w[p + "ssm_beta.weight"].T)  # [m, n_head]
        decay = np.exp(softplus(x @ w[p + "ssm_alpha.weight"].T + w[p + "ssm_dt.bias"]) * w[p + "ssm_a"])
        z = (x @ w[p + "attn_gate.weight"].T).reshape(m, n_head, -1)

        qkv = silu(self.convolution(x @ w[p + "attn_qkv.weight"].T))
        q, k, v = np.split(qkv, [n_key_head * d_key, 2 * n_key_head * d_key], axis=1)
        # value head h reads key head h % n_key_head
        q = np.tile(l2_norm(q.reshape(m, n_key_head, d_key), cfg.rms_eps), (1, n_head // n_key_head, 1))
        k = np.tile(l2_norm(k.reshape(m, n_key_head, d_key), cfg.rms_eps), (1, n_head // n_key_head, 1))
        v = v.reshape(m, n_head, -1)

        y: F64 = np.empty_like(v)
        for t in range(m):
            self.state = decay[t][:, None, None] * self.state
            delta = beta[t][:, None] * (v[t] - np.einsum("hvk,hk->hv", self.state, k[t]))
            self.state = self.state + np.einsum("hv,hk->hvk", delta, k[t])
            y[t] = np.einsum("hvk,hk->hv", self.state, q[t]) / np.sqrt(d_key)
        y = rms_norm(y, w[p + "ssm_norm.weight"], cfg.rms_eps) * silu(z)
        y = y.reshape(m, -1) @ w[p + "ssm_out.weight"].T
        return y


RECURRENCES: dict[str, type[ShortConvolution] | type[Mamba2] | type[DeltaNet]] = {
    "lfm2": ShortConvolution,
    "granitehybrid": Mamba2,
    "falcon-h1": Mamba2,
    "qwen35": DeltaNet,
}


# ---------------------------------------------------------------------------------------------------------
# the stream
# ---------------------------------------------------------------------------------------------------------


class LayeredStream(ReferenceStream):
    """One token stream. ``recurrences`` holds the layers that keep a state, by layer."""

    config: LayerConfig

    def __init__(self, weights: Weights, config: LayerConfig, n_ctx: int, n_keep: int = 4, n_slide: int = 0) -> None:
        super().__init__(weights, config, n_ctx, n_keep, n_slide)
        if config.arch == "granitehybrid":
            self.rope[False] = rope_table(config, n_ctx, factors=weights.get("rope_freqs.weight"))
        if config.sections:
            still = still_pairs(config.n_rot // 2, config.sections, config.arch in INTERLEAVED)
            for table in self.rope[False]:  # cosine and sine of position 0 at every position
                table[:, still] = table[0, still]
        self.recurrences: dict[int, Recurrence] = {}
        self.forget()

    def forget(self) -> None:
        """The states are as they were before the first token."""
        cfg = self.config
        layers = [il for il in range(cfg.n_layer) if cfg.recurrent[il]]
        self.recurrences = {il: RECURRENCES[cfg.arch](self.weights, cfg, il) for il in layers}

    def feed(self, tokens: Sequence[int], chunk: int | Sequence[int] = 1) -> F64:
        """See ReferenceStream.feed."""
        return super().feed(tokens, chunk) / (self.config.logit_scale or 1.0)

    def _rotation(self, il: int) -> tuple[F64, F64] | None:
        return self.rope[False] if self.config.rotated[il] else None

    def _layer(self, il: int, x: F64) -> F64:
        """Attention, recurrence, or the sum of both; then the feed-forward network."""
        cfg, w, p = self.config, self.weights, f"blk.{il}."
        scale = cfg.residual_scale or 1.0
        h = rms_norm(x, w[p + "attn_norm.weight"], cfg.rms_eps)
        if cfg.attention[il]:
            x = x + scale * self._attention(il, h)
        if cfg.recurrent[il]:
            x = x + scale * self.recurrences[il](h)
        h = rms_norm(x, w[p + _FFN_NORM.get(cfg.arch, "ffn_norm.weight")], cfg.rms_eps)
        return x + scale * self._feed_forward(il, h)

    def _attention(self, il: int, x: F64) -> F64:
        """Qwen 3.5: attn_q projects to each head's query and gate, side by side (build_layer_attn)."""
        if self.config.arch != "qwen35":
            return super()._attention(il, x)
        cfg, w, p, m = self.config, self.weights, f"blk.{il}.", len(x)
        both = (x @ w[p + "attn_q.weight"].T).reshape(m, cfg.n_head, 2, cfg.head_dim)
        q = rms_norm(both[:, :, 0], w[p + "attn_q_norm.weight"], cfg.rms_eps).transpose(1, 0, 2)
        gate = both[:, :, 1].reshape(m, -1)
        k, v = self._project(il, "k", x, cfg.n_head_kv), self._project(il, "v", x, cfg.n_head_kv)
        y: F64 = (self._attend(il, q, k, v) * sigmoid(gate)) @ w[p + "attn_output.weight"].T
        return y


class LayeredReference(Reference):
    """A loaded model."""

    config: LayerConfig

    def __init__(self, weights: Weights, config: LayerConfig) -> None:
        super().__init__(weights, config)

    def stream(self, n_ctx: int, n_keep: int = 4, n_slide: int = 0) -> LayeredStream:
        """A fresh stream."""
        return LayeredStream(self.weights, self.config, n_ctx, n_keep, n_slide)


def load_layered_reference(path: str | os.PathLike[str]) -> LayeredReference:
    """Read a GGUF file into a float64 reference model."""
    return LayeredReference(*load(path))
