"""How an API registers its routes: with and without /v1, described once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Header
from pydantic import BaseModel

from edge_stream.server.http import schemas

CONVERSATION_HEADER = "X-Conversation"

Name = Annotated[
    str | None,
    Header(alias=CONVERSATION_HEADER, description="The client's name for the conversation", max_length=128),
]

_ERRORS = {
    400: "The request cannot be answered as it is.",
    401: "A valid API key is needed.",
    403: "The request comes from another site.",
    408: "The request did not arrive in time.",
    413: "The request is too large.",
    503: "Too many requests are waiting, or the server is shutting down: see Retry-After.",
}


def error_responses(model: type[BaseModel] = schemas.ErrorBody) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route: how every request may fail."""
    return {code: {"model": model, "description": text} for code, text in _ERRORS.items()}


def failing(code: int, text: str, model: type[BaseModel] = schemas.ErrorBody) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route that has one more way to fail."""
    return {code: {"model": model, "description": text}}


def streamed(media_type: str = "text/event-stream") -> dict[int | str, dict[str, Any]]:
    """`responses` of a route whose answer may be streamed."""
    content: dict[str, Any] = {media_type: {"schema": {}}}  # an item is not described
    return {200: {"content": content, "description": "The answer; chunks if `stream` is true."}}


def add_route(
    router: APIRouter,
    path: str,
    handler: Callable[..., Any],
    tag: str,
    *,
    aliases: tuple[str, ...] | None = None,
    **options: Any,
) -> None:
    """A route, and others for the same. aliases None: the path with or without /v1, whichever it has not."""
    if aliases is None:
        aliases = (path.removeprefix("/v1"),) if path.startswith("/v1/") else ("/v1" + path,)
    router.add_api_route(path, handler, tags=[tag], **options)
    for alias in aliases:
        router.add_api_route(alias, handler, include_in_schema=False, **options)
