"""Converted checkpoints against transformers: its logits, its tokens, and llama.cpp's own converter.

`make test-transformers` runs this in an environment of its own: torch and transformers are large.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: make test-transformers")
transformers = pytest.importorskip("transformers", reason="transformers is not installed: make test-transformers")

# no conftest.py here: it would hide that of tests/
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import families  # noqa: E402
import gguf  # noqa: E402
import llama_cpp_converter as llama_cpp  # noqa: E402
import numpy as np  # noqa: E402
import sinks  # noqa: E402
from awkward_strings import awkward_strings  # noqa: E402

from edge_stream import Engine  # noqa: E402
from edge_stream.converters import to_gguf  # noqa: E402
from edge_stream.models.conversion import open_source  # noqa: E402

TOKENS = [int(t) for t in np.random.default_rng(0).integers(10, 600, 96)]
# where llama.cpp itself computes less precisely: activations have 8 bits for MXFP4, GELU is a table in float16
TOLERANCE: dict[str, float] = {
    "gpt_oss-mxfp4": 0.05,
    "gemma4": 1e-3,
    "gemma4-experts": 2e-3,
    "gemma3n": 2e-3,
    "gemma3n-shared": 1e-3,
    "gemma3n-e2b": 1e-3,
}


@pytest.fixture(scope="module", params=families.FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path, Any]:
    """Name, checkpoint, converted file, transformers' model."""
    name = request.param
    folder = tmp_path_factory.mktemp(name)
    model = families.write(folder / "checkpoint", name)
    out = folder / "ours.gguf"
    to_gguf.convert(open_source(str(folder / "checkpoint")), out, to_gguf.GgufOptions(outtype="f32"), lambda _: None)
    return name, folder / "checkpoint", out, model


def exact(path: Path, n_ctx: int = 256, n_keep: int = 4, **more: Any) -> Engine:
    options = {"cache_type_k": "f32", "cache_type_v": "f32", "flash_attn": "off"} | more
    return Engine.load(path, n_ctx=n_ctx, n_keep=n_keep, n_batch=256, n_ubatch=256, **options)


def test_logits(case: tuple[str, Path, Path, Any], record_property: Callable[[str, Any], None]) -> None:
    name, _, out, model = case
    with torch.no_grad():
        want = model(torch.tensor([TOKENS])).logits[0].numpy()
    with exact(out) as engine:
        got = engine.stream().logits_of(TOKENS)
    assert want.std() > 0.1, "the model says nothing"
    error = float(np.abs(got - want).max() / np.abs(want).max())
    record_property("relative error", error)
    print(f"{name}: {error:.2g}")
    assert error < TOLERANCE.get(name, 1e-4)


def test_gelu_is_a_table(tmp_path: Path) -> None:
    """What 22 random layers of Gemma 3n differ by is the rounding of GELU, and nothing else."""
    model = families.write(tmp_path / "checkpoint", "gemma3n-shared", gentle=False)
    out, source = tmp_path / "ours.gguf", open_source(str(tmp_path / "checkpoint"))
    to_gguf.convert(source, out, to_gguf.GgufOptions(outtype="f32"), lambda _: None)
    with exact(out, proof=False) as engine:
        got = engine.stream().logits_of(TOKENS)
    errors = []
    for table in (False, True):
        for part in model.modules():
            if table and hasattr(part, "act_fn"):
                part.act_fn = families.TableGelu()
        with torch.no_grad():
            want = model(torch.tensor([TOKENS])).logits[0].numpy()
        errors.append(float(np.abs(got - want).max() / np.abs(want).max()))
    print(f"without the table {errors[0]:.2g}, with it {errors[1]:.2g}")
    assert errors[0] > 0.05 and errors[1] < 0.02


def test_streaming(case: tuple[str, Path, Path, Any]) -> None:
    """Past the end of the cache: attention sees sinks and window at in-cache positions, states have read everything."""
    name, _, out, model = case
    want = sinks.streamed_logits(model, TOKENS).numpy()
    with torch.no_grad():
        whole = model(torch.tensor([TOKENS])).logits[0].numpy()
    with exact(out, sinks.N_CTX, sinks.N_KEEP) as engine:
        stream, got = engine.stream(), []
        for token in TOKENS:
            stream.feed([token])
            got.append(np.array(stream.logits))
        assert stream.stats.n_evicted == len(TOKENS) - sinks.N_CTX
    error = float(np.abs(np.array(got) - want).max() / np.abs(want).max())
    print(f"{name}: {error:.2g}")
    tolerance = TOLERANCE.get(name, 1e-4)
    assert error < tolerance
    assert np.abs(whole - want).max() / np.abs(want).max() > 10 * tolerance, "nothing that was evicted mattered"


def test_tokens(case: tuple[str, Path, Path, Any]) -> None:
    name, folder, out, _ = case
    if not (folder / "tokenizer.json").exists():
        pytest.skip("SentencePiece models are compared in tests/test_convert_gguf.py")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    known = families.KNOWN_TOKENS.get(families.FAMILIES[name][2], lambda _: False)
    with exact(out) as engine:
        for text in awkward_strings(200):
            if not known(text):
                assert engine.tokenize(text, special=True) == tokenizer.encode(text, add_special_tokens=False), text


def test_equal_to_llama_cpp(case: tuple[str, Path, Path, Any]) -> None:
    """Tensor by tensor and key by key."""
    name, folder, out, _ = case
    if name in families.NOT_IN_LLAMA_CPP:
        pytest.skip(families.NOT_IN_LLAMA_CPP[name])
    theirs, pre = out.with_name("theirs.gguf"), gguf.GGUFReader(out).fields["tokenizer.ggml.pre"].contents()
    extra = ["--no-mtp"] if name.startswith("qwen3_5") else []  # tensors that only its own speculation uses
    families.publish(folder)
    published = out.with_name("published.gguf")
    to_gguf.convert(open_source(str(folder)), published, to_gguf.GgufOptions(outtype="f32"), lambda _: None)
    done = subprocess.run(
        [sys.executable, llama_cpp.__file__, pre, folder, "--outtype", "f32", "--outfile", theirs, *extra],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    a, b = gguf.GGUFReader(published), gguf.GGUFReader(theirs)
    ours, other = ({t.name: t for t in r.tensors} for r in (a, b))
    assert ours.keys() - families.MORE_TENSORS.get(name, set()) == other.keys()
    for tensor in other:
        assert ours[tensor].tensor_type == other[tensor].tensor_type, tensor
        assert list(ours[tensor].shape) == list(other[tensor].shape), tensor
        assert np.allclose(ours[tensor].data, other[tensor].data, rtol=1e-6, atol=0), tensor
    arch = a.fields["general.architecture"].contents()
    keys, wanted = ({k.removeprefix(f"{arch}."): f.contents() for k, f in r.fields.items()} for r in (a, b))
    assert {
        key: (keys.get(key), wanted.get(key))
        for key in keys.keys() | wanted.keys()
        if not _same(keys.get(key), wanted.get(key))
        and key not in families.DIFFERENT
        and key not in families.DIFFERENT_IN.get(name, ())
        and not (key in families.MORE and key not in wanted)
        and not (key in families.FALSE and key not in wanted and keys[key] is False)
    } == {}


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, float) and isinstance(b, (int, float)):
        return bool(np.isclose(a, b, rtol=1e-6))
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return all(_same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)
