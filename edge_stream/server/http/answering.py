"""From generation requests to an HTTP response. Knows no API: an AnswerForm writes what is sent."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import Request, Response
from sse_starlette import EventSourceResponse
from starlette.types import Receive, Scope, Send

from edge_stream.server.errors import ApiError
from edge_stream.server.http.channel import Channel, ClientDisconnected, cancel_on_disconnect
from edge_stream.server.http.guard import HISTORY_HEADER
from edge_stream.server.http.requests import RequestBuilder
from edge_stream.server.http.schemas import ChatRequest
from edge_stream.server.scheduling.events import Delta, Done, Finished, Progress, Scored, Started, TokenLogprobs
from edge_stream.server.scheduling.scheduler import Scheduler
from edge_stream.server.scheduling.tasks import GenerationRequest
from edge_stream.text import sendable

if TYPE_CHECKING:
    from edge_stream.server.settings import Settings

T = TypeVar("T")

_SEND_SECONDS = 60.0  # a client that takes nothing for so long is disconnected

# Some clients take these for line ends, as str.splitlines does.
_SEPARATORS = {code: f"\\u{code:04x}" for code in (0x85, 0x2028, 0x2029)}


@dataclass
class Collected:
    """One choice, whole. tool_calls: as OpenAI's messages have them. scored: its prompt's tokens.

    finished: None until it is complete.
    """

    scored: list[TokenLogprobs] = field(default_factory=list)
    text: str = ""
    reasoning: str = ""
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    finished: Finished | None = None

    def add(self, event: Delta | Finished) -> None:
        """Take the choice's next event in."""
        if isinstance(event, Finished):
            self.finished = event
            return
        self.text += event.text
        self.reasoning += event.reasoning
        if event.token is not None:
            self.tokens.append(event.token)
        if event.logprobs:
            self.logprobs.append(event.logprobs)
        for call in event.tool_calls or ():
            self._add_call(call)

    def _add_call(self, call: dict[str, Any]) -> None:
        if call["index"] == len(self.tool_calls):
            self.tool_calls.append({"id": "", "type": "function", "function": {"name": "", "arguments": ""}})
        whole, more = self.tool_calls[call["index"]], call.get("function", {})
        whole["id"] = call.get("id") or whole["id"]
        for name in ("name", "arguments"):
            whole["function"][name] += more.get(name) or ""


class AnswerForm:
    """How an API writes an answer of one or several tasks of n choices each. Choice i of task k is number k * n + i."""

    media_type = "text/event-stream"

    def __init__(self, n: int = 1) -> None:
        self.n = n

    def whole(self, choices: Sequence[Collected], done: Sequence[Done]) -> Any:
        """The body of an answer that is not streamed. done: of every task, in order."""
        raise NotImplementedError

    def chunks(self, k: int, event: Progress) -> Iterable[bytes]:
        """What is sent for an event of task k."""
        raise NotImplementedError

    def end(self, done: Sequence[Done]) -> Iterable[bytes]:
        """What is sent once every task is done. done: in the order in which they were."""
        return ()

    def failure(self, error: ApiError) -> bytes:
        """What is sent for an error after the stream began."""
        return sse(error.body)


