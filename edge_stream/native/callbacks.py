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
        self._deferred: tuple[Any, int, FrameType | None] | None = None  # handler, and what it is to be called with

    def guard(self, kind: Any, function: Callable[..., Any], failed: Any = 0) -> Any:
        """function as a ctypes callback of type `kind`. After an exception it returns `failed` until `run` ends."""

        def call(*arguments: Any) -> Any:
            try:
                self.deliver()
                if self._error is None:
                    return function(*arguments)
            except BaseException as error:
                self._error = error
            return failed

        return kind(call)

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a native function. Raises what a callback raised meanwhile, including KeyboardInterrupt.

        An interrupt that no callback saw waits for `deliver`: call it once the result is in a safe place.
        """
        with self._defer_interrupt():
            try:
                result = function(*arguments)
            finally:
                error, self._error = self._error, None
        if error is not None:
            raise error
        return result

    def deliver(self) -> None:
        """Hand a deferred interrupt to its handler, which may raise KeyboardInterrupt."""
        deferred, self._deferred = self._deferred, None
        if deferred is not None:
            handler, *arguments = deferred
            handler(*arguments)

    @contextmanager
    def _defer_interrupt(self) -> Iterator[None]:
        handler = signal.getsignal(signal.SIGINT)
        # Python runs signal handlers in the main thread only; without one in Python there is nothing to defer
        if threading.current_thread() is not threading.main_thread() or not callable(handler):
            yield
            return

        def defer(number: int, frame: FrameType | None) -> None:
            self._deferred = handler, number, frame

        signal.signal(signal.SIGINT, defer)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, handler)
