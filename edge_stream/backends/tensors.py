"""How llama.cpp reads a model's tensors, and where it keeps them: fields of llama_model_params."""

from __future__ import annotations

import ctypes as C
import re
import sys
from pathlib import Path
from typing import Any

from edge_stream.backends import LoadOptions
from edge_stream.errors import EdgeStreamError
from edge_stream.hardware import devices
from edge_stream.native import libraries

LOAD_MODES = {"auto": -1, "none": 0, "mmap": 1, "mlock": 2, "mmap+mlock": 3, "dio": 4}  # llama_load_mode


class _Override(C.Structure):
    """llama_model_tensor_buft_override."""

    _fields_ = [("pattern", C.c_char_p), ("buft", C.c_void_p)]


def place(params: Any, options: LoadOptions) -> list[Any]:
    """Set the fields; returns what must stay alive until the model is loaded. Raises EdgeStreamError."""
    if options.load_mode not in LOAD_MODES:
        raise EdgeStreamError(f"load_mode = {options.load_mode} is unknown: use one of {', '.join(LOAD_MODES)}")
    params.load_mode = LOAD_MODES[options.load_mode]
    for name, value in options.model_params.items():
        setattr(params, name, value)
    kept: list[Any] = []
    if options.tensor_split:
        most = int(libraries.llama().llama_max_devices())
        if len(options.tensor_split) >= most:
            raise EdgeStreamError(f"--tensor-split has {len(options.tensor_split)} numbers: {most - 1} at most")
        params.tensor_split = (C.c_float * most)(*options.tensor_split)
        kept.append(params.tensor_split)
    if options.override_tensor:
        buffers = devices.buffer_types()
        rows = []
        for pattern, buffer in options.override_tensor:
            if buffer not in buffers:
                raise EdgeStreamError(f"--override-tensor: buffer {buffer} is unknown: there are {', '.join(buffers)}")
            try:
                re.compile(pattern)  # std::regex, which reads it, would end the program
            except re.error as error:
                raise EdgeStreamError(f"--override-tensor: {pattern!r} is no regular expression: {error}") from None
            rows.append(_Override(pattern.encode(), buffers[buffer]))
        kept.append((_Override * (len(rows) + 1))(*rows))
        params.tensor_buft_overrides = C.cast(kept[-1], C.c_void_p)
    return kept


def check_locked(options: LoadOptions, n_bytes: int) -> None:
    """Raise EdgeStreamError if --mlock was asked for and the system locked nothing (Linux tells)."""
    if "mlock" not in options.load_mode or sys.platform != "linux":
        return
    status = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(r"^VmLck:\s+(\d+) kB", status, re.MULTILINE)
    if found and int(found[1]) * 1024 < n_bytes // 2:
        raise EdgeStreamError(
            f"--mlock: the system does not lock {n_bytes >> 20:,} MiB in memory; raise `ulimit -l` or leave it out"
        )
