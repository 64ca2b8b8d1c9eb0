"""Loading a GGUF file: how far it is, ending it, and the memory that it leaves behind."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_runner import Loader, Run
from tiny_models import write_tiny_llama

from edge_stream import Engine
from edge_stream.native import bindings

Tiny = Callable[[str], Path]


def test_a_load_tells_how_far_it_is(tiny: Tiny) -> None:
    seen: list[int] = []
    Engine.load(tiny("gqa"), n_ctx=64, on_load=seen.append).close()
    assert seen == sorted(seen)
    assert seen[0] == 0 and seen[-1] == 100 and len(set(seen)) > 10


def test_the_tokens_that_end_a_text(tiny: Tiny) -> None:
    with Engine.load(tiny("gqa"), n_ctx=64) as engine:
        tokens = engine.backend.vocabulary.eog_tokens
        assert engine.eos in tokens
        assert list(tokens) == [token for token in range(engine.n_vocab) if engine.is_eog(token)]


def test_what_a_listener_raises_ends_the_load(tiny: Tiny) -> None:
    def stop(percent: int) -> None:
        if percent > 0:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        Engine.load(tiny("gqa"), n_ctx=64, on_load=stop)
    with Engine.load(tiny("gqa"), n_ctx=64) as engine, engine.stream() as stream:
        stream.feed_tokens([1, 2, 3])


def test_commands_show_it(run: Run, loader: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge_stream.cli.options._LOAD_SECONDS", 0)
    monkeypatch.setattr("edge_stream.cli.meter._LINE_SECONDS", 0)
    loader.engine.answers = ["Hi"]
    plain = loader.load

    def slowly(model: str, **settings: object) -> object:
        on_load = settings["on_load"]
        assert callable(on_load)
        on_load(40)
        return plain(model, **settings)

    monkeypatch.setattr(loader, "load", slowly)
    assert "loading 40 % of 100 %" in run("run", "-m", "x.gguf", "-p", "Hello", "-n", "1").stderr


# the file's pages that are resident after a load, in KiB, and a logit
_RESIDENT = """
import sys
from edge_stream import Engine
with Engine.load(sys.argv[1], n_ctx=64, proof=False, model_params={"use_extra_bufts": sys.argv[2] == "1"}) as engine:
    inside, resident = False, 0
    for line in open("/proc/self/smaps"):
        words = line.split()
        if not words[0].endswith(":"):
            inside = line.rstrip().endswith(sys.argv[1])
        elif inside and words[0] == "Rss:":
            resident += int(words[1])
    with engine.stream() as stream:
        stream.feed_tokens([1, 2, 3])
        print(resident, float(stream.logits[5]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/smaps is Linux's")
def test_the_file_of_repacked_weights_is_not_kept_in_memory(tmp_path: Path) -> None:
    """Every matrix is repacked (but for the embedding, which is small here); unpacked, all of the file stays."""
    if not bindings.library().es_bank_available():
        pytest.skip("a stock libllama keeps it")
    if platform.machine() == "x86_64" and " avx2 " not in Path("/proc/cpuinfo").read_text():
        pytest.skip("llama.cpp repacks nothing on this processor")
    whole = write_tiny_llama(tmp_path / "whole.gguf", head_dim=64, n_head=8, n_head_kv=8, n_embd=512, n_ff=2048)
    path = tmp_path / "q4_0.gguf"
    done = subprocess.run(
        [sys.executable, "-m", "edge_stream.cli", "convert", whole, "--to", "gguf", "--quantize", "Q4_0", "-o", path],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results = []
    for repacked in ("0", "1"):
        words = [sys.executable, "-c", _RESIDENT, str(path), repacked]
        resident, logit = subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()
        results.append((int(resident), float(logit)))
    (mapped, expected), (left, logit) = results
    size = path.stat().st_size / 1024
    assert mapped > 0.9 * size
    assert left < 0.4 * size
    assert logit == pytest.approx(expected, abs=0.05)
