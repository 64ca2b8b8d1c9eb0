"""OpenAI's API: /v1/chat/completions, /v1/completions, /v1/models."""

from __future__ import annotations

import asyncio
import codecs
import secrets
import time
from collections.abc import Iterable, Sequence
from typing import Any

from fastapi import APIRouter, Request

from edge_stream.server.apis import openai_schemas as answers
from edge_stream.server.apis.facts import BUILD, likely, loop_info, model_facts, progress
from edge_stream.server.apis.llama import NativeForm
from edge_stream.server.apis.routes import Name, add_route, failing, streamed
from edge_stream.server.errors import NOT_FOUND, ApiError
from edge_stream.server.http import schemas
from edge_stream.server.http.answering import AnswerForm, Answering, Collected, sse, sum_usage
from edge_stream.server.scheduling.events import (
    Delta,
    Done,
    Finished,
    Progress,
    Reading,
    Scored,
    Started,
    TokenLogprobs,
)
from edge_stream.server.scheduling.tasks import GenerationRequest


class OpenAI:
    """The routes."""

    def __init__(self, router: APIRouter, answering: Answering) -> None:
        self.answering, self.engine = answering, answering.engine
        self.alias = answering.settings.alias
        for path, handler, model, aliases in (
            ("/v1/chat/completions", self.chat, answers.ChatResponse, None),
            ("/v1/completions", self.complete, answers.TextResponse, ()),  # /completions is llama-server's own
        ):
            options: dict[str, Any] = {"methods": ["POST"], "response_model": model, "responses": streamed()}
            add_route(router, path, handler, "OpenAI", aliases=aliases, **options)
        count: dict[str, Any] = {"methods": ["POST"], "response_model": answers.InputTokens}
        add_route(router, "/v1/chat/completions/input_tokens", self.input_tokens, "OpenAI", **count)
        add_route(router, "/v1/models", self.models, "OpenAI", response_model=answers.Models)
        missing: dict[str, Any] = {"response_model": answers.Model, "responses": failing(404, "No such model.")}
        add_route(router, "/v1/models/{model:path}", self.model, "OpenAI", **missing)

    async def chat(self, body: schemas.ChatRequest, request: Request, x_conversation: Name = None) -> Any:
        """Answer a chat. Send the whole history each time: only what is new is read."""
        generation = await asyncio.to_thread(self.answering.requests.from_chat, body, x_conversation)
        form = ChatForm(self, body, [""])
        if body.verbose or self.answering.settings.verbose:
            form.verbose = NativeForm(self.answering, [generation], [await self.answering.prompt_text(generation)])
        return await self.answering.answer(request, form, [generation], body.stream)

    async def complete(self, body: schemas.CompletionRequest, request: Request, x_conversation: Name = None) -> Any:
        """Continue a text of any length. With `echo` and `logprobs`, the prompt is scored too."""
        generations = await asyncio.to_thread(self.answering.requests.from_text, body, x_conversation)
        echo = [await self.answering.prompt_text(g) if body.echo else "" for g in generations]
        return await self.answering.answer(request, TextForm(self, body, echo, generations), generations, body.stream)

    async def input_tokens(self, body: schemas.ChatRequest) -> dict[str, Any]:
        """How many tokens a chat is."""
        return await self.answering.count_tokens(body)

    async def models(self) -> dict[str, Any]:
        """The loaded model."""
        return {"data": [model_facts(self.engine, self.answering.settings)]}

    async def model(self, model: str) -> dict[str, Any]:
        """The loaded model, by one of its names."""
        facts = model_facts(self.engine, self.answering.settings)
        if model not in facts["aliases"]:
            raise ApiError(404, f"there is no model {model[:100]!r}: this server runs {self.alias}", NOT_FOUND)
        return facts


