"""The lines of a chat: from prompt_toolkit on a terminal, else from stdin."""

from __future__ import annotations

import sys
from typing import Any

from edge_stream.cli.console import decode_text

_QUOTES = '"""'


class Lines:
    """Reads messages. Raises EOFError when there are no more."""

    def __init__(self) -> None:
        self.interactive = sys.stdin.isatty() and sys.stdout.isatty()
        self._prompt: Any = None
        if self.interactive:
            from prompt_toolkit import PromptSession
            from prompt_toolkit.history import InMemoryHistory

            self._prompt = PromptSession(history=InMemoryHistory())

    def read_message(self) -> str:
        """A message: a line, or several lines between triple quotes."""
        line = self._read_line("> ")
        if not line.lstrip().startswith(_QUOTES):
            return line
        text = line.lstrip()[len(_QUOTES) :]
        while _QUOTES not in text:
            try:
                text += "\n" + self._read_line(". ")
            except EOFError:
                break  # the input ended inside the quotes
        return text.partition(_QUOTES)[0].strip("\n")

    def _read_line(self, prompt: str) -> str:
        if self._prompt is not None:
            return str(self._prompt.prompt(prompt))
        data = sys.stdin.buffer.readline()
        if not data:
            raise EOFError
        return decode_text(data, "stdin").rstrip("\r\n")
