"""The MLC engine: its logits equal the NumPy float64 StreamingLLM that the llama.cpp engine is held to."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import paged_mlc
import pytest
from mlc_models import write_mlc
from tiny_checkpoints import write_tiny

from edge_stream import EdgeStreamError, Engine
from edge_stream.converters import mlc
from edge_stream.converters.gguf_tensors import llama3_divisors
from edge_stream.converters.mlc import MlcOptions
from edge_stream.converters.mlc.readback import ReadBack
from edge_stream.converters.mlc.rope import frequencies
from edge_stream.converters.reference import logits as numpy_logits
from edge_stream.families import RopeScaling
from edge_stream.mlc.compile import host_target, target_lanes
from edge_stream.mlc.folder import MlcFolder
from edge_stream.models.conversion import open_source

N_CTX = 51  # neither a page of TVM's cache nor a block of ours
N_TOKENS = N_CTX + 400
TOLERANCE = 1e-3

Draw = Callable[..., list[int]]
Load = Callable[..., Any]


@pytest.fixture(scope="module")
def expected(reference: Any) -> Callable[..., np.ndarray]:
    """Reference logits [n_tokens, n_vocab], computed once per setting."""

    @cache
    def get(name: str, n_keep: int, size: int, tokens: tuple[int, ...], n_ctx: int = N_CTX) -> np.ndarray:
        stream = reference(name).stream(n_ctx, n_keep)
        return np.concatenate([stream.feed(tokens[i : i + size], size) for i in range(0, len(tokens), size)])

    return get


def streamed(engine: Any, tokens: list[int], size: int) -> np.ndarray:
    """Logits [n_tokens, n_vocab] of an engine fed in pieces of a size."""
    with engine.stream() as stream:
        return np.concatenate([stream.logits_of(tokens[i : i + size]) for i in range(0, len(tokens), size)])


@pytest.mark.parametrize("size", [1, 2, 7, 8])
@pytest.mark.parametrize("n_keep", [0, 4, 17])
def test_logits_equal_reference(n_keep: int, size: int, load_mlc: Load, expected: Any, draw: Draw) -> None:
    tokens = draw(N_TOKENS)
    got = streamed(load_mlc("gqa", n_ctx=N_CTX, n_keep=n_keep), tokens, size)
    assert np.abs(got - expected("gqa", n_keep, size, tuple(tokens))).max() < TOLERANCE


@pytest.mark.parametrize(("n_keep", "size"), [(0, 64), (4, 64), (17, 33)])
def test_large_chunks(n_keep: int, size: int, load_mlc: Load, expected: Any, draw: Draw) -> None:
    n_ctx = 4 * 64 + 17 + 5
    tokens = draw(n_ctx + 400)
    got = streamed(load_mlc("gqa", n_ctx=n_ctx, n_keep=n_keep), tokens, size)
    assert np.abs(got - expected("gqa", n_keep, size, tuple(tokens), n_ctx)).max() < TOLERANCE


def test_the_tolerance_can_fail(load_mlc: Load, expected: Any, draw: Draw) -> None:
    """A stream with other sinks or another window is far outside of the tolerance."""
    tokens = draw(N_TOKENS)
    want = expected("gqa", 4, 1, tuple(tokens))
    for n_ctx, n_keep in ((N_CTX, 3), (N_CTX - 1, 4)):
        assert np.abs(streamed(load_mlc("gqa", n_ctx=n_ctx, n_keep=n_keep), tokens, 1) - want).max() > 20 * TOLERANCE


@pytest.mark.parametrize("name", ["mha", "head64", "qwen2"])
def test_kinds_of_models_and_rebase(name: str, load_mlc: Load, expected: Any, draw: Draw) -> None:
    """Heads that share nothing, wide heads, biases; with a rebase every few tokens."""
    tokens = draw(200)
    engine = load_mlc(name, n_ctx=N_CTX, rebase_at=N_CTX + 20)
    with engine.stream() as stream:
        got = np.concatenate([stream.logits_of([token]) for token in tokens])
        assert stream.stats.n_rebases > 5
    assert np.abs(got - expected(name, 4, 1, tuple(tokens))).max() < TOLERANCE


def test_both_engines_choose_the_same_chunks(load: Load, load_mlc: Load, draw: Draw) -> None:
    """A prompt of many cache lengths in one call: evictions, counters and logits are the other engine's."""
    tokens = draw(1000)
    found = []
    for engine in (load("gqa", n_ctx=96, n_keep=5, n_batch=16), load_mlc("gqa", n_ctx=96, n_keep=5, n_batch=16)):
        with engine.stream() as stream:
            logits = stream.logits_of(tokens)
            stats = stream.stats
            found.append((logits, [stats.n_past, stats.n_cached, stats.n_evicted, stats.n_slides, stats.n_chunk]))
    assert found[0][1] == found[1][1]
    assert np.abs(found[0][0] - found[1][0]).max() < TOLERANCE


