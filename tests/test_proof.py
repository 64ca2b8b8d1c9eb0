"""The proof at load: right models pass it, wrongly rotated ones do not, and it is made once per weights."""

from __future__ import annotations

import ctypes as C
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import raw_llama
from test_architectures import MUST_STREAM

from edge_stream import Engine, UnsupportedModelError
from edge_stream.models import names, proofs
from edge_stream.native import bindings, libraries

pytestmark = pytest.mark.skipif(not bindings.library().es_bank_available(), reason="a stock libllama has no sink bank")

SIGN, BASE, NOPE = 1, 2, 3  # enum es_bank_fault
OPTIONS: dict[str, Any] = {"n_ctx": raw_llama.N_CTX, "n_threads": 1}


@pytest.fixture(autouse=True)
def no_kept_proofs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What other tests proved of the same weights is not known here."""
    monkeypatch.setenv("EDGE_STREAM_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def fault() -> Iterator[Callable[[int], None]]:
    """fault(kind): contexts made from now on learn a wrong rotation."""
    libraries.llama()
    library = C.CDLL(str(libraries.llama_dir() / libraries._lib_name("llama")))
    library.llama_es_bank_fault.argtypes = [C.c_int32]
    yield library.llama_es_bank_fault
    library.llama_es_bank_fault(0)


def prove(path: Path) -> tuple[str, bindings.Proof]:
    """The reason why a model is refused ("" if it is not) and what it showed."""
    native, raw = bindings.library(), bindings.Proof()
    with Engine.load(path, **OPTIONS, proof=False) as engine, engine.stream() as stream:
        status = native.es_stream_prove(stream.handle, C.byref(raw))
    return (native.es_last_error().decode() if status else ""), raw


@pytest.mark.parametrize("name", sorted(MUST_STREAM))
def test_a_wrong_rotation_is_refused(name: str, made: Callable[[str], Path], fault: Callable[[int], None]) -> None:
    """Turned the other way, by another base, or where the model does not rotate: refused, unless nothing is rotated."""
    path = made(name)
    reason, right = prove(path)
    assert reason == ""
    if right.distance == 0:
        pytest.skip("a recurrent model has no keys")
    refused = []
    for kind in (SIGN, BASE, NOPE):
        fault(kind)
        reason, wrong = prove(path)
        if reason:
            assert "off by" in reason
            refused.append(kind)
        else:  # the fault did not touch this model
            assert (wrong.move, wrong.rebase) == (right.move, right.rebase)
    assert refused in ([SIGN, BASE], [NOPE], [SIGN, BASE, NOPE])


@pytest.mark.parametrize("kind", [SIGN, BASE])
def test_quantised_weights_hide_no_wrong_rotation(kind: int, fault: Callable[[int], None]) -> None:
    """The runtime's rounding makes differences of a tenth of the spread; a wrong rotation makes far larger ones."""
    demo = names.resolve("demo")
    reason, right = prove(demo)
    assert reason == "" and right.parallel
    fault(kind)
    reason, wrong = prove(demo)
    assert "off by" in reason
    assert wrong.move > 3 * max(right.move, right.positions, right.rebase)


def test_the_engine_refuses_what_fails(made: Callable[[str], Path], fault: Callable[[int], None]) -> None:
    fault(SIGN)
    with pytest.raises(UnsupportedModelError, match=r"llama.gguf cannot stream: its sinks cannot be moved .* off by"):
        Engine.load(made("llama"), **OPTIONS, rebase_at=3000)
    Engine.load(made("llama"), **OPTIONS, rebase_at=3000, proof=False).close()


def test_absolute_positions_are_named(made: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A temperature that sets in at position 64: exact below it, and refused where streams would get there."""
    with pytest.raises(UnsupportedModelError, match=r"temperature .* from 64 on, so 42 is the largest n_ctx"):
        Engine.load(made("mistral3_short"), n_ctx=48)
    with Engine.load(made("mistral3_short"), n_ctx=40, n_threads=1) as engine:
        assert engine.proof is not None
        assert engine.proof.distance < 64


def test_once_per_weights(made: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept on disk, for streams that get no further; for other weights, or a damaged file, it is made again."""
    native, made_proofs = bindings.library(), []
    real = native.es_stream_prove
    monkeypatch.setattr(native, "es_stream_prove", lambda *args: (made_proofs.append(1), real(*args))[1])

    def load(name: str, **options: Any) -> proofs.Proof:
        with Engine.load(made(name), **(OPTIONS | options)) as engine:
            assert engine.proof is not None
            return engine.proof

    first = load("llama")
    assert load("llama") == first
    assert load("llama", rebase_at=100) == first
    assert len(made_proofs) == 1
    assert load("llama", rebase_at=9000).distance > first.distance
    assert len(made_proofs) == 2
    load("qwen3")
    assert len(made_proofs) == 3
    files = sorted((names.cache_folder() / "proofs").iterdir())
    assert [file.suffix for file in files] == [".json", ".json"]
    for file in files:
        file.write_text(json.dumps({"key": [], "proof": 5}))
    load("llama")
    assert len(made_proofs) == 4


def test_a_cache_that_cannot_be_written_is_no_error(
    made: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EDGE_STREAM_CACHE", str(tmp_path / "file"))
    with Engine.load(made("llama"), **OPTIONS) as engine:
        assert engine.proof is not None


@pytest.mark.parametrize("rebase_at", [0, 3000])
def test_redecoding_is_proven_too(made: Callable[[str], Path], rebase_at: int) -> None:
    """What llama.cpp's own shift gets wrong is refused where sinks are decoded again."""
    options = OPTIONS | {"sink_move": "redecode", "rebase_at": rebase_at}
    Engine.load(made("llama"), **options).close()
    for name in ("smollm3", "phi4mini"):  # layers without rotation; longrope's magnitude, applied twice
        with pytest.raises(UnsupportedModelError, match=r"llama\.cpp's own shift does not"):
            Engine.load(made(name), **options)
    for name in ("lfm2", "qwen3vl", "granitehybrid", "deepseek2"):
        with pytest.raises(UnsupportedModelError, match="without the sink bank"):
            Engine.load(made(name), **options)
