"""The CPU kernels for 4-bit matrices, one by one, against float64, in float32 and in integers; choosing experts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

tvm = pytest.importorskip("tvm")

from edge_stream.converters.mlc import model  # noqa: E402
from edge_stream.mlc import compile as mlc_compile  # noqa: E402
from edge_stream.mlc.kernels import ROWS, integer, linear  # noqa: E402

X86 = mlc_compile.platform.machine().lower() in ("x86_64", "amd64")

PROCESSORS = {
    "znver4": "avx512vnni",
    "skylake-avx512": "avx512bw",
    "knl": "avx512f",
    "alderlake": "avxvnni",
    "haswell": "avx2",
}
# instruction sets that are compiled for: a level of x86-64 and more
TARGETS = {
    "avx512vnni": ("x86-64-v4", ["+avx512vnni"]),
    "avx512bw": ("x86-64-v4", []),
    "avxvnni": ("x86-64-v3", ["+avxvnni"]),
    "avx2": ("x86-64-v3", []),
}


@pytest.mark.parametrize(("cpu", "feature"), PROCESSORS.items())
def test_instructions_of_processors(cpu: str, feature: str) -> None:
    if not X86:
        pytest.skip("x86's processors")
    assert mlc_compile.target_lanes({"kind": "llvm", "mcpu": cpu}) is mlc_compile._X86[feature]


def run(kernel: Any, name: str, x: np.ndarray, w: np.ndarray, s: np.ndarray, n: int) -> np.ndarray:
    """[m, n]: x [m, k] times a matrix, by a kernel compiled for one of TARGETS."""
    mcpu, more = TARGETS[name]
    target = tvm.target.Target({"kind": "llvm", "mcpu": mcpu, "mattr": more})
    function = kernel(len(x), n, x.shape[1], mlc_compile._X86[name]).with_attr("global_symbol", "matmul")
    library = tvm.compile(tvm.IRModule({"matmul": function}), target=target)
    y = tvm.runtime.tensor(np.full((1, len(x), n), np.nan, np.float32))
    library["matmul"](*(tvm.runtime.tensor(a) for a in (x[None], w, s)), y)
    return np.asarray(y.numpy()[0])


@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize(("n", "k"), [(128, 64), (200, 100), (5, 32)])
@pytest.mark.parametrize("name", TARGETS)
def test_products_with_4_bit_weights(name: str, n: int, k: int, m: int) -> None:
    """In float32; and in integers, where each input is off by half a step of its group at most."""
    lanes = mlc_compile._X86[name]
    have = tvm.get_global_func("target.llvm_get_cpu_features")(tvm.target.Target(mlc_compile.host_target()))
    if not X86 or not {name, "avx512vl" if "512" in name else "avx2"} <= {str(feature) for feature in have}:
        pytest.skip(f"this processor has no {name}")
    rng = np.random.default_rng(n + m)
    blocks, groups = -(-n // lanes.block), -(-k // 32)
    x = np.zeros((m, groups * 32), np.float32)
    x[:, :k] = rng.standard_normal((m, k))
    x[0, :32] = 0
    x[-1, k - 4 : k] = 1e4
    w = rng.integers(0, 2**32, (blocks, groups * 4, lanes.block), dtype=np.uint32)
    s = rng.random((blocks, groups, lanes.block), dtype=np.float32)
    nibbles = w[:, :, None] >> (4 * np.arange(8, dtype=np.uint32))[:, None] & 15
    weights = (nibbles.reshape(blocks, groups * 32, -1) - 7.0) * np.repeat(s.astype(np.float64), 32, axis=1)
    weights = weights.swapaxes(1, 2).reshape(-1, groups * 32)[:n]
    want = x.astype(np.float64) @ weights.T
    largest = np.repeat(np.abs(x.reshape(m, groups, 32)).max(axis=2), 32, axis=1).astype(np.float64)
    size = largest @ np.abs(weights).T  # of the products, at most
    x = np.ascontiguousarray(x[:, :k])
    assert (np.abs(run(linear.matmul_q4, name, x, w, s, n) - want) <= 1e-6 * size).all()
    error = np.abs(run(integer.matmul_q4, name, x, w, s, n) - want)
    assert (error <= (0.5 / 32767 + 1e-6) * size).all() and error.any()


@pytest.mark.parametrize("n_expert", [6, 128])
def test_chosen_experts_exist_whatever_the_scores_are(n_expert: int) -> None:
    k = 5
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((12, n_expert)).astype(np.float32)
    scores[6:] = [[np.nan], [np.inf], [-np.inf], [0.0], [0.0], [0.0]]
    scores[10, 1::2] = np.nan
    scores[11, 2] = np.inf
    given = tvm.te.placeholder(scores.shape, "float32")
    function = tvm.te.create_prim_func([given, model._chosen(k, model._rank(given))])
    library = tvm.compile(tvm.IRModule({"chosen": function.with_attr("global_symbol", "chosen")}), target="llvm")
    out = tvm.runtime.tensor(np.full((len(scores), k), -1, np.int32))
    library["chosen"](tvm.runtime.tensor(scores), out)
    want = np.argsort(-np.nan_to_num(scores, nan=-1e38, posinf=np.inf, neginf=-np.inf), axis=1, kind="stable")[:, :k]
    assert np.array_equal(out.numpy(), want)
