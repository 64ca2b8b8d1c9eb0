"""Native calls that call back into Python, without losing exceptions raised in callbacks."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Callbacks:
    """Wraps Python functions as native callbacks, and makes the native calls that use them.

    ctypes drops exceptions raised in a callback. `guard` keeps the exception and tells native code to stop; `run`
    raises it once native code has returned. Python delivers Ctrl-C at a callback's first instruction, before any `try`
    is entered; `run` therefore defers SIGINT, and the guard delivers it inside its `try`.
    """

    def __init__(self) -> None:
        self._error: BaseException | None = None
        self._deferred: tuple[int, FrameType | None] | None = None
        self._handler: Any = None

    def guard(self, kind: Any, function: Callable[..., Any], failed: Any = 0) -> Any:
        """function as a ctypes callback of type `kind`. After an exception it returns `failed` until `run` ends."""

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
        """Call a native function. Raises what a callback raised meanwhile, including KeyboardInterrupt."""
        with self._defer_interrupt():
            result = function(*arguments)
        error, self._error = self._error, None
        if error is not None:
            raise error
        self._deliver()
        return result

    @contextmanager
    def _defer_interrupt(self) -> Iterator[None]:
        handler = signal.getsignal(signal.SIGINT)
        # Python runs signal handlers in the main thread only; without one in Python there is nothing to defer
        if threading.current_thread() is not threading.main_thread() or not callable(handler):
            yield
            return
        self._handler = handler
        signal.signal(signal.SIGINT, self._defer)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, handler)

    def _defer(self, number: int, frame: FrameType | None) -> None:
        self._deferred = number, frame

    def _deliver(self) -> None:
        deferred, self._deferred = self._deferred, None
        if deferred is not None:
            self._handler(*deferred)
