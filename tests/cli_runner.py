"""Running commands in this process, with an engine that needs no model; the fixtures are in conftest.py."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner, Result
from fake_engine import FakeEngine

from edge_stream.cli import cli

Run = Callable[..., Result]


class Loader:
    """Stands in for the Engine class: remembers what was asked of it."""

    def __init__(self) -> None:
        self.engine = FakeEngine()
        self.asked: dict[str, Any] = {}
        self.n_loads = 0
        self.error: Exception | None = None

    def load(self, model: str, *, on_load: Any = None, **settings: Any) -> FakeEngine:
        if self.error:
            raise self.error
        self.n_loads += 1
        self.asked = {"model": model, **settings}
        self.engine.n_ctx = settings["n_ctx"] or self.engine.n_ctx_train
        self.engine.n_keep = settings["n_keep"]
        return self.engine


def install(monkeypatch: pytest.MonkeyPatch) -> Loader:
    """A Loader in the place of Engine, and no environment variables of llama.cpp."""
    for name in list(os.environ):
        if name.startswith("LLAMA_ARG_"):
            monkeypatch.delenv(name)
    made, module = Loader(), ModuleType("edge_stream.engine")
    module.Engine = made  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "edge_stream.engine", module)
    return made


def invoke(*arguments: str, **settings: Any) -> Result:
    """Run a command line; what escapes must be an exit status."""
    result = CliRunner().invoke(cli, list(arguments), **settings)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result
