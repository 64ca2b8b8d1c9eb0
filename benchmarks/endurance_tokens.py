"""Millions of tokens of real text through one stream: perplexity, memory and speed at the end as at the beginning.

    python benchmarks/endurance_tokens.py -m demo -n 4000000
    python benchmarks/endurance_tokens.py -m build/endurance/demo-mlc -n 4000000
    python benchmarks/endurance_tokens.py --table

Every token is read and predicted. The text is English of Debian packages, as much as is needed of: bible-kjv (`bible -f
-l0 gen1:1-rev22:21`), dict-jargon (Jargon File), dict-foldoc (dictionary of computing) and dict-gcide (Webster 1913 and
WordNet), without their markup: 12 million tokens of the demo model, in dict's order. --text reads other files instead.
Nothing is repeated. Resumable: session and figures are kept in build/endurance/tokens-NAME, and the next run goes on
there, also with a larger -n.

Aims: perplexity of the last --tail tokens within 1 % of a stream begun a cache's length before them; resident memory
+0.5 MiB at most from --from on; the aged stream as fast as a young one within 2 %: after the last token it goes on, in
turns with one that is restored as it was at --from, in --pairs of slices, token by token, each in an engine of its own,
which they exchange half-way; the median of the pairs' ratios counts, between its bounds of 95 % confidence (from order
statistics). Plain times of the first and last --timed tokens, hours apart, are given beside that.

Memory: model, tokens and losses are in memory as a whole from the start. Each process takes its baseline when it has
read --warm tokens, in chunks and token by token, and saved once; one that resumes has other memory than the one before:
its own growth counts, and the largest is given.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import multiprocessing
import os
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_stream import Engine
from edge_stream.measure.metrics import resident_mib
from edge_stream.measure.stamp import stamp

ROOT = Path(__file__).resolve().parents[1]
BIBLE = "bible -f -l0 gen1:1-rev22:21"
DICTIONARIES = ("jargon", "foldoc", "gcide")  # /usr/share/dictd/NAME.dict.dz of Debian's dict-NAME
SLICE = 500  # tokens between two looks at the clock
MARKUP = (  # of Debian's dictionaries: what to replace, with what
    (r"\\[^\\\n]*\\", ""),  # pronunciation
    (r"\s*\[[^]\n]*(?:Webster|WordNet|PJC|Century|Jargon File)[^]\n]*\]", ""),  # where it is from
    (r"\(\d{4}-\d\d-\d\d\)|<[^>\n]+> ?|[{}]", ""),  # dates, subjects, links
    (r"(?<=\S)\n +(?=\S)", " "),  # lines are broken at 70 columns
    (r"\n\s+", "\n"),
)


def texts(files: list[str]) -> Iterator[str]:
    """The texts, one by one."""
    if files:
        yield from (Path(name).read_text(encoding="utf-8", errors="replace") for name in files)
        return
    try:
        yield subprocess.run(BIBLE.split(), check=True, capture_output=True, text=True).stdout
    except FileNotFoundError:
        raise SystemExit("bible is not installed (Debian: apt-get install bible-kjv)") from None
    for name in DICTIONARIES:
        path = Path(f"/usr/share/dictd/{name}.dict.dz")
        if not path.exists():
            raise SystemExit(f"{path} is not there (Debian: apt-get install dict-{name})")
        text = gzip.decompress(path.read_bytes()).decode("utf-8", errors="replace")
        for pattern, instead in MARKUP:
            text = re.sub(pattern, instead, text)
        yield text


def load(args: argparse.Namespace) -> Engine:
    """The model. A GGUF file is read rather than mapped: else pages of rare tokens' embeddings would come by and by."""
    options = {} if Path(args.model).is_dir() else {"load_mode": "none"}
    return Engine.load(args.model, n_ctx=args.ctx_size, n_threads=args.threads, **options)


