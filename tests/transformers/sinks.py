"""Transformers' models with attention restricted to sinks and window at in-cache positions.

A token sees the first N_KEEP tokens and the newest, N_CTX in all, at distances as if these followed one another. What a
layer's keys are at other positions follows from the model itself: the text is computed once for every distance by which
sinks move, each time beginning at another position (rows of a batch). Row 0 gives queries and the window's keys, row i
the sinks' keys after i evictions, and all rows get row 0's output. So recurrent layers read the whole text, once, and
nothing is assumed about how a family rotates.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

N_CTX, N_KEEP = 48, 4


def streamed_logits(model: torch.nn.Module, tokens: list[int]) -> torch.Tensor:
    """Logits [n, n_vocab]: those of a stream that is fed one token at a time."""
    n = len(tokens)
    shifts = torch.arange(max(1, n - N_CTX + 1))[:, None]
    patched = {type(part).__module__ for part in model.modules()}
    n_calls = 0
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        for name in patched:
            plain = getattr(sys.modules[name], "eager_attention_forward", None)
            if plain is None:
                continue

            def forward(
                module: torch.nn.Module,
                q: torch.Tensor,
                k: torch.Tensor,
                v: torch.Tensor,
                _mask: Any,
                *rest: Any,
                plain: Any = plain,
                **more: Any,
            ) -> tuple[torch.Tensor, None]:
                nonlocal n_calls
                n_calls += 1
                keys = k[:1].repeat(n, 1, 1, 1)  # one item per query
                keys[:, :, :N_KEEP] = k[(torch.arange(n) - N_CTX + 1).clamp(min=0), :, :N_KEEP]
                usual = getattr(module, "sliding_window", None)  # some pass None for a layer without one
                window = more.get("sliding_window", usual)
                out, _ = plain(
                    module,
                    q[0].transpose(0, 1)[:, :, None],
                    keys,
                    v[:1].expand(n, -1, -1, -1),
                    _visible(n, window).to(q.dtype),
                    *rest,
                    **more,
                )
                return out.transpose(0, 1).expand(len(shifts), -1, -1, -1), None

            patch.setattr(sys.modules[name], "eager_attention_forward", forward)
        batch = torch.tensor([tokens]).expand(len(shifts), -1)
        logits: torch.Tensor = model(batch, position_ids=torch.arange(n) + shifts, use_cache=False).logits[0]
    assert n_calls > 0, "the model has no attention that could be replaced"
    return logits


def _visible(n: int, window: int | None) -> torch.Tensor:
    """Masks [n, 1, 1, n] to add: 0 where a query (first axis) sees a key, else -inf."""
    query, key = torch.arange(n)[:, None], torch.arange(n)
    sink = key < N_KEEP
    seen = (key <= query) & (sink | (query - key < N_CTX - N_KEEP))
    if window is not None:  # by in-cache positions, too
        seen &= torch.where(sink, query.clamp(max=N_CTX - 1), query) - key < window
    return torch.zeros(n, n).masked_fill(~seen, float("-inf"))[:, None, None]
