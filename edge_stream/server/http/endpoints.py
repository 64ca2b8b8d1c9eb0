"""The endpoints: OpenAI's, and llama-server's for slots, tokens and templates."""

from __future__ import annotations

import asyncio
import json
from array import array
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import JSONResponse
from sse_starlette import EventSourceResponse
from starlette.types import Receive, Scope, Send

from edge_stream._version import __version__
from edge_stream.sampling import NUMBERS
from edge_stream.server import errors
from edge_stream.server.errors import ApiError
from edge_stream.server.history.prefix_matching import History
from edge_stream.server.http import schemas
from edge_stream.server.http.channel import Channel, ClientDisconnected, cancel_on_disconnect
from edge_stream.server.http.requests import RequestBuilder
from edge_stream.server.http.responses import ChatResponseBuilder, ResponseBuilder, TextResponseBuilder
from edge_stream.server.scheduling.events import Delta, Done, Finished, Started
from edge_stream.server.scheduling.scheduler import Scheduler
from edge_stream.server.scheduling.slot_actions import SlotActions
from edge_stream.server.scheduling.tasks import GenerationRequest
from edge_stream.text import sendable

if TYPE_CHECKING:
    from edge_stream.server.settings import Settings

T = TypeVar("T")

CONVERSATION_HEADER = "X-Conversation"
HISTORY_HEADER = "X-Edge-Stream-History"

_SEND_SECONDS = 60.0  # a client that takes nothing for so long is disconnected

_ERRORS: dict[int | str, dict[str, Any]] = {
    code: {"model": schemas.ErrorBody, "description": text}
    for code, text in {
        400: "The request cannot be answered as it is.",
        401: "A valid API key is needed.",
        403: "The request comes from another site.",
        408: "The request did not arrive in time.",
        413: "The request is too large.",
        503: "Too many requests are waiting, or the server is shutting down: see Retry-After.",
    }.items()
}

Name = Annotated[
    str | None,
    Header(alias=CONVERSATION_HEADER, description="The client's name for the conversation", max_length=128),
]


