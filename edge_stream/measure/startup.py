"""The time until the first token."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from typing import Any

from edge_stream.errors import EdgeStreamError
from edge_stream.measure.table import rounded

_FIRST_TOKEN = """
import sys, time
start = time.perf_counter()
from edge_stream import Engine, Sampling
imported = time.perf_counter()
with Engine.load(sys.argv[1], n_ctx=int(sys.argv[2])) as engine:
    loaded = time.perf_counter()
    stream = engine.stream()
    stream.feed("Once upon a time there was")
    next(iter(stream.generate(1, sampling=Sampling(temp=0))))
    first = time.perf_counter()
print(imported - start, loaded - imported, first - loaded)
"""


def startup(model: str, n_ctx: int, repetitions: int) -> list[dict[str, Any]]:
    """Medians over fresh processes, in ms.

    help: the process of `edge-stream --help`. load: Engine.load. first token: from there to the first token after a
    prompt of a few words. process to first token: all of it, with the interpreter's start.
    """
    spans: dict[str, list[float]] = {"help": [], "load": [], "first token": [], "process to first token": []}
    for _ in range(repetitions):
        spans["help"].append(_timed([sys.executable, "-m", "edge_stream.cli", "--help"])[0])
        whole, output = _timed([sys.executable, "-c", _FIRST_TOKEN, model, str(n_ctx)])
        _imported, load, first = (float(x) * 1e3 for x in output.split())
        spans["load"].append(load)
        spans["first token"].append(first)
        spans["process to first token"].append(whole)
    return [
        {
            "startup": name,
            "p50_ms": rounded(statistics.median(times), 1),
            "min_ms": rounded(min(times), 1),
            "max_ms": rounded(max(times), 1),
            "n": repetitions,
        }
        for name, times in spans.items()
    ]


def _timed(command: list[str]) -> tuple[float, str]:
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    elapsed = (time.perf_counter() - start) * 1e3
    if done.returncode != 0:
        raise EdgeStreamError(f"a timed process failed: {done.stderr.strip().splitlines()[-1:] or ['?']}")
    return elapsed, done.stdout
