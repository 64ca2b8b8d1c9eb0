"""Families that the MLC engine computes with more than Llama's layers: yarn and a temperature, layers that do not
rotate, sliding windows with a rope base of their own.

Checkpoints of tiny_checkpoints.py become an MLC folder and a GGUF file; the folder's logits must be those of the
float64 forward pass, and past the end of the cache those of the float64 stream (attention over sinks and window at
in-cache positions) and of the llama.cpp engine.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import paged_mlc
import pytest
import tiny_checkpoints as tiny
from click.testing import CliRunner
from mlc_models import write_mlc
from reference import Reference, load_reference
from reference_layers import load_layered_reference

from edge_stream import EdgeStreamError, Engine
from edge_stream.cli import cli
from edge_stream.converters import reference as forward
from edge_stream.converters import to_gguf
from edge_stream.models.conversion import open_source

pytest.importorskip("tvm")

N_CTX, N_KEEP = 51, 4
N_TOKENS = 4 * N_CTX
REBASE_AT = N_CTX + 20
TOLERANCE = 1e-3  # of logits whose spread is about 2
EXACT = {"cache_type_k": "f32", "cache_type_v": "f32", "n_threads": 1}

# name -> what differs from the checkpoint's config, so that it shows within N_CTX
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "ministral3": ("ministral3", {}),
    # the temperature sets in within the cache
    "ministral3-warm": ("ministral3", {"original_max_position_embeddings": 20, "llama_4_scaling_beta": 0.5}),
    # yarn's magnitude stays, as in Devstral 2
    "ministral3-loud": ("ministral3", {"mscale_all_dim": 0.0, "llama_4_scaling_beta": 0.0}),
    "smollm3": ("smollm3", {}),
    "gemma3": ("gemma3", {}),
    "qwen3-moe": ("qwen3-moe", {}),
}


class Model:
    """A checkpoint, and what is made of it."""

    def __init__(self, folder: Path, case: str) -> None:
        name, rope = CASES[case]
        self.checkpoint, self.mlc, self.gguf = folder / "hf", folder / "mlc", folder / "model.gguf"
        tiny.write_tiny(self.checkpoint, name)
        if rope:
            path = self.checkpoint / "config.json"
            config = json.loads(path.read_text())
            config["rope_parameters"] |= rope
            path.write_text(json.dumps(config))
        write_mlc(self.checkpoint, self.mlc, n_ctx=N_CTX)
        source = open_source(str(self.checkpoint))
        to_gguf.convert(source, self.gguf, to_gguf.GgufOptions(outtype="f32"), lambda _line: None)
        source.close()
        load: Callable[[Path], Reference] = load_layered_reference if case == "smollm3" else load_reference
        self.reference = load(self.gguf)

    def engine(self, **options: Any) -> Engine:
        return Engine.load(self.mlc, **(EXACT | {"n_ctx": N_CTX, "n_keep": N_KEEP} | options))


@pytest.fixture(scope="module", params=CASES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp(request.param)
        patch.setenv("EDGE_STREAM_CACHE", str(folder / "cache"))
        yield Model(folder, request.param)


@pytest.fixture(scope="module")
def tokens() -> list[int]:
    return [int(t) for t in np.random.default_rng(0).integers(10, tiny.N_VOCAB - 10, N_TOKENS)]


def streamed(engine: Engine, tokens: list[int], size: int) -> np.ndarray:
    with engine, engine.stream() as stream:
        return np.concatenate([stream.logits_of(tokens[i : i + size]) for i in range(0, len(tokens), size)])


def test_logits(model: Model, tokens: list[int]) -> None:
    """Before any slide, against the checkpoint itself."""
    source = open_source(str(model.checkpoint))
    want = forward.logits(source, tokens[:N_CTX])
    source.close()
    got = streamed(model.engine(), tokens[:N_CTX], N_CTX)
    assert want.std() > 1.0
    assert np.abs(got - want).max() < 1e-4 * np.abs(want).max()


@pytest.mark.parametrize(("size", "rebase_at"), [(1, None), (7, None), (1, REBASE_AT)])
def test_streams_as_the_reference(size: int, rebase_at: int | None, model: Model, tokens: list[int]) -> None:
    stream = model.reference.stream(N_CTX, N_KEEP)
    want = np.concatenate([stream.feed(tokens[i : i + size], size) for i in range(0, len(tokens), size)])
    engine = model.engine(**({"rebase_at": rebase_at} if rebase_at else {}))
    assert np.abs(streamed(engine, tokens, size) - want).max() < TOLERANCE


def test_padding_of_a_step_is_finite(model: Model, tokens: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rows go through all layers; of what is no number, experts beyond the last were chosen."""
    from edge_stream.mlc.ring import RingDecoder

    compute, padded = RingDecoder._hidden, []

    def record(decoder: RingDecoder, ids: np.ndarray, m: int, *arguments: Any) -> Any:
        hidden = compute(decoder, ids, m, *arguments)
        if len(ids) < m:
            padded.append(np.from_dlpack(hidden).copy())
        return hidden

    monkeypatch.setattr(RingDecoder, "_hidden", record)
    streamed(model.engine(), tokens, 7)
    assert padded and all(np.isfinite(hidden).all() for hidden in padded)


