"""OpenAI's API: /v1/chat/completions, /v1/completions, /v1/models."""

from __future__ import annotations

import asyncio
import secrets
import time
from array import array
from collections.abc import Iterable, Sequence
from typing import Any

from fastapi import APIRouter, Request

from edge_stream.server.apis import openai_schemas as answers
from edge_stream.server.apis.routes import Name, add_route, streamed
from edge_stream.server.history.prefix_matching import History
from edge_stream.server.http import schemas
from edge_stream.server.http.answering import AnswerForm, Answering, Collected, sse, sum_usage
from edge_stream.server.scheduling.events import Delta, Done, Finished, Progress, Started, TokenLogprobs


class OpenAI:
    """The routes."""

    def __init__(self, router: APIRouter, answering: Answering) -> None:
        self.answering, self.engine = answering, answering.engine
        self.alias = answering.settings.alias
        self.created = int(self.engine.model_path.stat().st_mtime)
        for path, handler, model in (
            ("/v1/chat/completions", self.chat, answers.ChatResponse),
            ("/v1/completions", self.complete, answers.TextResponse),
        ):
            add_route(router, path, handler, "OpenAI", methods=["POST"], response_model=model, responses=streamed())
        add_route(router, "/v1/models", self.models, "OpenAI", response_model=answers.Models)

    async def chat(self, body: schemas.ChatRequest, request: Request, x_conversation: Name = None) -> Any:
        """Answer a chat. Send the whole history each time: only what is new is read."""
        generation = await asyncio.to_thread(self.answering.requests.from_chat, body, x_conversation)
        return await self.answering.answer(request, ChatForm(self, body, [""]), [generation], body.stream)

    async def complete(self, body: schemas.CompletionRequest, request: Request, x_conversation: Name = None) -> Any:
        """Continue a text of any length."""
        generations = await asyncio.to_thread(self.answering.requests.from_text, body, x_conversation)
        echo = [self._prompt_text(g.history) if body.echo else "" for g in generations]
        return await self.answering.answer(request, TextForm(self, body, echo), generations, body.stream)

    def _prompt_text(self, history: History) -> str:
        data = history.text or b""
        if history.variables.get("tokens"):
            data = self.engine.detokenize(array("i", data).tolist())
        return data.decode("utf-8", errors="replace")

    async def models(self) -> dict[str, Any]:
        """The loaded model."""
        engine = self.engine
        meta = {
            "n_vocab": engine.n_vocab,
            "n_ctx_train": engine.n_ctx_train,
            "n_ctx": engine.n_ctx,
            "desc": engine.desc,
        }
        return {"data": [{"id": self.alias, "created": self.created, "owned_by": "edge-stream", "meta": meta}]}


