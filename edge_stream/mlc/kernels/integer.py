"""Products of a few rows with a matrix of 4-bit groups in integers: for processors that add products of int16 pairs.

The layout is linear.py's. Each group of 32 inputs is rounded to int16 with a scale of its own (an error of 1e-5 of the
largest, where float16 has 5e-4), and its products with the nibbles are summed exactly: 32 x 32767 x 15 fits int32. A
word >> 4p & 0x000F000F is the pair of nibbles p and p + 4, so inputs are paired alike. Sums begin at -7 times those of
the inputs, since a weight is (nibble - 7) * scale. About twice as fast as linear.py's, for one row and for six.
"""

# TVMScript is parsed by TVM, not run by Python
# mypy: disable-error-code="untyped-decorator,no-untyped-def,valid-type,no-redef"
from __future__ import annotations

from functools import cache
from typing import Any

from tvm.script import tirx as T

from edge_stream.mlc.kernels import Lanes
from edge_stream.mlc.kernels.linear import GROUP

_LARGEST = 32767.0
_ROUND = 12582912.0  # 1.5 * 2^23: a float that it is added to has its integer in the lowest bits
_ROUND_BITS = 0x4B400000


def _rounded(x: Any) -> Any:
    """The nearest int32 of |x| < 2^22."""
    return T.reinterpret("int32", x + T.float32(_ROUND)) - T.int32(_ROUND_BITS)


def _add_products(sums: Any, a: Any, b: Any, lanes: Lanes) -> Any:
    """sums + a_low * b_low + a_high * b_high, where a and b hold a pair of int16 per lane. All [vector] int32."""
    n = lanes.vector
    a, b = T.reinterpret(f"int16x{2 * n}", a), T.reinterpret(f"int16x{2 * n}", b)
    if lanes.dot_adds:
        return T.call_llvm_pure_intrin(f"int32x{n}", lanes.dot, sums, a, b)
    return sums + T.call_llvm_pure_intrin(f"int32x{n}", lanes.dot, a, b)


@cache  # parsing takes longer than compiling
def matmul_q4(m: int, n: int, k: int, lanes: Lanes) -> Any:
    """x [1, m, k] float32, words, scales -> y [1, m, n] float32. See linear.matmul_q4. lanes.dot is not empty."""
    width, lane, vector = lanes.block, lanes.vector, lanes.of_rows(m)
    registers = vector // lane
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
            pairs = T.sblock_alloc_buffer((groups, m, GROUP // 2), "int32")  # of rounded inputs
            scale = T.sblock_alloc_buffer((groups, m), "float32")
            offset = T.sblock_alloc_buffer((groups, m), "int32")  # -7 times the sum of a group
            for i in T.serial(m):
                for g in T.serial(groups):
                    with T.sblock("group"):
                        value = T.sblock_alloc_buffer((GROUP,), "float32", scope="local")
                        tops = T.sblock_alloc_buffer((8,), "float32", scope="local")
                        sums = T.sblock_alloc_buffer((8,), "int32", scope="local")
                        whole = T.sblock_alloc_buffer((8,), "int32", scope="local")
                        top = T.sblock_alloc_buffer((1,), "float32", scope="local")
                        if padded:
                            for c in T.serial(GROUP):
                                value[c] = T.if_then_else(g * GROUP + c < k, x[0, i, g * GROUP + c], T.float32(0))
                        else:
                            for c in T.vectorized(GROUP):
                                value[c] = x[0, i, g * GROUP + c]
                        for p in T.vectorized(8):
                            tops[p] = T.float32(1e-30)  # so that a group of zeros has an inverse
                            sums[p] = T.int32(0)
                        for c in T.unroll(GROUP // 8):
                            for p in T.vectorized(8):
                                tops[p] = T.max(tops[p], T.max(value[c * 8 + p], T.float32(0) - value[c * 8 + p]))
                        top[0] = tops[0]
                        for p in T.unroll(7):
                            top[0] = T.max(top[0], tops[p + 1])
                        scale[g, i] = top[0] * T.float32(1.0 / _LARGEST)
                        top[0] = T.float32(_LARGEST) / top[0]
                        for c in T.unroll(GROUP // 8):
                            for p in T.vectorized(8):
                                whole[p] = _rounded(value[c * 8 + p] * top[0])
                                sums[p] = sums[p] + whole[p]
                            for p in T.vectorized(4):
                                pairs[g, i, c * 4 + p] = (whole[p] & T.int32(0xFFFF)) | (whole[p + 4] << T.int32(16))
                        offset[g, i] = T.int32(0)
                        for p in T.serial(8):
                            offset[g, i] = offset[g, i] - sums[p] * T.int32(7)
            for b in T.parallel(blocks):
                with T.sblock("rows"):
                    acc = T.sblock_alloc_buffer((m, vector), "float32", scope="local")
                    part = T.sblock_alloc_buffer((m, vector), "int32", scope="local")
                    two = T.sblock_alloc_buffer((vector,), "int32", scope="local")  # nibbles of each row
                    for v in T.serial(n_vectors):
                        for i in T.unroll(m):
                            for j in T.vectorized(vector):
                                acc[i, j] = T.float32(0)
                        for g in T.serial(groups):
                            for i in T.unroll(m):
                                for j in T.vectorized(vector):
                                    part[i, j] = offset[g, i]
                            for c in T.unroll(GROUP // 8):
                                for p in T.unroll(4):
                                    for j in T.vectorized(vector):
                                        two[j] = T.reinterpret(
                                            "int32",
                                            (w[b, g * 4 + c, v * vector + j] >> T.Cast("uint32", 4 * p))
                                            & T.uint32(0x000F000F),
                                        )
                                    for i in T.unroll(m):
                                        for u in T.unroll(registers):
                                            part[i, T.Ramp(u * lane, 1, lane)] = _add_products(
                                                part[i, T.Ramp(u * lane, 1, lane)],
                                                two[T.Ramp(u * lane, 1, lane)],
                                                T.Broadcast(pairs[g, i, c * 4 + p], lane),
                                                lanes,
                                            )
                            for i in T.unroll(m):
                                for j in T.vectorized(vector):
                                    acc[i, j] = acc[i, j] + T.Cast("float32", part[i, j]) * (
                                        s[b, g, v * vector + j] * scale[g, i]
                                    )
                        for i in T.unroll(m):
                            if ragged:
                                for j in T.serial(vector):
                                    if b * width + v * vector + j < n:
                                        y[0, i, b * width + v * vector + j] = acc[i, j]
                            else:
                                for j in T.vectorized(vector):
                                    y[0, i, b * width + v * vector + j] = acc[i, j]

    return matmul
