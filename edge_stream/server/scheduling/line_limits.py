"""Limits that take effect at line ends, for editors that want a few lines of code: n_indent and t_max_predict_ms."""

from __future__ import annotations


class LineLimits:
    """Where an answer ends. n_indent: at the first character of a line, after the first, that is indented by fewer
    blanks. max_ms (0: none): after the first line end that comes later than this.
    """

    def __init__(self, n_indent: int, max_ms: int) -> None:
        self.n_indent, self.max_ms = n_indent, max_ms
        self._indent: int | None = None  # of the line so far; None: it has begun, or it is the first

    def push(self, text: str, ms: float) -> tuple[str, bool]:
        """(what there is of the text, whether the answer ends there). ms: since it began."""
        for i, character in enumerate(text):
            if self._indent is not None and character in " \t":
                self._indent += 1
                continue
            if self._indent is not None and self._indent < self.n_indent:
                return text[:i], True
            self._indent = 0 if character == "\n" else None
        return text, bool(self.max_ms and ms > self.max_ms and "\n" in text)
