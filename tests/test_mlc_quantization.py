"""MLC's packing: known bits, the same bits as TVM's kernels, and what unpacking gives back."""

from __future__ import annotations

import numpy as np
import pytest

from edge_stream.converters.mlc.quantization import (
    QUANTIZATIONS,
    Quantization,
    find_quantization,
    pack,
    to_dtype,
    unpack,
)
from edge_stream.errors import EdgeStreamError

GROUPED = [name for name, q in QUANTIZATIONS.items() if q.bits]


def weights(q: Quantization, rows: int = 7, columns: int = 192, seed: int = 0) -> np.ndarray:
    """Random rows of the model's dtype, with a group of zeros, a row of zeros, tiny and halfway values."""
    w = np.random.default_rng(seed).standard_normal((rows, columns)).astype(q.dtype)
    w[1] = 0
    w[2, : q.group_size] = 0
    w[3, q.group_size :] = np.array(1e-7, q.dtype)
    w[4, : q.group_size] = 0
    w[4, :5] = [q.max_int, 0.5, 1.5, -0.5, -1.5]  # scale 1: these stand halfway between two integers
    return w


def test_known_bits() -> None:
    w = np.zeros((1, 32), np.float32)
    w[0, :9] = [7, -7, 0, 1, -1, 3.2, -3.2, 6.6, 2]
    packed, scale = pack(w, find_quantization("q4f32_1"))
    # 14, 0, 7, 8, 6, 10, 4, 14 from the lowest bits up; then 9 and zeros, which are 7
    assert [f"{int(word):08x}" for word in packed[0]] == ["e4a6870e", "77777779", "77777777", "77777777"]
    assert scale.tolist() == [[1.0]]


def test_known_bits_of_three_bit_weights() -> None:
    w = np.zeros((1, 40), np.float16)
    w[0, :4] = [3, -3, 1, -2]
    packed, scale = pack(w, find_quantization("q3f16_1"))
    # 6, 0, 4, 1, then zeros, which are 3; ten to a word, two bits unused
    word = sum(v << (3 * i) for i, v in enumerate([6, 0, 4, 1, 3, 3, 3, 3, 3, 3]))
    assert packed.shape == (1, 4) and int(packed[0, 0]) == word and scale.tolist() == [[1.0]]


