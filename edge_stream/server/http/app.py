"""The ASGI application: endpoints, page and middleware put together; errors as responses; the OpenAPI document."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException

from edge_stream._version import __version__
from edge_stream.errors import EdgeStreamError, not_utf8
from edge_stream.server import errors
from edge_stream.server.errors import ApiError
from edge_stream.server.http.endpoints import error_response, make_router
from edge_stream.server.http.guard import Guard
from edge_stream.server.http.page_files import page_files, page_route
from edge_stream.server.scheduling.scheduler import Scheduler
from edge_stream.server.settings import Settings


def make_app(scheduler: Scheduler, settings: Settings) -> FastAPI:
    """The application, whose lifespan starts and stops the scheduler."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        if settings.n_http_threads:
            asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(settings.n_http_threads))
        scheduler.start()
        yield
        await asyncio.to_thread(scheduler.stop)

    app = FastAPI(
        title="edge-stream",
        version=__version__,
        description="Endless conversations over the OpenAI API.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    page = page_files() if settings.has_page else {}
    app.include_router(make_router(scheduler, settings))
    for path in page:
        # HEAD: Ollama's clients ask for `/` so, to know whether the server runs
        app.add_api_route(path, page_route(*page[path]), methods=["GET", "HEAD"], include_in_schema=False)
    app.add_middleware(Guard, settings=settings, page=frozenset(page), error_response=error_response)
    for kind, handler in (
        (ApiError, _on_api_error),
        (EdgeStreamError, _on_library_error),
        (RequestValidationError, _on_validation),
        (HTTPException, _on_http),
        (UnicodeEncodeError, _on_text),
        (MemoryError, _on_exhausted),
        (Exception, _on_bug),
    ):
        app.add_exception_handler(kind, handler)
    app.openapi = lambda: _openapi(app, settings)  # type: ignore[method-assign]
    return app


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(request.url.path, error)


async def _on_library_error(request: Request, error: Exception) -> Response:
    return error_response(request.url.path, errors.exhausted(error) or errors.invalid(str(error)))


async def _on_text(request: Request, error: Exception) -> Response:
    assert isinstance(error, UnicodeEncodeError)
    return error_response(request.url.path, errors.invalid(not_utf8(error)))


async def _on_exhausted(request: Request, error: Exception) -> Response:
    lacking = errors.exhausted(error)
    assert lacking
    return error_response(request.url.path, lacking)


async def _on_validation(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return error_response(request.url.path, errors.first_problem(error.errors()))


async def _on_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    kind = errors.NOT_FOUND if error.status_code == 404 else errors.INVALID
    headers = dict(error.headers or {})
    return error_response(request.url.path, ApiError(error.status_code, str(error.detail), kind, headers))


async def _on_bug(request: Request, _error: Exception) -> Response:
    error = ApiError(500, "an internal error: see the server's log", errors.SERVER)
    return error_response(request.url.path, error)


def _openapi(app: FastAPI, settings: Settings) -> dict[str, Any]:
    """FastAPI's document, corrected: errors are 400, not 422, and some endpoints need a key."""
    if app.openapi_schema:
        return app.openapi_schema
    document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    for path in document["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        document["components"]["schemas"].pop(name, None)
    if settings.api_keys:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
        document["paths"]["/health"]["get"]["security"] = []
    app.openapi_schema = document
    return document
