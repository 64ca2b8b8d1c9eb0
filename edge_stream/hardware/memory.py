"""How much memory is available, and whether a cache fits."""

from __future__ import annotations

import mmap

from edge_stream.errors import EdgeStreamError


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
