"""Speed, latency and memory of the modes, which take turns within one run."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from edge_stream.errors import EdgeStreamError
from edge_stream.measure.metrics import percentile
from edge_stream.measure.modes import keep_of
from edge_stream.measure.reader_process import BLOCK, ReaderProcess, close_all
from edge_stream.measure.table import rounded

PLACEABLE = ("stream", "window")  # modes that have Reader.place

Note = Callable[[str], None]


@dataclass(frozen=True)
class Test:
    """A test as in llama-bench. n_prompt, n_gen: tokens read, generated. depth: tokens before; None: a full cache."""

    n_prompt: int = 0
    n_gen: int = 0
    depth: int | None = 0

    def depth_in(self, n_ctx: int) -> int:
        """The depth in tokens, in a cache of n_ctx."""
        return n_ctx if self.depth is None else self.depth

    @property
    def repeats_last(self) -> bool:
        """Whether mode dense decodes its last token over and over: so its cache stays full and needs no more room."""
        return self.depth is None and not self.n_prompt

    def dense_size(self, n_ctx: int) -> int:
        """Cells that mode dense needs, two for the warm-up included."""
        return n_ctx if self.repeats_last else self.depth_in(n_ctx) + self.n_prompt + max(2, self.n_gen)

    def name(self, n_ctx: int) -> str:
        """`pp512`, `tg128` or `pp512+tg128`, with ` @ d4096` for a depth."""
        parts = [f"pp{self.n_prompt}"] * bool(self.n_prompt) + [f"tg{self.n_gen}"] * bool(self.n_gen)
        depth = self.depth_in(n_ctx)
        return "+".join(parts) + (f" @ d{depth}" if depth else "")


@dataclass(frozen=True)
class Setup:
    """A model and its cache. settings: the other arguments of Engine.load."""

    model: str
    n_ctx: int
    n_keep: int
    settings: dict[str, Any]


@dataclass
class Runner:
    """Runs all tests in all modes. recompute_gen: tokens per repetition in mode recompute, where each costs a prompt.

    place: depths beyond the cache are not read in full; a full cache that has slid counts as that deep. ratios: of the
    tests so far, see the function `ratios`.
    """

    modes: Sequence[str]
    tests: Sequence[Test]
    repetitions: int = 5
    recompute_gen: int = 4
    place: bool = False
    note: Note = print
    progress: Callable[[str, int, int], None] = lambda _what, _done, _total: None
    stamp: dict[str, Any] = field(default_factory=dict)
    ratios: list[dict[str, Any]] = field(default_factory=list)

    def measure(self, setup: Setup) -> Iterator[list[dict[str, Any]]]:
        """For each test a row for each mode. Each mode has a process of its own; they take turns."""
        processes = self._open(setup)
        try:
            for test in self.tests:
                trials = [_Trial(p, self._shortened(test, p.mode), setup, self.place) for p in processes]
                trials = [trial for trial in trials if self._fits(trial)]
                self._run(trials)
                done = [trial.row(self.stamp) for trial in trials]
                self.ratios += ratios(done)
                yield done
        finally:
            close_all(processes)

    def _open(self, setup: Setup) -> list[ReaderProcess]:
        """A process per mode; dense is left out, with a note, if a cache for everything cannot be had."""
        processes: list[ReaderProcess] = []
        try:
            for mode in self.modes:
                n_ctx = setup.n_ctx
                if mode == "dense":
                    n_ctx = max([n_ctx, *(t.dense_size(n_ctx) for t in self.tests)])
                try:
                    processes.append(ReaderProcess(setup.model, mode, n_ctx, setup.n_keep, setup.settings))
                except EdgeStreamError as error:
                    if mode != "dense" or n_ctx == setup.n_ctx or not processes:
                        raise
                    self.note(f"mode dense is not measured with n_ctx {n_ctx}: {error}")
        except BaseException:
            close_all(processes)
            raise
        return processes

    def _shortened(self, test: Test, mode: str) -> Test:
        if mode != "recompute" or test.n_gen <= self.recompute_gen:
            return test
        return Test(test.n_prompt, self.recompute_gen, test.depth)

    def _fits(self, trial: _Trial) -> bool:
        end, trained = trial.depth + (0 if trial.repeat else trial.n), trial.process.facts["n_ctx_train"]
        if trial.process.mode != "dense" or end <= trained:
            return True
        self.note(f"mode dense ends at the training length, {trained} tokens: {trial.name} is not measured")
        return False

    def _show_reading(self, trial: _Trial, done: int) -> None:
        self.progress(f"{trial.process.mode} {trial.name}: reading", done, trial.depth)

    def _run(self, trials: list[_Trial]) -> None:
        if not trials:
            return
        for trial in trials:
            trial.prepare(partial(self._show_reading, trial))
        for repetition in range(self.repetitions):
            first = repetition % len(trials)
            turn = trials[first:] + trials[:first]
            for trial in turn:
                trial.begin()
            going = list(turn)
            while going:
                going = [trial for trial in going if trial.block()]
            for trial in turn:
                trial.end()
            self.progress(f"n_ctx {turn[0].setup.n_ctx} {turn[0].name}", repetition + 1, self.repetitions)


class _Trial:
    """One mode in one test."""

    def __init__(self, process: ReaderProcess, test: Test, setup: Setup, place: bool) -> None:
        self.process, self.test, self.setup = process, test, setup
        self.depth = test.depth_in(setup.n_ctx)
        self.placed = place and process.mode in PLACEABLE and self.depth > process.n_ctx
        self.name = test.name(setup.n_ctx)
        self.n = test.n_prompt + test.n_gen
        self.repeat = process.mode == "dense" and test.repeats_last
        # tokens can be taken back as long as nothing was evicted; shift leaves a cell unused
        self.undo = not self.repeat and self.depth + self.n + (process.mode == "shift") <= process.n_ctx
        self.samples: list[int] = []  # ns per repetition
        self.tokens: list[int] = []  # ns per generated token
        self.fills: list[float] = []
        self._to_generate = 0
        self._sum = 0

    def prepare(self, progress: Callable[[int], None]) -> None:
        """Reach the depth and warm up."""
        call = self.process.call
        call("reset")
        target = self.process.n_ctx if self.placed else self.depth - self.repeat
        warm = 0 if self.process.mode == "recompute" else 2
        self.process.read(target, progress)
        if self.placed:
            call("place", self.depth)
        if self.repeat:
            call("generate", 2, True)
        elif warm:
            # two tokens that are not counted: the first slide of a full cache builds another graph
            call("generate", warm)
            if self.depth + warm + (self.process.mode == "shift") <= self.process.n_ctx:
                self._back(warm)
        if self.test.n_prompt and self.undo:
            call("prompt", self.test.n_prompt)
            self._back(self.test.n_prompt)
        self.rss_start = call("rss")

    def _back(self, n: int) -> None:
        """Take n tokens back. Sinks cannot be taken back one by one: then begin again."""
        if self.depth >= self.setup.n_keep:
            self.process.call("forget", n)
        else:
            self.process.call("reset")
            if self.depth:
                self.process.call("fill", self.depth)

    def begin(self) -> None:
        """Begin a repetition: read the prompt."""
        self._sum = self.process.call("prompt", self.test.n_prompt) if self.test.n_prompt else 0
        self._to_generate = self.test.n_gen

    def block(self) -> bool:
        """Generate up to BLOCK tokens; False once there are enough."""
        n = min(BLOCK, self._to_generate)
        if n:
            times, fill = self.process.call("generate", n, self.repeat)
            self.tokens += times
            self.fills += [fill] * n
            self._sum += sum(times)
            self._to_generate -= n
        return self._to_generate > 0

    def end(self) -> None:
        """End a repetition."""
        self.samples.append(self._sum)
        if self.undo:
            self._back(self.n)

    def row(self, stamp: dict[str, Any]) -> dict[str, Any]:
        """The results: llama-bench's names, then ours."""
        process, facts, settings = self.process, self.process.facts, self.setup.settings
        ms = [t / 1e6 for t in self.tokens]
        speeds = [self.n * 1e9 / s for s in self.samples]
        reached = "read in chunks" if self.depth else "empty"
        if self.placed:
            reached = f"{process.n_ctx} read, then counted as {self.depth}"
        return {
            **stamp,
            **{k: facts[k] for k in ("model_filename", "model_type", "model_size", "model_n_params")},
            **{k: settings[k] for k in ("n_batch", "n_ubatch")},
            "n_threads": facts["n_threads"],
            "type_k": settings["cache_type_k"],
            "type_v": settings["cache_type_v"],
            **{k: settings[k] for k in ("n_gpu_layers", "flash_attn")},
            "n_prompt": self.test.n_prompt,
            "n_gen": self.test.n_gen,
            "n_depth": self.depth,
            "test": self.name,
            "avg_ns": round(statistics.fmean(self.samples)),
            "stddev_ns": round(_spread(self.samples)),
            "avg_ts": rounded(statistics.fmean(speeds)),
            "stddev_ts": rounded(_spread(speeds)),
            "samples_ns": self.samples,
            "samples_ts": [rounded(s) for s in speeds],
            "mode": process.mode,
            "n_ctx": process.n_ctx,
            "n_keep": keep_of(process.mode, self.setup.n_keep),
            **{k: settings[k] for k in ("cache_type_k", "cache_type_v")},
            **{f"p{q}_ms": rounded(percentile(ms, q)) if ms else None for q in (25, 50, 75, 99)},
            "mean_ms": rounded(statistics.fmean(ms)) if ms else None,
            "max_ms": rounded(max(ms)) if ms else None,
            "avg_fill": rounded(statistics.fmean(self.fills), 1) if self.fills else None,
            "depth_by": "read in chunks, held there" if self.repeat else reached,
            "load_ms": rounded(facts["load_ms"], 1),
            "rss_start_mib": rounded(self.rss_start, 2),
            "rss_end_mib": rounded(process.call("rss"), 2),
            "counters": process.call("counters"),
        }


