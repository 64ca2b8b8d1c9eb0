"""Millions of tokens of real text through one stream: perplexity, memory and speed at the end as at the beginning.

    python benchmarks/endurance_tokens.py -m demo -n 4000000
    python benchmarks/endurance_tokens.py -m build/endurance/demo-mlc -n 4000000 --text more.txt

Every token is read and predicted. The text is Debian's bible-kjv (`bible -f -l0 gen1:1-rev22:21`, 1.2 million tokens
of the demo model) and the files given with --text; --repeat begins it again where it ends. Resumable: session and
figures are kept in build/endurance/tokens-NAME, and the next run goes on there. At the end, a stream begun a cache's
length before the last --tail tokens reads them as well.

Aims: perplexity of the tail within 1 % of that; resident memory +0.5 MiB at most from --from on; ms per token of the
last --timed tokens / of as many from --from on within 2 % (token by token; on a machine with other work this is noise).
A process that resumes has other memory than the one before: its own growth counts, and the largest is given.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np

from edge_stream import Engine
from edge_stream.measure.metrics import resident_mib

ROOT = Path(__file__).resolve().parents[1]
BIBLE = "bible -f -l0 gen1:1-rev22:21"


def read_text(files: list[str]) -> str:
    """The Bible, then the files."""
    try:
        parts = [subprocess.run(BIBLE.split(), check=True, capture_output=True, text=True).stdout]
    except FileNotFoundError:
        raise SystemExit("bible is not installed (Debian: apt-get install bible-kjv)") from None
    return "\n".join(parts + [Path(name).read_text(encoding="utf-8", errors="replace") for name in files])


def ppl(nll: np.ndarray) -> float:
    """Perplexity."""
    return math.exp(float(np.nanmean(nll)))


class Reading:
    """A stream that reads a text, and what is kept of it on disk."""

    def __init__(self, args: argparse.Namespace, tokens: list[int], engine: Engine, folder: Path) -> None:
        self.args, self.tokens, self.engine, self.folder = args, tokens, engine, folder
        self.state: dict[str, Any] = {"n": 0, "ms": {}, "growth_mib": 0.0, "runs": 0}
        if (folder / "state.json").exists():
            self.state = json.loads((folder / "state.json").read_text())
        self.nll = np.load(folder / "nll.npy") if self.state["n"] else np.empty(0)
        self.stream = engine.restore(folder / f"session-{self.state['n']}") if self.state["n"] else engine.stream()
        self.state["runs"] += 1
        self.rss: float | None = None

    def keep(self) -> None:
        """Session, losses and state, in this order: the state names the session."""
        self.stream.save(self.folder / f"session-{self.state['n']}")
        for name, write in (
            ("nll.npy", lambda f: np.save(f, self.nll)),
            ("state.json", lambda f: f.write(json.dumps(self.state).encode())),
        ):
            with (self.folder / f"{name}.tmp").open("wb") as file:
                write(file)
            (self.folder / f"{name}.tmp").rename(self.folder / name)
        for old in self.folder.glob("session-*"):
            if old.name != f"session-{self.state['n']}":
                old.unlink()

    def block(self, end: int) -> None:
        """Read up to `end`. Token by token where time is measured."""
        n, a = self.state["n"], self.args
        spans = {"first": (a.start, a.start + a.timed), "last": (a.n - a.timed, a.n)}
        timed = next((name for name, (x, y) in spans.items() if x <= n and end <= y), None)
        begun = time.monotonic()
        got = self.stream.score(self.tokens[n:end], chunk=1 if timed else None)
        if timed:
            self.state["ms"].setdefault(timed, []).append(1000 * (time.monotonic() - begun) / (end - n))
        self.nll = np.append(self.nll[:n], got)
        self.state["n"] = end
        if end >= a.start:
            now = resident_mib() or 0.0
            if self.rss is None:
                self.rss = now
            self.state["growth_mib"] = max(self.state["growth_mib"], round(now - self.rss, 2))

    def read(self) -> None:
        """All of it."""
        a = self.args
        stops = sorted({*range(0, a.n, a.block), a.start, a.start + a.timed, a.n - a.timed, a.n})
        stops += range(a.start, a.start + a.timed, 1000)
        stops += range(a.n - a.timed, a.n, 1000)
        kept = time.monotonic()
        for end in sorted(set(stops)):
            if end <= self.state["n"]:
                continue
            self.block(end)
            if time.monotonic() - kept > a.keep_seconds or end == a.n:
                self.keep()
                kept = time.monotonic()

    def result(self) -> dict[str, Any]:
        """Figures, and whether the aims hold."""
        a, s = self.args, self.state
        stats = self.stream.stats
        assert stats.n_past == a.n == len(self.nll), (stats.n_past, len(self.nll))
        self.stream.close()
        tail = self.nll[-a.tail :]
        fresh = self.engine.stream()
        first = self.tokens[a.n - a.tail - self.engine.n_ctx : a.n - a.tail]
        fresh.feed(first)
        again = fresh.score(self.tokens[a.n - a.tail : a.n])
        ms = {name: float(np.median(values)) for name, values in s["ms"].items()}
        out = {
            "tokens": a.n,
            "n_ctx": self.engine.n_ctx,
            "slides": stats.n_slides,
            "rebases": stats.n_rebases,
            "runs": s["runs"],
            "ppl": ppl(self.nll),
            "ppl_tail": ppl(tail),
            "ppl_tail_fresh": ppl(again),
            "growth_mib": s["growth_mib"],
            "ms_first": ms.get("first"),
            "ms_last": ms.get("last"),
        }
        out["ppl_ratio"] = out["ppl_tail"] / out["ppl_tail_fresh"]
        out["ms_ratio"] = ms["last"] / ms["first"] if len(ms) == 2 else None
        out["holds"] = {
            "ppl": abs(out["ppl_ratio"] - 1) <= 0.01,
            "memory": out["growth_mib"] <= 0.5,
            "speed": out["ms_ratio"] is not None and abs(out["ms_ratio"] - 1) <= 0.02,
        }
        return out


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", default="demo")
    parser.add_argument("-c", "--ctx-size", type=int, default=512)
    parser.add_argument("-n", type=int, default=4_000_000)
    parser.add_argument("--from", dest="start", type=int, default=100_000)
    parser.add_argument("--timed", type=int, default=10_000)
    parser.add_argument("--tail", type=int, default=100_000)
    parser.add_argument("--block", type=int, default=5_000)
    parser.add_argument("--keep-seconds", type=float, default=120)
    parser.add_argument("-t", "--threads", type=int)
    parser.add_argument("--text", action="append", default=[], metavar="FILE")
    parser.add_argument("--repeat", action="store_true")
    parser.add_argument("--state", type=Path, default=ROOT / "build" / "endurance")
    args = parser.parse_args()
    folder = args.state / f"tokens-{Path(args.model).stem}-{args.n}"
    folder.mkdir(parents=True, exist_ok=True)
    with Engine.load(args.model, n_ctx=args.ctx_size, n_threads=args.threads) as engine:
        tokens = engine.tokenize(read_text(args.text), add_bos=engine.add_bos)
        if len(tokens) < args.n:
            if not args.repeat:
                raise SystemExit(
                    f"the text has {len(tokens):,} tokens, {args.n:,} are wanted: give more --text, or --repeat"
                )
            tokens = (tokens * -(-args.n // len(tokens)))[: args.n]
        reading = Reading(args, tokens, engine, folder)
        reading.read()
        found = reading.result()
    (folder / "result.json").write_text(json.dumps(found))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
