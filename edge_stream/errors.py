"""Errors of edge_stream: `str(error)` is one clear sentence. The CLI turns them into exit codes."""

from __future__ import annotations

LONGEST = 1000  # characters of a message
_ERR_DECODE = -4  # native.bindings.DECODE


def without_middle(text: str, n: int) -> str:
    """A text of n characters at most: what is wrong with a long name stands behind it."""
    head = (n - 3) // 2
    return text if len(text) <= n else f"{text[:head]}...{text[len(text) - (n - 3 - head) :]}"


def one_line(text: str) -> str:
    """A text that may have parts of a hostile file, for a terminal: control characters escaped, LONGEST at most."""
    short = without_middle(text, LONGEST)  # first: a file may hold any number of characters
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in short)
    return without_middle(line, LONGEST)


def not_utf8(error: UnicodeEncodeError) -> str:
    """What is wrong with a text that has half of a surrogate pair: of JSON's escapes, or for a byte of an argument."""
    return f"{error.object[max(0, error.start - 20) : error.end + 20]!r} is no text that UTF-8 can carry"


class EdgeStreamError(Exception):
    """An error that the user can understand and act on. status: the C API's code, 0 if there is none."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(one_line(message))
        self.status = status


class UnsupportedModelError(EdgeStreamError):
    """The model cannot stream; the message names the missing property."""


class SessionError(EdgeStreamError):
    """A session file could not be read, written or restored; an existing file is unchanged."""


def no_numbers(what: str) -> EdgeStreamError:
    """A model computed NaN or infinity; es_sampler_sample says the same."""
    why = "its weights are damaged, or its values exceed the type that they are computed in"
    return EdgeStreamError(f"{what} computed no numbers (NaN or infinity): {why}", _ERR_DECODE)


def cannot_import(error: ImportError, what: str, extra: str) -> EdgeStreamError:
    """What needs a package that is missing, which `extra` has, or one that is there and does not load."""
    if isinstance(error, ModuleNotFoundError):
        return EdgeStreamError(f"{what} needs {error.name}: pip install 'edge-stream[{extra}]'")
    return EdgeStreamError(f"{what} needs a package that cannot be loaded: {error}")
