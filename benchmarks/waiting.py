"""How the waiting policy of the CPU threads affects speed, on a quiet machine and beside busy processes.

llama.cpp's CPU threads meet at barriers many times per token. Policies: "default", llama.cpp's barrier with GNU
OpenMP's spinning; "passive", the same with OMP_WAIT_POLICY=passive; "ours", native/src/ggml/es-barrier.h with time
slices of 0.1 ms (edge_stream/native/scheduling.py), edge-stream's default; "sleep", ours without spinning. Each policy runs
in its own process (settings are read once), and policies take turns over several rounds. The load is one busy Python
process per core; the fair share is then half of the quiet speed of the default. "of default" is the median of the
rounds' ratios, since the speed of a shared machine drifts from round to round.

    python benchmarks/waiting.py -m demo
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

SPIN = "while True: pass"
SETTINGS = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "EDGE_STREAM_WAIT")

CHILD = """
import json, sys, time
from edge_stream import Engine, Sampling
model, seconds = sys.argv[1], float(sys.argv[2])
engine = Engine.load(model, n_ctx=512)
stream = engine.stream()
stream.feed(list(range(100, 700)))
gaps, end = [], time.perf_counter() + seconds
last = time.perf_counter()
for token in stream.generate(sampling=Sampling(temp=0), ignore_eos=True):
    now = time.perf_counter()
    gaps.append(now - last)
    last = now
    if now > end:
        break
print(json.dumps({"tok_per_s": len(gaps) / sum(gaps), "max_gap_s": max(gaps)}))
"""


def measure(model: str, env: dict[str, str], busy: int, seconds: float) -> dict[str, float]:
    """Speed and longest gap of a process with one waiting policy, beside `busy` spinning processes."""
    load = [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(busy)]
    try:
        command = [sys.executable, "-c", CHILD, model, str(seconds)]
        clean = {k: v for k, v in os.environ.items() if k not in SETTINGS}
        out = subprocess.run(command, env=clean | env, capture_output=True, text=True, check=True)
        return dict(json.loads(out.stdout.splitlines()[-1]))
    finally:
        for process in load:
            process.kill()
        for process in load:
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", default="demo")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0)
    args = parser.parse_args()

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # an empty policy is OpenMP's default, and keeps edge-stream from setting its own
    ways: dict[str, dict[str, str]] = {
        "default": {"EDGE_STREAM_WAIT": "stock", "OMP_WAIT_POLICY": ""},
        "passive": {"EDGE_STREAM_WAIT": "stock", "OMP_WAIT_POLICY": "passive"},
        "ours": {},
        "sleep": {"EDGE_STREAM_WAIT": "sleep"},
    }
    results: dict[str, dict[str, list[float]]] = {way: {"quiet": [], "busy": [], "gap": []} for way in ways}
    for _ in range(args.rounds):
        for way, env in ways.items():
            results[way]["quiet"].append(measure(args.model, env, 0, args.seconds)["tok_per_s"])
            time.sleep(0.2)
            busy = measure(args.model, env, cores, args.seconds)
            results[way]["busy"].append(busy["tok_per_s"])
            results[way]["gap"].append(busy["max_gap_s"])
    base = statistics.median(results["default"]["quiet"])
    print("| waiting | quiet tok/s | of default | beside busy | of fair share | each run's | longest gap s |")
    print("|---|---|---|---|---|---|---|")
    for way, r in results.items():
        quiet, busy_speed = statistics.median(r["quiet"]), statistics.median(r["busy"])
        ratio = statistics.median(a / b for a, b in zip(r["quiet"], results["default"]["quiet"], strict=True))
        shares = ", ".join(f"{speed / (base / 2):.2f}" for speed in r["busy"])
        print(
            f"| {way} | {quiet:.1f} | {ratio:.3f} | {busy_speed:.1f} | {busy_speed / (base / 2):.2f} | {shares} "
            f"| {max(r['gap']):.3f} |"
        )


if __name__ == "__main__":
    main()
