"""How far a stream that comes back from disk is from one that was never saved: the largest difference of a logit.

    python benchmarks/restore_rounding.py -m demo
    python benchmarks/restore_rounding.py -m build/demo-f32.gguf -ctk f32 -ctv f32

Once messages have left the cache there are gaps among its cells, which a session closes up: the same keys are summed in
another order. In float32 that is rounding of 1e-5. Kernels for quantised weights round their inputs to 8 bits, where
such a difference becomes a whole step now and then: a draw between two tokens can then go the other way.
"""

from __future__ import annotations

import argparse
import pydoc_data.topics
import tempfile
from pathlib import Path

import numpy as np

from edge_stream import Engine
from edge_stream.measure.table import markdown

PIECES = (45, 6, 27, 24, 27, 24)  # tokens of messages, so that a window slides to where one begins
AFTER = 60  # tokens that are compared


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", default="demo")
    parser.add_argument("-c", "--ctx-size", type=int, default=256)
    parser.add_argument("-ctk", "--cache-type-k", default="f16")
    parser.add_argument("-ctv", "--cache-type-v", default="f16")
    args = parser.parse_args()
    cache = {"cache_type_k": args.cache_type_k, "cache_type_v": args.cache_type_v}
    rows = []
    with (
        Engine.load(args.model, n_ctx=args.ctx_size, flash_attn="off", **cache) as engine,
        tempfile.TemporaryDirectory(prefix="edge-stream-rounding-") as folder,
    ):
        tokens = engine.tokenize(" ".join(pydoc_data.topics.topics.values())[:20_000])
        path = Path(folder) / "session"
        for n_before in (args.ctx_size * 3 // 4, args.ctx_size * 5 // 4, args.ctx_size * 4):
            with engine.stream(n_boundary=args.ctx_size // 8) as stream:
                at = 0
                while at < n_before:
                    stream.mark()
                    end = min(at + PIECES[at % len(PIECES)], n_before)
                    stream.feed_tokens(tokens[at:end])
                    at = end
                stream.save(path)
                n_evicted = stream.stats.n_evicted
                after = tokens[n_before : n_before + AFTER]
                never = np.array([stream.logits_of([token])[0] for token in after])
            with engine.restore(path) as stream:
                again = np.array([stream.logits_of([token])[0] for token in after])
            differences = np.abs(never - again).max(axis=1)
            rows.append(
                {
                    "tokens before": str(n_before),
                    "had left": str(n_evicted),
                    "largest": f"{differences.max():.1e}",
                    "median of the largest": f"{np.median(differences):.1e}",
                    "largest logit": f"{np.abs(never).max():.0f}",
                }
            )
    print(markdown(rows, list(rows[0])))


if __name__ == "__main__":
    main()
