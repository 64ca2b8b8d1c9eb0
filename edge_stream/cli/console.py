"""What the subcommands share: reading text, and Ctrl-C."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from edge_stream.cli.meter import Meter
from edge_stream.errors import EdgeStreamError

LONG_PROMPT = 2048  # tokens from which on reading is shown


def decode_text(data: bytes, name: str) -> str:
    """Decode strict UTF-8, without a byte order mark. Raises EdgeStreamError that names the first bad byte."""
    try:
        return data.decode("utf-8-sig" if data.startswith(b"\xef\xbb\xbf") else "utf-8")
    except UnicodeDecodeError as error:
        raise EdgeStreamError(
            f"{name} is not valid UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}"
        ) from None


def read_text(path: Path) -> str:
    """The text of a file; `-` is stdin. Raises EdgeStreamError."""
    if str(path) == "-":
        return decode_text(sys.stdin.buffer.read(), "stdin")
    try:
        return decode_text(path.read_bytes(), str(path))
    except OSError as error:
        raise EdgeStreamError(f"cannot read {path}: {error.strerror}") from None


def speeds(read: float, written: float) -> str:
    """Tokens per second of a prompt and of an answer, as llama-cli prints them."""
    return f"[ Prompt: {read:.1f} t/s | Generation: {written:.1f} t/s ]"


class Stopped(EdgeStreamError):
    """Ctrl-C while a text was read."""


class Interrupt:
    """Ctrl-C as a flag to look at between two steps. A second one within a second is a KeyboardInterrupt."""

    def __init__(self) -> None:
        self._pending = False
        self._last = -10.0

    def press(self) -> None:
        """Note a Ctrl-C."""
        now = time.monotonic()
        if now - self._last < 1.0:
            raise KeyboardInterrupt
        self._last = now
        self._pending = True

    def is_pending(self) -> bool:
        """Whether Ctrl-C was pressed since the watch began."""
        return self._pending

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Catch SIGINT inside the block."""
        self._pending = False

        def handle(_number: int, _frame: FrameType | None) -> None:
            self.press()

        try:
            before = signal.signal(signal.SIGINT, handle)
        except ValueError:  # not the main thread, which is the one that gets Ctrl-C
            yield
            return
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def reading(self, meter: Meter) -> Callable[[int, int], None]:
        """A callback for Stream.feed that moves the meter, and raises Stopped after a Ctrl-C."""

        def on_progress(done: int, total: int) -> None:
            meter.show("reading", done, total)
            if self._pending:
                raise Stopped("stopped by Ctrl-C")

        return on_progress
