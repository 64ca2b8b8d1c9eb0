"""LoRA adapters: the logits are those of merged weights, also past the end of the cache; sessions are tied to them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from tiny_models import write_tiny_llama

from edge_stream import EdgeStreamError, Engine
from edge_stream.errors import SessionError

RANK, ALPHA = 4, 8.0
NAMES = ("attn_q", "attn_k", "attn_v", "ffn_up")


def write_adapter(model: Path, path: Path, seed: int = 0, architecture: str = "llama") -> Path:
    """A random adapter for some matrices of a model."""
    writer, random = gguf.GGUFWriter(path, architecture), np.random.default_rng(seed)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", ALPHA)
    for tensor in gguf.GGUFReader(model).tensors:
        if any(name in tensor.name for name in NAMES):
            n_in, n_out = (int(n) for n in tensor.shape)
            writer.add_tensor(f"{tensor.name}.lora_a", random.normal(0, 0.3, (RANK, n_in)).astype(np.float32))
            writer.add_tensor(f"{tensor.name}.lora_b", random.normal(0, 0.1, (n_out, RANK)).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def merge(model: Path, adapter: Path, scale: float, path: Path) -> Path:
    """The model with the adapter added to its weights."""
    shutil.copy(model, path)
    parts = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(adapter).tensors}
    for tensor in gguf.GGUFReader(path, "r+").tensors:
        if f"{tensor.name}.lora_a" in parts:
            a, b = parts[f"{tensor.name}.lora_a"], parts[f"{tensor.name}.lora_b"]
            tensor.data[:] += scale * ALPHA / RANK * (b @ a)
    return path


@pytest.mark.parametrize("sink_move", ["bank", "redecode"])
def test_a_stream_is_that_of_the_merged_model(
    load: Callable[..., Engine],
    tiny: Callable[[str], Path],
    tmp_path: Path,
    sink_move: str,
    draw: Callable[..., list[int]],
) -> None:
    adapter = write_adapter(tiny("gqa"), tmp_path / "adapter.gguf")
    merged = merge(tiny("gqa"), adapter, 0.5, tmp_path / "merged.gguf")
    options = {"n_ctx": 48, "sink_move": sink_move, "flash_attn": "off", "cache_type_k": "f32", "cache_type_v": "f32"}
    tokens = draw(150)
    with (
        Engine.load(merged, n_threads=1, **options) as whole,
        Engine.load(tiny("gqa"), n_threads=1, lora=[(str(adapter), 0.5)], **options) as engine,
        Engine.load(tiny("gqa"), n_threads=1, **options) as bare,
    ):
        found = []
        for one in (whole, engine, bare):
            with one.stream() as stream:
                stream.feed(tokens)
                assert stream.stats.n_evicted > 50
                found.append(np.array(stream.logits))
    np.testing.assert_allclose(found[1], found[0], atol=2e-4)
    assert np.abs(found[2] - found[0]).max() > 0.1


def test_a_session_needs_the_same_adapters(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    one = write_adapter(tiny("gqa"), tmp_path / "one.gguf")
    two = write_adapter(tiny("gqa"), tmp_path / "two.gguf", seed=1)
    session = tmp_path / "session"
    with Engine.load(tiny("gqa"), n_ctx=64, lora=[(str(one), 1.0)]) as engine, engine.stream() as stream:
        stream.feed("some text")
        stream.save(session)
        engine.restore(session).close()
    for other in ([], [(str(two), 1.0)], [(str(one), 0.5)], [(str(one), 1.0), (str(two), 1.0)]):
        with (
            Engine.load(tiny("gqa"), n_ctx=64, lora=other) as engine,
            pytest.raises(SessionError, match="another model"),
        ):
            engine.restore(session)


def test_bad_adapters_are_refused(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    foreign = write_adapter(tiny("gqa"), tmp_path / "foreign.gguf", architecture="qwen2")
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"no GGUF file")
    for file, match in (
        (tmp_path / "none", "does not exist"),
        (bad, "cannot load LoRA"),
        (foreign, "is for another architecture, qwen2: the model is llama"),
    ):
        with pytest.raises(EdgeStreamError, match=match):
            Engine.load(tiny("gqa"), n_ctx=64, lora=[(str(file), 1.0)])


EXACT = {"n_ctx": 64, "n_threads": 1, "flash_attn": "off", "cache_type_k": "f32", "cache_type_v": "f32"}


def test_scales_can_change(tiny: Callable[[str], Path], tmp_path: Path, draw: Callable[..., list[int]]) -> None:
    """Every set of scales is a model of its own, whose streams and sessions no other reads."""
    files = [write_adapter(tiny("gqa"), tmp_path / f"{seed}.gguf", seed=seed) for seed in (1, 2)]
    tokens, session = draw(150), tmp_path / "session"

    def logits(engine: Engine) -> np.ndarray:
        with engine.stream() as stream:
            stream.feed(tokens)
            stream.save(session)
            return np.array(stream.logits)

    with Engine.load(tiny("gqa"), lora=[(str(file), 1.0) for file in files], **EXACT) as engine:
        for scales in ([0.5, 0.0], [1.0, 1.0], [0.0, 0.0]):
            stream = engine.stream()
            engine.set_adapters(scales)
            with pytest.raises(EdgeStreamError, match="stream is closed"):
                stream.feed(tokens)
            if session.exists():
                with pytest.raises(SessionError, match="another model"):
                    engine.restore(session)
            found = logits(engine)
            lora = [(str(file), scale) for file, scale in zip(files, scales, strict=True)]
            with Engine.load(tiny("gqa"), lora=lora, **EXACT) as other:
                other.restore(session).close()
                np.testing.assert_array_equal(logits(other), found)
        with Engine.load(tiny("gqa"), **EXACT) as bare:
            np.testing.assert_array_equal(logits(bare), found)


@pytest.mark.parametrize("tied", [False, True])
def test_an_adapter_of_the_embedding(tied: bool, tmp_path: Path, draw: Callable[..., list[int]]) -> None:
    """A tied one is refused: llama.cpp would use it for the output matrix as well, in the wrong shapes, and abort."""
    model, tokens = write_tiny_llama(tmp_path / "model.gguf", head_dim=16, tied=tied), draw(20)
    path, random = tmp_path / "embedding.gguf", np.random.default_rng(0)
    embedding = next(t for t in gguf.GGUFReader(model).tensors if t.name == "token_embd.weight")
    n_embd, n_vocab = (int(n) for n in embedding.shape)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", ALPHA)
    writer.add_tensor("token_embd.weight.lora_a", random.normal(0, 1, (n_vocab, RANK)).astype(np.float32))
    writer.add_tensor("token_embd.weight.lora_b", random.normal(0, 1, (n_embd, RANK)).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if tied:
        with pytest.raises(EdgeStreamError, match="which is this model's output matrix too"):
            Engine.load(model, n_ctx=64, lora=[(str(path), 1.0)])
        return
    with (
        Engine.load(model, n_ctx=64, lora=[(str(path), 1.0)]) as engine,
        Engine.load(model, n_ctx=64) as bare,
    ):
        assert np.abs(engine.stream().logits_of(tokens) - bare.stream().logits_of(tokens)).max() > 0.1
