"""Products of rows with the matrices of the experts that were chosen for them.

The layout is linear.py's; the blocks of one expert follow those of the one before. Each row has an expert of its own,
so a matrix is read again for every row that chose it: one row at a time is what decoding needs.
"""

# TVMScript is parsed by TVM, not run by Python
# mypy: disable-error-code="untyped-decorator,no-untyped-def,valid-type,no-redef"
from __future__ import annotations

from functools import cache
from typing import Any

from tvm.script import tirx as T

from edge_stream.mlc.kernels import Lanes
from edge_stream.mlc.kernels.linear import GROUP, nibble_scale


@cache  # parsing takes longer than compiling
def matmul_f32(m: int, used: int, share: int, n_expert: int, n: int, k: int, lanes: Lanes) -> Any:
    """x [m / share, k], chosen [m / used, used] int32, w [n_expert blocks, k, block] -> y [m, n], float32."""
    width = lanes.block
    blocks = -(-n // width)

    @T.prim_func(private=True, s_tir=True)
    def matmul(
        x: T.Buffer((m // share, k), "float32"),
        chosen: T.Buffer((m // used, used), "int32"),
        w: T.Buffer((n_expert * blocks, k, width), "float32"),
        y: T.Buffer((m, n), "float32"),
    ):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        for task in T.parallel(m * blocks):
            with T.sblock("rows"):
                acc = T.sblock_alloc_buffer((width,), "float32", scope="local")
                i: T.let[T.int32] = task // blocks
                b: T.let[T.int32] = task % blocks
                at: T.let[T.int32] = chosen[i // used, i % used] * blocks + b
                for j in T.vectorized(width):
                    acc[j] = T.float32(0)
                for c in T.serial(k):
                    for j in T.vectorized(width):
                        acc[j] = acc[j] + w[at, c, j] * x[i // share, c]
                for j in T.serial(width):
                    if b * width + j < n:
                        y[i, b * width + j] = acc[j]

    return matmul


@cache  # parsing takes longer than compiling
def matmul_q4(m: int, used: int, share: int, n_expert: int, n: int, k: int, lanes: Lanes) -> Any:
    """x [m / share, k] float32, chosen [m / used, used] int32, words, scales -> y [m, n] float32."""
    width = lanes.block
    blocks, groups = -(-n // width), -(-k // GROUP)

    @T.prim_func(private=True, s_tir=True)
    def matmul(
        x: T.Buffer((m // share, k), "float32"),
        chosen: T.Buffer((m // used, used), "int32"),
        w: T.Buffer((n_expert * blocks, groups * 4, width), "uint32"),
        s: T.Buffer((n_expert * blocks, groups, width), "float32"),
        y: T.Buffer((m, n), "float32"),
    ):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        with T.sblock("root"):
            scaled = T.sblock_alloc_buffer((m // share, groups * GROUP), "float32")  # x', as in linear.py
            offset = T.sblock_alloc_buffer((m // share, groups), "float32")  # 7 times the sum of a group of x
            for i in T.serial(m // share):
                for g in T.serial(groups):
                    offset[i, g] = T.float32(0)
                    for c in T.serial(GROUP):
                        value: T.let[T.float32] = T.if_then_else(
                            g * GROUP + c < k, x[i, T.min(g * GROUP + c, k - 1)], T.float32(0)
                        )
                        offset[i, g] = offset[i, g] + value * T.float32(7)
                        scaled[i, g * GROUP + c] = value * nibble_scale(c % 8)
            for task in T.parallel(m * blocks):
                with T.sblock("rows"):
                    acc = T.sblock_alloc_buffer((width,), "float32", scope="local")
                    part = T.sblock_alloc_buffer((width,), "float32", scope="local")
                    i: T.let[T.int32] = task // blocks
                    b: T.let[T.int32] = task % blocks
                    at: T.let[T.int32] = chosen[i // used, i % used] * blocks + b
                    for j in T.vectorized(width):
                        acc[j] = T.float32(0)
                    for g in T.serial(groups):
                        for j in T.vectorized(width):
                            part[j] = -offset[i // share, g]
                        for c in T.unroll(GROUP // 8):
                            for p in T.unroll(8):
                                for j in T.vectorized(width):
                                    part[j] = (
                                        part[j]
                                        + T.Cast(
                                            "float32",
                                            T.reinterpret(
                                                "int32",
                                                T.if_then_else(
                                                    p < 7,
                                                    w[at, g * 4 + c, j] & (T.uint32(15) << T.Cast("uint32", 4 * p)),
                                                    w[at, g * 4 + c, j] >> T.uint32(28),
                                                ),
                                            ),
                                        )
                                        * scaled[i // share, g * GROUP + c * 8 + p]
                                    )
                        for j in T.vectorized(width):
                            acc[j] = acc[j] + part[j] * s[at, g, j]
                    for j in T.serial(width):
                        if b * width + j < n:
                            y[i, b * width + j] = acc[j]

    return matmul
