"""Vectorised elementwise functions."""

# TVMScript is parsed by TVM, not run by Python
# mypy: disable-error-code="untyped-decorator,no-untyped-def,valid-type,no-redef"
from __future__ import annotations

from functools import cache
from typing import Any

from tvm.script import tirx as T

from edge_stream.mlc.kernels import Lanes


def exp(x: Any) -> Any:
    """e^x for x <= 0 as an expression that vectorises: 2^n times a polynomial of degree 6, relative error 2e-7."""
    x = T.max(x, T.float32(-87.0))
    n = T.floor(x * T.float32(1.4426950408889634) + T.float32(0.5))
    # ln 2 in two parts, the first with few bits so that n times it is exact
    r = x - n * T.float32(0.693359375) - n * T.float32(-2.12194440e-4)
    p: Any = T.float32(1.0 / 720.0)
    for coefficient in (1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0):
        p = p * r + T.float32(coefficient)
    return p * T.reinterpret("float32", (T.Cast("int32", n) + 127) << 23)


@cache  # parsing takes longer than compiling
def gated(m: int, n: int, activation: str, lanes: Lanes) -> Any:
    """x [1, m, 2 n], gate then up -> y [1, m, n] = activation(gate) * up, float32.

    Both are gate * sigmoid(z): z = gate for silu; for gelu (the tanh form) 2 sqrt(2 / pi) (gate + 0.044715 gate^3).
    """
    linear, cubic = (1.0, 0.0) if activation == "silu" else (1.5957691216057308, 1.5957691216057308 * 0.044715)
    width = next(w for w in (lanes.block, lanes.vector, 4, 2, 1) if n % w == 0)

    @T.prim_func(private=True, s_tir=True)
    def function(x: T.Buffer((1, m, 2 * n), "float32"), y: T.Buffer((1, m, n), "float32")):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        for i in T.serial(m):
            for b in T.serial(n // width):
                for j in T.vectorized(width):
                    with T.sblock("element"):
                        at: T.let[T.int32] = b * width + j
                        gate: T.let[T.float32] = x[0, i, at]
                        z: T.let[T.float32] = gate * (T.float32(linear) + T.float32(cubic) * gate * gate)
                        e: T.let[T.float32] = exp(T.float32(0) - T.max(z, T.float32(0) - z))  # of -|z|
                        sigmoid: T.let[T.float32] = T.Select(z < T.float32(0), e, T.float32(1)) / (T.float32(1) + e)
                        y[0, i, at] = gate * sigmoid * x[0, i, n + at]

    return function
