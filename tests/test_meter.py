"""The one progress meter, and what converters tell it."""

from __future__ import annotations

import pytest

from edge_stream.cli import meter as meters
from edge_stream.cli.meter import Meter


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that meters see, in seconds."""
    now = [0.0]
    monkeypatch.setattr(meters.time, "monotonic", lambda: now[0])
    return now


def test_a_line_a_minute_where_there_is_no_terminal(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with Meter() as meter:
        for second in range(0, 150, 10):
            clock[0] = second
            meter.show("tokens", 100 * second, 15000)
        meter.note("a note")
    assert capsys.readouterr().err.splitlines() == ["tokens 6,000 of 15,000", "tokens 12,000 of 15,000", "a note"]


def test_bytes_and_small_tasks(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with Meter(min_total=2**20, in_bytes=True) as meter:
        clock[0] = 60
        meter.show("small", 1, 2**20 - 1)
        meter.show("copying", 3 << 20, 2000 << 20)
    assert capsys.readouterr().err == "copying 3 MiB of 2,000 MiB\n"


def test_percentages_of_what_takes_long(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with Meter(delay=1, in_percent=True) as meter:
        clock[0] = 61
        meter.show("loading", 50, 100)
    assert capsys.readouterr().err == "loading 50 % of 100 %\n"


def test_a_bar_comes_after_its_delay(
    clock: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(meters.sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    with Meter(delay=1, in_percent=True) as meter:
        clock[0] = 0.9
        meter.show("loading", 10, 100)
        assert capsys.readouterr().err == ""
        clock[0] = 1.1
        meter.show("loading", 20, 100)
        meter.note("a note")
    shown = capsys.readouterr().err
    assert "loading" in shown and "20%" in shown


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(meters.sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    with Meter() as meter:
        meter.show("one", 1, 3)
        meter.note("a note")
        meter.show("two", 2, 3)
    shown = capsys.readouterr().err
    assert "one" in shown and "two" in shown and "a note\n" in shown


def test_converters_count_bytes() -> None:
    from edge_stream.converters.progress import counter

    seen: list[tuple[str, int, int]] = []
    advance = counter(lambda *report: seen.append(report), "converting", 10)
    advance(4)
    advance(6)
    assert seen == [("converting", 4, 10), ("converting", 10, 10)]
