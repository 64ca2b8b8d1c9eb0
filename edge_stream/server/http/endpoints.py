"""The endpoints: every API's routes over one scheduler. A new API is a module of `apis` and a line of `_APIS`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter
from starlette.responses import JSONResponse

from edge_stream.server.apis import anthropic, ollama
from edge_stream.server.apis.embeddings import Embeddings
from edge_stream.server.apis.llama import Llama
from edge_stream.server.apis.openai import OpenAI
from edge_stream.server.apis.responses import Responses
from edge_stream.server.apis.routes import error_responses
from edge_stream.server.errors import ApiError
from edge_stream.server.http.answering import Answering
from edge_stream.server.scheduling.scheduler import Scheduler

if TYPE_CHECKING:
    from edge_stream.server.settings import Settings

_APIS = (OpenAI, Responses, Llama, Embeddings, anthropic.Anthropic, ollama.Ollama)

# Errors are OpenAI's unless the path begins so: then the body is what the function makes of the error.
_ERROR_FORMS: dict[str, Callable[[ApiError], dict[str, Any]]] = {
    "/v1/messages": anthropic.error_body,
    "/messages": anthropic.error_body,
    "/api/": ollama.error_body,
}


def error_response(path: str, error: ApiError) -> JSONResponse:
    """An error as the API of a path has them."""
    form = next((form for prefix, form in _ERROR_FORMS.items() if path.startswith(prefix)), None)
    return JSONResponse(form(error) if form else error.body, error.code, headers=error.headers)


def make_router(scheduler: Scheduler, settings: Settings) -> APIRouter:
    """The routes of every API."""
    router, answering = APIRouter(responses=error_responses()), Answering(scheduler, settings)
    for api in _APIS:
        api(router, answering)
    return router
