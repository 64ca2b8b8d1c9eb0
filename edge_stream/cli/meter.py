"""Progress of long work on stderr: a bar on a terminal, elsewhere a line a minute."""

from __future__ import annotations

import sys
import time
from typing import Any

import click

_LINE_SECONDS = 60


class Meter:
    """One bar at a time, which is gone when the block ends; notes stay.

    min_total: smaller tasks are not shown. delay: nor is anything that lasts no longer, in seconds. in_bytes: amounts
    are bytes. in_percent: amounts are percentages.
    """

    def __init__(
        self, *, min_total: int = 0, delay: float = 0, in_bytes: bool = False, in_percent: bool = False
    ) -> None:
        self._min_total, self._delay, self._in_bytes, self._in_percent = min_total, delay, in_bytes, in_percent
        self._began = time.monotonic()
        self._progress: Any = None
        self._task: Any = None
        self._name = ""
        self._last_line = time.monotonic()

    def __enter__(self) -> Meter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Wipe the bar."""
        if self._progress is not None:
            self._progress.stop()
            self._progress, self._task, self._name = None, None, ""

    def show(self, task: str, done: int, total: int, now: str = "") -> None:
        """How far a task is. A new name begins a new bar. now: shown beside the name."""
        shown = f"{task} {now}".rstrip()
        if total < self._min_total or time.monotonic() - self._began < self._delay:
            return
        if not sys.stderr.isatty():
            if time.monotonic() - self._last_line >= _LINE_SECONDS:
                self._last_line = time.monotonic()
                click.echo(f"{shown} {self._amount(done)} of {self._amount(total)}", err=True)
            return
        if self._progress is None:
            self._progress = self._start()
        if task != self._name:
            if self._task is not None:
                self._progress.remove_task(self._task)
            self._task, self._name = self._progress.add_task(task, total=total), task
        self._progress.update(self._task, description=shown, completed=done, total=total)

    def note(self, text: str) -> None:
        """Print a sentence that stays."""
        if self._progress is None:
            click.echo(text, err=True)
        else:
            self._progress.console.print(text, highlight=False, markup=False)

    def _amount(self, n: int) -> str:
        return f"{n / 2**20:,.0f} MiB" if self._in_bytes else f"{n} %" if self._in_percent else f"{n:,}"

    def _start(self) -> Any:
        from rich import progress
        from rich.console import Console

        amounts: tuple[progress.ProgressColumn, ...] = (progress.MofNCompleteColumn(),)
        if self._in_percent:
            amounts = (progress.TaskProgressColumn(),)
        elif self._in_bytes:
            amounts = (progress.DownloadColumn(binary_units=True), progress.TransferSpeedColumn())
        bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            *amounts,
            progress.TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        bar.start()
        return bar
