"""A task's events as OpenAI's JSON: whole responses and chunks, for chats and for texts."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from edge_stream.server.scheduling.events import Delta, Done, Finished, Progress, Started, TokenLogprobs

if TYPE_CHECKING:
    from edge_stream.engine import Engine


class ResponseBuilder:
    """What chats and texts have in common. Choice i of task k has the index k * n + i.

    before: for each task, the text that its choices begin with.
    """

    prefix, whole, part = "", "", ""

    def __init__(self, engine: Engine, model: str, n: int, before: Sequence[str]) -> None:
        self.engine = engine
        self.id = self.prefix + secrets.token_hex(12)
        self.created, self.model = int(time.time()), model
        self.n = n
        self.texts = [text for text in before for _ in range(n)]
        self.logprobs: list[list[dict[str, Any]]] = [[] for _ in self.texts]
        self.calls: list[list[dict[str, Any]]] = [[] for _ in self.texts]
        self.ends: list[dict[str, Any]] = [{"finish_reason": "length"} for _ in self.texts]
        self._held: dict[int, Finished] = {}

    def head(self, kind: str) -> dict[str, Any]:
        """The fields that all objects start with."""
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def add(self, k: int, event: Delta | Finished) -> None:
        """Collect an event of task k, for a whole response."""
        i = k * self.n + event.index
        if isinstance(event, Finished):
            self.ends[i] = _end(event)
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

    def chunks(self, k: int, event: Progress) -> Iterable[dict[str, Any]]:
        """The chunks for an event of task k. Its last finish waits for Done, which says that the turn is saved."""
        first, held = k * self.n, self._held.pop(k, None)
        finish = [self._choice(first + held.index) | _end(held)] if held else []
        if isinstance(event, Done):
            yield self._chunk(finish) | {"timings": event.timings, "edge_stream": event.info}
            return
        if finish:
            yield self._chunk(finish)
        if isinstance(event, Started):
            choices = [self._choice(i) | self.begin(i) for i in range(first, first + self.n)]
            yield self._chunk(choices) | {"edge_stream": event.info}
        elif isinstance(event, Finished):
            self._held[k] = event
        elif event.text or event.tool_calls or event.logprobs or event.info:
            chunk = self._chunk([self._choice(first + event.index, event)])
            yield chunk | ({"edge_stream": event.info} if event.info else {})

    def choices(self) -> list[dict[str, Any]]:
        """All choices, complete."""
        raise NotImplementedError

    def begin(self, i: int) -> dict[str, Any]:
        """What choice i is in the first chunk."""
        raise NotImplementedError

    def delta(self, i: int, event: Delta | None) -> dict[str, Any]:
        """What an event adds to choice i: its text and logprobs."""
        raise NotImplementedError

    def _choice(self, i: int, event: Delta | None = None) -> dict[str, Any]:
        return {"index": i, "logprobs": None, **self.delta(i, event), "finish_reason": None}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self.head(self.part), "choices": choices}


def _end(event: Finished) -> dict[str, Any]:
    """How a choice ended."""
    end: dict[str, Any] = {"finish_reason": event.reason}
    if event.loop:
        end["edge_stream"] = {"loop": {"period": event.loop.period, "repetitions": event.loop.repetitions}}
    return end


class ChatResponseBuilder(ResponseBuilder):
    """chat.completion and chat.completion.chunk."""

    prefix, whole, part = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def choices(self) -> list[dict[str, Any]]:
        """All choices, complete."""
        out = []
        for i, text in enumerate(self.texts):
            message: dict[str, Any] = {"role": "assistant", "content": text}
            if self.calls[i]:
                message |= {"content": text if text.strip() else None, "tool_calls": self.calls[i]}
            logprobs = {"content": self.logprobs[i]} if self.logprobs[i] else None
            out.append({"index": i, "message": message, "logprobs": logprobs, **self.ends[i]})
        return out

    def begin(self, i: int) -> dict[str, Any]:
        """The role."""
        return {"delta": {"role": "assistant", "content": self.texts[i]}}

    def delta(self, i: int, event: Delta | None) -> dict[str, Any]:
        """Text, calls and logprobs of one token."""
        if event is None:
            return {"delta": {}}
        delta: dict[str, Any] = {"content": event.text} if event.text or not event.tool_calls else {}
        if event.tool_calls:
            first = len(self.calls[i])
            self.calls[i] += event.tool_calls
            delta["tool_calls"] = [{"index": first + j, **call} for j, call in enumerate(event.tool_calls)]
        return {"delta": delta, "logprobs": {"content": [self.token(event.logprobs)]} if event.logprobs else None}


class TextResponseBuilder(ResponseBuilder):
    """text_completion."""

    prefix, whole, part = "cmpl-", "text_completion", "text_completion"

    def __init__(self, engine: Engine, model: str, n: int, before: Sequence[str]) -> None:
        super().__init__(engine, model, n, before)
        self._offsets = [len(text) for text in self.texts]  # in characters, of each choice's next token

    def choices(self) -> list[dict[str, Any]]:
        """All choices, complete."""
        return [
            {"index": i, "text": text, "logprobs": self._columns(i, self.logprobs[i]), **self.ends[i]}
            for i, text in enumerate(self.texts)
        ]

    def begin(self, i: int) -> dict[str, Any]:
        """The prompt, if it is echoed."""
        return {"text": self.texts[i]}

    def delta(self, i: int, event: Delta | None) -> dict[str, Any]:
        """Text and logprobs: columns of one row."""
        rows = [self.token(event.logprobs)] if event and event.logprobs else []
        return {"text": event.text if event else "", "logprobs": self._columns(i, rows)}

    def _columns(self, i: int, rows: list[dict[str, Any]]) -> dict[str, Any] | None:
        """Logprobs of the next tokens of choice i."""
        if not rows:
            return None
        offsets = []
        for row in rows:
            offsets.append(self._offsets[i])
            self._offsets[i] += len(row["token"])
        return {
            "tokens": [row["token"] for row in rows],
            "token_logprobs": [row["logprob"] for row in rows],
            "top_logprobs": [{top["token"]: top["logprob"] for top in row["top_logprobs"]} for row in rows],
            "text_offset": offsets,
        }
