"""The endpoints: every API's routes over one scheduler. A new API is a module of `apis` and a line of `_APIS`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import APIRouter

from edge_stream.server.apis.llama import Llama
from edge_stream.server.apis.openai import OpenAI
from edge_stream.server.apis.routes import ERRORS
from edge_stream.server.http.answering import Answering
from edge_stream.server.scheduling.scheduler import Scheduler

if TYPE_CHECKING:
    from edge_stream.server.settings import Settings

_APIS = (OpenAI, Llama)


def make_router(scheduler: Scheduler, settings: Settings) -> APIRouter:
    """The routes of every API."""
    router, answering = APIRouter(responses=ERRORS), Answering(scheduler, settings)
    for api in _APIS:
        api(router, answering)
    return router
