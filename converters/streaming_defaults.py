"""Streaming defaults of a converted model."""

from __future__ import annotations

from dataclasses import dataclass

from edge_stream.errors import EdgeStreamError
from edge_stream.families import ModelConfig

DEFAULT_N_KEEP = 4  # sinks: enough for every model that Xiao et al. tried (arXiv 2309.17453, table 2)
DEFAULT_N_CTX = 4096
_TRAINED = 1  # of a model that was trained with a token in front of every sample (the same, table 3)


@dataclass(frozen=True)
class StreamingDefaults:
    """Written into the model; the defaults of run and chat."""

    n_keep: int
    n_ctx: int


def recommend(model: ModelConfig, n_keep: int | None = None, n_ctx: int | None = None) -> StreamingDefaults:
    """Streaming defaults for a model, or the given values if they are valid.

    n_ctx: 4,096, or less if the model's reach is shorter: in-cache distances go up to n_ctx, which should exceed
    neither the length before rope scaling nor a sliding window that all layers share.
    Raises EdgeStreamError if n_keep does not leave a window.
    """
    limit = min(DEFAULT_N_CTX, model.n_ctx_train)
    if model.rope_scaling is not None and model.rope_scaling.kind in ("yarn", "longrope"):
        limit = min(limit, model.rope_scaling.n_ctx_orig)
    if model.sliding_window and all(model.swa_layers):
        limit = min(limit, model.sliding_window)
    n_ctx = n_ctx or limit
    usual = _TRAINED if model.sink == "token" else DEFAULT_N_KEEP
    n_keep = min(usual, n_ctx - 1) if n_keep is None else n_keep
    if n_keep >= n_ctx:
        raise EdgeStreamError(f"{n_keep} sinks leave no window in a cache of {n_ctx} tokens")
    return StreamingDefaults(n_keep, n_ctx)
