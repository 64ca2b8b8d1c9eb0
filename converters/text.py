"""Text of unknown origin inside error messages."""

from __future__ import annotations


def quoted(value: object, limit: int = 60) -> str:
    """repr of a value on one line, cut to a length."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
