"""Texts to read: the user's file or tokens, or English that every Python carries."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_stream.errors import EdgeStreamError

if TYPE_CHECKING:
    from edge_stream.engine import Engine


def help_topics() -> str:
    """The topics of Python's `help()`, in alphabetical order: some 700,000 characters of English and code."""
    from pydoc_data.topics import topics

    return "\n".join(str(topics[name]) for name in sorted(topics))


def read_tokens(engine: Engine, text: str | None, ids: str | None, most: int) -> list[int]:
    """Tokens of a text (BOS first where the model wants it) or of a .npy file of ids; the first `most`, if > 0.

    Raises EdgeStreamError if there are fewer than two, or if an id is not in the vocabulary.
    """
    if ids is not None:
        tokens = load_ids(Path(ids))
        bad = next((t for t in tokens if not 0 <= t < engine.n_vocab), None)
        if bad is not None:
            raise EdgeStreamError(f"{ids}: token {bad} is not in the vocabulary of {engine.n_vocab}")
    else:
        # a character is at most a few tokens: what is certainly not needed is not tokenized
        text = text or ""
        tokens = engine.tokenize(text[: most * 64] if most > 0 else text, add_bos=engine.add_bos)
    if most > 0:
        tokens = tokens[:most]
    if len(tokens) < 2:
        raise EdgeStreamError(f"{len(tokens)} token is too few to predict anything: give a longer text")
    return tokens


def load_ids(path: Path) -> list[int]:
    """A .npy file with a vector of integers. Raises EdgeStreamError for anything else."""
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
    """The tokens again and again until there are n."""
    return (tokens * -(-n // len(tokens)))[:n]
