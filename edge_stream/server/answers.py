"""Records of the engine become OpenAI's JSON: whole answers and chunks, for chats and for texts."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from edge_stream.server.generation import Delta, Done, Finished, Started, TokenLogprobs

if TYPE_CHECKING:
    from edge_stream.engine import Engine


class Answer:
    """What chats and texts have in common. `first_index` is that of the job's choice 0."""

    prefix, whole, part = "", "", ""

    def __init__(self, engine: Engine, model: str, n: int) -> None:
        self.engine = engine
        self.id = self.prefix + secrets.token_hex(12)
        self.created, self.model = int(time.time()), model
        self.logprobs: list[list[dict[str, Any]]] = [[] for _ in range(n)]
        self.texts = [""] * n
        self.calls: list[list[dict[str, Any]]] = [[] for _ in range(n)]
        self.reasons = ["length"] * n
        self.first_index = 0
        self._held: Finished | None = None

    def head(self, kind: str) -> dict[str, Any]:
        """The fields that all objects begin with."""
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def add(self, event: Delta | Finished) -> None:
        """Collect, for a whole answer."""
        i = self.first_index + event.index
        if isinstance(event, Finished):
            self.reasons[i] = event.reason
            return
        if event.logprobs:
            self.logprobs[i].append(self.token(event.logprobs))
        self.texts[i] += event.text
        self.calls[i] += event.tool_calls or []

    def token(self, logprobs: TokenLogprobs) -> dict[str, Any]:
        """A token with its probability and the likeliest ones."""
        return {
            **self._likely(logprobs.token, logprobs.logprob),
            "top_logprobs": [self._likely(token, logprob) for token, logprob in logprobs.top],
        }

    def _likely(self, token: int, logprob: float) -> dict[str, Any]:
        piece = self.engine.token_to_piece(token, special=True)
        return {
            "token": piece.decode("utf-8", errors="replace"),
            "logprob": max(logprob, -9999.0),  # JSON has no infinity
            "bytes": list(piece),
        }

    def chunks(self, event: Started | Delta | Finished | Done) -> Iterable[dict[str, Any]]:
        """The chunks of a record. The last choice's finish waits for Done, which says that the turn is saved."""
        held, self._held = self._held, None
        if isinstance(event, Done):
            last = self._chunk(self.first_index + held.index, self.delta(None), held.reason) if held else None
            if last is None:
                last = {**self.head(self.part), "choices": []}
            yield last | {"timings": event.timings, "edge_stream": event.info}
            return
        if held:
            yield self._chunk(self.first_index + held.index, self.delta(None), held.reason)
        if isinstance(event, Started):
            yield self.begin() | {"edge_stream": event.info}
        elif isinstance(event, Finished):
            self._held = event
        elif event.text or event.tool_calls or event.logprobs or event.info:
            chunk = self._chunk(self.first_index + event.index, self.delta(event), None, event.logprobs)
            yield chunk | ({"edge_stream": event.info} if event.info else {})

    def begin(self) -> dict[str, Any]:
        """The first chunk."""
        raise NotImplementedError

    def delta(self, event: Delta | None) -> dict[str, Any]:
        """What a choice of a chunk adds."""
        raise NotImplementedError

    def _chunk(
        self, index: int, delta: dict[str, Any], reason: str | None, logprobs: TokenLogprobs | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, **delta, "logprobs": self.part_logprobs(index, logprobs), "finish_reason": reason}
        return {**self.head(self.part), "choices": [choice]}

    def part_logprobs(self, index: int, logprobs: TokenLogprobs | None) -> dict[str, Any] | None:
        """Logprobs of one token."""
        raise NotImplementedError


class ChatAnswer(Answer):
    """chat.completion and chat.completion.chunk."""

    prefix, whole, part = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def choices(self) -> list[dict[str, Any]]:
        """Of the whole answer."""
        out = []
        for i, text in enumerate(self.texts):
            message: dict[str, Any] = {"role": "assistant", "content": text}
            if self.calls[i]:
                message |= {"content": text.strip() or None, "tool_calls": self.calls[i]}
            logprobs = {"content": self.logprobs[i]} if self.logprobs[i] else None
            out.append({"index": i, "message": message, "logprobs": logprobs, "finish_reason": self.reasons[i]})
        return out

    def begin(self) -> dict[str, Any]:
        """The role of every choice."""
        choices = [
            {"index": i, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
            for i in range(len(self.texts))
        ]
        return {**self.head(self.part), "choices": choices}

    def delta(self, event: Delta | None) -> dict[str, Any]:
        """Text and calls."""
        if event is None:
            return {"delta": {}}
        delta: dict[str, Any] = {"content": event.text} if event.text or not event.tool_calls else {}
        if event.tool_calls:
            i = self.first_index + event.index
            first = len(self.calls[i])
            self.calls[i] += event.tool_calls
            delta["tool_calls"] = [{"index": first + k, **call} for k, call in enumerate(event.tool_calls)]
        return {"delta": delta}

    def part_logprobs(self, _index: int, logprobs: TokenLogprobs | None) -> dict[str, Any] | None:
        """One item."""
        return {"content": [self.token(logprobs)]} if logprobs else None


class TextAnswer(Answer):
    """text_completion."""

    prefix, whole, part = "cmpl-", "text_completion", "text_completion"

    def choices(self) -> list[dict[str, Any]]:
        """Of the whole answer."""
        return [
            {"index": i, "text": text, "logprobs": self._columns(self.logprobs[i]), "finish_reason": self.reasons[i]}
            for i, text in enumerate(self.texts)
        ]

    def begin(self) -> dict[str, Any]:
        """A chunk without text."""
        return {
            **self.head(self.part),
            "choices": [{"index": self.first_index, "text": "", "logprobs": None, "finish_reason": None}],
        }

    def delta(self, event: Delta | None) -> dict[str, Any]:
        """Text."""
        return {"text": event.text if event else ""}

    def part_logprobs(self, _index: int, logprobs: TokenLogprobs | None) -> dict[str, Any] | None:
        """Columns of one row."""
        return self._columns([self.token(logprobs)]) if logprobs else None

    @staticmethod
    def _columns(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
        if not rows:
            return None
        offsets, offset = [], 0
        for row in rows:
            offsets.append(offset)
            offset += len(row["token"])
        return {
            "tokens": [row["token"] for row in rows],
            "token_logprobs": [row["logprob"] for row in rows],
            "top_logprobs": [{top["token"]: top["logprob"] for top in row["top_logprobs"]} for row in rows],
            "text_offset": offsets,
        }
