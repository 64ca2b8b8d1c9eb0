"""Progress of long measurements on stderr: bars on a terminal, elsewhere notes and a line a minute."""

from __future__ import annotations

import sys
import time
from typing import Any

import click

_QUIET_S = 60  # between two lines where there is no terminal


class Meter:
    """A bar per task, gone when the block ends. Notes stay."""

    def __init__(self) -> None:
        self._progress: Any = None
        self._task: Any = None
        self._name = ""
        self._said = time.monotonic()

    def __enter__(self) -> Meter:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def show(self, what: str, done: int, total: int) -> None:
        """How far a task is. A new name begins a new bar."""
        if self._progress is None:
            if time.monotonic() - self._said >= _QUIET_S:
                self._said = time.monotonic()
                click.echo(f"{what} {done:,} of {total:,}", err=True)
            return
        if what != self._name:
            if self._task is not None:
                self._progress.remove_task(self._task)
            self._task, self._name = self._progress.add_task(what, total=total), what
        self._progress.update(self._task, completed=done, total=total)

    def note(self, text: str) -> None:
        """A sentence that stays."""
        if self._progress is None:
            click.echo(text, err=True)
        else:
            self._progress.console.print(text, highlight=False, markup=False)
