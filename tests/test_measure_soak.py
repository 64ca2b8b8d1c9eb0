"""A soak finds trends, resumes where it was, and refuses what does not belong together."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_stream.errors import EdgeStreamError
from edge_stream.measure import soak

Tiny = Callable[[str], Path]


@pytest.fixture
def plan(tiny: Tiny, tmp_path: Path) -> soak.Plan:
    return soak.Plan(
        model=str(tiny("gqa")),
        tokens=[int(t) for t in np.random.default_rng(1).integers(10, 256, 40)],
        n_ctx=32,
        n_keep=4,
        log=tmp_path / "log.jsonl",
        session=tmp_path / "log.session",
        settings={"n_threads": 1},
        interval=64,
        chunk=8,
        n_intervals=3,
    )


def soaked(plan: soak.Plan, stop: Callable[[], bool] = lambda: False) -> list[dict[str, Any]]:
    return soak.run(plan, lambda *_: None, lambda _: None, stop)


def more(plan: soak.Plan, **changes: Any) -> soak.Plan:
    return soak.Plan(**(plan.__dict__ | changes))


def test_intervals_are_logged_and_resumed(plan: soak.Plan) -> None:
    first = soaked(plan)
    assert [r["n_past"] for r in first] == [64, 128, 192]
    assert [json.loads(line) for line in plan.log.read_text().splitlines()] == first
    assert soaked(plan) == first  # nothing left to do
    longer = soaked(more(plan, n_intervals=5))
    assert longer[:3] == first
    assert [(r["n_past"], r["process"]) for r in longer[3:]] == [(256, 1), (320, 1)]
    # the same text in the same state: what a process of its own reads equals what the first would have read
    assert longer[4]["nll"] == pytest.approx(first[2]["nll"], rel=0.05)


def test_an_interval_that_was_stopped_is_read_again(plan: soak.Plan) -> None:
    left = iter([False] * 12 + [True] * 100)
    assert len(soaked(plan, lambda: next(left))) == 1
    assert [r["n_past"] for r in soaked(plan)] == [64, 128, 192]


def test_killed_between_session_and_log(plan: soak.Plan) -> None:
    records = soaked(plan)
    lines = plan.log.read_bytes().splitlines(keepends=True)
    plan.log.write_bytes(b"".join(lines[:2]) + lines[2][:20])
    assert soaked(plan) == records
    assert plan.log.read_bytes() == b"".join(lines)


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda plan: plan.log.write_text("hello\n"), "is not the log of a soak"),
        (lambda plan: plan.session.unlink(), "which is not there"),
        (lambda plan: plan.session.write_bytes(plan.session.read_bytes()[:-9]), "session"),
        (lambda plan: plan.log.write_bytes(b"".join(plan.log.read_bytes().splitlines(True)[:1])), "do not belong"),
        (lambda plan: plan.log.write_bytes(b"".join(plan.log.read_bytes().splitlines(True)[1:])), "lacks intervals"),
    ],
)
def test_what_does_not_fit_is_refused(plan: soak.Plan, spoil: Callable[[soak.Plan], Any], sentence: str) -> None:
    soaked(plan)
    spoil(plan)
    with pytest.raises(EdgeStreamError, match=sentence):
        soaked(more(plan, n_intervals=4))


def test_other_settings_are_refused(plan: soak.Plan) -> None:
    soaked(plan)
    with pytest.raises(EdgeStreamError, match="was made with chunk 8, not 4"):
        soaked(more(plan, chunk=4))


def made(rss: Callable[[int], float], ms: Callable[[int], float], processes: int = 1, n: int = 40) -> list[Any]:
    return [
        {
            "interval": i,
            "process": i * processes // n,
            "n_past": 1000 * (i + 1),
            "nll": 2.0,
            "p50_ms": ms(i),
            "max_ms": 3.0,
            "rss_mib": rss(i),
            "n_ctx": 500,
            "n_keep": 4,
            "interval_tokens": 1000,
            "chunk": 1,
        }
        for i in range(n)
    ]


NOISE = np.random.default_rng(0).normal(size=40)


def rising(records: list[Any]) -> list[str]:
    return [name for name, trend in soak.verdict(records)["trends"].items() if trend["rises"]]


def test_trends() -> None:
    assert rising(made(lambda _: 100.0, lambda i: 5 + 0.2 * NOISE[i])) == []
    assert rising(made(lambda i: 100 + 0.1 * i, lambda i: 5 + 0.2 * NOISE[i])) == ["rss_mib"]
    assert rising(made(lambda _: 100.0, lambda i: 5 + 0.02 * i + 0.1 * NOISE[i])) == ["p50_ms"]
    assert rising(made(lambda i: 100 + 0.01 * i, lambda _: 5.0)) == []  # certain, but less than 1 MiB
    assert rising(made(lambda _: 100.0, lambda i: 5 - 0.02 * i)) == []


def test_a_step_between_processes_is_no_trend_and_a_leak_in_each_is() -> None:
    assert rising(made(lambda i: 100.0 + 50 * (i * 4 // 40), lambda _: 5.0, processes=4)) == []
    assert rising(made(lambda i: 100.0 + 2 * (i % 10), lambda _: 5.0, processes=4)) == ["rss_mib"]


def test_kendall_is_that_of_the_textbook() -> None:
    values = np.arange(10.0)
    assert soak.kendall([values]) == pytest.approx(4.17e-5, rel=0.01)  # S = 45, variance 125, z = 44 / sqrt(125)
    assert soak.kendall([values[::-1]]) == 1.0
    assert soak.theil_sen([values * 3]) == 3.0
    assert soak.kendall([np.zeros(5)]) == 1.0
