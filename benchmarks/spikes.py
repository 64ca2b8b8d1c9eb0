"""The latency of every token, by mode: which spikes are due to the method, and which to the machine.

    python benchmarks/spikes.py -m demo --mode stream,shift -c 1024 -n 3000 -r 5

Every repetition starts afresh, fills the cache and then decodes n tokens one by one, the modes taking turns of 16
tokens. What a method costs comes at the same tokens in every repetition; other delays come anywhere. So beside the
largest latency overall, and that of the quietest repetition, the table has the largest of the tokens' best times
("every time"): a token is slow there only if it was slow in all repetitions.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_stream.measure import plots
from edge_stream.measure.reader_process import ReaderProcess, close_all, in_turns
from edge_stream.measure.table import as_json, markdown

WARM = 64  # tokens beyond a full cache that are not counted


def repetition(workers: list[ReaderProcess], n: int) -> list[NDArray[np.float64]]:
    """Milliseconds of n tokens in each mode, [n]."""
    for worker in workers:
        worker.call("reset")
        worker.read(worker.n_ctx)
        worker.call("generate", WARM)
    return in_turns(workers, n)


def row(worker: ReaderProcess, ms: NDArray[np.float64]) -> dict[str, Any]:
    """A row of the table. ms: [repetitions, n]."""
    p50 = float(np.median(ms))
    within = ms / np.median(ms, axis=1, keepdims=True)  # the machine's speed drifts from one repetition to the next
    best = within.min(axis=0)
    return {
        "mode": worker.mode,
        "n_ctx": worker.n_ctx,
        "tokens": ms.shape[1],
        "repetitions": ms.shape[0],
        "p50_ms": p50,
        "p99/p50": float(np.percentile(within, 99)),
        "max/p50": float(within.max()),
        "quietest max/p50": float(within.max(axis=1).min()),
        "every time max/p50": float(best.max()),
        "tokens above 1.5 every time": int((best > 1.5).sum()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", default="demo")
    parser.add_argument("--mode", default="stream,shift", help="one or more, separated by commas")
    parser.add_argument("-c", "--ctx-size", type=int, default=1024)
    parser.add_argument("--keep", type=int, default=4)
    parser.add_argument("-n", "--n-gen", type=int, default=3000)
    parser.add_argument("-r", "--repetitions", type=int, default=5)
    parser.add_argument("--plot", help="a picture of every token's best time")
    parser.add_argument("-o", "--output", choices=("md", "json"), default="md")
    args = parser.parse_args()
    plots.check_plot(args.plot)
    workers: list[ReaderProcess] = []
    try:
        for mode in args.mode.split(","):
            workers.append(ReaderProcess(args.model, mode, args.ctx_size, args.keep, {}))
        runs = []
        for i in range(args.repetitions):
            runs.append(repetition(workers, args.n_gen))
            print(f"repetition {i + 1} of {args.repetitions}", file=sys.stderr)
        measured = [np.stack([run[k] for run in runs]) for k in range(len(workers))]
        rows = [row(worker, ms) for worker, ms in zip(workers, measured, strict=True)]
    finally:
        close_all(workers)
    if args.plot:
        best = {worker.mode: ms.min(axis=0) for worker, ms in zip(workers, measured, strict=True)}
        plots.token_latency(best, args.repetitions, args.plot)
    print(as_json(rows) if args.output == "json" else markdown(rows, list(rows[0])))


if __name__ == "__main__":
    main()
