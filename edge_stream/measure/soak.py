"""Streaming for hours: a record per interval, and a test for trends.

Every interval reads the same tokens, so that intervals can be compared. After each, the session is saved with its
record, which is then appended to the log: a soak that was killed resumes after the last complete interval.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_stream.engine import Engine
from edge_stream.errors import EdgeStreamError
from edge_stream.measure.corpus import repeat_to
from edge_stream.measure.metrics import resident_mib

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edge_stream.stream import Stream

P_VALUE = 0.01
# what must not rise; it may over the run by a share of its median, and by an amount of its unit
WATCHED = {"nll": (0.01, 0.0), "p50_ms": (0.05, 0.0), "rss_mib": (0.01, 1.0)}
_SAME = ("n_ctx", "n_keep", "interval_tokens", "chunk")  # must not change when a soak is resumed

Record = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What to stream. interval, chunk: tokens. n_intervals: in all, hours: of this process, 0: no limit."""

    model: str
    tokens: Sequence[int]
    n_ctx: int
    n_keep: int
    log: Path
    session: Path
    settings: dict[str, Any] = field(default_factory=dict)
    interval: int = 4096
    chunk: int = 1
    n_intervals: int = 0
    hours: float = 0.0


def run(
    plan: Plan, progress: Callable[[str, int, int], None], note: Callable[[str], None], stop: Callable[[], bool]
) -> list[Record]:
    """Stream to the plan's end or until stop() is true; all records, those of earlier processes included.

    An interval that stop() ends is not recorded. Raises EdgeStreamError if the log, the session and the plan do not
    belong together, or if the disk is full.
    """
    began = time.monotonic()
    records = read_log(plan.log)
    with Engine.load(plan.model, n_ctx=plan.n_ctx, n_keep=plan.n_keep, **plan.settings) as engine:
        stream = _open(engine, plan, records, note)
        process = records[-1]["process"] + 1 if records else 0
        text = repeat_to(list(plan.tokens), plan.interval)
        while not (plan.n_intervals and len(records) >= plan.n_intervals):
            if stop() or (plan.hours and time.monotonic() - began >= plan.hours * 3600):
                break
            measured = _interval(stream, text, plan.chunk, progress, stop, len(records))
            if measured is None:
                break
            stats = stream.stats
            record = {
                "interval": len(records),
                "process": process,
                "time": round(time.time(), 1),
                "n_past": stats.n_past,
                **measured,
                "rss_mib": resident_mib(),
                "slides": stats.n_slides,
                "rebases": stats.n_rebases,
                "n_ctx": plan.n_ctx,
                "n_keep": plan.n_keep,
                "interval_tokens": plan.interval,
                "chunk": plan.chunk,
            }
            line = json.dumps(record)
            stream.save(plan.session, line.encode())
            _append(plan.log, line)
            records.append(record)
    return records


def _interval(
    stream: Stream,
    text: Sequence[int],
    chunk: int,
    progress: Callable[[str, int, int], None],
    stop: Callable[[], bool],
    number: int,
) -> dict[str, float] | None:
    """Read the text once: mean NLL in nats, and milliseconds per token. None if stop() became true."""
    nll, times = [], []
    for start in range(0, len(text), chunk):
        if stop():
            return None
        piece = text[start : start + chunk]
        before = time.perf_counter_ns()
        nll.append(stream.score(piece, chunk=chunk))
        times.append((time.perf_counter_ns() - before) / 1e6 / len(piece))
        progress(f"interval {number}", start + len(piece), len(text))
    return {
        "nll": float(np.nanmean(np.concatenate(nll))),
        "p50_ms": float(np.median(times)),
        "p99_ms": float(np.quantile(times, 0.99)),
        "max_ms": max(times),
    }


def _open(engine: Engine, plan: Plan, records: list[Record], note: Callable[[str], None]) -> Stream:
    """The stream at the log's end. A record that only the session has (killed in between) is appended to the log."""
    if not plan.session.exists():
        if records:
            raise EdgeStreamError(f"{plan.log} continues from {plan.session}, which is not there: use another --log")
        return engine.stream()
    stream = engine.restore(plan.session)
    try:
        last = _record(stream.user)
    except (ValueError, UnicodeDecodeError):
        raise EdgeStreamError(f"{plan.session} is not the session of a soak: use another --session") from None
    for name, value in zip(_SAME, (plan.n_ctx, plan.n_keep, plan.interval, plan.chunk), strict=True):
        if last[name] != value:
            raise EdgeStreamError(f"{plan.session} was made with {name} {last[name]}, not {value}: use another --log")
    if last["interval"] == len(records):
        _append(plan.log, json.dumps(last))
        records.append(last)
    elif not records or last != records[-1]:
        raise EdgeStreamError(f"{plan.log} and {plan.session} do not belong together: use another --log")
    note(f"resumes at {stream.stats.n_past:,} tokens, interval {len(records)}")
    return stream