class Answering:
    """Answers requests by a scheduler's tasks."""

    def __init__(self, scheduler: Scheduler, settings: Settings) -> None:
        self.scheduler, self.settings, self.engine = scheduler, settings, scheduler.engine
        self.requests = RequestBuilder(self.engine, settings, scheduler.renderer)

    async def call(self, work: Callable[[], T]) -> T:
        """Run something on the engine's thread."""
        return await asyncio.wrap_future(self.scheduler.call(work))

    async def chat(self, request: Request, form: AnswerForm, body: ChatRequest, name: str | None) -> Response:
        """Answer a chat. Raises ApiError."""
        generation = await asyncio.to_thread(self.requests.from_chat, body, name)
        return await self.answer(request, form, [generation], body.stream)

    async def prompt_tokens(self, generation: GenerationRequest) -> list[int]:
        """All tokens of a request's history, whatever the cache holds of it."""
        history = generation.history
        rendered = await asyncio.wrap_future(self.scheduler.render(lambda r: r.rebuilt(history, 2**31)))
        return [token for piece in rendered.pieces for token in piece.tokens] + rendered.answer_start

    async def count_tokens(self, body: ChatRequest) -> dict[str, int]:
        """How many tokens a chat is, rendered anew. Raises ApiError."""
        generation = await asyncio.to_thread(self.requests.from_chat, body, None)
        return {"input_tokens": len(await self.prompt_tokens(generation))}

    async def prompt_text(self, generation: GenerationRequest) -> str:
        """The text of a request's history, control tokens included."""
        history = generation.history
        if history.text is not None and not history.is_tokens:
            return history.text.decode("utf-8", errors="replace")
        pieces = [self.engine.token_to_piece(t, special=True) for t in await self.prompt_tokens(generation)]
        return b"".join(pieces).decode("utf-8", errors="replace")

    async def answer(
        self, request: Request, form: AnswerForm, generations: Sequence[GenerationRequest], stream: bool
    ) -> Response:
        """Generate; a client that hangs up ends it. Raises ApiError."""
        channel = Channel(self.scheduler, generations)
        try:
            channel.submit()
            if stream:
                return await self._stream(request, form, channel)
            return await cancel_on_disconnect(request, self._whole(form, channel))
        except ClientDisconnected:
            channel.cancel()
            return Response(status_code=499)
        except BaseException:
            channel.cancel()
            raise

    @staticmethod
    async def _whole(form: AnswerForm, channel: Channel) -> Response:
        choices = [Collected() for _ in channel.tasks for _ in range(form.n)]
        done: dict[int, Done] = {}
        while len(done) < len(channel.tasks):
            k, event = await channel.get()
            if isinstance(event, (Delta, Finished)):
                choices[k * form.n + event.index].add(event)
            elif isinstance(event, Scored):
                for choice in choices[k * form.n : (k + 1) * form.n]:
                    choice.scored = event.tokens
            elif isinstance(event, Done):
                done[k] = event
        in_order = [done[k] for k in range(len(done))]
        headers = {HISTORY_HEADER: in_order[-1].info["history"]}
        return Response(to_json(form.whole(choices, in_order)), headers=headers, media_type="application/json")

    async def _stream(self, request: Request, form: AnswerForm, channel: Channel) -> Response:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        # An early error becomes a response with its status; a later one has to be part of the stream.
        with suppress(asyncio.TimeoutError):
            first = await cancel_on_disconnect(request, asyncio.wait_for(channel.peek(), self.settings.ping_seconds))
            if isinstance(first, Started):
                headers[HISTORY_HEADER] = first.info["history"]

        async def events() -> AsyncIterator[bytes]:
            done: list[Done] = []
            try:
                while len(done) < len(channel.tasks):
                    k, event = await channel.get()
                    for chunk in form.chunks(k, event):
                        yield chunk
                    if isinstance(event, Done):
                        done.append(event)
                for chunk in form.end(done):
                    yield chunk
            except ApiError as error:
                yield form.failure(error)

        is_sse = form.media_type == AnswerForm.media_type  # only there a ping can be told from an answer
        return _EventStream(
            channel,
            events(),
            headers=headers,
            media_type=form.media_type,
            sep="\n",
            ping=self.settings.ping_seconds if is_sse else 0,
            send_timeout=_SEND_SECONDS,
        )


class _EventStream(EventSourceResponse):
    """A streamed response. However it ends, and even if it never starts, its tasks end with it."""

    def __init__(self, channel: Channel, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._channel = channel

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._channel.cancel()


def to_json(data: Any) -> str:
    """JSON on one line, for every way of counting lines."""
    return sendable(json.dumps(data, ensure_ascii=False, separators=(",", ":"))).translate(_SEPARATORS)


def sse(data: Any, event: str | None = None) -> bytes:
    """A server-sent event. data: a str is sent as it is, anything else as JSON."""
    text = data if isinstance(data, str) else to_json(data)
    return (f"event: {event}\n" if event else "").encode() + f"data: {text}\n\n".encode()


def sum_usage(done: Collection[Done]) -> dict[str, Any]:
    """Token counts of several tasks, as OpenAI has them."""
    names = ("prompt_tokens", "completion_tokens", "total_tokens")
    usage: dict[str, Any] = {name: sum(d.usage[name] for d in done) for name in names}
    cached = sum(d.usage["prompt_tokens_details"]["cached_tokens"] for d in done)
    return usage | {"prompt_tokens_details": {"cached_tokens": cached}}