def _spread(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def table_rows(rows: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    """The table: llama-bench's columns and ours, and their names. Settings have a column where they differ."""
    shown = [
        {
            "model": row["model_type"],
            "size": f"{row['model_size'] / 2**20:.2f} MiB",
            "params": f"{row['model_n_params'] / 1e6:.2f} M",
            "backend": row["backends"],
            "threads": row["n_threads"],
            **{name: row[name] for name in ("n_batch", "n_ubatch", "type_v", "flash_attn", "n_gpu_layers")},
            **{name: row[name] for name in ("mode", "n_ctx", "n_keep", "cache_type_k", "test")},
            "t/s": f"{row['avg_ts']:.2f} ± {row['stddev_ts']:.2f}",
            **{name: row[name] for name in ("p50_ms", "p99_ms", "max_ms", "avg_fill")},
            **{name: row[name] for name in ("rss_start_mib", "rss_end_mib", "depth_by")},
        }
        for row in rows
    ]
    settings = ("n_batch", "n_ubatch", "type_v", "flash_attn", "n_gpu_layers")
    same = [name for name in settings if len({row[name] for row in shown}) <= 1]
    if not any("counted as" in row["depth_by"] for row in rows):
        same.append("depth_by")  # all depths were read
    return shown, [name for name in (shown[0] if shown else {}) if name not in same]


def ratios(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Median times per generated token of the other modes and of stream, with quartiles. rows: those of one test.

    Empty unless stream and another mode were measured.
    """
    timed = [row for row in rows if row["p50_ms"] is not None]
    base = next((row for row in timed if row["mode"] == "stream"), None)
    if base is None:
        return []
    return [
        {
            "n_ctx": base["n_ctx"],
            "cache_type_k": base["cache_type_k"],
            "test": row["test"],
            "mode": row["mode"],
            "ms": row["p50_ms"],
            "quartiles": f"{row['p25_ms']:.2f}..{row['p75_ms']:.2f}",
            "stream ms": base["p50_ms"],
            "stream quartiles": f"{base['p25_ms']:.2f}..{base['p75_ms']:.2f}",
            "mode/stream": rounded(row["p50_ms"] / base["p50_ms"]),
            "stream/mode": rounded(base["p50_ms"] / row["p50_ms"]),
        }
        for row in timed
        if row["mode"] != "stream"
    ]
