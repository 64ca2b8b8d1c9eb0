"""What several APIs say of the model, of tokens and of progress."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edge_stream._version import __version__
from edge_stream.server.scheduling.events import Finished, Reading

if TYPE_CHECKING:
    from edge_stream.engine import Engine
    from edge_stream.server.settings import Settings

BUILD = f"build-{__version__}-edge-stream"  # system_fingerprint; llama-server's begins with a b as well

_FLOOR = -9999.0  # JSON has no infinity


def likely(engine: Engine, token: int, value: float, name: str = "logprob") -> dict[str, Any]:
    """A token and its probability."""
    piece = engine.token_to_piece(token, special=True)
    text = piece.decode("utf-8", errors="replace")
    return {"id": token, "token": text, name: max(value, _FLOOR), "bytes": list(piece)}


def progress(event: Reading) -> dict[str, Any]:
    """llama-server's prompt_progress, and timings where they are wanted."""
    facts = {"total": event.n_total, "cache": event.n_cached, "processed": event.n_processed}
    timings = {"timings": event.timings} if event.timings else {}
    return {"prompt_progress": {**facts, "time_ms": int(event.ms)}, **timings}


def loop_info(event: Finished) -> dict[str, Any]:
    """What a choice repeated, if the loop guard ended it."""
    loop = event.loop
    return {"loop": {"period": loop.period, "repetitions": loop.repetitions}} if loop else {}


def model_facts(engine: Engine, settings: Settings) -> dict[str, Any]:
    """An item of /v1/models."""
    meta = {
        "n_vocab": engine.n_vocab,
        "n_ctx_train": engine.n_ctx_train,
        "n_ctx": engine.n_ctx,
        "size": engine.n_bytes,
        "desc": engine.desc,
    }
    created = int(engine.model_path.stat().st_mtime)
    return {
        "id": settings.alias,
        "object": "model",
        "aliases": list(settings.aliases),
        "tags": list(settings.tags),
        "created": created,
        "owned_by": "edge-stream",
        "meta": meta,
    }