class Endpoints:
    """The routes, over a scheduler."""

    def __init__(self, scheduler: Scheduler, settings: Settings) -> None:
        self.scheduler, self.settings, self.engine = scheduler, settings, scheduler.engine
        self.requests = RequestBuilder(self.engine, settings)
        self.slot_actions = SlotActions(scheduler)
        self.created = int(self.engine.model_path.stat().st_mtime)
        self.router = APIRouter(responses=_ERRORS)
        add = self.router.add_api_route
        event_stream: dict[str, Any] = {"text/event-stream": {"schema": {"type": "string"}}}
        for path, handler, model in (
            ("/v1/chat/completions", self.chat, schemas.ChatResponse),
            ("/v1/completions", self.complete, schemas.TextResponse),
        ):
            streamed: dict[int | str, dict[str, Any]] = {
                200: {"content": event_stream, "description": "The answer; chunks if `stream` is true."}
            }
            add(path, handler, methods=["POST"], response_model=model, responses=streamed, tags=["OpenAI"])
        add("/v1/models", self.models, response_model=schemas.Models, tags=["OpenAI"])
        add("/health", self.health, response_model=schemas.Health, tags=["server"])
        add("/v1/health", self.health, response_model=schemas.Health, include_in_schema=False)
        plain: dict[str, Any] = {"text/plain": {"schema": {"type": "string"}}}
        metrics: dict[int | str, dict[str, Any]] = {200: {"content": plain, "description": "Prometheus text."}}
        add("/metrics", self.metrics, response_class=Response, responses=metrics, tags=["server"])
        add("/props", self.props, response_model=schemas.Props, tags=["server"])
        none: dict[str, Any] = {"response_model_exclude_none": True}
        add("/slots", self.slots, response_model=list[schemas.Slot], tags=["slots"], **none)
        missing: dict[int | str, dict[str, Any]] = {
            404: {"model": schemas.ErrorBody, "description": "No such slot or file."}
        }
        add(
            "/slots/{slot}",
            self.slot,
            methods=["POST"],
            responses=missing,
            response_model=schemas.SlotAnswer,
            tags=["slots"],
            **none,
        )
        add("/tokenize", self.tokenize, methods=["POST"], response_model=schemas.Tokens, tags=["text"])
        add("/detokenize", self.detokenize, methods=["POST"], response_model=schemas.Content, tags=["text"])
        add("/apply-template", self.template, methods=["POST"], response_model=schemas.Prompt, tags=["text"])

    #
    # answers
    #

    async def chat(self, body: schemas.ChatRequest, request: Request, x_conversation: Name = None) -> Any:
        """Answer a chat. Send the whole history each time: only what is new is read."""
        generation = await asyncio.to_thread(self.requests.from_chat, body, x_conversation)
        builder = ChatResponseBuilder(self.engine, self.settings.alias, body.n, [""])
        return await self._answer(request, builder, [generation], body)

    async def complete(self, body: schemas.CompletionRequest, request: Request, x_conversation: Name = None) -> Any:
        """Continue a text of any length."""
        generations = await asyncio.to_thread(self.requests.from_text, body, x_conversation)
        echo = [self._prompt_text(g.history) if body.echo else "" for g in generations]
        builder = TextResponseBuilder(self.engine, self.settings.alias, body.n, echo)
        return await self._answer(request, builder, generations, body)

    def _prompt_text(self, history: History) -> str:
        data = history.text or b""
        if history.variables.get("tokens"):
            data = self.engine.detokenize(array("i", data).tolist())
        return data.decode("utf-8", errors="replace")

    async def _answer(
        self,
        request: Request,
        builder: ResponseBuilder,
        generations: list[GenerationRequest],
        body: schemas.ChatRequest | schemas.CompletionRequest,
    ) -> Response:
        channel = Channel(self.scheduler, generations)
        try:
            channel.submit()
            if body.stream:
                usage_chunk = bool(body.stream_options and body.stream_options.include_usage)
                return await self._stream(request, builder, channel, usage_chunk)
            return await cancel_on_disconnect(request, self._whole(builder, channel))
        except ClientDisconnected:
            channel.cancel()
            return Response(status_code=499)
        except BaseException:
            channel.cancel()
            raise

    async def _whole(self, builder: ResponseBuilder, channel: Channel) -> Response:
        done: dict[int, Done] = {}
        while len(done) < len(channel.tasks):
            k, event = await channel.get()
            if isinstance(event, (Delta, Finished)):
                builder.add(k, event)
            elif isinstance(event, Done):
                done[k] = event
        last = done[len(done) - 1]
        body = {
            **builder.head(builder.whole),
            "choices": builder.choices(),
            "usage": _sum_usage(done.values()),
            "timings": last.timings,
            "edge_stream": last.info,
        }
        return JSONResponse(body, headers={HISTORY_HEADER: last.info["history"]})

    async def _stream(
        self, request: Request, builder: ResponseBuilder, channel: Channel, usage_chunk: bool
    ) -> Response:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        # An early error becomes a response with its status; a later one has to be part of the stream.
        with suppress(asyncio.TimeoutError):
            first = await cancel_on_disconnect(request, asyncio.wait_for(channel.peek(), self.settings.ping_seconds))
            if isinstance(first, Started):
                headers[HISTORY_HEADER] = first.info["history"]

        async def events() -> AsyncIterator[dict[str, str]]:
            done: list[Done] = []
            try:
                while len(done) < len(channel.tasks):
                    k, event = await channel.get()
                    for chunk in builder.chunks(k, event):
                        yield _sse(chunk)
                    if isinstance(event, Done):
                        done.append(event)
                if usage_chunk:
                    yield _sse({**builder.head(builder.part), "choices": [], "usage": _sum_usage(done)})
                yield {"data": "[DONE]"}
            except ApiError as error:
                yield _sse(error.body)

        return _EventStream(
            channel,
            events(),
            headers=headers,
            sep="\n",
            ping=self.settings.ping_seconds,
            send_timeout=_SEND_SECONDS,
        )

    #
    # facts
    #

    async def health(self) -> dict[str, str]:
        """That the server is running. Needs no key."""
        return {"status": "ok"}

    async def models(self) -> dict[str, Any]:
        """The loaded model."""
        engine = self.engine
        meta = {
            "n_vocab": engine.n_vocab,
            "n_ctx_train": engine.n_ctx_train,
            "n_ctx": engine.n_ctx,
            "desc": engine.desc,
        }
        model = {"id": self.settings.alias, "created": self.created, "owned_by": "edge-stream", "meta": meta}
        return {"data": [model]}

    async def metrics(self) -> Response:
        """Prometheus metrics, prefix edge_stream_."""
        counts = await self._call(self.scheduler.counts)
        return Response(self.scheduler.metrics.text(counts), media_type="text/plain; version=0.0.4")

    async def props(self) -> dict[str, Any]:
        """The model, its template, the cache, defaults and limits."""
        engine, sampling, limits = self.engine, self.settings.sampling, self.settings.limits
        names = ("seed", *NUMBERS)
        return {
            "model_alias": self.settings.alias,
            "model_desc": engine.desc,
            "total_slots": engine.n_parallel,
            "n_ctx": engine.n_ctx,
            "n_keep": engine.n_keep,
            "n_ctx_train": engine.n_ctx_train,
            "sink_move": engine.sink_move,
            "flash_attn": engine.backend.options.flash_attn,
            "chat_template": self.scheduler.renderer.template.source,
            "takes_tools": self.requests.tool_format is not None,
            "default_generation_settings": {name: getattr(sampling, name) for name in names},
            "limits": vars(limits),
            "build_info": f"edge-stream {__version__}",
        }

    #
    # slots
    #

    async def slots(self) -> list[dict[str, Any]]:
        """The conversation in each slot of the cache."""
        return await self._call(self.scheduler.slots)

    async def slot(
        self,
        slot: int,
        action: Annotated[str, Query(pattern="^(save|restore|erase)$")],
        body: schemas.SlotFile | None = None,
    ) -> dict[str, Any]:
        """Save a slot's conversation under a name, restore one, or erase it."""
        filename = body.filename if body else None
        return await asyncio.wrap_future(await self._call(lambda: self.slot_actions.act(slot, action, filename)))

    async def _call(self, work: Callable[[], T]) -> T:
        return await asyncio.wrap_future(self.scheduler.call(work))

    #
    # text
    #

    async def tokenize(self, body: schemas.TokenizeRequest) -> dict[str, Any]:
        """Tokens of a text."""
        engine = self.engine
        add_bos = body.add_special and engine.add_bos
        tokens = await asyncio.to_thread(
            lambda: engine.tokenize(body.content, add_bos=add_bos, special=body.parse_special)
        )
        return {"tokens": [self._piece(token) for token in tokens] if body.with_pieces else tokens}

    def _piece(self, token: int) -> dict[str, Any]:
        piece = self.engine.token_to_piece(token, special=True)
        try:
            return {"id": token, "piece": piece.decode()}
        except UnicodeDecodeError:
            return {"id": token, "piece": list(piece)}

    async def detokenize(self, body: schemas.DetokenizeRequest) -> dict[str, str]:
        """Text of tokens."""
        if any(token >= self.engine.n_vocab for token in body.tokens):
            raise errors.invalid(f"there is a token outside the vocabulary of {self.engine.n_vocab}")
        pieces = await asyncio.to_thread(lambda: [self.engine.token_to_piece(t, special=True) for t in body.tokens])
        return {"content": b"".join(pieces).decode("utf-8", errors="replace")}

    async def template(self, body: schemas.TemplateRequest) -> dict[str, str]:
        """A chat as the model's template renders it."""
        messages = [m.model_dump(exclude_none=True) for m in body.messages]
        variables = {"tools": [t.model_dump(exclude_none=True) for t in body.tools]} if body.tools else {}
        prompt = await asyncio.wrap_future(self.scheduler.render(lambda r: r.whole(messages, variables)))
        return {"prompt": sendable(prompt)}


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


# Some clients take these for line ends, as str.splitlines does.
_SEPARATORS = {code: f"\\u{code:04x}" for code in (0x85, 0x2028, 0x2029)}


def _sse(data: dict[str, Any]) -> dict[str, str]:
    return {"data": json.dumps(data, ensure_ascii=False, separators=(",", ":")).translate(_SEPARATORS)}


def _sum_usage(done: Collection[Done]) -> dict[str, Any]:
    names = ("prompt_tokens", "completion_tokens", "total_tokens")
    usage: dict[str, Any] = {name: sum(d.usage[name] for d in done) for name in names}
    cached = sum(d.usage["prompt_tokens_details"]["cached_tokens"] for d in done)
    return usage | {"prompt_tokens_details": {"cached_tokens": cached}}
