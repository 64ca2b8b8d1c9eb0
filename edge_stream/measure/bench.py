"""Speed, latency and memory of the modes, measured in turns within one run."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from edge_stream.errors import EdgeStreamError
from edge_stream.measure.modes import keep_of
from edge_stream.measure.table import rounded
from edge_stream.measure.worker import BLOCK, Worker, close_all
from edge_stream.metrics import percentile

PLACEABLE = ("stream", "window")  # modes in which a depth need not be read (Reader.place)

Note = Callable[[str], None]


@dataclass(frozen=True)
class Test:
    """One measurement, as llama-bench knows them. depth: tokens read before; None: as many as the cache holds."""

    n_prompt: int = 0
    n_gen: int = 0
    depth: int | None = 0

    def at(self, n_ctx: int) -> int:
        """The depth in tokens."""
        return n_ctx if self.depth is None else self.depth

    def held(self) -> bool:
        """Whether dense, at a full cache, decodes its last token again and again: equal fill, no room needed."""
        return self.depth is None and not self.n_prompt

    def dense_size(self, n_ctx: int) -> int:
        """Cells that dense needs, two for the warm-up included."""
        return n_ctx if self.held() else self.at(n_ctx) + self.n_prompt + max(2, self.n_gen)

    def name(self, n_ctx: int) -> str:
        """`pp512`, `tg128`, `pp512+tg128`, with ` @ d4096` where there is a depth."""
        parts = [f"pp{self.n_prompt}"] * bool(self.n_prompt) + [f"tg{self.n_gen}"] * bool(self.n_gen)
        depth = self.at(n_ctx)
        return "+".join(parts) + (f" @ d{depth}" if depth else "")


@dataclass(frozen=True)
class Setup:
    """What the modes of one group share."""

    model: str
    n_ctx: int
    n_keep: int
    settings: dict[str, Any]


@dataclass
class Runner:
    """Runs groups of modes. recompute_gen: tokens per repetition in mode recompute, where each costs a prompt.

    place: depths beyond the cache are not read in full. The cache is filled, slides, and then counts as that deep.
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

    def group(self, setup: Setup) -> list[dict[str, Any]]:
        """The rows of every test in every mode, processes of their own, taking turns."""
        rows: list[dict[str, Any]] = []
        workers = self._open(setup)
        try:
            for test in self.tests:
                lanes = [_Lane(w, self._test_of(w.mode, test), setup, self.place) for w in workers]
                lanes = [lane for lane in lanes if self._fits(lane)]
                self._run(lanes)
                done = [lane.row(self.stamp) for lane in lanes]
                rows += done
                self.ratios += ratios(done)
        finally:
            close_all(workers)
        return rows

    def _open(self, setup: Setup) -> list[Worker]:
        workers: list[Worker] = []
        try:
            for mode in self.modes:
                n_ctx = setup.n_ctx
                if mode == "dense":  # its cache has to hold everything
                    n_ctx = max([n_ctx, *(t.dense_size(n_ctx) for t in self.tests)])
                try:
                    workers.append(Worker(setup.model, mode, n_ctx, setup.n_keep, setup.settings))
                except EdgeStreamError as error:
                    if mode != "dense" or n_ctx == setup.n_ctx or not workers:
                        raise
                    self.note(f"mode dense is not measured with n_ctx {n_ctx}: {error}")
        except BaseException:
            close_all(workers)
            raise
        return workers

    def _test_of(self, mode: str, test: Test) -> Test:
        if mode != "recompute" or test.n_gen <= self.recompute_gen:
            return test
        return Test(test.n_prompt, self.recompute_gen, test.depth)

    def _fits(self, lane: _Lane) -> bool:
        end, trained = lane.depth + (0 if lane.hold else lane.n), lane.worker.facts["n_ctx_train"]
        if lane.worker.mode != "dense" or end <= trained:
            return True
        self.note(f"mode dense ends at the training length, {trained} tokens: {lane.name} is not measured")
        return False

    def _reading(self, lane: _Lane, done: int) -> None:
        self.progress(f"{lane.worker.mode} {lane.name}: reading", done, lane.depth)

    def _run(self, lanes: list[_Lane]) -> None:
        for lane in lanes:
            lane.prepare(partial(self._reading, lane))
        for repetition in range(self.repetitions):
            turn = lanes[repetition % len(lanes) :] + lanes[: repetition % len(lanes)] if lanes else []
            for lane in turn:
                lane.begin()
            left = list(turn)
            while left:
                left = [lane for lane in left if lane.block()]
            for lane in turn:
                lane.end()
            name = turn[0].name if turn else ""
            self.progress(f"n_ctx {lanes[0].setup.n_ctx} {name}" if lanes else "", repetition + 1, self.repetitions)


