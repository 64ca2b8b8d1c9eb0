"""How much memory a stream takes over many cache lengths, in a process of its own: others have more to do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

# Linux may join pages of which some were never touched into one of 2 MiB, at any time: not here (PR_SET_THP_DISABLE)
SCRIPT = """
import ctypes, json, random, sys
if sys.platform == "linux":
    assert ctypes.CDLL(None).prctl(41, 1, 0, 0, 0) == 0
from edge_stream import Engine
from edge_stream.measure.metrics import resident_mib
model, n_ctx, n_at_once, lengths, options = json.loads(sys.argv[1])
draw = random.Random(0)
with Engine.load(model, n_ctx=n_ctx, n_threads=1, **options) as engine, engine.stream() as stream:
    sizes = []
    for n in lengths:
        for _ in range(n):
            tokens = [draw.randrange(10, 256) for _ in range(n_ctx)]
            if n_at_once:
                stream.feed_tokens(tokens[:n_at_once])
            for token in tokens[n_at_once:]:
                stream.feed_tokens([token])
        sizes.append(resident_mib())
    assert stream.stats.n_past == n_ctx * sum(lengths)
    print(sizes[1] - sizes[0], stream.stats.n_rebases)
"""


def growth(model: Path, n_ctx: int, lengths: tuple[int, int], n_at_once: int = 0, **options: Any) -> tuple[float, int]:
    """MiB more after lengths[1] cache lengths than after lengths[0] before them, and the number of rebases.

    n_at_once: tokens of each cache length that are fed at once; the others are fed one by one.
    """
    what = json.dumps([str(model), n_ctx, n_at_once, lengths, options])
    done = subprocess.run([sys.executable, "-c", SCRIPT, what], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    mib, n_rebases = done.stdout.split()
    return float(mib), int(n_rebases)
