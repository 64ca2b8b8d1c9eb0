"""What a slide costs, compared with plain decode at the same cache fill and with llama.cpp's context shift.

    python benchmarks/slide_cost.py -m demo -c 512,4096 -ctk f16,q8_0 --keep 4

plain and sliding: milliseconds per token on one stream, in alternating blocks of one run. A plain block feeds a token
and takes it back (the cache stays one short of full, nothing is evicted); a sliding block feeds tokens, each of which
evicts one. The first two tokens of a block are not counted (the graph is rebuilt when the sinks start or stop moving).

shift: the one token at which llama.cpp drops half of the cache and rotates the rest, and its extra cost over a plain
token, spread over the tokens until the next shift; measured between the blocks, on a context without a stream.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edge_stream.engine import Engine
from edge_stream.measure.modes import ShiftReader
from edge_stream.measure.table import as_json, markdown


@dataclass
class Times:
    """Milliseconds per token, by what the token did."""

    plain: list[float] = field(default_factory=list)
    sliding: list[float] = field(default_factory=list)
    stock: list[float] = field(default_factory=list)
    shift: list[float] = field(default_factory=list)


class Lane:
    """A stream and a reader with context shift, on engines of their own, both filled."""

    def __init__(self, args: argparse.Namespace, n_ctx: int, kind: str) -> None:
        settings: dict[str, Any] = {
            "n_ctx": n_ctx,
            "n_keep": args.keep,
            "cache_type_k": kind,
            "cache_type_v": kind,
            "flash_attn": args.flash_attn,
            "n_threads": args.threads,
        }
        self.engine = Engine.load(args.model, sink_move=args.sink_move, **settings)
        self.shifter = ShiftReader(Engine.load(args.model, **settings), "shift")
        self.random = np.random.default_rng(0)
        self.times = Times()
        self.stream = self.engine.stream()
        self.stream.feed(self.draw(n_ctx + 64))
        self.stream.feed(self.draw(n_ctx - self.stream.stats.n_cached + 1))

    def draw(self, n: int) -> list[int]:
        """Random tokens."""
        return [int(t) for t in self.random.integers(100, self.engine.n_vocab - 100, n)]

    def plain(self, n: int) -> None:
        """n tokens, each taken back."""
        self.stream.rewind(1)
        for i, token in enumerate(self.draw(n)):
            took = timed(self.stream, token)
            self.stream.rewind(1)
            if i >= 2:
                self.times.plain.append(took)
        self.stream.feed(self.draw(1))

    def sliding(self, n: int) -> None:
        """n tokens, each of which evicts one."""
        self.times.sliding += [timed(self.stream, token) for token in self.draw(n)][2:]

    def shift(self, n: int) -> None:
        """n tokens at a full cache, then the one that shifts."""
        reader = self.shifter
        reader.feed(self.draw(reader.n_ctx - 1 - reader.n_cached - n))
        self.times.stock += [timed(reader, token) for token in self.draw(n)][2:]
        shifts = reader.n_shifts
        self.times.shift.append(timed(reader, self.draw(1)[0]))
        assert reader.n_shifts == shifts + 1

    def close(self) -> None:
        """Free both."""
        self.engine.close()
        self.shifter.close()


def timed(reader: Any, token: int) -> float:
    """Milliseconds to feed one token."""
    start = time.perf_counter()
    reader.feed((token,))
    return (time.perf_counter() - start) * 1e3


def measure(args: argparse.Namespace, n_ctx: int, kind: str) -> dict[str, Any]:
    """A row of the table."""
    lane = Lane(args, n_ctx, kind)
    try:
        for block in range(args.blocks):
            lane.plain(args.block_size)
            lane.sliding(args.block_size)
            if block % 4 == 1:  # half a cache has to be read before each
                lane.shift(args.block_size)
    finally:
        lane.close()
    times = lane.times
    plain, sliding, stock, shift = (float(np.median(t)) for t in (times.plain, times.sliding, times.stock, times.shift))
    until_next = (n_ctx - args.keep) // 2  # tokens
    p50, p99 = np.percentile(times.sliding, [50, 99])
    return {
        "n_ctx": n_ctx,
        "n_keep": args.keep,
        "cache type": kind,
        "plain_ms": plain,
        "sliding_ms": sliding,
        "sliding/plain": sliding / plain,
        "p99/p50": p99 / p50,
        "plain p99/p50": float(np.percentile(times.plain, 99) / np.percentile(times.plain, 50)),
        "max/p50": max(times.sliding) / p50,
        "slide_ms": sliding - plain,
        "shift_ms": shift,
        "shift/stock": shift / stock,
        "shift_ms per token": (shift - stock) / until_next,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", default="demo")
    parser.add_argument("-c", "--ctx-size", default="4096", help="one or more, separated by commas")
    parser.add_argument("--keep", type=int, default=4)
    parser.add_argument("-ctk", "--cache-type", default="f16", help="of K and V; one or more, separated by commas")
    parser.add_argument("-fa", "--flash-attn", default="auto")
    parser.add_argument("-t", "--threads", type=int, default=None)
    parser.add_argument("--sink-move", default="auto")
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--block-size", type=int, default=34)
    parser.add_argument("-o", "--output", choices=("md", "json"), default="md")
    args = parser.parse_args()
    rows = [measure(args, int(c), kind) for c in args.ctx_size.split(",") for kind in args.cache_type.split(",")]
    print(as_json(rows) if args.output == "json" else markdown(rows, list(rows[0])))


if __name__ == "__main__":
    main()
