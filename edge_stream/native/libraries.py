"""Find and load the native libraries: libllama (ours or a stock one) and libedge_stream.

Search order: the folder in LLAMA_CPP_LIB_PATH, if the user set it; with EDGE_STREAM_LLAMA=installed, the libraries
inside the installed llama-cpp-python (a prebuilt GPU wheel, say); else ours (`edge_stream/lib`), which have the sink
bank; else those inside llama-cpp-python. libedge_stream detects what the one in use can do.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from functools import lru_cache
from pathlib import Path
from types import ModuleType

from edge_stream.errors import EdgeStreamError
from edge_stream.native import scheduling

# GNU OpenMP: rounds that a waiting thread spins before it sleeps; the user's own setting wins. Our libllama waits there
# only between tokens (native/src/ggml/es-barrier.h does the rest): long enough to be awake for the next one. A stock
# libllama waits there after every graph node, where the default (some 300,000 rounds) starves other programs, and
# itself when cores are shared. Measured by benchmarks/waiting.py.
_SPIN_COUNT = "10000"
_SPIN_COUNT_STOCK = "500"


def lib_dir() -> Path:
    """The folder of our own native libraries (absent from a source tree that has not been built)."""
    return Path(__file__).resolve().parent.parent / "lib"


def _lib_name(name: str) -> str:
    return f"lib{name}.dylib" if sys.platform == "darwin" else f"lib{name}.so"


def _stock_lib_dir() -> Path:
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        raise EdgeStreamError("llama-cpp-python is not installed: install edge-stream with its dependencies")
    return Path(spec.origin).parent / "lib"


@lru_cache(maxsize=1)
def llama_dir() -> Path:
    """The folder whose libllama is in use."""
    if "LLAMA_CPP_LIB_PATH" in os.environ:
        return Path(os.environ["LLAMA_CPP_LIB_PATH"])
    wanted = os.environ.get("EDGE_STREAM_LLAMA", "bundled")
    if wanted not in ("bundled", "installed"):
        raise EdgeStreamError(f"EDGE_STREAM_LLAMA={wanted} is unknown: use bundled or installed")
    ours = lib_dir()
    if wanted == "bundled" and (ours / _lib_name("llama")).exists():
        return ours
    return _stock_lib_dir()


def _import_bindings() -> ModuleType:
    """llama_cpp.llama_cpp without its package, whose `__init__` imports chat formats and numpy: 0.3 s.

    Whoever imports llama_cpp later gets the whole package, with these bindings in it.
    """
    spec = importlib.util.find_spec("llama_cpp")
    if "llama_cpp" in sys.modules or spec is None:
        return importlib.import_module("llama_cpp.llama_cpp")
    sys.modules["llama_cpp"] = importlib.util.module_from_spec(spec)  # not run
    try:
        return importlib.import_module("llama_cpp.llama_cpp")
    finally:
        del sys.modules["llama_cpp"]
        sys.modules.pop("llama_cpp._ctypes_extensions", None)  # the package's own import binds its name in it


@lru_cache(maxsize=1)
def llama() -> ModuleType:
    """llama-cpp-python's raw bindings over the libraries of `llama_dir()`."""
    folder = llama_dir()
    if not (folder / _lib_name("llama")).exists():
        raise EdgeStreamError(
            f"no {_lib_name('llama')} in {folder}: build edge-stream (make build) or install llama-cpp-python"
        )
    if not any(name in os.environ for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")):
        os.environ["GOMP_SPINCOUNT"] = _SPIN_COUNT if folder == lib_dir() else _SPIN_COUNT_STOCK
        scheduling.ask_for_short_slices()
    if folder != _stock_lib_dir():
        os.environ["LLAMA_CPP_LIB_PATH"] = str(folder)
    try:
        bindings = _import_bindings()
    except (ImportError, OSError, RuntimeError) as error:
        raise EdgeStreamError(f"llama-cpp-python cannot load {folder}: {error}") from error
    loaded = Path(bindings._lib._name).resolve().parent
    if loaded != folder.resolve():
        # two libllamas in one process would misread each other's structs
        raise EdgeStreamError(
            f"llama_cpp was imported before edge_stream, with the libraries of {loaded}: import edge_stream first, or "
            "set EDGE_STREAM_LLAMA=installed"
        )
    return bindings


@lru_cache(maxsize=1)
def edge_stream_library() -> ctypes.CDLL:
    """libedge_stream, bound to the libllama that `llama()` loaded."""
    llama()
    path = lib_dir() / _lib_name("edge_stream")
    if not path.exists():
        raise EdgeStreamError(f"{path.name} is missing from {path.parent}: build edge-stream (make build)")
    try:
        # libllama must be loaded first, with global symbols, for ours to resolve against it
        ctypes.CDLL(str(llama_dir() / _lib_name("llama")), mode=ctypes.RTLD_GLOBAL)
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise EdgeStreamError(f"{path.name} cannot be loaded: {error}") from error
