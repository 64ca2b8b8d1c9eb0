"""How far float32 RoPE can go: the error of logits at large absolute positions.

ggml computes a rotation angle as position x theta_scale^i in float32. At growing positions this script compares a
stream's logits (float32 model and cache) with those of the same stream kept at small positions by constant rebasing,
and prints the largest and mean difference. `rebase_at` is chosen where the error is still that of small positions.

    python benchmarks/rebase_bound.py -m MODEL.gguf
"""

from __future__ import annotations

import argparse

import numpy as np

from edge_stream.engine import Engine

POSITIONS = [1 << k for k in (9, 11, 12, 13, 14, 15, 16, 17, 18)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", required=True)
    parser.add_argument("-c", "--ctx-size", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=64)
    args = parser.parse_args()

    options = {"n_ctx": args.ctx_size, "cache_type_k": "f32", "cache_type_v": "f32", "flash_attn": "off"}
    with (
        Engine.load(args.model, rebase_at=1 << 30, **options) as far,
        Engine.load(args.model, rebase_at=args.ctx_size + 64, **options) as near,
    ):
        tokens = [int(t) for t in np.random.default_rng(0).integers(10, far.n_vocab - 10, POSITIONS[-1] + args.tokens)]
        a, b = far.stream(), near.stream()
        done = 0
        print("| position | max abs difference of logits | mean |\n|---|---|---|")
        for position in POSITIONS:
            for stream in (a, b):
                stream.feed(tokens[done:position])
            piece = tokens[position : position + args.tokens]
            difference = np.abs(a.logits_of(piece) - b.logits_of(piece))
            done = position + args.tokens
            print(f"| {position} | {difference.max():.2e} | {difference.mean():.2e} |", flush=True)


if __name__ == "__main__":
    main()
