"""The lines of a chat: from prompt_toolkit on a terminal, else from stdin."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

from edge_stream.cli.console import decode_text

_QUOTES = '"""'


class Message(NamedTuple):
    """What the user typed. is_text: it is no command, whatever it begins with."""

    text: str
    is_text: bool


class Lines:
    """Reads messages. Raises EOFError when there are no more.

    simple: no line editing. multiline: a message goes on until a line that ends with a backslash (llama.cpp's -mli).
    """

    def __init__(self, *, simple: bool = False, multiline: bool = False) -> None:
        self.interactive = sys.stdin.isatty() and sys.stdout.isatty()
        self._multiline = multiline
        self._prompt: Any = None
        if self.interactive and not simple:
            from prompt_toolkit import PromptSession
            from prompt_toolkit.history import InMemoryHistory

            self._prompt = PromptSession(history=InMemoryHistory())

    def read_message(self) -> Message:
        """A message: a line, or several lines between triple quotes. `//` begins a text with a slash."""
        line = self._read_line("> ")
        if line.lstrip().startswith(_QUOTES):
            return Message(self._read_quoted(line.lstrip()[len(_QUOTES) :]), True)
        if line.startswith("//"):
            line, is_text = line[1:], True
        else:
            is_text = not line.startswith("/")
        if not self._multiline or not is_text:
            return Message(line, is_text)
        while not line.endswith("\\"):
            try:
                line += "\n" + self._read_line(". ")
            except EOFError:
                return Message(line, True)
        return Message(line[:-1], True)

    def _read_quoted(self, text: str) -> str:
        while _QUOTES not in text:
            try:
                text += "\n" + self._read_line(". ")
            except EOFError:
                break  # the input ended inside the quotes
        return text.partition(_QUOTES)[0].strip("\n")

    def _read_line(self, prompt: str) -> str:
        if self._prompt is not None:
            return str(self._prompt.prompt(prompt))
        if self.interactive:
            sys.stdout.write(prompt)
            sys.stdout.flush()
        data = sys.stdin.buffer.readline()
        if not data:
            raise EOFError
        return decode_text(data, "stdin").rstrip("\r\n")
