"""Layers that do not rotate, and layers with a sliding window and a rope base of their own, in TVM's paged cache.

That cache has one rope base for all layers, and no window that goes with sinks. Its kernels are compiled into the
library, though, and are changed here: a layer of the second kind calls them with the scale of its scores negated, and
for a negative scale they rotate, and see, as such a layer does. In-cache positions count, as for the others. TVM's
runtime is as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from edge_stream.converters.mlc.decoder_config import DecoderConfig

_MARK = "edge_stream_window"  # in the kernels' masks, until `specialise` replaces it
_ENDLESS = 1 << 30


def scale_of(config: DecoderConfig, layer: int) -> float:
    """What a layer calls the cache with: see above."""
    return config.score_scale if config.rope_kinds[layer] == "full" else -config.score_scale


@contextmanager
def masks(config: DecoderConfig) -> Iterator[None]:
    """While the kernels are made, their masks have a window, whose size `specialise` fills in."""
    if not config.n_swa:
        yield
        return
    from tvm import tirx
    from tvm.relax.frontend.nn.llm import _kernel_common, _prefill_kernels

    causal_mask, cross_mask = _kernel_common._causal_mask, _kernel_common._causal_or_sliding_cross_mask

    def window() -> Any:
        return tirx.call_extern("int32", _MARK)

    def among_themselves(causal: Any, row: Any, col: Any, kv_len: Any, qo_len: Any) -> Any:
        """The tokens of a step."""
        seen = causal_mask(causal, row, col, kv_len, qo_len)
        return tirx.And(seen, kv_len - qo_len + row - col < window())

    def mask(causal: Any, row: Any, col: Any, kv_len: Any, qo_len: Any, sliding_window_size: Any) -> Any:
        """The same in kernels without a window of TVM's; in the others, what was cached before."""
        if isinstance(sliding_window_size, int) and sliding_window_size == 0:
            return among_themselves(causal, row, col, kv_len, qo_len)
        seen = causal_mask(0, row, col, kv_len, qo_len)
        return tirx.And(seen, kv_len + row - col < window())

    try:
        for module in (_kernel_common, _prefill_kernels):
            module._causal_or_sliding_cross_mask = mask
        _prefill_kernels._causal_mask = among_themselves
        yield
    finally:
        for module in (_kernel_common, _prefill_kernels):
            module._causal_or_sliding_cross_mask = cross_mask
        _prefill_kernels._causal_mask = causal_mask


def specialise(module: Any, config: DecoderConfig) -> Any:
    """The module, with attention kernels that tell the two kinds of layers by the sign of their scale."""
    from tvm import tirx

    if set(config.rope_kinds) == {"full"}:
        return module
    for name, function in module.functions_items():
        if isinstance(function, tirx.PrimFunc):
            variables = {parameter.name: parameter for parameter in function.params}
            if {"sm_scale", "rope_scale", "rope_theta"} <= variables.keys():
                module.update_func(name, _specialise(function, variables, config))
    return module


def _specialise(function: Any, variables: dict[str, Any], config: DecoderConfig) -> Any:
    import tvm_ffi
    from tvm import tirx

    scale = variables["sm_scale"]
    other = scale < tirx.const(0, "float32")
    rotates = "sliding" in config.rope_kinds
    replaced = {
        "sm_scale": tirx.Select(other, -scale, scale),
        "rope_scale": tirx.Select(other, tirx.const(float(rotates), "float32"), variables["rope_scale"]),
        "rope_theta": tirx.Select(other, tirx.const(config.rope_base_swa, "float32"), variables["rope_theta"]),
    }
    window = tirx.Select(other, tirx.const(config.n_swa or _ENDLESS, "int32"), tirx.const(_ENDLESS, "int32"))

    def variable(value: Any) -> Any:
        return next((new for name, new in replaced.items() if value.same_as(variables[name])), value)

    def call(value: Any) -> Any:
        marked = len(value.args) == 1 and getattr(value.args[0], "value", None) == _MARK
        return window if marked else value

    def is_length(value: Any) -> bool:
        return getattr(getattr(value, "source", None), "name", "") == "kv_chunk_len"

    def compared(value: Any) -> Any:
        """One token's kernel: what is left of its cached ones. It is at position `kv_chunk_len` itself."""
        return tirx.And(value, value.a > value.b - window) if is_length(value.b) else value

    def loop(value: Any) -> Any:
        if not is_length(value.extent):
            return value
        body = tirx.IfThenElse(value.loop_var > value.extent - window, value.body, None)
        return tirx.For(value.loop_var, value.min, value.extent, value.kind, body, None, value.annotations)

    def branch(value: Any) -> Any:
        """The CPU's kernel for what was cached sets the maximum if a token is seen: it must be set if none is, too."""
        then = value.then_case
        if value.else_case is None or not isinstance(then, tirx.BufferStore) or then.buffer.name != "new_m":
            return value
        return tirx.SeqStmt([tirx.IfThenElse(tirx.Not(value.condition), value.else_case, None), then])

    callbacks: list[Any] = [(tirx.Var, variable), (type(tirx.call_extern("int32", _MARK)), call)]
    if config.n_swa:
        callbacks.append((tirx.IfThenElse, branch))
    if config.n_swa and "decode" in str(function.attrs["global_symbol"]):
        callbacks += [(tirx.LT, compared), (tirx.For, loop)]
    return function.with_body(tvm_ffi.structural_map(function.body, callbacks))
