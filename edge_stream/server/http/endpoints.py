"""The endpoints: every API's routes over one scheduler. A new API is a module of `apis` and a line of `_APIS`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter
from starlette.responses import JSONResponse

from edge_stream.server.apis.embeddings import Embeddings
from edge_stream.server.apis.llama import Llama
from edge_stream.server.apis.openai import OpenAI
from edge_stream.server.apis.routes import ERRORS
from edge_stream.server.errors import ApiError
from edge_stream.server.http.answering import Answering
from edge_stream.server.scheduling.scheduler import Scheduler

if TYPE_CHECKING:
    from edge_stream.server.settings import Settings

_APIS = (OpenAI, Llama, Embeddings)

# Errors are OpenAI's unless the path begins so: then the body is what the function makes of the error.
_ERROR_FORMS: dict[str, Callable[[ApiError], dict[str, Any]]] = {}


def error_response(path: str, error: ApiError) -> JSONResponse:
    """An error as the API of a path has them."""
    form = next((form for prefix, form in _ERROR_FORMS.items() if path.startswith(prefix)), None)
    return JSONResponse(form(error) if form else error.body, error.code, headers=error.headers)


def make_router(scheduler: Scheduler, settings: Settings) -> APIRouter:
    """The routes of every API."""
    router, answering = APIRouter(responses=ERRORS), Answering(scheduler, settings)
    for api in _APIS:
        api(router, answering)
    return router