def test_a_fault_would_show(model: Model, tokens: list[int]) -> None:
    """Sinks that are left out, and each family's own rule switched off, are far outside of the tolerance."""
    want = model.reference.stream(N_CTX, N_KEEP).feed(tokens)
    faulty = [model.reference.stream(N_CTX, N_KEEP - 1)]
    config = model.reference.config
    faults: dict[str, dict[str, Any]] = {
        "mistral3": {"yarn": False, "rope_freq_scale": 1.0},
        "smollm3": {"rotated": (True,) * config.n_layer},
        "gemma3": {"rope_base_swa": config.rope_base},
        "qwen3moe": {"n_expert_used": config.n_expert_used - 1},
    }
    fields = [faults[config.arch]]
    if config.temperature > 0.2:
        fields.append({"temperature": 0.0})
    if config.n_swa:
        fields.append({"n_swa": config.n_swa - 1})
    for changes in fields:
        other = type(model.reference)(model.reference.weights, replace(config, **changes))
        faulty.append(other.stream(N_CTX, N_KEEP))
    for stream in faulty:
        assert np.abs(stream.feed(tokens) - want).max() > 10 * TOLERANCE


def test_both_engines_agree(model: Model, tokens: list[int]) -> None:
    if model.reference.config.temperature > 0.2:
        with pytest.raises(EdgeStreamError, match="attention temperature changes with absolute positions"):
            Engine.load(model.gguf, n_ctx=N_CTX)
        return
    options = EXACT | {"n_ctx": N_CTX, "n_keep": N_KEEP, "flash_attn": "off"}
    want = streamed(Engine.load(model.gguf, **options), tokens, 1)
    # llama.cpp's GELU is a table in float16
    tolerance = 20 * TOLERANCE if model.reference.config.arch == "gemma3" else TOLERANCE
    assert np.abs(streamed(model.engine(), tokens, 1) - want).max() < tolerance


def test_tvms_own_cache(model: Model, tokens: list[int]) -> None:
    """The libraries for phones are made of it: where it cannot compute the model, it is not compiled."""
    if model.reference.config.temperature > 0.2:
        with pytest.raises(EdgeStreamError, match="cannot compile this model: TVM's cache has no attention temp"):
            paged_mlc.load_paged(model.mlc, n_ctx=N_CTX, n_keep=N_KEEP)
        return
    engine = paged_mlc.load_paged(model.mlc, n_ctx=N_CTX, n_keep=N_KEEP, cache_type_k="f32", cache_type_v="f32")
    assert np.abs(streamed(engine, tokens, 1) - model.reference.stream(N_CTX, N_KEEP).feed(tokens)).max() < TOLERANCE


def test_sessions_and_rewinds(model: Model, tokens: list[int], tmp_path: Path) -> None:
    with model.engine(rebase_at=REBASE_AT) as engine:
        with engine.stream() as stream:
            stream.feed(tokens[:150])
            stream.feed(tokens[50:57])
            stream.rewind(7)
            stream.save(tmp_path / "s")
            want = stream.logits_of(tokens[150:])
        with engine.restore(tmp_path / "s") as stream:
            # the window lies elsewhere in the ring, so that sums have another order
            assert np.abs(stream.logits_of(tokens[150:]) - want).max() < TOLERANCE


def test_convert_verifies(model: Model, tmp_path: Path) -> None:
    """In float32 the engine's logits are the checkpoint's, but for weights rounded to bfloat16."""
    arguments = ["convert", str(model.checkpoint), "--to", "mlc", "--quantization", "q0f32", "--verify"]
    result = CliRunner().invoke(cli, [*arguments, "-o", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "verified: " in result.output and "in NumPy" not in result.output
    if model.reference.config.arch != "qwen3moe":
        assert "mlc-llm" in result.output  # the note on what its own definition does
