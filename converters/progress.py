"""How far a conversion is, told to the caller by a callback."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]  # task, bytes done, bytes in all


def silent(_task: str, _done: int, _total: int) -> None:
    """A Progress for callers who do not ask."""


def counter(progress: Progress, task: str, total: int) -> Callable[[int], None]:
    """A function that is called with the bytes of each step and reports their sum."""
    done = 0

    def advance(n_bytes: int) -> None:
        nonlocal done
        done += n_bytes
        progress(task, done, total)

    return advance
