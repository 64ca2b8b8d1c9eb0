"""Bad input gets one clear sentence, the right kind of error, and nothing is lost. One named case per row."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from architecture_metadata import FIXTURES, Fixture
from tiny_architectures import copy_with, make
from tiny_models import write_tiny_bert, write_tiny_gpt2, write_tiny_llama

from edge_stream import EdgeStreamError, Engine, Sampling, UnsupportedModelError
from edge_stream.models import names


def one_sentence(error: BaseException) -> str:
    """The message, which must be one line that a person can read."""
    text = str(error)
    assert text
    assert "\n" not in text
    assert "Traceback" not in text
    return text


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return write_tiny_llama(tmp_path / "good.gguf", head_dim=16)


def edited(path: Path, change: Callable[[bytes], bytes]) -> Path:
    """A damaged copy of a file."""
    out = path.with_name("bad.gguf")
    out.write_bytes(change(path.read_bytes()))
    return out


MODEL_FILES: dict[str, tuple[Callable[[Path], Path | str], str]] = {
    "missing": (lambda p: "does-not-exist.gguf", "does not exist"),
    "folder": (lambda p: p.parent, "is a folder"),
    "text file": (lambda p: edited(p, lambda b: b"hello " * 100), "not a GGUF"),
    "empty file": (lambda p: edited(p, lambda b: b""), "not a GGUF"),
    "magic only": (lambda p: edited(p, lambda b: b"GGUF"), "cannot load"),
    "cut in the header": (lambda p: edited(p, lambda b: b[:1000]), "cannot load .*: failed to read key"),
    "cut in the tensors": (lambda p: edited(p, lambda b: b[: len(b) // 2]), "ends before its tensors do: expected"),
    "one byte short": (lambda p: edited(p, lambda b: b.rstrip(b"\0")[:-1]), "ends before its tensors do: expected"),
    "future version": (lambda p: edited(p, lambda b: b[:4] + struct.pack("<I", 99) + b[8:]), "version 99"),
    "absurd tensor count": (lambda p: edited(p, lambda b: b[:8] + b"\xff" * 7 + b"\x7f" + b[16:]), "cannot load"),
    "absurd key count": (lambda p: edited(p, lambda b: b[:16] + b"\xff" * 7 + b"\x7f" + b[24:]), "cannot load"),
    "unknown architecture": (
        lambda p: edited(p, lambda b: b.replace(struct.pack("<Q", 5) + b"llama", struct.pack("<Q", 5) + b"lxxma")),
        "cannot load .*unknown model architecture: 'lxxma'",
    ),
    "missing tensor": (
        lambda p: edited(p, lambda b: b.replace(b"output_norm.weight", b"output_xxxx.weight")),
        "cannot load .*output_norm.weight",
    ),
    "name too long": (lambda p: "a" * 300, "File name too long"),
    "nobody's home": (lambda p: "~nobody-of-that-name/x.gguf", "no such user"),
    "hub name of no form": (lambda p: "hf:nonsense", "not of the form"),
    "hub name with a path": (lambda p: "hf:../../etc:passwd", "not of the form"),
}


def test_a_short_file_is_given_in_bytes(good: Path) -> None:
    size = max(int(t.data_offset + t.n_bytes) for t in gguf.GGUFReader(good).tensors)
    cut = edited(good, lambda b: b[: size - 1])
    with pytest.raises(EdgeStreamError, match=f"expected {size} bytes, has {size - 1}$"):
        Engine.load(cut, n_ctx=64)
    Engine.load(edited(good, lambda b: b[:size]), n_ctx=64).close()  # padding after the last tensor may be missing


@pytest.mark.parametrize("name", MODEL_FILES)
def test_model_file(name: str, good: Path) -> None:
    make, match = MODEL_FILES[name]
    with pytest.raises(EdgeStreamError, match=match) as caught:
        Engine.load(str(make(good)), n_ctx=64)
    one_sentence(caught.value)


UNSUPPORTED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "learned positions": (write_tiny_gpt2, "no rotary positions"),
    "embedding model": (write_tiny_bert, "embedding model|encoder"),
    "keys weighted after their rotation": (lambda p: make(p, "hunyuan-dense"), "changed after their rotation"),
    "a temperature by position": (lambda p: make(p, "mistral3_short"), "temperature .* 42 is the largest"),
    "sparse attention": (lambda p: make(p, "deepseek32"), "sparse or indexed"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_model(name: str, tmp_path: Path) -> None:
    write, match = UNSUPPORTED[name]
    with pytest.raises(UnsupportedModelError, match=match) as caught:
        Engine.load(write(tmp_path / "m.gguf"), n_ctx=64)
    assert "cannot stream" in one_sentence(caught.value)


# name: the model, a key of its metadata, and a value that contradicts its tensors (None: the key is left out)
CONTRADICTIONS: dict[str, tuple[str, str, Any, str]] = {
    "no rope sections": ("qwen3vl", "rope.dimension_sections", [0, 0, 0, 0], "do not add up"),
    "rope sections too long": ("qwen3vl", "rope.dimension_sections", [60, 50, 50, 0], "do not add up"),
    "rope sections too short": ("qwen2vl", "rope.dimension_sections", [1, 0, 0, 0], "do not add up"),
    "a negative rope section": ("qwen2vl", "rope.dimension_sections", [-3, 6, 5, 0], "do not add up"),
    "a hybrid without a convolution": ("lfm2", "shortconv.l_cache", None, "cannot load"),
    "a hybrid without states": ("granitehybrid", "ssm.state_size", 0, "cannot load"),
    "a hybrid without groups": ("qwen35", "ssm.group_count", 0, "cannot load"),
    "attention every 0th layer": ("qwen35", "full_attention_interval", 0, "full_attention_interval is 0"),
    "a sliding window of no layer": (
        "granite_swa",
        "attention.sliding_window_pattern",
        [False] * 4,
        "no layer that uses",
    ),
    "more is rotated than a head has": ("qwen35", "rope.dimension_count", 4096, "rotates 4096 dimensions"),
    "a choice of experts that is not known": ("afmoe", "expert_gating_func", 2**31 - 1, "expert_gating_func is 2147"),
    "windows of nothing": ("afmoe", "attention.sliding_window", 0, "memory that its architecture does not know"),
    "a negative epsilon": ("gemma3", "attention.layer_norm_rms_epsilon", -1e-6, "epsilon is negative"),
    "an epsilon that is no number": ("gemma3", "attention.layer_norm_rms_epsilon", float("nan"), "not a number"),
    "nothing is rotated": ("gemma2", "rope.dimension_count", 0, "rotates 0 dimensions"),
    "nothing is rotated in windows": ("gemma4", "rope.dimension_count_swa", 0, "rotates 0 dimensions"),
    "an odd number is rotated": ("gemma3", "rope.dimension_count", 5, "rotates 5 dimensions"),
    "attention without heads": ("gemma3", "attention.head_count", 0, "no heads"),
    "attention without a number of heads": ("gemma3", "attention.head_count", None, "no heads"),
    "no heads": ("qwen35", "attention.head_count", 0, "cannot load|cannot create|is damaged"),
    "latent attention without values": ("deepseek2", "attention.value_length_mla", None, "not of both"),
    "latent attention with keys of no length": ("deepseek2", "attention.key_length_mla", 0, "not of both"),
    "a negative sliding window": ("gemma3", "attention.sliding_window", -5, "cannot load|sliding_window"),
    "a sliding window of gigabytes": ("gemma3", "attention.sliding_window", 1 << 30, "sliding_window is 1073741824"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_metadata_that_contradict_the_tensors(name: str, tmp_path: Path) -> None:
    """llama.cpp would divide by zero, or abort, over some of these."""
    model, key, value, match = CONTRADICTIONS[name]
    good = make(tmp_path / "good.gguf", model)
    metadata = {k: v for k, v in FIXTURES[model].metadata.items() if k != key} | ({} if value is None else {key: value})
    bad = copy_with(good, tmp_path / "bad.gguf", Fixture(FIXTURES[model].arch, metadata))
    with pytest.raises(EdgeStreamError, match=match) as caught:
        Engine.load(bad, n_ctx=64)
    one_sentence(caught.value)


def test_an_assertion_while_loading_is_an_error(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ggml_abort ends the process, but not in the loading of a file."""
    from edge_stream.native import bindings

    # 2^32 - 1 layers: one of llama.cpp's own assertions
    count = struct.pack("<Q", 17) + b"llama.block_count" + struct.pack("<I", 4)
    bad = edited(good, lambda b: b.replace(count + struct.pack("<I", 2), count + b"\xff" * 4))
    assert bad.read_bytes() != good.read_bytes()
    with pytest.raises(EdgeStreamError, match=r"cannot load .*GGML_ASSERT\(.*\) failed \(llama-.*:\d+\)") as caught:
        Engine.load(bad, n_ctx=64)
    one_sentence(caught.value)
    assert bindings.library().es_version()  # the process lives
    Engine.load(good, n_ctx=64).close()


