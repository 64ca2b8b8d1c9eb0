"""Untrusted text in error messages."""

from __future__ import annotations


def quoted(value: object, limit: int = 60) -> str:
    """repr of a value on one line, truncated to `limit` characters."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
