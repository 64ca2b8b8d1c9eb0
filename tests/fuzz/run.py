"""Fuzz what is written in Python: `run.py TARGET -n 100000 --minutes 60` (at least). Resumes where it was stopped.

Input i of a target is the same in every run. A failure, a hang (10 s of CPU time) or growing memory ends the run with
the number of the input, from which the next run goes on; `--only I` tries it alone. Figures: a JSON object, kept beside
the state.
"""

from __future__ import annotations

import argparse
import collections
import faulthandler
import json
import math
import os
import random
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edge_stream.output.files import replace_text

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("EDGE_STREAM_CACHE", tempfile.mkdtemp(prefix="edge-stream-cache-"))

import files
import http_requests

TARGETS = {
    "checkpoints": files.checkpoints,
    "gguf": files.gguf_sources,
    "mlc": files.mlc_folders,
    "http": http_requests.requests,
}
HANG = 10  # seconds of CPU time: the machine may have other work
WARM = 1000  # inputs after which memory is compared
GROWTH = 64  # MiB
KEEP = 600  # seconds after which the figures are kept


def rss() -> float:
    """Resident memory of this process, MiB (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def run(
    target: str,
    first: int,
    last: int,
    *,
    least: float = 0,
    most: float = math.inf,
    keep: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """Inputs from `first` on, to `last` or until `least` seconds are over if that is later, or `most`, or an interrupt.

    keep: takes the figures every ten minutes and at the end, be it a fault. Raises AssertionError, or whatever a reader
    raised.
    """
    seen: collections.Counter[str] = collections.Counter()
    faulthandler.register(signal.SIGPROF, chain=True)  # where it hangs; then the process ends
    warm, n, begun = 0.0, 0, time.monotonic()
    kept = begun

    def figures() -> dict[str, Any]:
        return {
            "inputs": n,
            "seconds": round(time.monotonic() - begun, 1),
            "outcomes": dict(seen.most_common()),
            "grown_mib": round(rss() - warm, 1) if warm else None,
            "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
        }

    with tempfile.TemporaryDirectory(prefix="edge-stream-fuzz-") as root, TARGETS[target](Path(root)) as attempt:
        try:
            while (seconds := time.monotonic() - begun) < most and (first + n < last or seconds < least):
                i = first + n
                signal.setitimer(signal.ITIMER_PROF, HANG)
                try:
                    seen[attempt(random.Random(f"{target} {i}"))] += 1
                except KeyboardInterrupt:
                    break
                except BaseException:
                    print(f"input {i} of {target}:", file=sys.stderr)
                    raise
                finally:
                    signal.setitimer(signal.ITIMER_PROF, 0)
                n += 1
                if n == WARM:
                    warm = rss()
                if warm and n % 1000 == 0:
                    grown = rss() - warm
                    assert grown < GROWTH, f"{grown:.0f} MiB more memory after {n} inputs"
                if time.monotonic() - kept > KEEP:
                    keep(figures())
                    kept = time.monotonic()
        finally:
            keep(figures())
    return figures()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("-n", type=int, default=100_000, help="inputs in all, those of earlier runs among them")
    parser.add_argument("--minutes", type=float, default=60, help="at least, in all")
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop this run after")
    parser.add_argument("--state", type=Path, default=Path("build/endurance"), help="folder of figures and progress")
    parser.add_argument("--only", type=int, help="this input alone")
    args = parser.parse_args()
    if args.only is not None:
        print(run(args.target, args.only, args.only + 1))
        return
    path = args.state / f"fuzz-{args.target}.json"
    known = json.loads(path.read_text()) if path.exists() else {"inputs": 0, "seconds": 0.0, "outcomes": {}}
    left = 60 * args.minutes - known["seconds"]
    if known["inputs"] >= args.n and left <= 0:
        print(args.target, json.dumps(known))
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    args.state.mkdir(parents=True, exist_ok=True)

    def keep(found: dict[str, Any]) -> None:
        outcomes = collections.Counter(known["outcomes"]) + collections.Counter(found["outcomes"])
        found |= {
            "inputs": known["inputs"] + found["inputs"],
            "seconds": round(known["seconds"] + found["seconds"], 1),
            "outcomes": dict(outcomes.most_common()),
            "peak_mib": max(known.get("peak_mib", 0), found["peak_mib"]),
        }
        replace_text(path, json.dumps(found))

    run(args.target, known["inputs"], args.n, least=left, most=args.seconds, keep=keep)
    print(args.target, path.read_text())


if __name__ == "__main__":
    main()
