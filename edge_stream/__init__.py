"""edge-stream: a language model that reads and writes a token stream of any length, on a device, at constant memory.

>>> from edge_stream import Engine
>>> with Engine.load("demo", n_ctx=512) as engine:
...     stream = engine.stream()
...     stream.feed("Once upon a time")
...     for token in stream.generate(100):
...         print(token.text, end="", flush=True)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edge_stream._version import __version__

if TYPE_CHECKING:
    from edge_stream.engine import Engine
    from edge_stream.errors import EdgeStreamError, SessionError, UnsupportedModelError
    from edge_stream.generation import Token
    from edge_stream.sampling import Sampling
    from edge_stream.stream import Stream

__all__ = [
    "EdgeStreamError",
    "Engine",
    "Sampling",
    "SessionError",
    "Stream",
    "Token",
    "UnsupportedModelError",
    "__version__",
]

_HOME = {
    "Engine": "engine",
    "Sampling": "sampling",
    "Stream": "stream",
    "Token": "generation",
    "EdgeStreamError": "errors",
    "SessionError": "errors",
    "UnsupportedModelError": "errors",
}


def __getattr__(name: str) -> Any:
    # imported on first use: `edge-stream --help` needs none of numpy, llama_cpp and the native libraries
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"edge_stream.{_HOME[name]}"), name)
