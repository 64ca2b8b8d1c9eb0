"""Shared by both backends' loading: size checks, llama.cpp's loader and log, a tag of the weights."""

from __future__ import annotations

import ctypes as C
import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from edge_stream.backends import LoadOptions
from edge_stream.errors import EdgeStreamError
from edge_stream.hardware import devices
from edge_stream.native import bindings, libraries
from edge_stream.native.callbacks import Callbacks

_TAG_BLOCKS = 64
_TAG_BLOCK_BYTES = 1 << 16


def default_threads() -> int:
    """The number of cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def check_sizes(options: LoadOptions) -> None:
    """Raise EdgeStreamError for sizes that no cache can have."""
    for name in ("n_ctx", "n_batch", "n_ubatch"):
        value = getattr(options, name)
        if not 1 <= value <= 1 << 28:
            raise EdgeStreamError(f"{name} = {value} must be between 1 and {1 << 28}")
    if not 0 <= options.n_keep < options.n_ctx:
        raise EdgeStreamError(f"n_keep = {options.n_keep} must be between 0 and n_ctx = {options.n_ctx} (exclusive)")


def weights_tag(path: Path) -> int:
    """64-bit hash of a model file's size and 64 evenly spaced blocks, which tells a fine-tune from its base."""
    size = path.stat().st_size
    digest = hashlib.sha256(size.to_bytes(8, "little"))
    with path.open("rb") as file:
        for i in range(_TAG_BLOCKS):
            file.seek(max(0, size - _TAG_BLOCK_BYTES) * i // (_TAG_BLOCKS - 1))
            digest.update(file.read(_TAG_BLOCK_BYTES))
    return int.from_bytes(digest.digest()[:8], "little")


def start(verbose: bool) -> Any:
    """Initialise llama.cpp and return its bindings; it logs to the terminal only if verbose."""
    llama = libraries.llama()
    bindings.library().es_log_set(verbose)
    llama.llama_backend_init()
    return llama


def load_model(
    path: Path,
    params: Any,
    callbacks: Callbacks,
    *,
    names: Sequence[str] | None = None,
    rpc: Sequence[str] = (),
    on_load: Callable[[int], object] | None = None,
) -> int:
    """es_model_load, interruptible by Ctrl-C: a llama_model *, or 0.

    names, rpc: of the devices that hold layers, see `devices.choose`. on_load: see LoadOptions.
    """
    llama = libraries.llama()
    devices.place(params, names, rpc)

    def report(fraction: float, _user: object) -> bool:
        if on_load:
            on_load(int(100 * fraction))
        return True

    on_progress = callbacks.guard(llama.llama_progress_callback, report, failed=False)
    params.progress_callback = on_progress
    model: int = 0
    try:
        model = callbacks.run(bindings.library().es_model_load, os.fsencode(path), params) or 0
        callbacks.deliver()
    except BaseException:
        if model:
            llama.llama_model_free(model)
        raise
    return model


def log_hint() -> str:
    """The last error that llama.cpp logged, as the end of a sentence, or ""."""
    last = bindings.library().es_log_last_error().decode(errors="replace")
    return f": {last}" if last else ""


def reason(function: Any, *arguments: Any) -> str | None:
    """The reason that a native check gives for failing; None if it passes."""
    buffer = C.create_string_buffer(512)
    return None if function(*arguments, buffer, len(buffer)) else buffer.value.decode(errors="replace")
