"""Prompts of models that were trained to fill in the middle of a text, from what stands around it.

As llama-server makes them: `[REP] myproject, then for each file [SEP] name, text; [PRE] prefix [SUF] suffix [MID]`
(arXiv 2409.12186). Nothing is cut off: what does not fit the cache streams.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from edge_stream.server.errors import NOT_SUPPORTED, ApiError

if TYPE_CHECKING:
    from edge_stream.engine import Engine

_NO_FILE = "\n\n--- snippet ---\n\n"  # between files, for models without a token for it


def prompt(
    engine: Engine,
    prefix: str | list[int],
    suffix: str | list[int],
    extra: Sequence[tuple[str, str]] = (),
    begun: str = "",
) -> list[int]:
    """Tokens after which the model writes what stands between prefix and suffix.

    extra: (name, text) of other files. begun: the start of what is to be written. Raises ApiError 501 for models that
    lack the tokens.
    """
    vocabulary = engine.backend.vocabulary
    fim = vocabulary.fim_tokens
    missing = [name for name in ("prefix", "suffix", "middle") if name not in fim]
    if missing:
        raise ApiError(501, f"this model cannot fill in: it has no token for {', '.join(missing)}", NOT_SUPPORTED)

    def tokens(text: str | list[int]) -> list[int]:
        return engine.tokenize(text) if isinstance(text, str) else text

    out = [fim["repository"], *tokens("myproject\n")] if "repository" in fim else []
    for name, text in extra:
        out += [fim["file"], *tokens(f"{name}\n")] if "file" in fim else tokens(_NO_FILE)
        out += tokens(text)
    if "file" in fim:
        out += [fim["file"], *tokens("filename\n")]
    if engine.add_bos:
        out.append(engine.bos)
    out += [fim["prefix"], *tokens(prefix), *engine.tokenize(begun, special=True)]
    return [*out, fim["suffix"], *tokens(suffix), fim["middle"]]
