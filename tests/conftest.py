"""Fixtures: tiny random models written once per session, and engines over them."""

from __future__ import annotations

import os

# several engines share the cores with the test itself
os.environ.setdefault("OMP_NUM_THREADS", "2")

import importlib.util
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
from cli_runner import Loader, Run, install, invoke
from mlc_models import write_mlc
from reference import Reference, load_reference
from serving_template import SPECIAL, TEMPLATE
from tiny_models import write_tiny_gemma3, write_tiny_llama, write_tiny_qwen2

from edge_stream import Engine
from edge_stream.hardware import devices
from edge_stream.native import bindings

# a shell's background job ignores Ctrl-C, and so would the commands that tests interrupt
signal.signal(signal.SIGINT, signal.default_int_handler)

# it handles segmentation faults, into what pytest captures; pytest's own handler, set up after this, names the test
if importlib.util.find_spec("tvm_ffi") is not None:
    import tvm_ffi  # noqa: F401

# no test measures wall-clock time
hypothesis.settings.register_profile("edge-stream", deadline=None)
hypothesis.settings.load_profile("edge-stream")

# proofs and compiled libraries of earlier runs are nobody's business
_CACHE = tempfile.TemporaryDirectory(prefix="edge-stream-cache-")
os.environ.setdefault("EDGE_STREAM_CACHE", _CACHE.name)

WRITERS: dict[str, Callable[[Path], Path]] = {
    "gqa": lambda p: write_tiny_llama(p, head_dim=16),
    "mha": lambda p: write_tiny_llama(p, head_dim=16, n_head_kv=4, seed=1),
    "head64": lambda p: write_tiny_llama(p, seed=2),
    "linear": lambda p: write_tiny_llama(p, head_dim=16, rope_scaling=("linear", 4.0), seed=3),
    "yarn": lambda p: write_tiny_llama(p, head_dim=32, rope_scaling=("yarn", 4.0, 64), seed=4),
    "factors": lambda p: write_tiny_llama(p, head_dim=16, rope_factors=True, seed=5),
    "one_layer": lambda p: write_tiny_llama(p, head_dim=16, n_layer=1, seed=6),
    "chat": lambda p: write_tiny_llama(p, head_dim=16, chat_template=TEMPLATE, special_tokens=SPECIAL, seed=7),
    "qwen2": lambda p: write_tiny_qwen2(p),
    "gemma3": lambda p: write_tiny_gemma3(p),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of the bank need a libllama of ours: with a stock one only the fallback is there to test."""
    if bindings.library().es_bank_available():
        return
    for item in items:
        if "bank" in getattr(getattr(item, "callspec", None), "params", {}).values():
            item.add_marker(pytest.mark.skip(reason="a stock libllama has no sink bank"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """tiny(name) -> the GGUF file of WRITERS[name]."""
    folder = tmp_path_factory.mktemp("models")

    def get(name: str) -> Path:
        path = folder / f"{name}.gguf"
        return path if path.exists() else WRITERS[name](path)

    return get


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """made(name) -> the tiny model `name` of tiny_architectures."""
    import tiny_architectures

    folder = tmp_path_factory.mktemp("architectures")

    def get(name: str) -> Path:
        path = folder / f"{name}.gguf"
        return path if path.exists() else tiny_architectures.make(path, name)

    return get


@pytest.fixture(scope="session")
def tiny_mlc(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Path]]:
    """tiny_mlc(name, quantization) -> the same model as an MLC folder. Libraries are built once per session."""
    folder = tmp_path_factory.mktemp("mlc")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGE_STREAM_CACHE", os.environ.get("EDGE_STREAM_CACHE", str(folder / "cache")))

        def get(name: str, quantization: str = "q0f32") -> Path:
            path = folder / f"{name}-{quantization}"
            return path if path.exists() else write_mlc(tiny(name), path, quantization)

        yield get


@pytest.fixture
def load_mlc(tiny_mlc: Callable[..., Path]) -> Iterator[Callable[..., Engine]]:
    """load_mlc(name, **options) -> an exact MLC engine (float32 weights and KV), closed after the test."""
    engines: list[Engine] = []

    def get(name: str, *, quantization: str = "q0f32", **options: Any) -> Engine:
        exact = {"cache_type_k": "f32", "cache_type_v": "f32", "n_threads": 1}
        engines.append(Engine.load(tiny_mlc(name, quantization), **(exact | options)))
        return engines[-1]

    yield get
    for engine in engines:
        engine.close()


@pytest.fixture(scope="session")
def reference(tiny: Callable[[str], Path]) -> Callable[[str], Reference]:
    """reference(name) -> the NumPy float64 implementation over the same weights."""
    loaded: dict[str, Reference] = {}

    def get(name: str) -> Reference:
        if name not in loaded:
            # ggml's CPU backend looks GELU up in a float16 table; with that table the rest can be compared
            on_cpu = not any(d.is_local_gpu for d in devices.devices())
            loaded[name] = load_reference(tiny(name)).with_gelu("table" if name == "gemma3" and on_cpu else "exact")
        return loaded[name]

    return get


@pytest.fixture
def load(tiny: Callable[[str], Path]) -> Iterator[Callable[..., Engine]]:
    """load(name, **options) -> an exact engine (float32 KV, no flash attention), closed after the test."""
    engines: list[Engine] = []

    def get(name: str, **options: Any) -> Engine:
        exact = {"cache_type_k": "f32", "cache_type_v": "f32", "flash_attn": "off", "n_threads": 1}
        engines.append(Engine.load(tiny(name), **(exact | options)))
        return engines[-1]

    yield get
    for engine in engines:
        engine.close()


@pytest.fixture(params=["llama.cpp", "mlc"])
def load_each(request: pytest.FixtureRequest) -> Callable[..., Engine]:
    """load or load_mlc: for tests of what both engines promise, which run once with each."""
    getter: Callable[..., Engine] = request.getfixturevalue("load" if request.param == "llama.cpp" else "load_mlc")
    return getter


@pytest.fixture(scope="session")
def draw() -> Callable[..., list[int]]:
    """draw(n, n_vocab, seed) -> random tokens that are not control tokens."""

    def get(n: int, n_vocab: int = 256, seed: int = 0) -> list[int]:
        return [int(t) for t in np.random.default_rng(seed).integers(10, n_vocab, n)]

    return get


@pytest.fixture
def loader(monkeypatch: pytest.MonkeyPatch) -> Loader:
    """Stands in for Engine."""
    return install(monkeypatch)


@pytest.fixture
def run(loader: Loader) -> Run:
    """run(*arguments) -> the result of the command line, with the loader's engine."""
    return invoke
