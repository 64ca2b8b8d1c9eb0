"""An answer as blocks: thinking, texts and calls in the order in which they are written. Several APIs send it so."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from edge_stream.server.scheduling.events import Delta

if TYPE_CHECKING:
    from edge_stream.server.http.answering import Collected


@dataclass
class Block:
    """A part of an answer. number: its place among the parts. text: a call's is its arguments, as JSON.

    id: random, for APIs that name parts. call_id, name: a call's.
    """

    kind: Literal["thinking", "text", "call"]
    number: int
    text: str = ""
    call_id: str = ""
    name: str = ""
    id: str = field(default_factory=lambda: secrets.token_hex(12))

    @property
    def arguments(self) -> dict[str, Any] | None:
        """A call's arguments; None if they are no JSON object, as in an answer that was cut."""
        try:
            value = json.loads(self.text or "{}")
        except (ValueError, RecursionError):
            return None
        return value if isinstance(value, dict) else None


Step = tuple[Literal["open", "add", "close"], Block, str]


class Blocks:
    """Takes an answer's events in. Each gives steps: a block opens, a text is added to it, it closes."""

    def __init__(self) -> None:
        self.all: list[Block] = []
        self._open: tuple[str, int] | None = None  # kind, and the index of a call

    def push(self, event: Delta) -> Iterator[Step]:
        """What a token adds."""
        if event.reasoning:
            yield from self._add("thinking", event.reasoning)
        if event.text:
            yield from self._add("text", event.text)
        for call in event.tool_calls or ():
            function = call.get("function") or {}
            new = {"name": function.get("name") or "", "call_id": call.get("id") or "call_" + secrets.token_hex(12)}
            yield from self._add("call", function.get("arguments") or "", call["index"], **new)

    def end(self) -> Iterator[Step]:
        """Nothing comes after this."""
        if self._open is not None:
            self._open = None
            yield "close", self.all[-1], ""

    def _add(self, kind: Literal["thinking", "text", "call"], text: str, index: int = 0, **new: str) -> Iterator[Step]:
        if self._open != (kind, index):
            yield from self.end()
            self._open = kind, index
            self.all.append(Block(kind, len(self.all), **new))
            yield "open", self.all[-1], ""
        if text:
            self.all[-1].text += text
            yield "add", self.all[-1], text


def whole_blocks(answer: Collected) -> list[Block]:
    """The blocks of a whole answer: thinking, text, calls."""
    blocks = Blocks()
    calls = [{"index": i, **call} for i, call in enumerate(answer.tool_calls)]
    for _ in blocks.push(Delta(0, answer.text, 0, calls, reasoning=answer.reasoning)):
        pass
    return blocks.all
