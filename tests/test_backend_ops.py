"""No op of the sinks' moves falls to the CPU on CUDA or Metal, by their own support functions in the pinned source."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Callable
from functools import partial

import backend_ops
import pytest

from edge_stream.cache_types import CACHE_TYPES
from edge_stream.hardware import bank_ops, devices

needs_source = pytest.mark.skipif(
    not (backend_ops.LLAMA / backend_ops.CUDA).exists() or not shutil.which("c++"),
    reason="needs llama.cpp's source (make build) and a C++ compiler",
)


@pytest.fixture(scope="module")
def found() -> dict[str, Callable[[int], bool]]:
    return backend_ops.backends()


@needs_source
def test_every_slide_stays_on_the_device(found: dict[str, Callable[[int], bool]]) -> None:
    for backend in ("CUDA", "Metal"):
        for cache_type in CACHE_TYPES:
            missing = bank_ops.unsupported(found[backend], cache_type)
            assert missing["slide"] == missing["capture"] == [], (backend, cache_type)
            # known: neither backend converts iq4_nl to float32, so a rebase, which is rare, takes the CPU
            assert missing["rebase"] == (["load"] if cache_type == "iq4_nl" else []), (backend, cache_type)


@needs_source
def test_a_missing_op_is_seen(found: dict[str, Callable[[int], bool]]) -> None:
    """An Apple GPU without bfloat cannot store such keys."""
    assert bank_ops.unsupported(found["Metal without bfloat"], "bf16")["slide"] == ["store"]


@needs_source
def test_the_documented_table_is_the_sources(found: dict[str, Callable[[int], bool]]) -> None:
    page = backend_ops.DOC.read_text(encoding="utf-8")
    start, end = page.index(backend_ops.BEGIN) + len(backend_ops.BEGIN), page.index(backend_ops.END)
    assert page[start:end].strip() == backend_ops.table(found), "python benchmarks/backend_ops.py --write"


def test_the_list_of_ops_is_complete() -> None:
    """bank_ops holds the ops that the support functions are reduced to, with the shapes that they look at."""
    base = bank_ops._base()
    base.ggml_op_desc.restype, base.ggml_op_desc.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
    for cache_type in CACHE_TYPES:
        with bank_ops.ops(cache_type) as steps:
            kinds = {base.ggml_op_desc(t).decode() for tensors in steps.values() for t in tensors.values()}
        quantised = CACHE_TYPES[cache_type][1] > 1
        assert kinds == {"ROPE", "SET_ROWS", "CPY"} | ({"MUL_MAT"} if quantised else set())
        assert kinds <= set(backend_ops.OPS)


def test_devices_here_compute_them_all() -> None:
    for device in devices.devices():
        if device.kind == "accelerator" or device.is_rpc:
            continue
        for cache_type in CACHE_TYPES:
            supports = partial(devices.ggml().ggml_backend_dev_supports_op, device.handle)
            missing = bank_ops.unsupported(supports, cache_type)
            assert missing["slide"] == missing["capture"] == [], (device.name, cache_type)
