"""The sinks' ops by llama.cpp's own Metal encoders and kernel sources, run on the CPU: no Apple hardware needed."""

from __future__ import annotations

import re
import shutil
from typing import Any

import metal_emulation
import pytest
from metal_emulation import Result

from edge_stream import bank_ops
from edge_stream.engine import CACHE_TYPES

pytestmark = pytest.mark.skipif(
    not metal_emulation.BACKEND.exists() or not shutil.which("clang++"),
    reason="needs llama.cpp's source (make build) and clang++",
)

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
def metal() -> Any:
    return metal_emulation.build()


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


def test_wrong_kernels_are_seen() -> None:
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

    lib = metal_emulation.build(edit)
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
