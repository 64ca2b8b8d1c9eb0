"""Time per token at several depths, in turns: does a stream slow down as it grows?

    python benchmarks/depth.py -m demo -c 512 -d 1000,10000,100000

Each depth has its own process and stream, which first reads all tokens up to it (in chunks). Then the streams take
turns decoding 16 tokens one by one, so that drifts in the speed of a shared machine affect all of them alike.
"""

from __future__ import annotations

import argparse
import sys

import numpy as np

from edge_stream.measure.reader_process import ReaderProcess, close_all, in_turns
from edge_stream.measure.table import as_json, markdown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", default="demo")
    parser.add_argument("-c", "--ctx-size", type=int, default=512)
    parser.add_argument("--keep", type=int, default=4)
    parser.add_argument("-d", "--depths", default="1000,10000,100000", help="tokens, each at least the cache's size")
    parser.add_argument("-n", "--n-gen", type=int, default=640)
    parser.add_argument("-o", "--output", choices=("md", "json"), default="md")
    args = parser.parse_args()
    depths = [int(d) for d in args.depths.split(",")]
    if min(depths) < args.ctx_size:
        parser.error(f"a depth below the cache's size, {args.ctx_size}, would be measured with less in the cache")
    workers: list[ReaderProcess] = []
    try:
        for depth in depths:
            workers.append(ReaderProcess(args.model, "stream", args.ctx_size, args.keep, {}))
            workers[-1].read(depth, lambda at: print(f"{at:,} tokens read", file=sys.stderr))
            workers[-1].call("generate", 2)  # at a full cache the first slide builds another graph
        memory = [worker.call("rss") for worker in workers]
        print("measuring", file=sys.stderr)
        ms = in_turns(workers, args.n_gen)
        counters = [worker.call("counters") for worker in workers]
    finally:
        close_all(workers)
    medians = [float(np.median(own)) for own in ms]
    rows = [
        {
            "depth": depth,
            "n_ctx": args.ctx_size,
            "slides": count["slides"],
            "rebases": count["rebases"],
            "p50_ms": median,
            "quartiles": "..".join(f"{q:.2f}" for q in np.percentile(own, [25, 75])),
            "p50/first": median / medians[0],
            "rss_mib": rss,
        }
        for depth, count, median, own, rss in zip(depths, counters, medians, ms, memory, strict=True)
    ]
    print(as_json(rows) if args.output == "json" else markdown(rows, list(rows[0])))


if __name__ == "__main__":
    main()
