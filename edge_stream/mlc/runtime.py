"""TVM's runtime without its Python package, which takes a second to import: a kept library needs tvm_ffi alone."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import tvm_ffi
from numpy.typing import NDArray

_CPU, _POOLED = 1, 2  # kDLCPU; tvm.runtime.vm.VirtualMachine.POOLED_ALLOCATOR
_ALIGNMENT = 64  # what compiled functions ask of a tensor's address


@lru_cache(maxsize=1)
def _load_runtime() -> None:
    """libtvm_runtime from where the package keeps it, as the package would: whoever imports tvm later gets the same."""
    spec = importlib.util.find_spec("tvm")
    assert spec is not None and spec.origin is not None  # compile.require_tvm
    name = "libtvm_runtime.dylib" if sys.platform == "darwin" else "libtvm_runtime.so"
    folders = [Path(spec.origin).parent / "lib"]
    if os.environ.get("TVM_LIBRARY_PATH"):
        folders.insert(0, Path(os.environ["TVM_LIBRARY_PATH"]))
    found = next((folder / name for folder in folders if (folder / name).exists()), folders[-1] / name)
    ctypes.CDLL(str(found), mode=ctypes.RTLD_GLOBAL)


class Tensor:
    """A zeroed NumPy array, and the TVM tensor over the same memory."""

    def __init__(self, shape: tuple[int, ...], dtype: str) -> None:
        kind = np.dtype(dtype)
        size = int(np.prod(shape)) * kind.itemsize
        memory = np.zeros(size + _ALIGNMENT, np.uint8)
        start = -memory.ctypes.data % _ALIGNMENT
        self.np: NDArray[Any] = memory[start : start + size].view(kind).reshape(shape)
        self.tvm = tvm_ffi.from_dlpack(self.np)


def functions(library: Path, n_threads: int) -> Any:
    """The functions of a compiled library, by name: functions(library, n)["name"](*arguments)."""
    # read when TVM starts its threads; if it has started them already, the call below sets the number
    os.environ.setdefault("TVM_NUM_THREADS", str(n_threads))
    _load_runtime()
    tvm_ffi.get_global_func("runtime.config_threadpool")(1, n_threads)
    module = tvm_ffi.load_module(str(library))["vm_load_executable"]()
    module["vm_initialization"](_CPU, 0, _POOLED)
    return module
