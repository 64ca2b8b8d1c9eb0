"""config.json, validated and typed: only what is needed to compute a decoder.

Missing keys get the default of transformers' config class. A value of the wrong type is an error of one sentence, never
a guess.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from edge_stream.converters.text import quoted
from edge_stream.errors import EdgeStreamError
from edge_stream.families import REFUSED, Family, ModelConfig, RopeScaling, families, find_family

_MAX_COUNT = 1 << 31
_REQUIRED = object()
# keys that a multimodal checkpoint may have at the top level only
SINK = "attention_sink"  # a key of `edge-stream train`
_SHARED = ("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "vision_config")


class _Reader:
    """Typed access to config.json."""

    def __init__(self, config: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        self._config = config
        self._defaults = defaults

    def get(self, key: str, default: Any = _REQUIRED) -> Any:
        value = self._config.get(key)
        if value is not None:
            return value
        if key in self._config and default is not _REQUIRED:
            return default  # an explicit null switches a feature off
        value = self._defaults.get(key, default)
        if value is _REQUIRED:
            raise EdgeStreamError(f"config.json has no {key}")
        return value

    def count(self, key: str, default: Any = _REQUIRED, least: int = 1) -> int:
        return _count(key, self.get(key, default), least)

    def number(self, key: str, default: Any = _REQUIRED, least: float = 0.0) -> float:
        return _number(key, self.get(key, default), least)

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise EdgeStreamError(f"config.json: {key} = {value!r} must be true or false")
        return value

    def items(self, key: str, kind: type, n: int, default: Any = _REQUIRED) -> tuple[Any, ...]:
        values = self.get(key, default)
        types = (int, float) if kind is float else (kind,)
        if not isinstance(values, (list, tuple)) or len(values) != n or not all(type(v) in types for v in values):
            raise EdgeStreamError(f"config.json: {key} must be a list of {n} values, {kind.__name__} each")
        return tuple(values)

    def kinds(self, key: str, known: tuple[str, ...], n: int, default: Any = _REQUIRED) -> tuple[str, ...]:
        values = self.items(key, str, n, default)
        for value in values:
            if value not in known:
                raise EdgeStreamError(f"config.json: {key} has {quoted(value)}, which is none of {', '.join(known)}")
        return values

    def refuse(self, why: str) -> Any:
        raise EdgeStreamError(f"config.json: {why}")


def _count(key: str, value: Any, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < _MAX_COUNT:
        raise EdgeStreamError(f"config.json: {key} = {quoted(value)} must be a whole number of at least {least}")
    return value


def _number(key: str, value: Any, least: float = 0.0) -> float:
    ok = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not ok or not least <= value <= 1e30:
        raise EdgeStreamError(f"config.json: {key} = {quoted(value)} must be a number of at least {least:g}")
    return float(value)


def text_config(config: Any) -> dict[str, Any]:
    """The part of config.json that describes the language model: all of it unless there is a text_config."""
    if not isinstance(config, dict):
        raise EdgeStreamError("config.json is not a JSON object")
    inner = config.get("text_config")
    if inner is None:
        return config
    if not isinstance(inner, dict):
        raise EdgeStreamError("config.json: text_config is not a JSON object")
    shared = {k: config[k] for k in _SHARED if k in config}
    merged = shared | inner
    merged.setdefault("model_type", config.get("model_type"))
    return merged


def read_config(config: Mapping[str, Any]) -> ModelConfig:
    """Validate and type a config (its text part). Raises EdgeStreamError in one sentence."""
    family = find_family(config.get("model_type"))
    reason = REFUSED.get(str(config.get("model_type")))
    if family is None and reason is not None:
        raise EdgeStreamError(f"config.json: {reason}")
    if family is None:
        known = ", ".join(families())
        raise EdgeStreamError(
            f"config.json: model_type {config.get('model_type')!r} is not supported (supported: {known})"
        )
    config = family.normal(dict(config))
    r = _Reader(config, family.defaults)
    act = r.get("hidden_activation", None) or r.get("hidden_act", family.activation)
    if act not in family.activations:
        raise EdgeStreamError(
            f"config.json: activation {quoted(act)} is not {family.activation}, as {family.model_type} needs"
        )
    if r.flag("mlp_bias", False):
        raise EdgeStreamError("config.json: mlp_bias is not supported")

    n_head = r.count("num_attention_heads")
    n_embd = r.count("hidden_size")
    n_layer = r.count("num_hidden_layers")
    if n_layer > 10_000:
        raise EdgeStreamError(f"config.json: num_hidden_layers = {n_layer} is not believable")
    n_head_kv = r.count("num_key_value_heads", n_head)
    if n_head % n_head_kv:
        raise EdgeStreamError(f"config.json: {n_head} attention heads cannot share {n_head_kv} key-value heads")
    head_dim = r.get("head_dim", None)
    if head_dim is None:
        if n_embd % n_head:
            raise EdgeStreamError(f"config.json: hidden_size {n_embd} does not divide into {n_head} heads")
        head_dim = n_embd // n_head
    head_dim = _count("head_dim", head_dim, 2)
    if head_dim % 2:
        raise EdgeStreamError(f"config.json: head_dim = {head_dim} is odd, so it cannot be rotated in pairs")
    n_ctx_train = r.count("max_position_embeddings", 2048)
    rope, rope_swa = _rope_parameters(config)
    partial = _number("partial_rotary_factor", rope.get("partial_rotary_factor", r.get("partial_rotary_factor", 1.0)))
    n_rot = int(head_dim * partial)
    if not 0 < n_rot <= head_dim or n_rot % 2:
        raise EdgeStreamError(
            f"config.json: partial_rotary_factor = {partial:g} rotates {n_rot} of {head_dim} dimensions"
        )
    window, layers = _sliding_window(r, family, n_layer)
    sink = r.get(SINK, "")
    if sink not in ("", "token", "softmax1"):
        raise EdgeStreamError(f"config.json: {SINK} = {quoted(sink)} is neither token nor softmax1")
    qkv_bias = family.qkv_bias or r.flag("attention_bias", False)
    scalar = r.number("query_pre_attn_scalar", head_dim, 1e-9)
    return ModelConfig(
        family=family,
        n_layer=n_layer,
        n_embd=n_embd,
        n_ff=r.count("intermediate_size"),
        n_head=n_head,
        n_head_kv=n_head_kv,
        head_dim=head_dim,
        n_rot=n_rot,
        n_vocab=r.count("vocab_size"),
        n_ctx_train=n_ctx_train,
        norm_eps=r.number("rms_norm_eps"),
        rope_base=_number("rope_theta", rope.get("rope_theta", r.get("rope_theta", 10000.0)), 1.0),
        rope_base_swa=_number(
            "rope_local_base_freq",
            rope_swa.get(
                "rope_theta",
                r.get("rope_local_base_freq", rope.get("rope_theta", r.get("rope_theta", 10000.0))),
            ),
            1.0,
        ),
        rope_scaling=_rope_scaling(rope, r, n_ctx_train, n_rot),
        tied=r.flag("tie_word_embeddings", False),
        qkv_bias=qkv_bias,
        o_bias=qkv_bias and not (family.qkv_bias or family.qkv_only_bias),  # attention_bias covers q, k, v and o
        sliding_window=window,
        swa_layers=layers,
        attn_scale=1.0 / math.sqrt(scalar),
        attn_softcap=_number("attn_logit_softcapping", r.get("attn_logit_softcapping", 0.0)),
        logit_softcap=_number("final_logit_softcapping", r.get("final_logit_softcapping", 0.0)),
        rope_layers=tuple(family.rotated(r, n_layer)),
        sink=sink,
        own=family.read(r, n_layer),
    )


def _rope_parameters(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Rotary settings of full and of sliding-window layers, from rope_scaling, or rope_parameters of transformers 5."""
    found = config.get("rope_parameters")
    found = config.get("rope_scaling") if found is None else found
    if found is None:
        return {}, {}
    if not isinstance(found, Mapping):
        raise EdgeStreamError(f"config.json: rope_scaling = {quoted(found)} is not a JSON object")
    full = found.get("full_attention", found)
    sliding = found.get("sliding_attention", {})
    if not isinstance(full, Mapping) or not isinstance(sliding, Mapping):
        raise EdgeStreamError("config.json: rope_parameters does not hold JSON objects")
    if sliding.get("rope_type", "default") != "default":
        raise EdgeStreamError("config.json: scaled rotary positions in sliding-window layers are not supported")
    return dict(full), dict(sliding)


