"""libllama's own quantiser (llama_model_quantize), called through llama-cpp-python's bindings."""

from __future__ import annotations

import ctypes as C
import mmap
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from edge_stream.errors import EdgeStreamError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_PREFIX = "LLAMA_FTYPE_MOSTLY_"
# these are useless without an importance matrix; libllama refuses some of them, but only halfway through
_NEED_IMATRIX = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "Q2_K_S")
_NOT_FOR_DENSE = ("MXFP4_MOE", "NVFP4", "TQ1_0", "TQ2_0", "F16", "BF16")
_RELEASE_SECONDS = 0.2
_BEGUN = re.compile(r"\[ *\d+/ *\d+\] (\S+)")  # libllama's line for a tensor
MAX_BUFFER = 256 << 20  # bytes of rows that libllama holds at a time


def file_types() -> dict[str, int]:
    """llama-quantize's names (Q4_K_M, Q4_0, ...) -> enum llama_ftype."""
    from edge_stream.native import libraries

    llama = libraries.llama()
    names = [n.removeprefix(_PREFIX) for n in dir(llama) if n.startswith(_PREFIX)]
    return {n: int(getattr(llama, _PREFIX + n)) for n in sorted(names) if n not in _NOT_FOR_DENSE}


def file_type(name: str) -> int:
    """The llama_ftype of a name, in upper or lower case. Raises EdgeStreamError if there is none."""
    known = file_types()
    if name.upper() not in known:
        raise EdgeStreamError(f"quantisation {name} is unknown: use one of {', '.join(known)}")
    return known[name.upper()]


def quantize(
    source: Path,
    target: Path,
    name: str,
    *,
    imatrix: Mapping[str, NDArray[np.float32]] | None = None,
    keep_split: bool = False,
    allow_requantize: bool = False,
    integers: Mapping[str, int] | None = None,
    n_threads: int = 0,
    verbose: bool = False,
    started: Callable[[str], None] = lambda _tensor: None,
) -> list[str]:
    """Quantise a GGUF file (the first part of a split one) into another.

    imatrix: tensor name -> importance of each column. integers: metadata to add, e.g. the streaming defaults.
    started: called from another thread with each tensor's name as libllama starts on it.
    Returns libllama's warnings about tensors that got another type. Raises EdgeStreamError with libllama's reason; an
    unfinished target may then be left behind.
    """
    from edge_stream.native import libraries

    if name.upper() in _NEED_IMATRIX and imatrix is None:
        raise EdgeStreamError(f"{name.upper()} needs an importance matrix: give --imatrix FILE (made by llama-imatrix)")
    llama = libraries.llama()
    last_error = [""]
    warnings: list[str] = []

    def sink(level: int, text: bytes, _user: object) -> None:
        if verbose:
            os.write(2, text)
        line = text.decode(errors="replace").strip()
        if level == 4:  # GGML_LOG_LEVEL_ERROR
            last_error[0] = line
        if begun := _BEGUN.match(line):
            started(begun[1])
        if "required fallback quantization" in line:
            warnings.append(line.rpartition("WARNING: ")[2])

    params = llama.llama_model_quantize_default_params()
    params.ftype = file_type(name)
    params.nthread = n_threads or len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else n_threads
    params.keep_split = keep_split
    params.allow_requantize = allow_requantize
    params.max_buf_size = MAX_BUFFER
    if imatrix is not None:
        entries = (llama.llama_model_imatrix_data * (len(imatrix) + 1))()
        for entry, (tensor, values) in zip(entries, imatrix.items(), strict=False):
            entry.name = tensor.encode()
            entry.data = values.ctypes.data_as(C.POINTER(C.c_float))
            entry.size = values.size
        params.imatrix = entries
    if integers:
        overrides = (llama.llama_model_kv_override * (len(integers) + 1))()
        for override, (key, value) in zip(overrides, integers.items(), strict=False):
            override.key = key.encode()
            override.tag = llama.LLAMA_KV_OVERRIDE_TYPE_INT
            override.value.val_i64 = value
        params.kv_overrides = overrides

    held = params, imatrix  # kept alive for the call, which outlives an interrupted caller; ctypes keeps other arrays

    def work() -> int:
        with _logging_to(sink):
            return int(llama.llama_model_quantize(os.fsencode(source), os.fsencode(target), C.byref(held[0])))

    llama.llama_backend_init()
    with _releasing_pages(source.parent):
        status = _interruptible(work)
    if status != 0:
        hint = f": {last_error[0]}" if last_error[0] else ""
        raise EdgeStreamError(f"libllama could not quantise to {name}{hint}")
    return warnings


@contextmanager
def _logging_to(sink: Callable[[int, bytes, object], None]) -> Iterator[None]:
    """Send libllama's messages to a function; restores the previous callback afterwards."""
    from edge_stream.native import libraries

    llama = libraries.llama()
    callback, before, user = llama.llama_log_callback(sink), llama.llama_log_callback(), C.c_void_p()
    llama.llama_log_get(C.byref(before), C.byref(user))
    llama.llama_log_set(callback, None)
    try:
        yield
    finally:
        llama.llama_log_set(before, user)


def _interruptible(call: Callable[[], int]) -> int:
    """Run a native call in another thread, so that Ctrl-C works at once; the call itself cannot be stopped."""
    result: list[int] = []
    thread = threading.Thread(target=lambda: result.append(int(call())), daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.1)
    return result[0] if result else -1


@contextmanager
def _releasing_pages(folder: Path) -> Iterator[None]:
    """Release mapped pages of a folder's files while libllama reads them.

    libllama maps its input, so in the end the whole model counts as this process's memory. The pages are clean, so
    dropping them (madvise MADV_DONTNEED on a shared file mapping) costs at most another read. Linux only.
    """
    stop = threading.Event()

    def work() -> None:
        libc = C.CDLL(None, use_errno=True)
        libc.madvise.argtypes = [C.c_void_p, C.c_size_t, C.c_int]
        while not stop.wait(_RELEASE_SECONDS):
            with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
                for line in maps:
                    parts = line.split(maxsplit=5)
                    if len(parts) == 6 and parts[5].startswith(prefix) and parts[1] == "r--s":
                        begin, end = (int(x, 16) for x in parts[0].split("-"))
                        libc.madvise(begin, end - begin, mmap.MADV_DONTNEED)

    prefix = f"{folder.resolve()}/"
    if not sys.platform.startswith("linux"):
        yield
        return
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
