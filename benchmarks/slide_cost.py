"""What a slide costs: per-token time while sliding one token at a time, against plain decode at the same cache fill.

Both run on one stream, in alternating blocks of one run: a plain block feeds a token and rewinds it (the cache stays
one short of full, nothing is evicted); a sliding block feeds tokens, each of which evicts one. The first two tokens
of a block are not counted (the graph is rebuilt when the sinks start or stop moving).

    python benchmarks/slide_cost.py -m demo -c 4096 -ctk f16 --keep 4
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import numpy as np

from edge_stream.engine import Engine
from edge_stream.stream import Stream


def block(stream: Stream, tokens: list[int], sliding: bool) -> list[float]:
    """Times in milliseconds of one block, its first two tokens dropped."""
    if not sliding:
        stream.rewind(1)
    times = []
    for token in tokens:
        start = time.perf_counter()
        stream.feed((token,))
        times.append((time.perf_counter() - start) * 1e3)
        if not sliding:
            stream.rewind(1)
    if not sliding:
        stream.feed((tokens[-1],))
    return times[2:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", default="demo")
    parser.add_argument("-c", "--ctx-size", type=int, default=4096)
    parser.add_argument("--keep", type=int, default=4)
    parser.add_argument("-ctk", "--cache-type-k", default="f16")
    parser.add_argument("-ctv", "--cache-type-v", default="f16")
    parser.add_argument("-fa", "--flash-attn", default="auto")
    parser.add_argument("-t", "--threads", type=int, default=None)
    parser.add_argument("--sink-move", default="auto")
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--block-size", type=int, default=34)
    args = parser.parse_args()

    with Engine.load(
        args.model,
        n_ctx=args.ctx_size,
        n_keep=args.keep,
        cache_type_k=args.cache_type_k,
        cache_type_v=args.cache_type_v,
        flash_attn=args.flash_attn,
        n_threads=args.threads,
        sink_move=args.sink_move,
    ) as engine:
        random = np.random.default_rng(0)
        draw = lambda n: [int(t) for t in random.integers(100, engine.n_vocab - 100, n)]  # noqa: E731
        stream = engine.stream()
        stream.feed(draw(args.ctx_size + 64))
        stream.feed(draw(stream.stats.n_ctx - stream.stats.n_cached + 1))
        plain: list[float] = []
        sliding: list[float] = []
        for _ in range(args.blocks):
            plain += block(stream, draw(args.block_size), sliding=False)
            sliding += block(stream, draw(args.block_size), sliding=True)
    p50, p99 = np.percentile(sliding, [50, 99])
    print(
        json.dumps(
            {
                "n_ctx": args.ctx_size,
                "n_keep": args.keep,
                "cache_type_k": args.cache_type_k,
                "plain_ms": round(statistics.median(plain), 3),
                "sliding_ms": round(statistics.median(sliding), 3),
                "ratio": round(statistics.median(sliding) / statistics.median(plain), 4),
                "p99_over_p50": round(p99 / p50, 3),
                "plain_p99_over_p50": round(float(np.percentile(plain, 99) / np.percentile(plain, 50)), 3),
                "max_over_p50": round(max(sliding) / p50, 3),
            }
        )
    )


if __name__ == "__main__":
    main()
