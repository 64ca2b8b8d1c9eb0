"""Native calls that call back into Python: nothing that is raised in a callback is lost."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Callbacks:
    """Guards Python functions for native code, and makes the calls that use them.

    ctypes drops what a callback raises. `guard` keeps it, tells native code to stop, and `run` raises it once native
    code has returned. Python delivers Ctrl-C at a callback's first instruction, before any `try` is entered; `run`
    therefore holds SIGINT back, and the guard delivers it inside its `try`.
    """

    def __init__(self) -> None:
        self._error: BaseException | None = None
        self._held: tuple[int, FrameType | None] | None = None
        self._handler: Any = None

    def guard(self, kind: Any, function: Callable[..., Any], failed: Any = 0) -> Any:
        """function as a ctypes callback of a kind. It returns `failed` from the first exception to the end of `run`."""

        def call(*arguments: Any) -> Any:
            try:
                self._deliver()
                if self._error is None:
                    return function(*arguments)
            except BaseException as error:
                self._error = error
            return failed

        return kind(call)

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What a native function returns. Raises what a callback raised meanwhile, KeyboardInterrupt included."""
        with self._hold_interrupt():
            result = function(*arguments)
        error, self._error = self._error, None
        if error is not None:
            raise error
        self._deliver()
        return result

    @contextmanager
    def _hold_interrupt(self) -> Iterator[None]:
        handler = signal.getsignal(signal.SIGINT)
        # signals are the main thread's; without a handler in Python there is nothing to hold back
        if threading.current_thread() is not threading.main_thread() or not callable(handler):
            yield
            return
        self._handler = handler
        signal.signal(signal.SIGINT, self._hold)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, handler)

    def _hold(self, number: int, frame: FrameType | None) -> None:
        self._held = number, frame

    def _deliver(self) -> None:
        held, self._held = self._held, None
        if held is not None:
            self._handler(*held)