def write_tokens(args: argparse.Namespace, path: Path, n: int) -> None:
    """int32 of at least n tokens. In a process of its own: what it takes and frees is not the reader's memory."""
    found: list[int] = []
    with load(args) as engine:
        for text in texts(args.text):
            found += engine.tokenize(text, add_bos=engine.add_bos and not found)
            if len(found) >= n:
                break
    tokens = np.array(found, np.int32)
    if path.exists():
        before = np.load(path)
        if not np.array_equal(before, tokens[: len(before)]):
            raise SystemExit(f"the texts are others than those that {path.parent} was begun with")
    if len(tokens) < n:
        raise SystemExit(f"the texts have {len(tokens):,} tokens, {n:,} are wanted: give more with --text")
    replace(path, tokens)


def replace(path: Path, what: NDArray[Any] | dict[str, Any]) -> None:
    """Write an array or JSON in one step."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        if isinstance(what, dict):
            file.write(json.dumps(what).encode())
        else:
            np.save(file, what)
    temporary.rename(path)


def ppl(nll: NDArray[np.float32]) -> float:
    """Perplexity."""
    return math.exp(float(np.nanmean(nll, dtype=np.float64)))


class Reading:
    """A stream that reads tokens, and what is kept of it on disk."""

    def __init__(self, args: argparse.Namespace, tokens: NDArray[np.int32], engine: Engine, folder: Path) -> None:
        self.args, self.tokens, self.engine, self.folder = args, tokens, engine, folder
        self.state: dict[str, Any] = {"n": 0, "ms": {}, "growth_mib": 0.0, "runs": 0, "seconds": 0.0}
        self.state |= {"slides": 0, "rebases": 0}
        self.nll = np.full(args.n, np.nan, np.float32)
        if (folder / "state.json").exists():
            self.state |= json.loads((folder / "state.json").read_text())
            if self.state["n"] > args.n:
                raise SystemExit(f"{folder} has read {self.state['n']:,} tokens already: give a larger -n")
            if self.state["n"] >= args.start and not (folder / f"young-{args.start}").exists():
                raise SystemExit(f"{folder} has no stream of {args.start:,} tokens: give the --from it was begun with")
            self.nll[: self.state["n"]] = np.load(folder / "nll.npy")[: self.state["n"]]
        self.stream = engine.restore(folder / f"session-{self.state['n']}") if self.state["n"] else engine.stream()
        self.state["runs"] += 1
        self.rss: float | None = None
        self.warm = 0  # tokens read by this process
        self.chunked = False  # whether it has read in chunks too, which takes more memory

    def keep(self) -> None:
        """Session, losses and state, in this order: the state names the session."""
        n = self.state["n"]
        self.stream.save(self.folder / f"session-{n}")
        replace(self.folder / "nll.npy", self.nll[:n])
        replace(self.folder / "state.json", self.state)
        for old in self.folder.glob("session-*"):
            if old.name != f"session-{n}":
                old.unlink()

    def block(self, end: int, chunk: int | None) -> float:
        """Read up to `end`; ms per token."""
        n = self.state["n"]
        before = self.stream.stats
        begun = time.monotonic()
        self.nll[n:end] = self.stream.score(self.tokens[n:end].tolist(), chunk=chunk)
        took = time.monotonic() - begun
        after = self.stream.stats
        self.state["n"] = end
        self.state["slides"] += after.n_slides - before.n_slides
        self.state["rebases"] += after.n_rebases - before.n_rebases
        self.state["seconds"] += took
        self.warm += end - n
        self.chunked |= chunk is None
        return 1000 * took / (end - n)

    def watch(self) -> None:
        """Memory beyond this process's baseline, once it is warm."""
        if self.rss is None:
            self.keep()
            self.rss = resident_mib() or 0.0
        self.state["growth_mib"] = max(self.state["growth_mib"], round((resident_mib() or 0.0) - self.rss, 2))

    def read(self) -> None:
        """All of it: the first of this process, and what is timed, token by token."""
        a = self.args
        spans = {str(begin): (begin, begin + a.timed) for begin in (a.start, a.n - a.timed)}
        warm = self.state["n"] + SLICE
        edges = sorted({a.n, a.start, warm, *(edge for span in spans.values() for edge in span)})
        kept = time.monotonic()
        while (n := self.state["n"]) < a.n:
            name = next((name for name, (x, y) in spans.items() if x <= n < y), None)
            single = name is not None or n < warm
            end = min(n + (SLICE if single else a.block), next(edge for edge in edges if edge > n))
            ms = self.block(end, 1 if single else None)
            if name:
                self.state["ms"].setdefault(name, []).append(ms)
            if end == a.start:
                self.stream.save(self.folder / f"young-{a.start}")
            if end >= a.start and self.warm >= a.warm and self.chunked:
                self.watch()
            if end == a.n or time.monotonic() - kept > a.keep_seconds:
                self.keep()
                kept = time.monotonic()

    def turns(self) -> dict[str, Any]:
        """ms per token of the aged stream and the young one, slice by slice; the stream is closed."""
        a = self.args
        at = {"aged": a.n, "young": a.start}
        ms: dict[str, list[float]] = {"aged": [], "young": []}
        with load(a) as other:
            streams = {"aged": self.stream, "young": other.restore(self.folder / f"young-{a.start}")}
            for pair in range(a.pairs):
                if pair == a.pairs // 2:  # exchange the engines
                    for name, stream in streams.items():
                        stream.save(self.folder / f"turns-{name}")
                        stream.close()
                    streams = {
                        name: engine.restore(self.folder / f"turns-{name}")
                        for name, engine in (("young", self.engine), ("aged", other))
                    }
                for name in sorted(at, reverse=bool(pair % 2)):
                    begun = time.monotonic()
                    streams[name].score(self.tokens[at[name] : at[name] + SLICE].tolist(), chunk=1)
                    ms[name].append(1000 * (time.monotonic() - begun) / SLICE)
                    at[name] += SLICE
            for name, stream in streams.items():
                stream.close()
                (self.folder / f"turns-{name}").unlink(missing_ok=True)
        ratios = np.sort(np.array(ms["aged"]) / np.array(ms["young"]))
        rank = max(0, int(a.pairs / 2 - 0.98 * math.sqrt(a.pairs)))  # 1.96 standard deviations of a binomial one
        return {
            "ms_aged": float(np.median(ms["aged"])),
            "ms_young": float(np.median(ms["young"])),
            "age_ratio": float(np.median(ratios)),
            "age_ratio_bounds": [float(ratios[rank]), float(ratios[-1 - rank])],
            "pairs": a.pairs,
        }

    def result(self) -> dict[str, Any]:
        """Figures, and whether the aims hold."""
        a, s, stats = self.args, self.state, self.stream.stats
        assert stats.n_past == a.n and np.isnan(self.nll).sum() <= 1, (stats.n_past, np.isnan(self.nll).sum())
        turns = self.turns()
        with self.engine.stream() as fresh:
            before = self.tokens[a.n - a.tail - self.engine.n_ctx : a.n - a.tail].tolist()
            fresh.feed([self.engine.bos, *before] if self.engine.add_bos else before)
            again = fresh.score(self.tokens[a.n - a.tail : a.n].tolist())
        out = {
            "model": a.model if a.model == "demo" else Path(a.model).name,
            "engine": "MLC" if Path(a.model).is_dir() else "llama.cpp",
            "tokens": a.n,
            "n_ctx": self.engine.n_ctx,
            "slides": s["slides"],
            "rebases": s["rebases"],
            "runs": s["runs"],
            "hours": s["seconds"] / 3600,
            "ppl": ppl(self.nll),
            "tail": a.tail,
            "ppl_tail": ppl(self.nll[-a.tail :]),
            "ppl_tail_fresh": ppl(again.astype(np.float32)),
            "growth_mib": s["growth_mib"],
            "ms_first": float(np.median(s["ms"][str(a.start)])),
            "ms_last": float(np.median(s["ms"][str(a.n - a.timed)])),
            **turns,
            "stamp": stamp(),
        }
        out["ppl_ratio"] = out["ppl_tail"] / out["ppl_tail_fresh"]
        out["holds"] = {
            "ppl": abs(out["ppl_ratio"] - 1) <= 0.01,
            "memory": out["growth_mib"] <= 0.5,
            "speed": abs(out["age_ratio"] - 1) <= 0.02,
        }
        return out