def read_rope_scaling(config: Mapping[str, Any], head_dim: int) -> RopeScaling | None:
    """The scaling alone, of a config or of an MLC model's. Raises EdgeStreamError in one sentence."""
    r = _Reader(config, {})
    n_rot = int(head_dim * r.number("partial_rotary_factor", 1.0))
    return _rope_scaling(_rope_parameters(config)[0], r, r.get("max_position_embeddings", 0), n_rot)


def _rope_scaling(rope: dict[str, Any], r: _Reader, n_ctx_train: int, n_rot: int) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    kind = {"su": "longrope"}.get(kind, kind) if isinstance(kind, str) else kind
    if kind == "default":
        return None
    if kind not in ("linear", "llama3", "yarn", "longrope"):
        raise EdgeStreamError(
            f"config.json: rope scaling {quoted(kind)} is not supported (linear, llama3, yarn, longrope are)"
        )
    original = rope.get("original_max_position_embeddings", r.get("original_max_position_embeddings", n_ctx_train))
    n_ctx_orig = _count("original_max_position_embeddings", original)
    if kind == "longrope":
        return _longrope(rope, n_ctx_train, n_ctx_orig, n_rot)
    factor = _number("rope_scaling.factor", rope.get("factor", _missing(kind)), 1e-3)
    if kind == "linear":
        return RopeScaling(kind, factor, n_ctx_orig)
    if kind == "llama3":
        low = _number("low_freq_factor", rope.get("low_freq_factor", 1.0), 1e-6)
        high = _number("high_freq_factor", rope.get("high_freq_factor", 4.0), 1e-6)
        if high < low:
            raise EdgeStreamError(f"config.json: high_freq_factor {high:g} must not be below low_freq_factor {low:g}")
        return RopeScaling(kind, factor, n_ctx_orig, low_freq_factor=low, high_freq_factor=high)
    usual = 0.1 * math.log(factor) + 1.0 if factor > 1.0 else 1.0
    given = rope.get("attention_factor")
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        scales = [_number(key, rope[key]) for key in ("mscale", "mscale_all_dim")]
        usual = (1.0 + scales[0] * (usual - 1.0)) / (1.0 + scales[1] * (usual - 1.0))
    return RopeScaling(
        kind,
        factor,
        n_ctx_orig,
        magnitude=usual if given is None else _number("attention_factor", given, 1e-6),
        beta_fast=_number("beta_fast", rope.get("beta_fast") or 32.0),
        beta_slow=_number("beta_slow", rope.get("beta_slow") or 1.0),
        truncate=rope.get("truncate") is not False,
    )


