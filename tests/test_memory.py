"""Memory that is asked for, and that is given back."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from edge_stream.errors import EdgeStreamError
from edge_stream.hardware import memory

# a block as of a session that is saved, then smaller ones: what the process keeps of them, MiB
FREED = """
import ctypes, sys
from edge_stream.hardware.memory import return_freed_memory
from edge_stream.measure.metrics import resident_mib

if sys.argv[1] == "return":
    return_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]

def filled(n):
    block = libc.malloc(n)
    ctypes.memset(block, 1, n)
    return block

before = resident_mib()
libc.free(filled(20 << 20))
blocks = [filled(2 << 20) for _ in range(15)]
for block in blocks:
    libc.free(block)
print(resident_mib() - before)
"""


def test_memory_that_the_system_refuses() -> None:
    memory.check_obtainable(1 << 20)
    with pytest.raises(EdgeStreamError, match="not enough memory: 1,099,511,627,776 MiB are needed"):
        memory.check_obtainable(1 << 60)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
@pytest.mark.parametrize(
    ("how", "environment", "keeps"),
    [("return", {}, False), ("not", {}, True), ("return", {"MALLOC_ARENA_MAX": "2"}, True)],
)
def test_freed_memory_goes_back(how: str, environment: dict[str, str], keeps: bool) -> None:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    done = subprocess.run(
        [sys.executable, "-c", FREED, how], env=inherited | environment, capture_output=True, text=True, check=True
    )
    assert (float(done.stdout) > 20) is keeps, done.stdout