def table(state: Path) -> str:
    """Markdown of the results kept, a row each: the longest reading of each model."""
    found = [json.loads(path.read_text()) for path in sorted(state.glob("tokens-*/result.json"))]
    if not found:
        raise SystemExit(f"no results in {state}: make endurance-tokens")
    lines = [
        "| model | tokens | hours | rebases | perplexity of the last | of a fresh stream | ratio | MiB more "
        "| aged / young (95 %), pairs | ms first / last |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in found:
        low, high = r["age_ratio_bounds"]
        lines.append(
            f"| {r['model']} ({r['engine']}) | {r['tokens']:,} | {r['hours']:.1f} | {r['rebases']:,} "
            f"| {r['ppl_tail']:.3f} ({r['tail']:,}) | {r['ppl_tail_fresh']:.3f} | {r['ppl_ratio']:.4f} "
            f"| {r['growth_mib']:+.2f} | {r['age_ratio']:.3f} ({low:.3f} to {high:.3f}), {r['pairs']} "
            f"| {r['ms_first']:.2f} / {r['ms_last']:.2f} |"
        )
    lines.append("")
    for r in found:
        missed = ", ".join(name for name, holds in r["holds"].items() if not holds)
        lines.append(
            f"- {r['model']}: {r['stamp']['test_time'][:10]}, {r['stamp']['cpu_info']}, {r['threads']} thread(s), "
            f"n_ctx {r['n_ctx']}, {r['runs']} process(es), edge-stream {r['stamp']['edge_stream_commit']}. "
            + (f"Missed: {missed}." if missed else "All aims hold.")
        )
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", default="demo")
    parser.add_argument("-c", "--ctx-size", type=int, default=512)
    parser.add_argument("-n", type=int, default=4_000_000)
    parser.add_argument("--from", dest="start", type=int, help="default: 100,000, or a quarter of -n if that is less")
    parser.add_argument(
        "--timed", type=int, help=f"a multiple of {2 * SLICE}; default: 10,000, or about a twelfth of -n"
    )
    parser.add_argument("--pairs", type=int, help=f"slices of {SLICE} tokens each; even; default: 5 times --timed")
    parser.add_argument("--tail", type=int, help="default: as --from")
    parser.add_argument("--block", type=int, default=5_000)
    parser.add_argument("--warm", type=int, default=10_000, help="default: 10,000, or --from if that is less")
    parser.add_argument("--keep-seconds", type=float, default=120)
    parser.add_argument("-t", "--threads", type=int)
    parser.add_argument("--text", action="append", default=[], metavar="FILE")
    parser.add_argument("--state", type=Path, default=ROOT / "build" / "endurance")
    parser.add_argument("--table", action="store_true", help="print the results kept, as Markdown")
    args = parser.parse_args()
    if args.table:
        print(table(args.state))
        return
    pair = 2 * SLICE
    args.start = min(100_000, args.n // 4) if args.start is None else args.start
    args.timed = max(pair, min(10_000, args.n // 12) // pair * pair) if args.timed is None else args.timed
    args.pairs = 5 * args.timed // SLICE if args.pairs is None else args.pairs
    args.tail = args.tail or args.start
    args.warm = min(args.warm, args.start)
    if args.timed < pair or args.timed % pair:
        parser.error(f"--timed must be a multiple of {pair}")
    if args.pairs < 2 or args.pairs % 2:
        parser.error("--pairs must be even, and 2 at least")
    least = max(args.start + 2 * args.timed, args.tail + args.ctx_size)
    if args.start < pair or args.n < least:
        parser.error(f"--from must be {pair:,} at least, and -n {least:,} with these --from, --timed and --tail")
    folder = args.state / f"tokens-{Path(args.model).stem}"
    folder.mkdir(parents=True, exist_ok=True)
    path, wanted = folder / "tokens.npy", args.n + args.pairs * SLICE
    if not path.exists() or len(np.load(path, mmap_mode="r")) < wanted:
        writer = multiprocessing.get_context("spawn").Process(target=write_tokens, args=(args, path, wanted))
        writer.start()
        writer.join()
        if writer.exitcode != 0:
            raise SystemExit(1)
    tokens = np.array(np.load(path, mmap_mode="r")[:wanted])
    with load(args) as engine:
        reading = Reading(args, tokens, engine, folder)
        reading.read()
        found = reading.result() | {"threads": args.threads or os.cpu_count()}
    replace(folder / "result.json", found)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