def read_log(path: Path) -> list[Record]:
    """The records of a log; [] if there is none. An incomplete last line is removed.

    Raises EdgeStreamError if it is not the log of a soak.
    """
    if not path.exists():
        return []
    try:
        with path.open("rb+") as file:
            data = file.read()
            whole = data[: data.rfind(b"\n") + 1]
            records = [_record(line) for line in whole.splitlines()]
            if len(whole) < len(data):
                file.truncate(len(whole))
    except OSError as error:
        raise EdgeStreamError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, UnicodeDecodeError):
        raise EdgeStreamError(f"{path} is not the log of a soak: use another --log") from None
    if [record["interval"] for record in records] != list(range(len(records))):
        raise EdgeStreamError(f"{path} lacks intervals: use another --log")
    return records


def _record(line: bytes) -> Record:
    """Parse a record. Raises ValueError if it is none."""
    record = json.loads(line)
    needed = ("interval", "process", "n_past", *_SAME, *WATCHED)
    if not isinstance(record, dict) or not all(isinstance(record.get(n), int | float) for n in needed):
        raise ValueError("not a record")
    return record


def _append(path: Path, line: str) -> None:
    try:
        with path.open("ab") as file:
            file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise EdgeStreamError(f"cannot write {path}: {error.strerror or error}") from None


def verdict(records: Sequence[Record]) -> dict[str, Any]:
    """Whether anything rises. Intervals before the cache was full, and the first of each process, do not count.

    trends: for each of WATCHED the median, `rise` (Theil-Sen slope times number of intervals), the one-sided p-value,
    and `rises`: p < P_VALUE and a rise beyond what WATCHED allows. With too few intervals p is 1.
    """
    counted = [
        (record, i)
        for i, record in enumerate(records)
        if record["n_past"] - record["interval_tokens"] >= record["n_ctx"]
        and (i > 0 and records[i - 1]["process"] == record["process"])
    ]
    groups: dict[int, list[Record]] = {}
    for record, _ in counted:
        groups.setdefault(record["process"], []).append(record)
    trends = {}
    for name, (share, amount) in WATCHED.items():
        values = [np.array([record[name] for record in group], dtype=np.float64) for group in groups.values()]
        middle = float(np.median(np.concatenate(values))) if values else 0.0
        rise = theil_sen(values) * len(counted)
        p = kendall(values)
        trends[name] = {
            "median": middle,
            "rise": rise,
            "p": p,
            "rises": bool(p < P_VALUE and rise > max(share * abs(middle), amount)),
        }
    return {
        "n_past": records[-1]["n_past"] if records else 0,
        "intervals": len(records),
        "intervals_counted": len(counted),
        "processes": len({record["process"] for record in records}),
        "max_ms": max((record["max_ms"] for record in records), default=None),
        "trends": trends,
    }


def kendall(groups: Sequence[NDArray[np.float64]]) -> float:
    """One-sided p-value of a rise within the groups: seasonal Kendall test (Hirsch, Slack, Smith 1982).

    Normal approximation, corrected for ties and continuity.
    """
    score, variance = 0.0, 0.0
    for values in groups:
        n = len(values)
        score += float(np.sign(values[None, :] - values[:, None])[np.triu_indices(n, 1)].sum())
        ties = np.unique(values, return_counts=True)[1].astype(np.float64)
        variance += (n * (n - 1) * (2 * n + 5) - float((ties * (ties - 1) * (2 * ties + 5)).sum())) / 18
    if variance <= 0 or score <= 0:
        return 1.0
    return 0.5 * math.erfc((score - 1) / math.sqrt(2 * variance))


def theil_sen(groups: Sequence[NDArray[np.float64]]) -> float:
    """The median slope per interval over all pairs within a group; 0 if there are none."""
    slopes = []
    for values in groups:
        i, j = np.triu_indices(len(values), 1)
        slopes.append((values[j] - values[i]) / (j - i))
    found = np.concatenate(slopes) if slopes else np.empty(0)
    return float(np.median(found)) if len(found) else 0.0
