"""Write docs/models.md: what edge-stream does with every architecture that llama.cpp knows.

    python benchmarks/architectures.py [-o FILE] [MODEL ...]

A tiny random model of each (tests/tiny_architectures.py) streams three cache lengths past the end of its cache, and is
compared with an oracle that moves no window. A few minutes on two cores.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from results import stamp_line

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from tiny_architectures import (  # noqa: E402
    EXACT,
    N_CTX,
    N_KEEP,
    N_TOKENS,
    NOISE_FACTOR,
    REBASE_AT,
    TOLERANCE,
    Result,
    names,
    run,
)

INTRODUCTION = f"""# Architectures

Every text architecture that the pinned llama.cpp knows, written by `python benchmarks/architectures.py` and tested by
`tests/test_architectures.py`. A tiny random model of each, with the properties that real checkpoints have, reads
{N_TOKENS:,} tokens one by one through a cache of {N_CTX} with {N_KEEP} sinks (float32 cache, flash attention off, the
sink bank), once plainly and once with a rebase whenever position {REBASE_AT} is reached. Its logits are compared with
those of an oracle that moves no window: llama.cpp driven by hand, the sinks decoded anew at every slide.

- exact: no logit of either run is further from the oracle's than {TOLERANCE:g}, or {NOISE_FACTOR:g} times the model's
  own float noise where that is more; refused: what edge-stream says when it is asked to load the model; no fixture:
  llama.cpp takes none of the metadata tried, or does not decode with it, and this is what it says.
- memory: cache (of all tokens), sliding window (in some layers), state (recurrent layers).
- plain, rebased: largest difference of a logit. noise: the same between one token at a time and batches of 16, before
  any slide. effect: what leaving the sinks where they were, or dropping them, changes; a state has no sinks to move.

Random weights say nothing about the quality of text. An architecture that llama.cpp adds appears here by itself.
"""


def number(value: float | None) -> str:
    return "" if value is None else "0" if value == 0 else f"{value:.1e}"


def row(result: Result) -> str:
    """A line of the table."""
    outcome = result.status if result.status == EXACT else f"{result.status}: {result.reason}".replace("|", "\\|")
    rebased = f"{number(result.rebased)} ({result.n_rebases})" if result.rebased is not None else ""
    measured = (number(result.plain), rebased, number(result.noise), number(result.effect))
    return f"| {' | '.join((result.name, result.arch, result.memory, outcome, *measured))} |"


def document(results: list[Result]) -> str:
    """All of docs/models.md."""
    counts = Counter(result.status for result in results)
    n_archs = len({result.arch for result in results})
    summary = f"{len(results)} models of {n_archs} architectures: " + ", ".join(
        f"{n} {status}" for status, n in counts.most_common()
    )
    table = [
        "| model | architecture | memory | result | plain | rebased (times) | noise | effect |",
        "|---|---|---|---|---|---|---|---|",
        *map(row, results),
    ]
    return "\n".join([INTRODUCTION, f"{stamp_line()}.", "", f"{summary}.", "", *table, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help="default: all")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "docs" / "models.md")
    parser.add_argument("-j", "--jobs", type=int, default=2)
    args = parser.parse_args()
    unknown = sorted(set(args.models) - set(names()))
    if unknown:
        parser.error(f"no model {', '.join(unknown)}: use any of {', '.join(names())}")
    results = []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:
        for result in pool.map(lambda name: run(name, Path(folder)), args.models or names()):
            print(f"{result.name}: {result.status} {result.reason}".rstrip(), file=sys.stderr, flush=True)
            results.append(result)
    args.output.write_text(document(results), encoding="utf-8")
    print(f"wrote {args.output}", file=sys.stderr)


if __name__ == "__main__":
    main()