def test_vectors_that_kernels_abort_over(tmp_path: Path) -> None:
    """Their type is checked in the header: a file of one tensor is enough."""
    writer = gguf.GGUFWriter(tmp_path / "bad.gguf", "llama")
    writer.add_tensor("output_norm.weight", np.ones(64, dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(EdgeStreamError, match=r"output_norm\.weight is a vector of type f16, not f32"):
        Engine.load(tmp_path / "bad.gguf", n_ctx=64)


OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "n_keep = n_ctx": ({"n_ctx": 64, "n_keep": 64}, "n_keep = 64"),
    "n_keep leaves no window": ({"n_ctx": 64, "n_keep": 62}, "window"),
    "n_keep negative": ({"n_ctx": 64, "n_keep": -1}, "n_keep = -1"),
    "n_ctx negative": ({"n_ctx": -5}, "n_ctx = -5"),
    "n_ctx absurd": ({"n_ctx": 1 << 40}, "n_ctx"),
    "n_ctx beyond memory": ({"n_ctx": 1 << 28}, "would fit"),
    "n_batch zero": ({"n_ctx": 64, "n_batch": 0}, "n_batch = 0"),
    "unknown cache type": ({"n_ctx": 64, "cache_type_k": "q3_k"}, "cache type q3_k"),
    "quantised V without flash attention": ({"n_ctx": 64, "cache_type_v": "q8_0", "flash_attn": "off"}, "needs flash"),
    "cache type that does not divide the head": ({"n_ctx": 64, "cache_type_k": "q8_0"}, "cannot create|head"),
    "unknown flash_attn": ({"n_ctx": 64, "flash_attn": "maybe"}, "flash_attn = maybe"),
    "unknown sink_move": ({"n_ctx": 64, "sink_move": "magic"}, "sink_move = magic"),
    "n_slide negative": ({"n_ctx": 64, "n_slide": -1}, "n_slide"),
    "rebase_at inside the cache": ({"n_ctx": 64, "rebase_at": 10}, "rebase_at = 10"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_option(name: str, good: Path) -> None:
    options, match = OPTIONS[name]
    with pytest.raises(EdgeStreamError, match=match) as caught:
        Engine.load(good, **options)
    one_sentence(caught.value)


def grammar(stream: Any, text: str) -> None:
    """Begin to generate by a grammar."""
    next(stream.generate(1, sampling=Sampling(grammar=text)))


STREAM_CALLS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "empty prompt": (lambda s: s.feed(""), "prompt is empty"),
    "no tokens": (lambda s: s.feed([]), "prompt is empty"),
    "token beyond the vocabulary": (lambda s: s.feed([10**6]), "not in the vocabulary"),
    "token that would wrap": (lambda s: s.feed([2**32 + 5]), "not in the vocabulary"),
    "negative token": (lambda s: s.feed([-1]), "not in the vocabulary"),
    "tokens that are no numbers": (lambda s: s.feed(["a"]), "must be integers"),
    "rewind too far": (lambda s: s.rewind(10**6), "cannot rewind"),
    "rewind backwards": (lambda s: s.rewind(-1), "cannot rewind"),
    "rewind into the sinks": (lambda s: s.rewind(58), "cannot rewind"),
    "generate after rewind": (lambda s: (s.rewind(1), next(s.generate(1))), "no logits"),
    "bad grammar": (lambda s: next(s.generate(1, sampling=Sampling(grammar='root ::= "'))), "grammar"),
    "bad JSON schema": (lambda s: next(s.generate(1, sampling=Sampling(json_schema="{"))), "JSON schema"),
    "a grammar without an end": (lambda s: grammar(s, 'root ::= "a'), "cannot be parsed: "),
    "a grammar's text is one line": (
        lambda s: grammar(s, "root ::= (\n\x1b[2J"),
        r"cannot be parsed: expecting .* at \?\[2J$",
    ),
    "a grammar with repeats backwards": (lambda s: grammar(s, 'root ::= "a"{5,3}'), "at least 5 times and at most 3"),
    "a grammar of millions": (lambda s: grammar(s, f'root ::= "{"a" * 9999}"' + "{2000}"), "repeats too much"),
    "a grammar of too many": (lambda s: grammar(s, 'root ::= "a"{99999999999999999999}'), "repeats too much"),
    "a grammar of too many ways": (lambda s: grammar(s, 'root ::= "a"*{1000}'), "too many ways"),
    "grammar and schema": (lambda s: next(s.generate(1, sampling=Sampling(grammar="x", json_schema="{}"))), "not both"),
    "NaN temperature": (lambda s: next(s.generate(1, sampling=Sampling(temp=float("nan")))), "finite"),
    "repeat_penalty zero": (lambda s: next(s.generate(1, sampling=Sampling(repeat_penalty=0.0))), "repeat_penalty"),
    "repeat_last_n huge": (lambda s: next(s.generate(1, sampling=Sampling(repeat_last_n=2**21))), "repeat_last_n"),
    "logit bias of no token": (lambda s: next(s.generate(1, sampling=Sampling(logit_bias={10**6: 1.0}))), "logit_bias"),
}


@pytest.mark.parametrize("name", STREAM_CALLS)
def test_stream_call(name: str, good: Path) -> None:
    """The call fails, and the stream goes on as if it had not been made."""
    call, match = STREAM_CALLS[name]
    with Engine.load(good, n_ctx=64) as engine, engine.stream() as stream:
        stream.feed(list(range(10, 70)))
        with pytest.raises(EdgeStreamError, match=match) as caught:
            call(stream)
        one_sentence(caught.value)
        before = stream.stats.n_past
        assert before in (60, 59)
        stream.feed(list(range(10, 100)))
        assert stream.stats.n_past == before + 90


def test_lone_surrogates_are_text(good: Path) -> None:
    """What a terminal hands over for undecodable bytes must not crash the tokenizer."""
    with Engine.load(good, n_ctx=64) as engine:
        assert engine.tokenize("a\udcffb")


def test_demo_model_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EdgeStreamError, match=r"edge-stream\[demo\]"):
        names.resolve("demo")


def test_choose_quant() -> None:
    files = [
        "m-Q4_K_M.gguf",
        "m-Q8_0.gguf",
        "mmproj-m-Q8_0.gguf",
        "big-F16-00001-of-00002.gguf",
        "big-F16-00002-of-00002.gguf",
    ]
    assert names.choose_quant(files, "", "u/m") == ["m-Q4_K_M.gguf"]
    assert names.choose_quant(files, "q8_0", "u/m") == ["m-Q8_0.gguf"]
    assert names.choose_quant(files, "F16", "u/m") == files[3:]
    assert names.choose_quant(["only.gguf"], "", "u/m") == ["only.gguf"]
    with pytest.raises(EdgeStreamError, match=re.escape("no Q2_K file (it has m-Q4_K_M.gguf")):
        names.choose_quant(files, "Q2_K", "u/m")