def _missing(kind: str) -> Any:
    return f"missing for {kind}"


def _longrope(rope: dict[str, Any], n_ctx_train: int, n_ctx_orig: int, n_rot: int) -> RopeScaling:
    factors = []
    for key in ("short_factor", "long_factor"):
        values = rope.get(key)
        if not isinstance(values, list) or len(values) != n_rot // 2:
            raise EdgeStreamError(f"config.json: rope_scaling.{key} must be a list of {n_rot // 2} numbers")
        factors.append(tuple(_number(key, v, 1e-6) for v in values))
    factor = n_ctx_train / n_ctx_orig
    given = rope.get("attention_factor")
    usual = math.sqrt(1.0 + math.log(factor) / math.log(n_ctx_orig)) if factor > 1.0 and n_ctx_orig > 1 else 1.0
    magnitude = usual if given is None else _number("attention_factor", given, 1e-6)
    return RopeScaling("longrope", factor, n_ctx_orig, magnitude, short_factor=factors[0], long_factor=factors[1])


def _sliding_window(r: _Reader, family: Family, n_layer: int) -> tuple[int, tuple[bool, ...]]:
    """The window's size, and which layers use it."""
    none = 0, (False,) * n_layer
    if family.windowed is None:
        return none
    value = r.get("sliding_window", 0)
    if value == 0 or (family.window_flag and not r.flag(family.window_flag, False)):
        return none
    window = _count("sliding_window", value)
    types = r.get("layer_types", None)
    if types is not None:
        known = {"sliding_attention": True, "full_attention": False}
        if not isinstance(types, list) or len(types) != n_layer or any(t not in known for t in map(str, types)):
            raise EdgeStreamError(f"config.json: layer_types must name full or sliding attention for {n_layer} layers")
        return window, tuple(known[t] for t in types)
    return window, tuple(family.windowed(layer, r.count) for layer in range(n_layer))
