"""Progress of a conversion, reported through a callback."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]  # task, bytes done, bytes in total


def silent(_task: str, _done: int, _total: int) -> None:
    """A Progress that does nothing."""


def counter(progress: Progress, task: str, total: int) -> Callable[[int], None]:
    """A function to call with the bytes of each step; it reports the running total."""
    done = 0

    def advance(n_bytes: int) -> None:
        nonlocal done
        done += n_bytes
        progress(task, done, total)

    return advance