@pytest.mark.parametrize("name", GROUPED)
def test_group_of_zeros_is_zero_bits_and_scale_zero(name: str) -> None:
    q = QUANTIZATIONS[name]
    packed, scale = pack(weights(q), q)
    assert not packed[1].any() and not scale[1].any()
    assert not packed[2, : q.group_size // q.per_word].any() and scale[2, 0] == 0
    assert not unpack(packed, scale, 192, q)[1].any()


@pytest.mark.parametrize("name", GROUPED)
def test_unpacked_weights_are_within_half_a_step(name: str) -> None:
    q = QUANTIZATIONS[name]
    w = np.random.default_rng(1).standard_normal((16, 480)).astype(q.dtype)
    packed, scale = pack(w, q)
    steps = np.repeat(scale.astype(np.float64), q.group_size, axis=1)
    error = np.abs(unpack(packed, scale, 480, q) - w.astype(np.float64))
    rounding = 0.02 if q.dtype == "float16" else 1e-6  # of the arithmetic in the model's dtype
    assert (error <= steps * (0.5 + rounding)).all()
    assert (error > steps * 0.45).any()  # and are not better than that either


@pytest.mark.parametrize("name", GROUPED)
def test_last_group_is_padded_with_zero_bits(name: str) -> None:
    q = QUANTIZATIONS[name]
    w = np.random.default_rng(2).standard_normal((3, q.group_size + 5)).astype(q.dtype)
    packed, scale = pack(w, q)
    assert (packed.shape, scale.shape) == q.shapes(3, q.group_size + 5) and scale.shape == (3, 2)
    assert not packed[:, q.group_size // q.per_word + 1 + 5 // q.per_word :].any()
    assert unpack(packed, scale, w.shape[1], q).shape == w.shape


def test_beyond_float16_is_refused() -> None:
    with pytest.raises(EdgeStreamError, match=r"layer holds weights beyond float16's range"):
        to_dtype(np.array([70000.0], np.float32), "float16", "layer")
    assert to_dtype(np.array([70000.0], np.float32), "float32", "layer")[0] == 70000.0


def test_unknown_quantization() -> None:
    with pytest.raises(EdgeStreamError, match="quantization q5f16_9 is unknown: use one of q0f16"):
        find_quantization("q5f16_9")


@pytest.mark.parametrize("name", ["q4f16_1", "q3f16_1"])
def test_bits_are_those_of_float16_arithmetic(name: str) -> None:
    """Every finite float16 there is, in groups of like and of unlike size, step by step in NumPy's own float16."""
    q = QUANTIZATIONS[name]
    finite = np.arange(65536, dtype=np.uint16).view(np.float16)
    finite = finite[np.isfinite(finite)]
    mixed = np.random.default_rng(3).permutation(finite)
    rows = len(finite) // (4 * q.group_size)
    for w in (part[: rows * 4 * q.group_size].reshape(rows, -1) for part in (finite, mixed)):
        grouped = w.reshape(rows, -1, q.group_size)
        top, middle = np.float16(2 * q.max_int), np.float16(q.max_int)
        want_scale = np.abs(grouped).max(axis=2) / middle
        with np.errstate(all="ignore"):
            levels = np.rint(grouped / want_scale[:, :, None] + middle)
        levels = np.fmin(np.fmax(levels, np.float16(0)), top).astype(np.uint32).reshape(rows, -1, q.per_word)
        want = sum(levels[:, :, i] << np.uint32(i * q.bits) for i in range(q.per_word))
        packed, scale = pack(w, q)
        assert np.array_equal(packed, want)
        assert np.array_equal(scale.view(np.uint16), want_scale.view(np.uint16))


@pytest.mark.parametrize("name", GROUPED)
@pytest.mark.parametrize("columns", [192, 205])
def test_bits_are_those_of_tvm(name: str, columns: int) -> None:
    """The same formula as tensor expressions, compiled by TVM for this CPU: every bit equal."""
    pytest.importorskip("tvm")
    q = QUANTIZATIONS[name]
    w = weights(q, 40, columns)
    want_packed, want_scale = _tvm_pack(w, q)
    packed, scale = pack(w, q)
    assert np.array_equal(packed, want_packed)
    assert np.array_equal(scale.view(f"u{scale.itemsize}"), want_scale.view(f"u{scale.itemsize}"))


def _tvm_pack(w: np.ndarray, q: Quantization) -> tuple[np.ndarray, np.ndarray]:
    import tvm
    from tvm import relax, te, tirx

    rows, columns = w.shape
    (_, words), (_, groups) = q.shapes(rows, columns)
    zero, top, middle = (tirx.const(v, q.dtype) for v in (0, 2 * q.max_int, q.max_int))

    def expression(x: te.Tensor) -> tuple[te.Tensor, te.Tensor]:
        r = te.reduce_axis((0, q.group_size), "r")
        e = te.reduce_axis((0, q.per_word), "e")

        def magnitude(i: tirx.Var, g: tirx.Var) -> tirx.Expr:
            inside = g * q.group_size + r < columns
            return te.max(tirx.if_then_else(inside, te.abs(x[i, g * q.group_size + r]), zero), axis=r)

        largest = te.compute((rows, groups), magnitude, "largest")
        scale = te.compute((rows, groups), lambda i, g: largest[i, g] / middle, "scale")

        def level(i: tirx.Var, k: tirx.Var) -> tirx.Expr:
            scaled = tirx.round(x[i, k] / scale[i, k // q.group_size] + middle)
            return tirx.min(tirx.max(scaled, zero), top).astype("uint32")

        levels = te.compute((rows, columns), level, "levels")

        def word(i: tirx.Var, j: tirx.Var) -> tirx.Expr:
            k = j * q.per_word + e
            bits = levels[i, k] << (e * q.bits).astype("uint32")
            return te.sum(tirx.if_then_else(k < columns, bits, tirx.const(0, "uint32")), axis=e)

        return te.compute((rows, words), word, "packed"), scale

    builder = relax.BlockBuilder()
    argument = relax.Var("w", relax.TensorType(w.shape, q.dtype))
    with builder.function("main", [argument]):
        with builder.dataflow():
            result = builder.emit_output(builder.emit_te(expression, argument))
        builder.emit_func_output(result)
    built = relax.build(relax.transform.LegalizeOps()(builder.finalize()), target="llvm")
    packed, scale = relax.VirtualMachine(built, tvm.cpu())["main"](tvm.runtime.tensor(w))
    return packed.numpy(), scale.numpy()
