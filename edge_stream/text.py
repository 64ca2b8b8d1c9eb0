"""From token bytes to text for display: whole UTF-8 characters, and no part of a stop string."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Sequence
from typing import Any

_HALF = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json(text: str | bytes, **options: Any) -> Any:
    """JSON of a file that may hold anything. options: json.loads'.

    Raises ValueError if it is none, is nested too deeply, or has a text that UTF-8 cannot carry (half of a surrogate
    pair, which JSON can escape).
    """
    text = text.decode() if isinstance(text, bytes) else text
    try:
        value = json.loads(text, **options)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if _HALF.search(text):
        json.dumps(value, ensure_ascii=False).encode()
    return value


def sendable(text: str) -> str:
    """A text without lone surrogates, which JSON can escape but UTF-8 cannot carry."""
    return text.encode("utf-8", errors="replace").decode()


class Utf8Assembler:
    """Turns the bytes of tokens, which may split a character, into whole characters. Bad bytes become U+FFFD."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, data: bytes) -> str:
        """The characters that are now complete."""
        return self._decoder.decode(data)

    def flush(self) -> str:
        """What is left, at the end."""
        return self._decoder.decode(b"", final=True)


class StopMatcher:
    """Holds back text that may be the beginning of a stop string. found: the one that ended the text."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> tuple[str, bool]:
        """Returns (text to show, whether a stop string was found; if so the text ends before it)."""
        text = self._held + text
        hits = [(text.find(stop), stop) for stop in self._stops if stop in text]
        if hits:
            self._held = ""
            at, self.found = min(hits)
            return text[:at], True
        keep = max((self._overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """The text held back, at the end of the stream."""
        text, self._held = self._held, ""
        return text

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """Length of the longest suffix of text that is a proper prefix of stop."""
        for n in range(min(len(stop) - 1, len(text)), 0, -1):
            if text.endswith(stop[:n]):
                return n
        return 0
