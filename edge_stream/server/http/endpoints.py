"""The endpoints: every API's routes over one scheduler. A new API is a module of `apis` and a line of `_APIS`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from edge_stream.server.apis import anthropic, ollama
from edge_stream.server.apis.llama import Llama
from edge_stream.server.apis.openai import OpenAI
from edge_stream.server.apis.responses import Responses
from edge_stream.server.apis.routes import error_responses
from edge_stream.server.errors import ApiError
from edge_stream.server.http.answering import Answering
from edge_stream.server.scheduling.scheduler import Scheduler

if TYPE_CHECKING:
    from edge_stream.server.settings import Settings

_APIS = (OpenAI, Responses, Llama, anthropic.Anthropic, ollama.Ollama)

# how errors look, by the beginning of the path; elsewhere they look as llama-server's
_ERRORS = {"/v1/messages": anthropic.error_body, "/messages": anthropic.error_body, "/api/": ollama.error_body}


def make_router(scheduler: Scheduler, settings: Settings) -> APIRouter:
    """The routes of every API."""
    router, answering = APIRouter(responses=error_responses()), Answering(scheduler, settings)
    for api in _APIS:
        api(router, answering)
    return router


def error_response(path: str, error: ApiError) -> Response:
    """An error as clients of the path's API expect it."""
    form = next((form for start, form in _ERRORS.items() if path.startswith(start)), None)
    return JSONResponse(form(error) if form else error.body, error.code, headers=error.headers)
