"""MLC folders on the MLC engine against transformers: its logits, and its attention restricted to sinks and window."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: make test-transformers")
transformers = pytest.importorskip("transformers", reason="transformers is not installed: make test-transformers")
pytest.importorskip("tvm", reason="TVM is not installed: pip install 'edge-stream[mlc]'")

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import families  # noqa: E402
import numpy as np  # noqa: E402
from mlc_models import write_mlc  # noqa: E402
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # noqa: E402

from edge_stream import Engine  # noqa: E402

N_CTX, N_KEEP = 51, 4
TOKENS = [int(t) for t in np.random.default_rng(0).integers(10, 600, 4 * N_CTX)]
NAMES = ("llama", "ministral3", "mistral3", "smollm3", "gemma3", "qwen3_moe")


@pytest.fixture(scope="module", params=NAMES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path, Any]]:
    """Name, MLC folder in float32, transformers' model in float64."""
    folder = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGE_STREAM_CACHE", os.environ.get("EDGE_STREAM_CACHE", str(folder / "cache")))
        model = families.write(folder / "checkpoint", request.param)
        yield request.param, write_mlc(folder / "checkpoint", folder / "mlc"), model


def logits(folder: Path, tokens: list[int], **options: Any) -> np.ndarray:
    exact = {"cache_type_k": "f32", "cache_type_v": "f32", "n_threads": 1, "n_ctx": N_CTX, "n_keep": N_KEEP}
    with Engine.load(folder, **(exact | options)) as engine, engine.stream() as stream:
        return np.concatenate([stream.logits_of([token]) for token in tokens])


def tolerance(name: str) -> float:
    return 1e-3 if name.startswith("gemma") else 1e-4


def test_logits(case: tuple[str, Path, Any]) -> None:
    name, folder, model = case
    with torch.no_grad():
        want = model(torch.tensor([TOKENS[:N_CTX]])).logits[0].numpy()
    error = float(np.abs(logits(folder, TOKENS[:N_CTX]) - want).max() / np.abs(want).max())
    print(f"{name}: {error:.2g}")
    assert want.std() > 0.1, "the model says nothing"
    assert error < tolerance(name)


class Attention:
    """transformers' attention, over sinks and window: what it is given is rotated by absolute positions, so that sinks
    are turned on by as many positions as have been evicted."""

    def __init__(self, model: Any) -> None:
        self.rotary = next(m for name, m in model.named_modules() if name.endswith("rotary_emb"))
        self.keys: dict[int, list[Any]] = {}
        self.values: dict[int, list[Any]] = {}

    def turned(self, module: Any, key: Any, n: int) -> Any:
        """key [1, heads, 1, head_dim] n positions further."""
        if not getattr(module, "use_rope", True):
            return key
        kind = getattr(module, "layer_type", None)
        inv_freq = getattr(self.rotary, f"{kind}_inv_freq" if hasattr(self.rotary, f"{kind}_inv_freq") else "inv_freq")
        angle = torch.cat([inv_freq.double() * n] * 2)
        half = key.shape[-1] // 2
        return key * angle.cos() + torch.cat([-key[..., half:], key[..., :half]], dim=-1) * angle.sin()

    def __call__(self, module: Any, query: Any, key: Any, value: Any, _mask: Any, scaling: float, **_: Any) -> Any:
        """One token: query [1, heads, 1, head_dim], key and value [1, KV heads, 1, head_dim]."""
        keys, values = self.keys.setdefault(module.layer_idx, []), self.values.setdefault(module.layer_idx, [])
        keys.append(key)
        values.append(value)
        n_evicted = max(0, len(keys) - N_CTX)
        kept = [*range(N_KEEP), *range(N_KEEP + n_evicted, len(keys))] if n_evicted else list(range(len(keys)))
        window = getattr(module, "sliding_window", None) or math.inf
        seen = [i for at, i in enumerate(kept) if len(kept) - 1 - at < window]  # distances are those in the cache
        k = torch.cat([self.turned(module, keys[i], n_evicted) if i < N_KEEP else keys[i] for i in seen], dim=2)
        v = torch.cat([values[i] for i in seen], dim=2)
        share = query.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(share, dim=1), v.repeat_interleave(share, dim=1)
        weights = torch.softmax(query @ k.transpose(2, 3) * scaling, dim=-1)
        return (weights @ v).transpose(1, 2), weights


@pytest.mark.parametrize("rebase_at", [None, N_CTX + 20])
def test_streams_as_transformers_attention(rebase_at: int | None, case: tuple[str, Path, Any]) -> None:
    name, folder, model = case
    ALL_ATTENTION_FUNCTIONS.register("sinks-and-window", Attention(model))
    text = getattr(model.config, "text_config", model.config)
    before, text._attn_implementation = text._attn_implementation, "sinks-and-window"
    try:
        with torch.no_grad():
            rows = [
                model(torch.tensor([[token]]), position_ids=torch.tensor([[at]]), use_cache=False).logits[0, 0].numpy()
                for at, token in enumerate(TOKENS)
            ]
    finally:
        text._attn_implementation = before
    want = np.array(rows)
    got = logits(folder, TOKENS, **({"rebase_at": rebase_at} if rebase_at else {}))
    assert np.abs(got - want).max() < tolerance(name) * np.abs(want).max()
    if rebase_at is None:  # a cache with a sink less is told apart
        other = logits(folder, TOKENS, n_keep=N_KEEP - 1)
        assert np.abs(other - want).max() > 100 * tolerance(name)