class OpenAIForm(AnswerForm):
    """What chats and texts have in common. before: for each task, the text that its choices begin with."""

    prefix, object_whole, object_part = "", "", ""

    def __init__(self, api: OpenAI, body: schemas.Generation, before: Sequence[str]) -> None:
        super().__init__(body.n)
        self.engine = api.engine
        self.usage_chunk = bool(body.stream_options and body.stream_options.include_usage)
        self.before = [text for text in before for _ in range(body.n)]
        self._head = {
            "id": self.prefix + secrets.token_hex(12),
            "created": int(time.time()),
            "model": api.alias,
            "system_fingerprint": BUILD,
        }
        self._held: dict[int, Finished] = {}

    def token(self, logprobs: TokenLogprobs) -> dict[str, Any]:
        """A token with its probability and the likeliest ones."""
        assert logprobs.logprob is not None
        return likely(self.engine, logprobs.token, logprobs.logprob) | {
            "top_logprobs": [likely(self.engine, token, logprob) for token, logprob in logprobs.top]
        }

    def whole(self, choices: Sequence[Collected], done: Sequence[Done]) -> dict[str, Any]:
        """All choices; facts of the last task."""
        return {
            **self._head,
            "object": self.object_whole,
            "choices": [
                {
                    "index": i,
                    **self.choice(i, choice),
                    **(_end(choice.finished) if choice.finished else {"finish_reason": "length"}),
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
        everyone = range(first, first + self.n)
        finish = [self._part(first + held.index, {}) | _end(held)] if held else []
        if isinstance(event, Done):
            yield self._chunk(finish) | {"timings": event.timings, "edge_stream": event.info}
            return
        if finish:
            yield self._chunk(finish)
        if isinstance(event, Started):
            yield self._chunk([self._part(i, self.begin(i)) for i in everyone]) | {"edge_stream": event.info}
        elif isinstance(event, Reading):
            yield self._chunk([self._part(i, self.delta(i, None)) for i in everyone]) | progress(event)
        elif isinstance(event, Scored):
            yield self._chunk([self._part(i, self.scored(i, event.tokens)) for i in everyone])
        elif isinstance(event, Finished):
            self._held[k] = event
        elif event.text or event.reasoning or event.tool_calls or event.logprobs or event.info:
            i = first + event.index
            extras = {"edge_stream": event.info, "timings": event.timings}
            yield self._chunk([self._part(i, self.delta(i, event))]) | {k: v for k, v in extras.items() if v}

    def end(self, done: Sequence[Done]) -> Iterable[bytes]:
        """A chunk with usage if it is wanted, and the end."""
        if self.usage_chunk:
            yield sse({**self._chunk([]), "usage": sum_usage(done), "timings": done[-1].timings})
        yield sse("[DONE]")

    def _part(self, i: int, what: dict[str, Any]) -> dict[str, Any]:
        return {"index": i, **(what or self.delta(i, None)), "finish_reason": None}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "object": self.object_part, "choices": choices}

    def choice(self, i: int, choice: Collected) -> dict[str, Any]:
        """Choice i, whole: its text and logprobs."""
        raise NotImplementedError

    def begin(self, i: int) -> dict[str, Any]:
        """What choice i is in the first chunk."""
        raise NotImplementedError

    def scored(self, i: int, tokens: list[TokenLogprobs]) -> dict[str, Any]:
        """The scored prompt of choice i."""
        raise NotImplementedError

    def delta(self, i: int, event: Delta | None) -> dict[str, Any]:
        """What an event adds to choice i: its text and logprobs. None: nothing."""
        raise NotImplementedError


def _end(event: Finished) -> dict[str, Any]:
    """How a choice ended."""
    return {"finish_reason": event.reason} | ({"edge_stream": loop_info(event)} if event.loop else {})


class ChatForm(OpenAIForm):
    """chat.completion and chat.completion.chunk. verbose: llama-server's own form of the same answer, to be added."""

    prefix, object_whole, object_part = "chatcmpl-", "chat.completion", "chat.completion.chunk"
    verbose: NativeForm | None = None

    def whole(self, choices: Sequence[Collected], done: Sequence[Done]) -> dict[str, Any]:
        """All choices."""
        body = super().whole(choices, done)
        return body | {"__verbose": self.verbose.final(0, choices[0], done[0])} if self.verbose else body

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
        return {"delta": {"role": "assistant", "content": None}, "logprobs": None}

    def delta(self, i: int, event: Delta | None) -> dict[str, Any]:
        """Text, thinking, calls and logprobs of one token; only what there is of them."""
        delta: dict[str, Any] = {}
        if event and event.text:
            delta["content"] = event.text
        if event and event.reasoning:
            delta["reasoning_content"] = event.reasoning
        if event and event.tool_calls:
            delta["tool_calls"] = event.tool_calls
        logprobs = {"content": [self.token(event.logprobs)]} if event and event.logprobs else None
        return {"delta": delta, "logprobs": logprobs}


class TextForm(OpenAIForm):
    """text_completion."""

    prefix, object_whole, object_part = "cmpl-", "text_completion", "text_completion"

    def __init__(
        self,
        api: OpenAI,
        body: schemas.Generation,
        before: Sequence[str],
        generations: Sequence[GenerationRequest],
    ) -> None:
        super().__init__(api, body, before)
        self._scored = [g.score is not None for g in generations for _ in range(body.n)]
        # BOS, which the prompt did not have
        self._n_added = [
            int(self.engine.add_bos and not g.history.is_tokens) for g in generations for _ in range(body.n)
        ]
        self._columns = [
            _Columns(self.engine, 0 if s else len(t)) for s, t in zip(self._scored, self.before, strict=True)
        ]

    def choice(self, i: int, choice: Collected) -> dict[str, Any]:
        """The text and its logprobs."""
        prompt = self._columns[i].of(choice.scored[self._n_added[i] :], special=True)
        return {"text": self.before[i] + choice.text, "logprobs": self._columns[i].of(choice.logprobs, before=prompt)}

    def begin(self, i: int) -> dict[str, Any]:
        """The prompt, if it is echoed; a scored one comes with its scores."""
        return {"text": "" if self._scored[i] else self.before[i], "logprobs": None}

    def scored(self, i: int, tokens: list[TokenLogprobs]) -> dict[str, Any]:
        """The prompt."""
        return {"text": self.before[i], "logprobs": self._columns[i].of(tokens[self._n_added[i] :], special=True)}

    def delta(self, i: int, event: Delta | None) -> dict[str, Any]:
        """Text and logprobs: columns of one row."""
        rows = [event.logprobs] if event and event.logprobs else []
        return {"text": event.text if event else "", "logprobs": self._columns[i].of(rows)}


class _Columns:
    """OpenAI's logprobs of texts: lists by token. at: the characters of the text before the next token."""

    def __init__(self, engine: Any, at: int) -> None:
        self.engine, self.at = engine, at
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a character may be several tokens

    def of(
        self, rows: Sequence[TokenLogprobs], before: dict[str, Any] | None = None, special: bool = False
    ) -> dict[str, Any] | None:
        """The columns of the next tokens, behind those of `before`. special: control tokens are part of the text."""
        if not rows:
            return before
        columns: dict[str, list[Any]] = before or {
            name: [] for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        }
        for row in rows:
            columns["tokens"].append(self._text(row.token))
            columns["text_offset"].append(self.at)
            self.at += len(self._decoder.decode(self.engine.token_to_piece(row.token, special=special)))
            if row.logprob is None:  # nothing comes before it
                columns["token_logprobs"].append(None)
                columns["top_logprobs"].append(None)
                continue
            columns["token_logprobs"].append(max(row.logprob, -9999.0))
            top: dict[str, float] = {}
            for token, logprob in row.top:  # tokens that are parts of a character may have the same text
                top.setdefault(self._text(token), max(logprob, -9999.0))
            columns["top_logprobs"].append(top)
        return columns

    def _text(self, token: int) -> str:
        return str(self.engine.token_to_piece(token, special=True).decode("utf-8", errors="replace"))
