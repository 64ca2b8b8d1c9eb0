"""Attention over sinks and a ring of window tokens, without ever re-rotating a cached key.

A key is stored once, rotated at its absolute position. Window keys are scored with the query at its absolute position,
sinks, whose absolute and in-cache positions are the same, with the query at its in-cache position: every score then
depends on in-cache distances, as in StreamingLLM (Xiao et al. 2023, section 3.2). Angles come from the host, one table
for each kind of layer: those that do not rotate have angles of 0.

Slots: the sinks' first, padded to whole blocks, then the ring. Keys are stored in blocks of slots,
[layers, kv heads, blocks, head_dim, block], values [layers, kv heads, slots, head_dim].
"""

# TVMScript is parsed by TVM, not run by Python
# mypy: disable-error-code="untyped-decorator,no-untyped-def,valid-type,no-redef"
from __future__ import annotations

from functools import cache
from typing import Any

from tvm.script import tirx as T

from edge_stream.mlc.kernels import Lanes
from edge_stream.mlc.kernels.elementwise import exp

# columns of `rows`, [m, 3] int32
SLOT, SEE_SINKS, SEE_RING = range(3)  # where the token goes (-1: padding), sinks and ring slots it attends to
# entries of `ring`, [4] int32
SINK_BLOCKS, RING_START, RING_SIZE, BLOCKS = range(4)  # BLOCKS: blocks in use, of sinks and ring
# entries of `layers`, [3] int32: the layer, the table of its angles, and how many tokens it sees
LAYER, KIND, WINDOW = range(3)
NO_WINDOW = 1 << 30

_HIDDEN = -1e30  # score of masked slots