@pytest.mark.parametrize("n_slide", [5, 20])
def test_larger_slides(n_slide: int, load_mlc: Load, reference: Any, draw: Draw) -> None:
    tokens = draw(200)
    got = streamed(load_mlc("gqa", n_ctx=N_CTX, n_slide=n_slide), tokens, 1)
    assert np.abs(got - reference("gqa").stream(N_CTX, 4, n_slide).feed(tokens, 1)).max() < TOLERANCE


def test_rewind_after_slides(load: Load, load_mlc: Load, draw: Draw) -> None:
    """Tokens of the window are taken back after slides: what is cached, and the logits, are the other engine's."""
    found = []
    for engine in (load("gqa", n_ctx=N_CTX), load_mlc("gqa", n_ctx=N_CTX)):
        with engine.stream() as stream:
            stream.feed(draw(150))
            for seed in range(3):
                stream.feed(draw(7 + seed, seed=3))
                stream.rewind(7 + seed)
            with pytest.raises(EdgeStreamError, match="cannot rewind"):
                stream.rewind(N_CTX)
            found.append((stream.tokens(), stream.logits_of(draw(30, seed=4))))
    assert found[0][0] == found[1][0] and len(found[0][0]) < N_CTX
    assert np.abs(found[0][1] - found[1][1]).max() < TOLERANCE


def test_float16_cache(load_mlc: Load, draw: Draw) -> None:
    """An f16 cache differs by its rounding, not more after many slides than before."""
    tokens = draw(10 * N_CTX)
    exact = streamed(load_mlc("head64", n_ctx=N_CTX), tokens, 1)
    rounded = streamed(load_mlc("head64", n_ctx=N_CTX, cache_type_k="f16", cache_type_v="f16"), tokens, 1)
    error = np.abs(rounded - exact).mean(axis=1)
    assert 0 < error[8 * N_CTX :].mean() < 1.5 * error[N_CTX // 2 : N_CTX].mean()


def quantised(name: str, quantization: str, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Dense logits of a converted checkpoint, and of a float64 forward pass over the weights as they were stored."""
    source = open_source(str(write_tiny(folder / "hf", name)))
    try:
        mlc.convert(source, folder / "out", MlcOptions(quantization=quantization), lambda _line: None)
        tokens = [int(t) for t in np.random.default_rng(0).integers(0, source.model.n_vocab, 45)]
        stored = ReadBack(folder / "out", source, quantization)
        stored._q = replace(stored._q, dtype="float32")  # MLC's kernels round each weight to float16, ours do not
        want = numpy_logits(stored, tokens)
    finally:
        source.close()
    options = {"n_ctx": 64, "cache_type_k": "f32", "cache_type_v": "f32"}
    with Engine.load(folder / "out", **options) as engine, engine.stream() as stream:
        got = np.concatenate([stream.logits_of(tokens[:9]), *(stream.logits_of([token]) for token in tokens[9:])])
    return got, want


@pytest.mark.parametrize(
    ("name", "quantization"),
    [
        ("qwen3", "q4f16_1"),
        ("llama3", "q4f32_1"),
        ("mistral-v0.1", "q4f16_0"),
        ("smollm", "q0f16"),
        ("qwen2", "q4f32_1"),
        ("phi3", "q4f16_1"),
        ("ministral3", "q4f16_1"),
        ("smollm3", "q4f32_1"),
        ("gemma3", "q4f16_0"),
        ("gemma", "q4f16_1"),
        ("qwen3-moe", "q4f16_1"),
        ("qwen3-moe", "q0f16"),
    ],
)
def test_quantised_models_equal_numpy(
    name: str, quantization: str, tmp_path: Path, tiny_mlc: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    del tiny_mlc  # its folder for libraries
    monkeypatch.setenv("EDGE_STREAM_PRODUCTS", "stock")
    got, want = quantised(name, quantization, tmp_path)
    assert np.abs(got - want).max() < TOLERANCE


@pytest.mark.parametrize(
    ("name", "quantization"), [("qwen3", "q4f16_1"), ("smollm3", "q4f32_1"), ("gemma3", "q4f16_0")]
)
def test_products_in_integers(name: str, quantization: str, tmp_path: Path, tiny_mlc: Any) -> None:
    """Rounding to int16 costs 1e-4 of the logits' size; float16, in which MLC's kernels compute, would cost 1e-3."""
    del tiny_mlc
    if not target_lanes(host_target()).dot:
        pytest.skip("this processor has no products of int16")
    got, want = quantised(name, quantization, tmp_path)
    assert 2e-6 < np.abs(got - want).mean() / want.std() < 2e-4


def test_frequencies_of_llama3() -> None:
    """Against the converter's divisors, which are written independently."""
    plain = 500000.0 ** (-np.arange(0, 64, 2) / 64)
    scaling = RopeScaling("llama3", 8.0, 8192)
    divisors = llama3_divisors(scaling, 500000.0, 64)
    assert np.allclose(frequencies(500000.0, 64, scaling), plain / divisors, rtol=1e-6)
    assert len(set(np.round(divisors, 3))) > 3


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("longrope", "does not know rope scaling longrope"),
        ("su", "does not know rope scaling longrope"),
        ("dynamic", "rope scaling 'dynamic' is not supported"),
        ("yarn", "original_max_position_embeddings = 0 must be"),
    ],
)
@pytest.mark.parametrize("key", ["rope_type", "type"])
def test_other_scalings_are_refused(key: str, kind: str, message: str, tiny_mlc: Any, tmp_path: Path) -> None:
    """Under either name of the key: a folder of another converter may have the older one."""
    shutil.copytree(tiny_mlc("gqa"), tmp_path / "model")
    path = tmp_path / "model" / "mlc-chat-config.json"
    config = json.loads(path.read_text())
    factors = {f"{length}_factor": [1.0] * 8 for length in ("short", "long")}
    config["model_config"]["rope_scaling"] = {key: kind, "factor": 4.0} | factors
    if kind != "yarn":
        config["model_config"]["rope_scaling"]["original_max_position_embeddings"] = 64
    path.write_text(json.dumps(config))
    with pytest.raises(EdgeStreamError, match=message) as error:
        MlcFolder(tmp_path / "model")
    assert "mlc-chat-config.json" in str(error.value) or "MLC engine" in str(error.value)


