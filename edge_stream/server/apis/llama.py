"""llama-server's own API: tokens, templates, slots, and what the server runs."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Query, Response

from edge_stream._version import __version__
from edge_stream.server import errors
from edge_stream.server.apis import llama_schemas as schemas
from edge_stream.server.apis.routes import add_route
from edge_stream.server.http.answering import Answering
from edge_stream.server.http.schemas import ErrorBody
from edge_stream.server.scheduling.slot_actions import SlotActions
from edge_stream.text import sendable


class Llama:
    """The routes."""

    def __init__(self, router: APIRouter, answering: Answering) -> None:
        self.answering, self.engine = answering, answering.engine
        self.scheduler, self.settings = answering.scheduler, answering.settings
        self.slot_actions = SlotActions(self.scheduler)
        no: tuple[str, ...] = ()
        add_route(router, "/health", self.health, "server", response_model=schemas.Health)
        plain: dict[str, Any] = {"text/plain": {"schema": {"type": "string"}}}
        metrics: dict[int | str, dict[str, Any]] = {200: {"content": plain, "description": "Prometheus text."}}
        add_route(router, "/metrics", self.metrics, "server", aliases=no, response_class=Response, responses=metrics)
        add_route(router, "/props", self.props, "server", aliases=no, response_model=schemas.Props)
        none: dict[str, Any] = {"response_model_exclude_none": True, "aliases": no}
        add_route(router, "/slots", self.slots, "slots", response_model=list[schemas.Slot], **none)
        missing: dict[int | str, dict[str, Any]] = {404: {"model": ErrorBody, "description": "No such slot or file."}}
        slot_answer: dict[str, Any] = {"responses": missing, "response_model": schemas.SlotAnswer, **none}
        add_route(router, "/slots/{slot}", self.slot, "slots", methods=["POST"], **slot_answer)
        for path, handler, model in (
            ("/tokenize", self.tokenize, schemas.Tokens),
            ("/detokenize", self.detokenize, schemas.Content),
            ("/apply-template", self.template, schemas.Prompt),
        ):
            add_route(router, path, handler, "text", methods=["POST"], aliases=no, response_model=model)

    #
    # facts
    #

    async def health(self) -> dict[str, str]:
        """That the server is running. Needs no key."""
        return {"status": "ok"}

    async def metrics(self) -> Response:
        """Prometheus metrics, prefix edge_stream_."""
        counts = await self.answering.call(self.scheduler.counts)
        return Response(self.scheduler.metrics.text(counts), media_type="text/plain; version=0.0.4")

    async def props(self) -> dict[str, Any]:
        """The model, its template, the cache, defaults and limits."""
        engine, sampling, limits = self.engine, self.settings.sampling, self.settings.limits
        names = ("seed", "temp", "top_k", "top_p", "min_p", "repeat_penalty", "repeat_last_n")
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
            "takes_tools": self.answering.requests.tool_format is not None,
            "default_generation_settings": {name: getattr(sampling, name) for name in names},
            "limits": vars(limits),
            "build_info": f"edge-stream {__version__}",
        }

    #
    # slots
    #

    async def slots(self) -> list[dict[str, Any]]:
        """The conversation in each slot of the cache."""
        return await self.answering.call(self.scheduler.slots)

    async def slot(
        self,
        slot: int,
        action: Annotated[str, Query(pattern="^(save|restore|erase)$")],
        body: schemas.SlotFile | None = None,
    ) -> dict[str, Any]:
        """Save a slot's conversation under a name, restore one, or erase it."""
        filename = body.filename if body else None
        return await asyncio.wrap_future(
            await self.answering.call(lambda: self.slot_actions.act(slot, action, filename))
        )

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
