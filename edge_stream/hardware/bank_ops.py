"""The graph ops that moving and rebasing sinks need, and whether a device supports them for a K cache type.

One list for `edge-stream info`, which asks the devices present, and for the table in docs/gpu.md, which asks the
support functions of backends that are not. Mirrors native/src/llama/es-bank.cpp.
"""

from __future__ import annotations

import ctypes as C
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from edge_stream.cache_types import CACHE_TYPES
from edge_stream.native import libraries

F32, I32, I64 = 0, 26, 27  # ggml_type
ROPE_NORMAL, ROPE_NEOX = 0, 2
STEPS = ("capture", "slide", "rebase")

_HEAD, _N_HEAD, _N_ROWS, _N_CELLS, _N_SLICE = 128, 8, 4, 4096, 256


class _InitParams(C.Structure):
    _fields_ = [("mem_size", C.c_size_t), ("mem_buffer", C.c_void_p), ("no_alloc", C.c_bool)]


@lru_cache(maxsize=1)
def _base() -> Any:
    """libggml-base, with the signatures of the functions that create tensors."""
    libraries.llama()
    lib = C.CDLL(str(libraries.llama_dir() / libraries._lib_name("ggml-base")))
    p, n, f, i, s = C.c_void_p, C.c_int64, C.c_float, C.c_int, C.c_size_t
    signatures: dict[str, list[Any]] = {
        "ggml_new_tensor_1d": [p, i, n],
        "ggml_new_tensor_2d": [p, i, n, n],
        "ggml_reshape_2d": [p, p, n, n],
        "ggml_reshape_3d": [p, p, n, n, n],
        "ggml_view_2d": [p, p, n, n, s, s],
        "ggml_view_3d": [p, p, n, n, n, s, s, s],
        "ggml_cast": [p, p, i],
        "ggml_cpy": [p, p, p],
        "ggml_mul_mat": [p, p, p],
        "ggml_set_rows": [p, p, p, p],
        "ggml_rope_ext": [p, p, p, p, i, i, i, f, f, f, f, f, f],
    }
    for name, argtypes in signatures.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = p, argtypes
    lib.ggml_init.restype, lib.ggml_init.argtypes = p, [_InitParams]
    lib.ggml_free.restype, lib.ggml_free.argtypes = None, [p]
    lib.ggml_row_size.restype, lib.ggml_row_size.argtypes = s, [i, n]
    lib.ggml_mul_mat_set_hint.restype, lib.ggml_mul_mat_set_hint.argtypes = None, [p, i]
    return lib


@contextmanager
def ops(cache_type: str, rope: int = ROPE_NEOX) -> Iterator[dict[str, dict[str, int]]]:
    """step -> name -> ggml_tensor * of every op of that step that computes, for this K cache type.

    Shapes are Mistral-7B's on a device: 8 KV heads of 128 dimensions, 4 sinks, 4096 cells. (On the CPU the rows of a
    slide are heads at one position.) The tensors have no data and are freed on exit.
    """
    lib = _base()
    kind = CACHE_TYPES[cache_type].ggml_type
    ctx = lib.ggml_init(_InitParams(1 << 20, None, True))
    try:
        width = _HEAD * _N_HEAD

        def rotate(x: int, pos: int) -> int:
            return int(lib.ggml_rope_ext(ctx, x, pos, None, _HEAD, rope, 4096, 1e4, 1.0, 0.0, 1.0, 32.0, 1.0))

        def hadamard(x: int, n: int) -> int:
            matrix = lib.ggml_new_tensor_2d(ctx, F32, _HEAD, _HEAD)
            y = lib.ggml_mul_mat(ctx, matrix, lib.ggml_reshape_2d(ctx, x, _HEAD, n))
            lib.ggml_mul_mat_set_hint(y, 1)  # GGML_HINT_SRC0_IS_HADAMARD
            return int(y)

        new_1d, new_2d = lib.ggml_new_tensor_1d, lib.ggml_new_tensor_2d
        quantised = CACHE_TYPES[cache_type].is_quantised  # llama.cpp rotates a quantised K by a Hadamard matrix
        cache = new_2d(ctx, kind, width, _N_CELLS)
        bank = new_2d(ctx, F32, width, _N_ROWS)

        keys = new_2d(ctx, F32, width, _N_ROWS)
        capture, slide, rebase = {}, {}, {}
        if quantised:
            keys = capture["hadamard"] = hadamard(keys, _N_HEAD * _N_ROWS)
        keys = lib.ggml_reshape_2d(ctx, keys, width, _N_ROWS)
        capture["copy"] = lib.ggml_cpy(ctx, keys, lib.ggml_view_2d(ctx, bank, width, _N_ROWS, 4 * width, 0))

        rows = lib.ggml_reshape_3d(ctx, bank, _HEAD, _N_HEAD, _N_ROWS)
        rows = slide["rope"] = rotate(rows, new_1d(ctx, I32, _N_ROWS))
        if quantised:
            rows = slide["hadamard"] = hadamard(rows, _N_HEAD * _N_ROWS)
        rows = lib.ggml_view_2d(ctx, rows, width, _N_ROWS, 4 * width, 0)
        slide["store"] = lib.ggml_set_rows(ctx, cache, rows, new_1d(ctx, I64, _N_ROWS))

        head, row = lib.ggml_row_size(kind, _HEAD), lib.ggml_row_size(kind, width)
        part = lib.ggml_view_3d(ctx, cache, _HEAD, _N_HEAD, _N_SLICE, head, row, 0)
        plain = rebase["load"] = lib.ggml_cast(ctx, part, F32)
        if quantised:
            plain = rebase["hadamard"] = hadamard(plain, _N_HEAD * _N_SLICE)
            plain = lib.ggml_reshape_3d(ctx, plain, _HEAD, _N_HEAD, _N_SLICE)
        turned = rebase["rope"] = rotate(plain, new_1d(ctx, I32, _N_SLICE))
        if quantised:
            turned = hadamard(turned, _N_HEAD * _N_SLICE)
            turned = lib.ggml_reshape_3d(ctx, turned, _HEAD, _N_HEAD, _N_SLICE)
        rebase["store"] = lib.ggml_cpy(ctx, turned, part)
        yield {"capture": capture, "slide": slide, "rebase": rebase}
    finally:
        lib.ggml_free(ctx)


def unsupported(supports: Callable[[int], bool], cache_type: str) -> dict[str, list[str]]:
    """step -> names of the ops that `supports` (called with a ggml_tensor *) rejects; empty lists if none."""
    missing: dict[str, set[str]] = {step: set() for step in STEPS}
    for rope in (ROPE_NORMAL, ROPE_NEOX):
        with ops(cache_type, rope) as steps:
            for step, tensors in steps.items():
                missing[step] |= {name for name, tensor in tensors.items() if not supports(tensor)}
    return {step: sorted(names) for step, names in missing.items()}
