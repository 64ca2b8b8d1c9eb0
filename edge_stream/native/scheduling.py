"""Ask Linux for short time slices, so that busy processes do not hold up threads that wait at a barrier."""

from __future__ import annotations

import ctypes
import os
import platform
import sys

# sched_setattr and sched_getattr: syscall numbers of the kernel's unistd tables
_SYSCALLS = {"x86_64": (314, 315), "aarch64": (274, 275)}
_SLICE_NS = 100_000  # the minimum that Linux accepts for a normal thread


class _SchedAttr(ctypes.Structure):
    """struct sched_attr, its first version (sched_setattr(2))."""

    _fields_ = [
        ("size", ctypes.c_uint32),
        ("policy", ctypes.c_uint32),
        ("flags", ctypes.c_uint64),
        ("nice", ctypes.c_int32),
        ("priority", ctypes.c_uint32),
        ("runtime", ctypes.c_uint64),
        ("deadline", ctypes.c_uint64),
        ("period", ctypes.c_uint64),
    ]


def ask_for_short_slices() -> bool:
    """Give the calling thread, and threads it starts later, slices of 0.1 ms (Linux 6.12; ignored before).

    Its share of the processor stays the same; a thread that wakes up runs sooner. Returns whether the kernel accepted
    it. Threads with a policy other than SCHED_OTHER are left alone.
    """
    if not sys.platform.startswith("linux") or platform.machine() not in _SYSCALLS:
        return False
    set_attr, get_attr = _SYSCALLS[platform.machine()]
    libc = ctypes.CDLL(None, use_errno=True)
    attr = _SchedAttr()
    size = ctypes.sizeof(attr)
    if libc.syscall(get_attr, 0, ctypes.byref(attr), size, 0) != 0 or attr.policy != os.SCHED_OTHER:
        return False
    attr.size, attr.runtime = size, _SLICE_NS
    return bool(libc.syscall(set_attr, 0, ctypes.byref(attr), 0) == 0)
