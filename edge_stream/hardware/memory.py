"""How much memory is available, whether a cache fits, and how freed memory goes back to the system."""

from __future__ import annotations

import ctypes
import mmap
import os

from edge_stream.errors import EdgeStreamError

_MALLOPT = ((-8, 1), (-3, 1 << 20), (-1, 1 << 20))  # malloc.h: M_ARENA_MAX, M_MMAP_THRESHOLD, M_TRIM_THRESHOLD


def available_memory() -> int | None:
    """Bytes of memory available now; None if the system does not report it."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def check_fits(n_bytes: int, n_ctx: int, n_parallel: int, bytes_per_token: int) -> None:
    """Raise EdgeStreamError, naming a cache size that would fit, if n_bytes of host memory are not available."""
    available = available_memory()
    if available is not None and n_bytes > available:
        times = f" for each of {n_parallel} streams" if n_parallel > 1 else ""
        fits = int(available * 0.8) // max(1, bytes_per_token) // n_parallel
        raise EdgeStreamError(
            f"a cache of n_ctx = {n_ctx}{times} needs {n_bytes / 2**20:,.0f} MiB but {available / 2**20:,.0f} MiB "
            f"are available; n_ctx = {fits} would fit"
        )


def check_obtainable(n_bytes: int) -> None:
    """Raise EdgeStreamError if the system refuses so much more memory now (`ulimit -v`, overcommitment).

    For work in numpy, where an allocation that fails may end the process: within a ufunc, numpy 2.4 raises MemoryError
    without the interpreter's lock. The memory is asked for, not touched, and given back.
    """
    try:
        mmap.mmap(-1, n_bytes).close()
    except OSError as error:
        raise EdgeStreamError(
            f"there is not enough memory: {n_bytes / 2**20:,.0f} MiB are needed ({error.strerror or error})"
        ) from error


def return_freed_memory() -> None:
    """Let glibc's malloc give freed memory back to the system. For a process of our own that lives for days.

    By default it keeps an arena per thread, and once a session's buffer of 20 MB was freed, blocks up to that size stay
    in one of them. Here: one arena, blocks of 1 MiB and more are mapped each for itself, and no more than that is kept
    at the arena's end (mallopt(3)). Nothing if the user has chosen (MALLOC_..., GLIBC_TUNABLES), or without glibc.
    """
    if os.environ.get("GLIBC_TUNABLES") or any(name.startswith("MALLOC_") for name in os.environ):
        return
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return
    for number, value in _MALLOPT:
        libc.mallopt(number, value)
