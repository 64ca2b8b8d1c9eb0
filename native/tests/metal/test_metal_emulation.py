"""The sinks' ops by llama.cpp's own Metal encoders and kernel sources, run on the CPU: see README.md."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import conftest
import graph_cost
import metal_emulation
import pytest
from metal_emulation import Result

from edge_stream import Engine
from edge_stream.cache_types import CACHE_TYPES
from edge_stream.hardware import bank_ops

pytestmark = pytest.mark.skipif(
    not metal_emulation.BACKEND.exists() or not metal_emulation.find_clang(),
    reason="needs llama.cpp's source (make build) and clang++ 15 or newer",
)

tiny = conftest.tiny  # the fixture of tests/conftest.py, which pytest does not offer in this folder

# one step of the type at its largest value, in shares of that: the angles' last bits may tip a value over
STEP = {
    "f32": 2e-4,  # of the angle itself, in float32 at position 1024
    "f16": 2**-10,
    "bf16": 2**-7,
    "q8_0": 1.2 / 127,
    "q5_1": 1.2 * 2 / 31,
    "q5_0": 1.2 / 16,
    "q4_1": 1.2 * 2 / 15,
    "q4_0": 1.2 / 8,
    "iq4_nl": 1.2 * 24 / 127,
}
N_CHANGED = {"capture": 4 * 1024, "slide": 4 * 1024, "rebase": 256 * 1024}


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return metal_emulation.compiled(tmp_path_factory.mktemp("metal"))


@pytest.fixture(scope="module")
def metal(emulator: Path) -> Any:
    return metal_emulation.load(emulator)


@pytest.mark.parametrize(
    ("cache_type", "rope"), [*((t, bank_ops.ROPE_NEOX) for t in CACHE_TYPES), ("f16", bank_ops.ROPE_NORMAL)]
)
def test_metals_kernels_compute_what_the_cpu_does(cache_type: str, rope: int, metal: Any) -> None:
    found = metal_emulation.check(metal, cache_type, rope)
    assert {"capture copy", "slide store", "rebase store"} <= set(found)
    for op, result in found.items():
        if isinstance(result, str):  # known, see test_backend_ops.py: a rebase of such a cache is the CPU's
            assert cache_type == "iq4_nl" and op.startswith("rebase"), (op, result)
            continue
        assert result.n_changed > 0.95 * N_CHANGED[op.split()[0]], op
        assert result.n_differing < 0.005 * result.n_changed, op
        stored = cache_type if op.endswith("store") else "f32"
        assert result.max_diff < STEP[stored] * result.max_abs, op
        # one kernel per op, and each waits for the one before
        assert result.n_barriers == result.n_dispatches - 1, op
    slide = found["slide store"]
    assert isinstance(slide, Result) and slide.n_dispatches == 2 + ("slide hadamard" in found)


def test_wrong_kernels_are_seen(tmp_path: Path) -> None:
    """A sign, a stride, an exchange: one in each kernel; and one kernel that no source has."""
    wrong = {
        "[args.n_dims/2] = x0*sin_theta + x1*cos_theta": "[args.n_dims/2] = x0*sin_theta - x1*cos_theta",  # rope_neox
        "src_row + 32*ind": "src_row + 32*(ind ^ 1)",  # set_rows to a quantised type
        "val2 - val + 2*((lane & i) == 0)*val": "val2 - val",  # fwht
        '"kernel_set_rows_f32_i64_f16"': '"kernel_other"',
    }
    met = set()

    def edit(text: str) -> str:
        for right in wrong:
            if right in text:
                met.add(right)
                text = text.replace(right, wrong[right])
        return text

    lib = metal_emulation.load(metal_emulation.compiled(tmp_path, edit))
    assert met == set(wrong)
    for cache_type, rope, op in (
        ("f32", bank_ops.ROPE_NEOX, "slide store"),
        ("q8_0", bank_ops.ROPE_NORMAL, "slide store"),
        ("q8_0", bank_ops.ROPE_NORMAL, "capture hadamard"),
    ):
        found = metal_emulation.check(lib, cache_type, rope)[op]
        assert isinstance(found, Result) and found.n_differing > 0.2 * found.n_changed, (cache_type, op)
    missing = metal_emulation.check(lib, "f16", bank_ops.ROPE_NEOX)["slide store"]
    assert "kernel_set_rows_f32_i64_f16" in str(missing)


@pytest.mark.parametrize(
    ("name", "n_layer", "cache_type", "flash_attn"),
    [("head64", 2, "f16", "on"), ("head64", 2, "q8_0", "on"), ("qwen2", 2, "f16", "off"), ("gemma3", 4, "f16", "on")],
)
def test_what_metal_is_given(
    name: str, n_layer: int, cache_type: str, flash_attn: str, tiny: Callable[[str], Path], emulator: Path
) -> None:
    """Two or three kernels per layer and slide; each access waits for those it depends on; the order is a right one."""
    options = {"n_ctx": 64, "cache_type_k": cache_type, "cache_type_v": cache_type, "flash_attn": flash_attn}
    found = metal_emulation.record(tiny(name), emulator, **options)
    assert found["plain"]["graphs"] == found["sliding"]["graphs"] == 1
    assert found["sliding"]["kernels"] - found["plain"]["kernels"] == (3 if cache_type == "q8_0" else 2) * n_layer
    assert found["conflicts"] == 0 and found["dependent"] > 10_000
    known = [host for source, _ in metal_emulation.embedded().values() for host in metal_emulation.host_names(source)]
    assert len(found["kernels"]) > 8 and set(found["kernels"]) <= set(known)
    with Engine.load(tiny(name), **options) as engine, engine.stream() as stream:
        graph_cost.decodes(stream, 64, lambda: None, size=1)
        assert stream.logits.tolist() == found["logits"]


def test_a_missing_barrier_is_seen(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    barrier = "ggml_metal_encoder_memory_barrier(ctx->enc);"
    emulator = metal_emulation.compiled(tmp_path, lambda text: text.replace(barrier, ""))
    assert metal_emulation.record(tiny("head64"), emulator, n_ctx=64, flash_attn="on")["conflicts"] > 1000


def test_every_kernel_is_in_the_embedded_library(metal: Any) -> None:
    """llama.cpp's embedding step: every source that the backend looks for, and each kernel in one of them."""
    embedded = metal_emulation.embedded()
    assert set(embedded) == set(metal_emulation.libraries()) and len(embedded) > 20
    for name, (source, assembly) in embedded.items():
        assert "__embed_" not in source, name
        # where the library is not embedded: switched off in the other case
        assert set(re.findall(r'^\s*#include "(.+)"', source, re.MULTILINE)) <= {"ggml-common.h"}, name
        assert f"_ggml_metallib_{name}_start" in assembly and f"_ggml_metallib_{name}_end" in assembly
    names = [host for source, _ in embedded.values() for host in metal_emulation.host_names(source)]
    metal_emulation.check(metal, "f16", bank_ops.ROPE_NEOX)
    used = metal_emulation.kernels_used(metal)
    assert len(used) >= 4
    assert [names.count(name) for name in used] == [1] * len(used)


def test_the_kernels_are_assembled_for_apple_silicon() -> None:
    for name in metal_emulation.KERNELS:
        found = metal_emulation.assembled(name)
        assert found[:4] == bytes.fromhex("cffaedfe")  # Mach-O, 64 bits
        assert f"_ggml_metallib_{name}_start".encode() in found
        assert metal_emulation.embedded()[name][0].encode() in found
