"""The main claims of the README, each a command that exits with 1 if it does not hold.

    python benchmarks/proof.py drift      no drift: 20,000 one-token evictions, f16 and q8_0 KV against float32 KV
    python benchmarks/proof.py point      sinks against recomputed windows and against no sinks, real text
    python benchmarks/proof.py constant   resident memory between 2 and 20 cache lengths
    python benchmarks/proof.py endless    10 million tokens through a tiny model, logits equal the reference after

Each prints one JSON object. `make proof` runs them all.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from edge_stream.engine import Engine
from edge_stream.measure.metrics import resident_mib
from edge_stream.probabilities import nll


def text_tokens(engine: Engine, n: int) -> list[int]:
    """English text that every Python has: the topics of `help()`."""
    from pydoc_data.topics import topics

    tokens = engine.tokenize("\n".join(str(topics[name]) for name in sorted(topics))[: n * 12])
    assert len(tokens) >= n
    return tokens[:n]


def score(engine: Engine, tokens: list[int], label: str) -> np.ndarray:
    """NLL of every token, one decode and (once full) one eviction per token."""
    parts, start = [], time.monotonic()
    with engine.stream() as stream:
        for at in range(0, len(tokens), 500):
            parts.append(stream.score(tokens[at : at + 500], chunk=1))
            if sys.stderr.isatty() or at % 5000 == 0:
                print(f"{label}: {at:,} tokens, {at / (time.monotonic() - start):.0f} tok/s", file=sys.stderr)
    return np.concatenate(parts)


def drift(args: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    """Mean |NLL difference| from a float32-KV stream: tokens 1,000-2,000 against the last 1,000."""
    result: dict[str, Any] = {"n_ctx": 512, "n_tokens": args.tokens}
    with Engine.load(args.model, n_ctx=512, cache_type_k="f32", cache_type_v="f32", flash_attn="off") as engine:
        tokens = text_tokens(engine, args.tokens)
        exact = score(engine, tokens, "f32")
    ok = True
    for kind in ("f16", "q8_0"):
        with Engine.load(args.model, n_ctx=512, cache_type_k=kind, cache_type_v=kind) as engine:
            difference = np.abs(score(engine, tokens, kind) - exact)
        early, late = float(difference[1000:2000].mean()), float(difference[-1000:].mean())
        # by 1,000s: the noise of the text itself is what "does not grow" has to be judged against
        blocks = [round(float(d), 5) for d in difference[1000:].reshape(-1, 1000).mean(axis=1)]
        slope = float(np.polyfit(np.arange(len(blocks)), blocks, 1)[0]) * len(blocks)
        result[kind] = {
            "early": round(early, 5),
            "late": round(late, 5),
            "trend_over_run": round(slope, 5),
            "blocks": blocks,
        }
        ok = ok and late <= early * 1.1
    return result, ok


def point(args: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    """Perplexity after the first 1,024 of 8,000 tokens: 4 sinks, none, and recomputed fresh windows."""
    n_tokens, n_ctx, first = 8000, 512, 1024
    with Engine.load(args.model, n_ctx=n_ctx) as engine:
        tokens = text_tokens(engine, n_tokens)
        sinks = score(engine, tokens, "4 sinks")
        # tokens sampled evenly, each predicted from nothing but the n_ctx tokens before it, read anew
        at = np.linspace(first, n_tokens - 1, args.samples).astype(int)
        fresh = []
        with engine.stream() as stream:
            for i in at:
                stream.reset()
                stream.feed(tokens[i - n_ctx : i])
                logits = stream.logits
                assert logits is not None
                fresh.append(nll(logits, tokens[i]))
    with Engine.load(args.model, n_ctx=n_ctx, n_keep=0) as engine:
        none = score(engine, tokens, "no sinks")

    def ppl(nlls: Any) -> float:
        return round(float(np.exp(np.mean(nlls))), 3)

    result = {
        "n_ctx": n_ctx,
        "n_tokens": n_tokens,
        "samples": len(at),
        "ppl_sinks": ppl(sinks[first:]),
        "ppl_no_sinks": ppl(none[first:]),
        "ppl_sinks_at_samples": ppl(sinks[at]),
        "ppl_recompute_at_samples": ppl(fresh),
    }
    ratio = result["ppl_sinks_at_samples"] / result["ppl_recompute_at_samples"]
    worse = result["ppl_no_sinks"] / result["ppl_sinks"]
    result |= {"sinks_over_recompute": round(ratio, 4), "no_sinks_over_sinks": round(worse, 3)}
    return result, ratio <= 1.05 and worse >= 1.5


def constant(args: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    """Resident memory at 2 and at 20 cache lengths, one-token evictions."""
    n_ctx = 512
    with Engine.load(args.model, n_ctx=n_ctx) as engine, engine.stream() as stream:
        tokens = text_tokens(engine, 20 * n_ctx)
        for token in tokens[: 2 * n_ctx]:
            stream.feed((token,))
        start = resident_mib()
        for token in tokens[2 * n_ctx :]:
            stream.feed((token,))
        end = resident_mib()
        stats = stream.stats
    assert start is not None
    assert end is not None
    result = {"n_ctx": n_ctx, "n_past": stats.n_past, "n_slides": stats.n_slides, "n_rebases": stats.n_rebases}
    result |= {"rss_2_mib": round(start, 2), "rss_20_mib": round(end, 2), "growth_mib": round(end - start, 2)}
    return result, end - start <= 1.0


def endless(args: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    """10 million tokens through a tiny float32 model; counters exact, logits equal the reference's at the end."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    from reference import load_reference
    from tiny_models import write_tiny_llama

    n_ctx, n_keep, n_total = 64, 4, args.total
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        path = write_tiny_llama(Path(folder) / "tiny.gguf", head_dim=16)
        exact = {"cache_type_k": "f32", "cache_type_v": "f32", "flash_attn": "off", "n_threads": 1}
        with Engine.load(path, n_ctx=n_ctx, n_keep=n_keep, **exact) as engine, engine.stream() as stream:
            sinks = [int(t) for t in random.integers(10, 300, n_keep)]
            stream.feed(sinks)
            start = time.monotonic()
            while stream.stats.n_past < n_total:
                n = min(100_000, n_total - stream.stats.n_past)
                stream.feed([int(t) for t in random.integers(10, 300, n)])
                if stream.stats.n_past % 1_000_000 < 100_000:
                    print(f"{stream.stats.n_past:,} tokens", file=sys.stderr)
            seconds = time.monotonic() - start
            stats = stream.stats
            # one token at a time from here: enough of them that both windows hold the same history
            tail = [int(t) for t in random.integers(10, 300, 20 * n_ctx)]
            got = np.concatenate([stream.logits_of([token]) for token in tail])
            end = stream.stats
        want = load_reference(path).stream(n_ctx, n_keep).feed(sinks + tail, 1)
    difference = float(np.abs(got[-n_ctx:] - want[-n_ctx:]).max())
    counters = (
        stats.n_past == n_total
        and stats.n_cached == n_ctx
        and stats.n_evicted == n_total - n_ctx
        and end.n_past == n_total + len(tail)
        and end.n_slides == stats.n_slides + len(tail)
    )
    result = {
        "n_past": end.n_past,
        "n_slides": end.n_slides,
        "n_rebases": end.n_rebases,
        "tok_per_s": round(n_total / seconds),
        "counters_exact": counters,
        "outputs_finite": bool(np.isfinite(got).all()),
        "max_abs_logit_difference": difference,
    }
    return result, counters and result["outputs_finite"] and difference < 1e-3


def main() -> None:
    proofs: dict[str, Callable[[argparse.Namespace], tuple[dict[str, Any], bool]]] = {
        "drift": drift,
        "point": point,
        "constant": constant,
        "endless": endless,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("proof", choices=proofs)
    parser.add_argument("-m", "--model", default="demo")
    parser.add_argument("--tokens", type=int, default=20_000, help="drift: tokens")
    parser.add_argument("--samples", type=int, default=300, help="point: recomputed positions")
    parser.add_argument("--total", type=int, default=10_000_000, help="endless: tokens")
    args = parser.parse_args()
    result, ok = proofs[args.proof](args)
    print(json.dumps({"proof": args.proof, "holds": ok, **result}))
    sys.exit(0 if ok else 1)


if __name__ == "__main__":
    main()
