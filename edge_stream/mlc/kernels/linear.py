"""Products of a few rows with a weight matrix, and lookup of its rows: 4-bit groups (MLC's q4*_1) and float32.

A matrix [n, k] is stored in blocks of rows (layout.py): float32 as [blocks, k, block]; 4 bits as words
[blocks, k / 8, block] uint32, the first column in the lowest bits, and scales [blocks, k / 32, block] float32. A weight
is (nibble - 7) * scale. With x' = x 2^(-4i) for a column at nibble i, nibble * x = (word & 15 << 4i) * x': no shift
except for the highest, and 7 times the sum of x over a group is subtracted once per group.

Both are memory-bound for one row and compute-bound for six. A block is one task of the parallel loop.
"""

# TVMScript is parsed by TVM, not run by Python
# mypy: disable-error-code="untyped-decorator,no-untyped-def,valid-type,no-redef"
from __future__ import annotations

from functools import cache
from typing import Any

from tvm.script import tirx as T

from edge_stream.mlc.kernels import Lanes

GROUP = 32


@cache  # parsing takes longer than compiling
def matmul_f32(m: int, n: int, k: int, lanes: Lanes) -> Any:
    """x [1, m, k], w [blocks, k, block] -> y [1, m, n], float32."""
    width, vector = lanes.block, lanes.of_rows(m)
    blocks, n_vectors, ragged = -(-n // width), width // vector, n % width != 0

    @T.prim_func(private=True, s_tir=True)
    def matmul(
        x: T.Buffer((1, m, k), "float32"),
        w: T.Buffer((blocks, k, width), "float32"),
        y: T.Buffer((1, m, n), "float32"),
    ):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        for b in T.parallel(blocks):
            with T.sblock("rows"):
                acc = T.sblock_alloc_buffer((m, vector), "float32", scope="local")
                for v in T.serial(n_vectors):
                    for i in T.unroll(m):
                        for j in T.vectorized(vector):
                            acc[i, j] = T.float32(0)
                    for c in T.serial(k):
                        for i in T.unroll(m):
                            for j in T.vectorized(vector):
                                acc[i, j] = acc[i, j] + w[b, c, v * vector + j] * x[0, i, c]
                    for i in T.unroll(m):
                        if ragged:
                            for j in T.serial(vector):
                                if b * width + v * vector + j < n:
                                    y[0, i, b * width + v * vector + j] = acc[i, j]
                        else:
                            for j in T.vectorized(vector):
                                y[0, i, b * width + v * vector + j] = acc[i, j]

    return matmul


def nibble_scale(p: Any) -> Any:
    """2^(-4p), but 1 for the last nibble, which is shifted. p: index of the nibble, 0..7."""
    return T.Select(p < 7, T.reinterpret("float32", (127 - 4 * p) << 23), T.float32(1))


@cache  # parsing takes longer than compiling
def matmul_q4(m: int, n: int, k: int, lanes: Lanes) -> Any:
    """x [1, m, k] float32, words, scales -> y [1, m, n] float32."""
    width, vector = lanes.block, lanes.of_rows(m)
    blocks, n_vectors, ragged = -(-n // width), width // vector, n % width != 0
    groups, padded = -(-k // GROUP), k % GROUP != 0

    @T.prim_func(private=True, s_tir=True)
    def matmul(
        x: T.Buffer((1, m, k), "float32"),
        w: T.Buffer((blocks, groups * 4, width), "uint32"),
        s: T.Buffer((blocks, groups, width), "float32"),
        y: T.Buffer((1, m, n), "float32"),
    ):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        with T.sblock("root"):
            scaled = T.sblock_alloc_buffer((m, groups * GROUP), "float32")  # x'
            offset = T.sblock_alloc_buffer((m, groups), "float32")  # 7 times the sum of a group of x
            for i in T.serial(m):
                for g in T.serial(groups):
                    with T.sblock("group"):
                        sums = T.sblock_alloc_buffer((8,), "float32", scope="local")
                        for p in T.vectorized(8):
                            sums[p] = T.float32(0)
                        for c in T.unroll(GROUP // 8):
                            if padded:
                                for p in T.serial(8):
                                    value: T.let[T.float32] = T.if_then_else(
                                        g * GROUP + c * 8 + p < k, x[0, i, g * GROUP + c * 8 + p], T.float32(0)
                                    )
                                    sums[p] = sums[p] + value
                                    scaled[i, g * GROUP + c * 8 + p] = value * nibble_scale(p)
                            else:
                                for p in T.vectorized(8):
                                    sums[p] = sums[p] + x[0, i, g * GROUP + c * 8 + p]
                                    scaled[i, g * GROUP + c * 8 + p] = x[0, i, g * GROUP + c * 8 + p] * nibble_scale(p)
                        offset[i, g] = T.float32(0)
                        for p in T.serial(8):
                            offset[i, g] = offset[i, g] + sums[p] * T.float32(7)
            for b in T.parallel(blocks):
                with T.sblock("rows"):
                    acc = T.sblock_alloc_buffer((m, vector), "float32", scope="local")
                    part = T.sblock_alloc_buffer((m, vector), "float32", scope="local")
                    value8 = T.sblock_alloc_buffer((vector,), "float32", scope="local")
                    for v in T.serial(n_vectors):
                        for i in T.unroll(m):
                            for j in T.vectorized(vector):
                                acc[i, j] = T.float32(0)
                        for g in T.serial(groups):
                            for i in T.unroll(m):
                                for j in T.vectorized(vector):
                                    part[i, j] = -offset[i, g]
                            for c in T.unroll(GROUP // 8):
                                for p in T.unroll(8):
                                    for j in T.vectorized(vector):
                                        value8[j] = T.Cast(
                                            "float32",
                                            T.reinterpret(
                                                "int32",
                                                T.if_then_else(
                                                    p < 7,
                                                    w[b, g * 4 + c, v * vector + j]
                                                    & (T.uint32(15) << T.Cast("uint32", 4 * p)),
                                                    w[b, g * 4 + c, v * vector + j] >> T.uint32(28),
                                                ),
                                            ),
                                        )
                                    for i in T.unroll(m):
                                        for j in T.vectorized(vector):
                                            part[i, j] = part[i, j] + value8[j] * scaled[i, g * GROUP + c * 8 + p]
                            for i in T.unroll(m):
                                for j in T.vectorized(vector):
                                    acc[i, j] = acc[i, j] + part[i, j] * s[b, g, v * vector + j]
                        for i in T.unroll(m):
                            if ragged:
                                for j in T.serial(vector):
                                    if b * width + v * vector + j < n:
                                        y[0, i, b * width + v * vector + j] = acc[i, j]
                            else:
                                for j in T.vectorized(vector):
                                    y[0, i, b * width + v * vector + j] = acc[i, j]

    return matmul


@cache  # parsing takes longer than compiling
def take_f32(m: int, n: int, k: int, lanes: Lanes) -> Any:
    """ids [m] int32, w -> rows y [m, k] float32."""
    width = lanes.block
    blocks = -(-n // width)

    @T.prim_func(private=True, s_tir=True)
    def take(
        ids: T.Buffer((m,), "int32"),
        w: T.Buffer((blocks, k, width), "float32"),
        y: T.Buffer((m, k), "float32"),
    ):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        for i in T.serial(m):
            for c in T.serial(k):
                with T.sblock("row"):
                    y[i, c] = w[ids[i] // width, c, ids[i] % width]

    return take


@cache  # parsing takes longer than compiling
def take_q4(m: int, n: int, k: int, lanes: Lanes) -> Any:
    """ids [m] int32, words, scales -> rows y [m, k] float32."""
    width = lanes.block
    blocks, groups = -(-n // width), -(-k // GROUP)

    @T.prim_func(private=True, s_tir=True)
    def take(
        ids: T.Buffer((m,), "int32"),
        w: T.Buffer((blocks, groups * 4, width), "uint32"),
        s: T.Buffer((blocks, groups, width), "float32"),
        y: T.Buffer((m, k), "float32"),
    ):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        for i in T.serial(m):
            for c in T.serial(k):
                with T.sblock("row"):
                    nibble: T.let[T.uint32] = (
                        w[ids[i] // width, c // 8, ids[i] % width] >> T.Cast("uint32", c % 8 * 4)
                    ) & T.uint32(15)
                    y[i, c] = (T.Cast("float32", nibble) - T.float32(7)) * s[
                        ids[i] // width, c // GROUP, ids[i] % width
                    ]

    return take