@cache  # parsing takes longer than compiling
def attention(
    m: int, n_layer: int, n_head: int, n_head_kv: int, head_dim: int, n_kinds: int, dtype: tuple[str, str], lanes: Lanes
) -> Any:
    """A PrimFunc that appends m tokens to the cache of one layer and attends to it.

    qkv: [1, m, n_head + 2 n_head_kv, head_dim] float32 before rotation. at_absolute, at_cached: [kinds of layers, 2, m,
    head_dim / 2] float32, cosines and sines of absolute and of in-cache positions. scales: [m] float32, factors on
    q.k. scores: scratch for [n_head, m, slots]. layers: see LAYER, [3] int32. y: [1, m, n_head, head_dim]. dtype: of
    keys and values. All rows of a step are sinks, or none is. Padding attends to nothing and gets zeros.
    """
    d, half, group = head_dim, head_dim // 2, n_head // n_head_kv
    width, vector = lanes.block, lanes.of_rows(m)
    n_vectors = width // vector
    d_vector = d if (m == 1 and d <= 128) or d % lanes.of_rows(m) else lanes.of_rows(m)
    k_type, v_type = dtype

    @T.prim_func(private=True, s_tir=True)
    def attend(
        qkv: T.Buffer((1, m, n_head + 2 * n_head_kv, d), "float32"),
        at_absolute: T.Buffer((n_kinds, 2, m, half), "float32"),
        at_cached: T.Buffer((n_kinds, 2, m, half), "float32"),
        scales: T.Buffer((m,), "float32"),
        rows: T.Buffer((m, 3), "int32"),
        ring: T.Buffer((4,), "int32"),
        var_k: T.handle,
        var_v: T.handle,
        var_scores: T.handle,
        layers: T.Buffer((3,), "int32"),
        y: T.Buffer((1, m, n_head, d), "float32"),
    ):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        n_blocks = T.int64()
        k = T.match_buffer(var_k, (n_layer, n_head_kv, n_blocks, d, width), k_type)
        v = T.match_buffer(var_v, (n_layer, n_head_kv, n_blocks, width, d), v_type)
        scores = T.match_buffer(var_scores, (n_head, m, n_blocks, width), "float32")
        with T.sblock("root"):
            layer: T.let[T.int32] = layers[0]
            kind: T.let[T.int32] = layers[1]
            window: T.let[T.int32] = layers[2]
            query = T.sblock_alloc_buffer((n_head, 2, d, m), "float32")  # for the sinks, for the ring
            for i in T.serial(m):
                for h in T.serial(n_head):
                    for c in T.serial(half):
                        a: T.let[T.float32] = qkv[0, i, h, c] * scales[i]
                        b: T.let[T.float32] = qkv[0, i, h, c + half] * scales[i]
                        query[h, 0, c, i] = a * at_cached[kind, 0, i, c] - b * at_cached[kind, 1, i, c]
                        query[h, 0, c + half, i] = a * at_cached[kind, 1, i, c] + b * at_cached[kind, 0, i, c]
                        query[h, 1, c, i] = a * at_absolute[kind, 0, i, c] - b * at_absolute[kind, 1, i, c]
                        query[h, 1, c + half, i] = a * at_absolute[kind, 1, i, c] + b * at_absolute[kind, 0, i, c]
                if rows[i, 0] >= 0:
                    for h in T.serial(n_head_kv):
                        block: T.let[T.int32] = rows[i, 0] // width
                        lane: T.let[T.int32] = rows[i, 0] % width
                        for c in T.serial(half):
                            a: T.let[T.float32] = qkv[0, i, n_head + h, c]
                            b: T.let[T.float32] = qkv[0, i, n_head + h, c + half]
                            k[layer, h, block, c, lane] = T.Cast(
                                k_type, a * at_absolute[kind, 0, i, c] - b * at_absolute[kind, 1, i, c]
                            )
                            k[layer, h, block, c + half, lane] = T.Cast(
                                k_type, a * at_absolute[kind, 1, i, c] + b * at_absolute[kind, 0, i, c]
                            )
                        for c in T.vectorized(d):
                            v[layer, h, block, lane, c] = T.Cast(v_type, qkv[0, i, n_head + n_head_kv + h, c])
            for h in T.parallel(n_head):
                with T.sblock("head"):
                    acc = T.sblock_alloc_buffer((m, vector), "float32", scope="local")
                    top = T.sblock_alloc_buffer((m, vector), "float32", scope="local")
                    best = T.sblock_alloc_buffer((m,), "float32", scope="local")
                    total = T.sblock_alloc_buffer((m,), "float32", scope="local")
                    key = T.sblock_alloc_buffer((vector,), "float32", scope="local")
                    for i in T.serial(m):
                        for j in T.vectorized(vector):
                            top[i, j] = T.float32(_HIDDEN)
                    for b in T.serial(ring[3]):
                        for u in T.serial(n_vectors):
                            for i in T.unroll(m):
                                for j in T.vectorized(vector):
                                    acc[i, j] = T.float32(0)
                            for c in T.serial(d):
                                for j in T.vectorized(vector):
                                    key[j] = T.Cast("float32", k[layer, h // group, b, c, u * vector + j])
                                for i in T.unroll(m):
                                    for j in T.vectorized(vector):
                                        acc[i, j] = (
                                            acc[i, j] + key[j] * query[h, T.if_then_else(b < ring[0], 0, 1), c, i]
                                        )
                            if b < ring[0]:
                                for i in T.unroll(m):
                                    for j in T.vectorized(vector):
                                        cell: T.let[T.int32] = b * width + u * vector + j
                                        acc[i, j] = T.Select(
                                            T.bitwise_and(
                                                T.Cast("int32", cell < rows[i, 1]),
                                                T.Cast("int32", cell >= rows[i, 1] + rows[i, 2] - window),
                                            )
                                            != 0,
                                            acc[i, j],
                                            T.float32(_HIDDEN),
                                        )
                            else:
                                for i in T.unroll(m):
                                    for j in T.vectorized(vector):
                                        at: T.let[T.int32] = (b - ring[0]) * width + u * vector + j
                                        past: T.let[T.int32] = T.Select(
                                            at < ring[1], at - ring[1] + ring[2], at - ring[1]
                                        )
                                        acc[i, j] = T.Select(
                                            T.bitwise_and(
                                                T.bitwise_and(
                                                    T.Cast("int32", at < ring[2]), T.Cast("int32", past < rows[i, 2])
                                                ),
                                                T.Cast("int32", past >= rows[i, 2] - window),
                                            )
                                            != 0,
                                            acc[i, j],
                                            T.float32(_HIDDEN),
                                        )
                            for i in T.unroll(m):
                                for j in T.vectorized(vector):
                                    top[i, j] = T.max(top[i, j], acc[i, j])
                                    scores[h, i, b, u * vector + j] = acc[i, j]
                    for i in T.serial(m):
                        best[i] = T.float32(_HIDDEN)
                        for j in T.serial(vector):
                            best[i] = T.max(best[i], top[i, j])
                        for j in T.vectorized(vector):
                            top[i, j] = T.float32(0)
                        for b in T.serial(ring[3] * n_vectors):
                            for j in T.vectorized(vector):
                                score: T.let[T.float32] = scores[h, i, b // n_vectors, b % n_vectors * vector + j]
                                weight: T.let[T.float32] = T.Select(
                                    score > T.float32(_HIDDEN / 2), exp(score - best[i]), T.float32(0)
                                )
                                top[i, j] = top[i, j] + weight
                                scores[h, i, b // n_vectors, b % n_vectors * vector + j] = weight
                        total[i] = T.float32(0)
                        for j in T.serial(vector):
                            total[i] = total[i] + top[i, j]
                        # padding sees nothing: zeros, since what follows must not compute with 0 / 0
                        total[i] = T.Select(rows[i, 0] >= 0, T.float32(1) / total[i], T.float32(0))
                    with T.sblock("values"):
                        out = T.sblock_alloc_buffer((m, d_vector), "float32", scope="local")
                        value = T.sblock_alloc_buffer((d_vector,), "float32", scope="local")
                        for c in T.serial(d // d_vector):
                            for i in T.unroll(m):
                                for j in T.vectorized(d_vector):
                                    out[i, j] = T.float32(0)
                            for b in T.serial(ring[3]):
                                for s in T.serial(width):
                                    for j in T.vectorized(d_vector):
                                        value[j] = T.Cast("float32", v[layer, h // group, b, s, c * d_vector + j])
                                    for i in T.unroll(m):
                                        for j in T.vectorized(d_vector):
                                            out[i, j] = out[i, j] + value[j] * scores[h, i, b, s]
                            for i in T.unroll(m):
                                for j in T.vectorized(d_vector):
                                    y[0, i, h, c * d_vector + j] = out[i, j] * total[i]

    return attend