class _Lane:
    """One mode in one test."""

    def __init__(self, worker: Worker, test: Test, setup: Setup, place: bool) -> None:
        self.worker, self.test, self.setup = worker, test, setup
        self.depth = test.at(setup.n_ctx)
        self.placed = place and worker.mode in PLACEABLE and self.depth > worker.n_ctx
        self.name = test.name(setup.n_ctx)
        self.n = test.n_prompt + test.n_gen
        self.hold = worker.mode == "dense" and test.held()
        # what was added can be taken back as long as nothing was evicted (shift leaves a cell unused)
        self.undo = not self.hold and self.depth + self.n + (worker.mode == "shift") <= worker.n_ctx
        self.samples: list[int] = []  # ns per repetition
        self.tokens: list[int] = []  # ns per generated token
        self.fills: list[float] = []
        self._left = 0
        self._sum = 0

    def prepare(self, progress: Callable[[int], None]) -> None:
        """Reach the depth and warm up."""
        call = self.worker.call
        call("reset")
        target = self.worker.n_ctx if self.placed else self.depth - self.hold
        warm = 0 if self.worker.mode == "recompute" else 2
        self.worker.read(target, progress)
        if self.placed:
            call("place", self.depth)
        if self.hold:
            call("generate", 2, True)
        elif warm:
            # at a full cache the first slide builds another graph: two tokens beyond the depth are not counted
            call("generate", warm)
            if self.depth + warm + (self.worker.mode == "shift") <= self.worker.n_ctx:
                self._back(warm)
        if self.test.n_prompt and self.undo:
            call("prompt", self.test.n_prompt)
            self._back(self.test.n_prompt)
        self.rss_start = call("rss")

    def _back(self, n: int) -> None:
        """To the depth again. Sinks cannot be taken back one by one."""
        if self.depth >= self.setup.n_keep:
            self.worker.call("forget", n)
        else:
            self.worker.call("reset")
            if self.depth:
                self.worker.call("fill", self.depth)

    def begin(self) -> None:
        """A repetition: the prompt."""
        self._sum = self.worker.call("prompt", self.test.n_prompt) if self.test.n_prompt else 0
        self._left = self.test.n_gen

    def block(self) -> bool:
        """Some tokens; whether more are to come."""
        n = min(BLOCK, self._left)
        if n:
            times, fill = self.worker.call("generate", n, self.hold)
            self.tokens += times
            self.fills += [fill] * n
            self._sum += sum(times)
            self._left -= n
        return self._left > 0

    def end(self) -> None:
        """The repetition is over."""
        self.samples.append(self._sum)
        if self.undo:
            self._back(self.n)

    def row(self, stamp: dict[str, Any]) -> dict[str, Any]:
        """Names as in llama-bench's JSON, then ours."""
        worker, facts, settings = self.worker, self.worker.facts, self.setup.settings
        ms = [t / 1e6 for t in self.tokens]
        speeds = [self.n * 1e9 / s for s in self.samples]
        reached = "read in chunks" if self.depth else "empty"
        if self.placed:
            reached = f"{worker.n_ctx} read, then counted as {self.depth}"
        return {
            **stamp,
            **{k: facts[k] for k in ("model_filename", "model_type", "model_size", "model_n_params")},
            "n_batch": settings["n_batch"],
            "n_ubatch": settings["n_ubatch"],
            "n_threads": facts["n_threads"],
            "type_k": settings["cache_type_k"],
            "type_v": settings["cache_type_v"],
            "n_gpu_layers": settings["n_gpu_layers"],
            "flash_attn": settings["flash_attn"],
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
            "mode": worker.mode,
            "n_ctx": worker.n_ctx,
            "n_keep": keep_of(worker.mode, self.setup.n_keep),
            "cache_type_k": settings["cache_type_k"],
            "cache_type_v": settings["cache_type_v"],
            **{f"p{q}_ms": rounded(percentile(ms, q)) if ms else None for q in (25, 50, 75, 99)},
            "mean_ms": rounded(statistics.fmean(ms)) if ms else None,
            "max_ms": rounded(max(ms)) if ms else None,
            "avg_fill": rounded(statistics.fmean(self.fills), 1) if self.fills else None,
            "depth_by": "read in chunks, held there" if self.hold else reached,
            "load_ms": rounded(facts["load_ms"], 1),
            "rss_start_mib": rounded(self.rss_start, 2),
            "rss_end_mib": rounded(worker.call("rss"), 2),
            "counters": worker.call("counters"),
        }


def _spread(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def table_rows(rows: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    """What llama-bench prints, with our columns: rows and their column names. Settings are shown where they differ."""
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
        same.append("depth_by")  # read, as anybody would expect
    return shown, [name for name in (shown[0] if shown else {}) if name not in same]


def ratios(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The median time per generated token of every mode beside stream's, with quartiles. rows: those of one test.

    Empty unless stream was measured beside another mode.
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