class OpenAIForm(AnswerForm):
    """What chats and texts have in common. before: for each task, the text that its choices begin with."""

    prefix, object_whole, object_part = "", "", ""

    def __init__(self, api: OpenAI, body: schemas.Generation, before: Sequence[str]) -> None:
        super().__init__(body.n)
        self.api, self.engine = api, api.engine
        self.id = self.prefix + secrets.token_hex(12)
        self.created = int(time.time())
        self.usage_chunk = bool(body.stream_options and body.stream_options.include_usage)
        self.before = [text for text in before for _ in range(body.n)]
        self._held: dict[int, Finished] = {}

    def head(self, kind: str) -> dict[str, Any]:
        """The fields that all objects start with."""
        return {"id": self.id, "object": kind, "created": self.created, "model": self.api.alias}

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

    def whole(self, choices: Sequence[Collected], done: Sequence[Done]) -> dict[str, Any]:
        """All choices; facts of the last task."""
        return {
            **self.head(self.object_whole),
            "choices": [
                {
                    "index": i,
                    **self.choice(i, choice),
                    "finish_reason": choice.finished.reason if choice.finished else "length",
                }
                for i, choice in enumerate(choices)
            ],
            "usage": sum_usage(done),
            "timings": done[-1].timings,
            "edge_stream": done[-1].info,
        }

    def chunks(self, k: int, event: Progress) -> Iterable[bytes]:
        """The chunks for an event of task k. Its last finish waits for Done, which says that the turn is saved."""
        return map(sse, self._chunks(k, event))

    def _chunks(self, k: int, event: Progress) -> Iterable[dict[str, Any]]:
        first, held = k * self.n, self._held.pop(k, None)
        finish = [self._part(first + held.index, None, held.reason)] if held else []
        if isinstance(event, Done):
            yield self._chunk(finish) | {"timings": event.timings, "edge_stream": event.info}
            return
        if finish:
            yield self._chunk(finish)
        if isinstance(event, Started):
            choices = [self._part(i) | self.begin(i) for i in range(first, first + self.n)]
            yield self._chunk(choices) | {"edge_stream": event.info}
        elif isinstance(event, Finished):
            self._held[k] = event
        elif event.text or event.reasoning or event.tool_calls or event.logprobs or event.info:
            chunk = self._chunk([self._part(first + event.index, event)])
            yield chunk | ({"edge_stream": event.info} if event.info else {})

    def end(self, done: Sequence[Done]) -> Iterable[bytes]:
        """A chunk with usage if it is wanted, and the end."""
        if self.usage_chunk:
            yield sse({**self._chunk([]), "usage": sum_usage(done)})
        yield sse("[DONE]")

    def _part(self, i: int, event: Delta | None = None, reason: str | None = None) -> dict[str, Any]:
        return {"index": i, "logprobs": None, **self.delta(i, event), "finish_reason": reason}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self.head(self.object_part), "choices": choices}

    def choice(self, i: int, choice: Collected) -> dict[str, Any]:
        """Choice i, whole: its text and logprobs."""
        raise NotImplementedError

    def begin(self, i: int) -> dict[str, Any]:
        """What choice i is in the first chunk."""
        raise NotImplementedError

    def delta(self, i: int, event: Delta | None) -> dict[str, Any]:
        """What an event adds to choice i: its text and logprobs."""
        raise NotImplementedError


class ChatForm(OpenAIForm):
    """chat.completion and chat.completion.chunk."""

    prefix, object_whole, object_part = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def choice(self, i: int, choice: Collected) -> dict[str, Any]:
        """The message and its logprobs."""
        message: dict[str, Any] = {"role": "assistant", "content": choice.text}
        if choice.reasoning:
            message["reasoning_content"] = choice.reasoning
        if choice.tool_calls:
            message |= {"content": choice.text if choice.text.strip() else None, "tool_calls": choice.tool_calls}
        logprobs = {"content": [self.token(one) for one in choice.logprobs]} if choice.logprobs else None
        return {"message": message, "logprobs": logprobs}

    def begin(self, i: int) -> dict[str, Any]:
        """The role."""
        return {"delta": {"role": "assistant", "content": self.before[i]}}

    def delta(self, i: int, event: Delta | None) -> dict[str, Any]:
        """Text, thinking, calls and logprobs of one token."""
        if event is None:
            return {"delta": {}}
        delta: dict[str, Any] = {}
        if event.reasoning:
            delta["reasoning_content"] = event.reasoning
        if event.tool_calls:
            delta["tool_calls"] = event.tool_calls
        if event.text or not delta:
            delta["content"] = event.text
        return {"delta": delta, "logprobs": {"content": [self.token(event.logprobs)]} if event.logprobs else None}


class TextForm(OpenAIForm):
    """text_completion."""

    prefix, object_whole, object_part = "cmpl-", "text_completion", "text_completion"

    def __init__(self, api: OpenAI, body: schemas.Generation, before: Sequence[str]) -> None:
        super().__init__(api, body, before)
        self._offsets = [len(text) for text in self.before]  # in characters, of each choice's next token

    def choice(self, i: int, choice: Collected) -> dict[str, Any]:
        """The text and its logprobs."""
        return {
            "text": self.before[i] + choice.text,
            "logprobs": self._columns(i, [self.token(one) for one in choice.logprobs]),
        }

    def begin(self, i: int) -> dict[str, Any]:
        """The prompt, if it is echoed."""
        return {"text": self.before[i]}

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
