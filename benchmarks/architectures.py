"""Write docs/models.md: how edge-stream handles every architecture that llama.cpp knows.

    python benchmarks/architectures.py [-o FILE] [MODEL ...]

A tiny random model of each (tests/tiny_architectures.py) streams three cache lengths beyond a full cache and is
compared with an oracle that moves no window. Takes a few minutes on two cores.
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

from architecture_exactness import (  # noqa: E402
    EXACT,
    N_CTX,
    N_KEEP,
    N_TOKENS,
    NOISE_FACTOR,
    REBASE_AT,
    TOLERANCE,
    Result,
    run,
)
from architecture_metadata import names  # noqa: E402

INTRODUCTION = f"""# Architectures

Every text architecture that the pinned llama.cpp knows; written by `python benchmarks/architectures.py`, tested by
`tests/test_architectures.py`. A tiny random model of each, with the properties of real checkpoints, reads {N_TOKENS:,}
tokens one at a time through a cache of {N_CTX} with {N_KEEP} sinks (float32 cache, flash attention off, sink bank),
once without rebases, and once with a rebase whenever position {REBASE_AT} is reached. Its logits are compared with
those of an oracle that moves no window: llama.cpp driven step by step, with the sinks decoded again at every slide.

- result: *exact* means that in both runs no logit differs from the oracle's by more than {TOLERANCE:g}, or by more than
  {NOISE_FACTOR:g} times the model's own float noise where that is larger. *refused* gives edge-stream's error message
  for this model. *no fixture* gives llama.cpp's: it accepted none of the metadata tried, or could not decode.
- memory: cache (all tokens), sliding window (in some layers), state (recurrent layers).
- plain, rebased: the largest difference of a logit in each run. noise: the same between one token at a time and batches
  of 16, before any slide. effect: what leaving the sinks unmoved, or dropping them, changes; a state has no sinks.

Random weights say nothing about text quality. Architectures that llama.cpp adds appear here automatically.
"""


def number(value: float | None) -> str:
    return "" if value is None else "0" if value == 0 else f"{value:.1e}"


def row(result: Result) -> str:
    """One row of the table."""
    outcome = result.status if result.status == EXACT else f"{result.status}: {result.reason}".replace("|", "\\|")
    rebased = f"{number(result.rebased)} ({result.n_rebases})" if result.rebased is not None else ""
    measured = (number(result.plain), rebased, number(result.noise), number(result.effect))
    return f"| {' | '.join((result.name, result.arch, result.memory, outcome, *measured))} |"


def document(results: list[Result]) -> str:
    """The whole of docs/models.md."""
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