@pytest.fixture(scope="module")
def paged_folder(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with MLC's own kind of library, compiled once."""
    return write_mlc(tiny("gqa"), tmp_path_factory.mktemp("paged") / "gqa", device="cpu")


def load_paged(folder: Path, n_keep: int, n_ctx: int = N_CTX) -> Engine:
    return paged_mlc.load_paged(folder, n_ctx=n_ctx, n_keep=n_keep, cache_type_k="f32", cache_type_v="f32")


@pytest.mark.parametrize("n_keep", [0, 4, 17])
def test_paged_cache_equals_reference(n_keep: int, paged_folder: Path, expected: Any, draw: Draw) -> None:
    """TVM's own cache evicts after attention: with a window of n_ctx - 1 it is held to the same reference."""
    tokens = draw(N_TOKENS)
    with load_paged(paged_folder, n_keep) as engine:
        assert np.abs(streamed(engine, tokens, 1) - expected("gqa", n_keep, 1, tuple(tokens))).max() < TOLERANCE


@pytest.mark.parametrize("size", [3, 8, 64])
def test_paged_cache_is_filled_in_chunks(size: int, paged_folder: Path, reference: Any, draw: Draw) -> None:
    """Chunks until the cache is full, then token by token."""
    tokens = draw(N_TOKENS)
    with load_paged(paged_folder, 4) as engine, engine.stream() as stream:
        got = np.concatenate([stream.logits_of(tokens[i : i + size]) for i in range(0, len(tokens), size)])
    sizes, at = [], 0
    while at < len(tokens):  # what es_window chooses for n_chunk = 1
        left = min(size - at % size, len(tokens) - at)
        sizes.append(min(left, 4 - at) if at < 4 else max(1, min(left, N_CTX - at)))
        at += sizes[-1]
    assert np.abs(got - reference("gqa").stream(N_CTX, 4).feed(tokens, sizes)).max() < TOLERANCE


def test_paged_cache_never_rewinds_after_a_slide(paged_folder: Path, expected: Any, draw: Draw) -> None:
    """Before a slide it may; after one it refuses, and goes on after a reset."""
    tokens = draw(N_TOKENS)
    with load_paged(paged_folder, 4) as engine, engine.stream() as stream:
        stream.feed(tokens[:20])
        stream.feed(draw(5, seed=3))
        stream.rewind(5)
        got = stream.logits_of(tokens[20:30])
        assert np.abs(got - expected("gqa", 4, 1, tuple(tokens))[20:30]).max() < TOLERANCE
        stream.feed(tokens[30:100])
        stream.rewind(2)
        with pytest.raises(EdgeStreamError, match="cannot rewind after it has slid"):
            stream.feed(tokens[:1])
        stream.reset()
        assert np.abs(stream.logits_of(tokens[:1]) - expected("gqa", 4, 1, tuple(tokens))[:1]).max() < TOLERANCE
        stream.feed(tokens[1:9])
        with pytest.raises(EdgeStreamError, match="no sessions"):
            stream.save("nowhere")
