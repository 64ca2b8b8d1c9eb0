"""Whichever way the CPU threads wait for each other (native/src/ggml/es-barrier.h), they compute the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

CHILD = """
import json, os, sys
from edge_stream import Engine, Sampling
if sys.argv[2] == "one core":
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # every thread shares it
options = {"n_ctx": 64, "n_threads": 3, "cache_type_k": "f32", "cache_type_v": "f32", "flash_attn": "off"}
with Engine.load(sys.argv[1], **options) as engine:
    stream = engine.stream()
    stream.feed(list(range(10, 150)))
    print(json.dumps([token.token for token in stream.generate(60, sampling=Sampling(temp=0), ignore_eos=True)]))
"""


def written(model: Path, wait: str, cores: str = "all") -> list[int]:
    """Tokens that a process writes with three threads that wait as told."""
    env = {**os.environ, "EDGE_STREAM_WAIT": wait, "OMP_NUM_THREADS": "3"}
    command = [sys.executable, "-c", CHILD, str(model), cores]
    return list(json.loads(subprocess.run(command, env=env, check=True, capture_output=True, timeout=120).stdout))


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="pinning to a core is Linux's")
def test_waiting_does_not_change_what_is_computed(tiny: Callable[[str], Path]) -> None:
    model = tiny("gqa")
    stock = written(model, "stock")
    assert len(stock) == 60
    assert written(model, "adaptive") == stock
    assert written(model, "sleep") == stock
    assert written(model, "adaptive", "one core") == stock
