"""Texts to read: the user's text or tokens, or the English of Python's help."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_stream.errors import EdgeStreamError

if TYPE_CHECKING:
    from edge_stream.engine import Engine


def help_topics() -> str:
    """The topics of Python's `help()` in alphabetical order: some 700,000 characters of English and code."""
    from pydoc_data.topics import topics

    return "\n".join(str(topics[name]) for name in sorted(topics))


def read_tokens(engine: Engine, text: str | None, ids: str | None, n_max: int) -> list[int]:
    """Tokens of a text, with BOS where the model wants it, or of a .npy file of ids; the first n_max if > 0.

    Raises EdgeStreamError if there are fewer than two, or if an id is not in the vocabulary.
    """
    if ids is not None:
        tokens = load_ids(Path(ids))
        bad = next((t for t in tokens if not 0 <= t < engine.n_vocab), None)
        if bad is not None:
            raise EdgeStreamError(f"{ids}: token {bad} is not in the vocabulary of {engine.n_vocab}")
    else:
        # a token has at most some 64 characters: the rest of a long text need not be tokenized
        text = text or ""
        tokens = engine.tokenize(text[: n_max * 64] if n_max > 0 else text, add_bos=engine.add_bos)
    if n_max > 0:
        tokens = tokens[:n_max]
    if len(tokens) < 2:
        raise EdgeStreamError(f"too few tokens ({len(tokens)}) to predict anything: give a longer text")
    return tokens


def load_ids(path: Path) -> list[int]:
    """The integers of a .npy file. Raises EdgeStreamError unless it holds one vector of them."""
    import numpy as np

    try:
        array: Any = np.load(path, allow_pickle=False)
    except OSError as error:
        raise EdgeStreamError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, EOFError):
        raise EdgeStreamError(f"{path} is not a .npy file") from None
    if not isinstance(array, np.ndarray) or array.ndim != 1 or array.dtype.kind not in "iu":
        raise EdgeStreamError(f"{path} must hold one vector of integers (token ids)")
    return [int(t) for t in array]


def repeat_to(tokens: list[int], n: int) -> list[int]:
    """The tokens, repeated or cut to n."""
    return (tokens * -(-n // len(tokens)))[:n]
