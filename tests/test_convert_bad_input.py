"""What convert is given may be broken or hostile: one clear sentence each, and nothing is left behind."""

from __future__ import annotations

import json
import pickle
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny_checkpoints as tiny
from family_configs import FAMILIES
from family_configs import config_of as family_config_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_stream.converters import gguf_metadata, safetensors_files, to_gguf
from edge_stream.converters.config import read_config, text_config
from edge_stream.converters.tensor_names import expected_tensors
from edge_stream.errors import EdgeStreamError
from edge_stream.families import find_family
from edge_stream.hardware import memory
from edge_stream.models.conversion import open_source
from edge_stream.output import files, staging

NAME = "llama-linear"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A good checkpoint in one file, a good one in three, and one of each other tokenizer."""
    root = tmp_path_factory.mktemp("good")
    return {
        "single": tiny.write_tiny(root / "single", NAME),
        "sharded": tiny.write_tiny(root / "sharded", NAME, shards=3),
        "bytes": tiny.write_tiny(root / "bytes", "llama3"),
    }


#
# ways to break a folder
#


def edit(file: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    """Change a JSON file; `change` edits in place or returns the new value."""

    def apply(folder: Path) -> None:
        value = json.loads((folder / file).read_text(encoding="utf-8"))
        result = change(value)
        (folder / file).write_text(json.dumps(value if result is None else result), encoding="utf-8")

    return apply


def config(**changes: Any) -> Callable[[Path], None]:
    return edit("config.json", lambda c: c.update(changes))


def without(key: str) -> Callable[[Path], None]:
    return edit("config.json", lambda c: {k: v for k, v in c.items() if k != key})


def header(change: Callable[[dict[str, Any]], Any], file: str = SINGLE) -> Callable[[Path], None]:
    """Change the JSON header of a safetensors file; the bytes behind it stay."""

    def apply(folder: Path) -> None:
        raw = (folder / file).read_bytes()
        length = int.from_bytes(raw[:8], "little")
        value = json.loads(raw[8 : 8 + length])
        result = change(value)
        text = result if isinstance(result, bytes) else json.dumps(value).encode()
        (folder / file).write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])

    return apply


def content(file: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda folder: (folder / file).write_bytes(change((folder / file).read_bytes())) and None


def tensors(change: Callable[[dict[str, np.ndarray]], Any]) -> Callable[[Path], None]:
    """Change tensors and write the file anew."""

    def apply(folder: Path) -> None:
        values = dict(tiny.random_tensors(tiny.config_of(NAME)))
        change(values)
        tiny.save_tensors(folder / SINGLE, values, "F32")

    return apply


def unlink(file: str) -> Callable[[Path], None]:
    return lambda folder: (folder / file).unlink()


def swap_for_link(file: str) -> Callable[[Path], None]:
    """Replace a file by a link to the same content outside of the folder."""

    def apply(folder: Path) -> None:
        outside = folder.parent / "outside"
        shutil.move(folder / file, outside)
        (folder / file).symlink_to(outside)

    return apply


def only_pickle(folder: Path) -> None:
    (folder / SINGLE).unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))


def disguised_pickle(folder: Path) -> None:
    (folder / SINGLE).write_bytes(pickle.dumps(Bomb()))


class Bomb:
    """Raises when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return eval, ("1 / 0",)


def twice_in_header(value: dict[str, Any]) -> bytes:
    text = json.dumps(value)
    first = json.dumps("model.norm.weight") + ": " + json.dumps(value["model.norm.weight"])
    return ("{" + first + ", " + text[1:]).encode()


def first_file(weight_map: dict[str, str], file: str) -> None:
    weight_map["model.norm.weight"] = file


def shard_with_a_copy(folder: Path) -> None:
    """The same tensor in two shards."""
    values = dict(tiny.random_tensors(tiny.config_of(NAME)))
    tiny.save_tensors(
        folder / "model-00009-of-00003.safetensors", {"model.norm.weight": values["model.norm.weight"]}, "F32"
    )
    edit(INDEX, lambda i: i["weight_map"].update({"extra": "model-00009-of-00003.safetensors"}))(folder)


def with_nan(value: float) -> Callable[[dict[str, np.ndarray]], None]:
    def change(values: dict[str, np.ndarray]) -> None:
        values["model.layers.1.mlp.down_proj.weight"][5, 7] = value

    return change


def entry(name: str, **changes: Any) -> Callable[[Path], None]:
    return header(lambda h: h[name].update(changes))


NORM = "model.norm.weight"
Q = "model.layers.0.self_attn.q_proj.weight"
# name -> folder to break, how, what the sentence must contain
CASES: dict[str, tuple[str, Callable[[Path], None], str]] = {
    # the folder
    "no config.json": ("single", unlink("config.json"), "has no config.json"),
    "no weights": ("single", unlink(SINGLE), "has no safetensors files"),
    "pickle instead of safetensors": ("single", only_pickle, "pickle"),
    "pickle under safetensors' name": ("single", disguised_pickle, "pickle file|header of"),
    "no tokenizer": ("single", unlink("tokenizer.model"), "has no tokenizer"),
    "weights are a link out of the folder": ("single", swap_for_link(SINGLE), "link out of the folder"),
    "config is a link out of the folder": ("single", swap_for_link("config.json"), "link out of the folder"),
    "tokenizer is a link out of the folder": ("single", swap_for_link("tokenizer.model"), "link out of the folder"),
    # config.json
    "config is not JSON": ("single", content("config.json", lambda b: b[:-5]), "config.json is not valid JSON"),
    "config is not UTF-8": ("single", content("config.json", lambda _: b"\xff\xfe\x00"), "not UTF-8"),
    "config is a list": ("single", edit("config.json", lambda c: [c]), "not a JSON object"),
    "a token is half of a surrogate pair": (
        "bytes",
        edit("tokenizer.json", lambda t: t["model"]["vocab"].update({"\ud800": 3})),
        "tokenizer.json is not valid JSON",
    ),
    "config nests too deeply": ("single", content("config.json", lambda _: b"[" * 100_000), "not valid JSON"),
    "unknown architecture": ("single", config(model_type="mamba"), "model_type 'mamba' is not supported"),
    "no hidden_size": ("single", without("hidden_size"), "config.json has no hidden_size"),
    "hidden_size is a text": ("single", config(hidden_size="64"), "hidden_size = '64' must be a whole number"),
    "negative layers": ("single", config(num_hidden_layers=-2), "num_hidden_layers = -2"),
    "a billion layers": ("single", config(num_hidden_layers=10**9), "not believable"),
    "config claims more layers": ("single", config(num_hidden_layers=3), "has no tensor model.layers.2"),
    "config claims fewer layers": ("single", config(num_hidden_layers=1), "tensor that llama does not"),
    "config lies about a shape": ("single", config(intermediate_size=100), r"is \[96, 64\]; by config.json it must be"),
    "heads do not divide": ("single", config(num_key_value_heads=3), "cannot share 3"),
    "heads do not divide hidden_size": (
        "single",
        config(num_attention_heads=5, num_key_value_heads=5),
        "does not divide",
    ),
    "odd head_dim": ("single", config(head_dim=15), "odd"),
    "other activation": ("single", config(hidden_act="relu"), "activation 'relu'"),
    "unknown rope scaling": (
        "single",
        config(rope_scaling={"type": "dynamic", "factor": 2.0}),
        "'dynamic' is not supported",
    ),
    "rope scaling without factor": ("single", config(rope_scaling={"type": "linear"}), "factor"),
    "rope factors of the wrong length": (
        "single",
        config(rope_scaling={"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}),
        "must be a list of 8",
    ),
    "infinite epsilon": ("single", config(rms_norm_eps=float("inf")), "rms_norm_eps = inf"),
    "quantised already": ("single", config(quantization_config={"quant_method": "hqq"}), "quantised already, by 'hqq'"),
    "partial rotation": ("single", config(partial_rotary_factor=0.5), "no partial rotary positions"),
    "tied, but with another lm_head": ("single", config(tie_word_embeddings=True), "another lm_head"),
    # safetensors
    "empty file": ("single", content(SINGLE, lambda _: b""), "too short"),
    "truncated weights": ("single", content(SINGLE, lambda b: b[:-100]), "is cut off: it has"),
    "truncated header": ("single", content(SINGLE, lambda b: b[:200]), "cut off inside its header"),
    "huge header length": ("single", content(SINGLE, lambda b: b"\xff" * 8 + b[8:]), "claims a header of"),
    "bytes behind the last tensor": ("single", content(SINGLE, lambda b: b + b"x"), "bytes after its last tensor"),
    "header is not JSON": ("single", header(lambda _: b"{nonsense}"), "header is not valid JSON"),
    "header is a list": ("single", header(lambda _: b"[]"), "header is not a JSON object"),
    "a name twice in the header": ("single", header(twice_in_header), "twice in its header"),
    "wrong dtype": ("single", entry(NORM, dtype="F64"), "has dtype 'F64'"),
    "dtype of another width": ("single", entry(NORM, dtype="F16"), "its shape .* needs"),
    "negative shape": ("single", entry(NORM, shape=[-64]), "no valid shape"),
    "offsets swapped": ("single", header(lambda h: h[NORM]["data_offsets"].reverse()), "takes -"),
    "offsets overlap": ("single", entry(NORM, data_offsets=[0, 256]), "overlaps|gap"),
    "offsets are floats": ("single", entry(NORM, data_offsets=[0.0, 256.0]), "no valid data_offsets"),
    "a matrix transposed": ("single", tensors(lambda t: t.update({Q: np.zeros((32, 64), "f4")})), r"is \[32, 64\]"),
    "missing tensor": ("single", tensors(lambda t: t.pop(Q)), f"has no tensor {Q}"),
    "extra tensor": (
        "single",
        tensors(lambda t: t.update(spare=np.zeros(3, "f4"))),
        "tensor that llama does not: 'spare'",
    ),
    "NaN among the weights": ("single", tensors(with_nan(float("nan"))), "NaN or infinity"),
    "infinity among the weights": ("single", tensors(with_nan(float("inf"))), "NaN or infinity"),
    # the index
    "index is not JSON": ("sharded", content(INDEX, lambda b: b[:-3]), "not valid JSON"),
    "index without weight_map": ("sharded", edit(INDEX, lambda i: {"metadata": {}}), "no weight_map"),
    "index points out of the folder": (
        "sharded",
        edit(INDEX, lambda i: first_file(i["weight_map"], "../other.safetensors")),
        "not a file of this folder",
    ),
    "index points to an absolute path": (
        "sharded",
        edit(INDEX, lambda i: first_file(i["weight_map"], "/etc/passwd")),
        "not a file of this folder",
    ),
    "a shard's name is longer than a file's can be": (
        "sharded",
        edit(INDEX, lambda i: first_file(i["weight_map"], "a" * 300)),
        "File name too long",
    ),
    "a shard is missing": ("sharded", unlink("model-00002-of-00003.safetensors"), "which is missing"),
    "a shard is truncated": (
        "sharded",
        content("model-00003-of-00003.safetensors", lambda b: b[: len(b) // 2]),
        "is cut off",
    ),
    "the index names the wrong shard": (
        "sharded",
        edit(INDEX, lambda i: i["weight_map"].update({Q: i["weight_map"]["model.norm.weight"]})),
        "but it is not",
    ),
    "a tensor in two shards": ("sharded", shard_with_a_copy, "is in model-"),
    # the tokenizer
    "tokenizer.model is nonsense": (
        "single",
        content("tokenizer.model", lambda _: b"\x00nonsense"),
        "not a SentencePiece",
    ),
    "vocabulary larger than the embedding": (
        "single",
        lambda folder: (
            config(vocab_size=500)(folder),
            tensors(lambda t: [t.update({n: t[n][:500]}) for n in ("model.embed_tokens.weight", "lm_head.weight")])(
                folder
            ),
        )[0],
        "but config.json has vocab_size 500",
    ),
    "a score that is a text": (
        "single",
        edit("generation_config.json", lambda g: g.update(temperature="hot")),
        "metadata cannot be written as GGUF",
    ),
    "tokenizer.json is a list": ("bytes", content("tokenizer.json", lambda _: b"[]"), "not a JSON object"),
    "a merge that makes no token": (
        "bytes",
        edit("tokenizer.json", lambda t: t["model"]["merges"].append(["zz", "qq"])),
        "something that is no token",
    ),
    "two tokens of one id": (
        "bytes",
        edit("tokenizer.json", lambda t: t["model"]["vocab"].update({"zzqq": 300})),
        "the same id 300",
    ),
    "a token id that is a text": (
        "bytes",
        edit("tokenizer.json", lambda t: t["model"]["vocab"].update({"zzqq": "x"})),
        "the id 'x'",
    ),
    "a word-piece tokenizer": (
        "bytes",
        edit("tokenizer.json", lambda t: t["model"].update(type="WordPiece")),
        "WordPiece",
    ),
    "text is lower-cased first": (
        "bytes",
        edit("tokenizer.json", lambda t: t.update(normalizer={"type": "Lowercase"})),
        "normalises text",
    ),
    "bos beyond the vocabulary": (
        "single",
        lambda folder: (
            config(bos_token_id=99999)(folder),
            edit("tokenizer_config.json", lambda t: t.pop("bos_token") and None)(folder),
        )[0],
        "bos_token_id = 99999",
    ),
}


def attempt(src: str, out: Path, **options: Any) -> None:
    source = open_source(src)
    try:
        to_gguf.convert(source, out, to_gguf.GgufOptions(**options), lambda _: None)
    finally:
        source.close()


def test_there_are_enough_cases() -> None:
    assert len(CASES) >= 25


@pytest.mark.parametrize("case", CASES)
def test_bad_checkpoint(case: str, good: dict[str, Path], tmp_path: Path) -> None:
    base, break_it, expected = CASES[case]
    folder, out = tmp_path / "in" / "model", tmp_path / "out"
    shutil.copytree(good[base], folder)
    out.mkdir()
    break_it(folder)
    with pytest.raises(EdgeStreamError, match=expected) as caught:
        attempt(str(folder), out / "model.gguf")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    assert list(out.iterdir()) == []


def test_the_good_ones_are_good(good: dict[str, Path], tmp_path: Path) -> None:
    for name, folder in good.items():
        attempt(str(folder), tmp_path / f"{name}.gguf")
        assert (tmp_path / f"{name}.gguf").stat().st_size > 100_000


def test_an_existing_file_survives_a_failure(good: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(good["single"], folder)
    tensors(with_nan(float("nan")))(folder)
    (tmp_path / "out.gguf").write_bytes(b"precious")
    with pytest.raises(EdgeStreamError, match="NaN"):
        attempt(str(folder), tmp_path / "out.gguf", overwrite=True)
    assert (tmp_path / "out.gguf").read_bytes() == b"precious"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out.gguf"]


def test_a_link_inside_a_hub_cache_is_followed(good: dict[str, Path], tmp_path: Path) -> None:
    """huggingface_hub keeps the files in blobs/, and links to them from snapshots/REVISION/."""
    blobs = tmp_path / "models--user--repo" / "blobs"
    snapshot = tmp_path / "models--user--repo" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in good["single"].iterdir():
        shutil.copy(path, blobs / path.name)
        (snapshot / path.name).symlink_to(blobs / path.name)
    attempt(str(snapshot), tmp_path / "m.gguf")
    assert (tmp_path / "m.gguf").exists()


@pytest.mark.parametrize(
    ("src", "expected"),
    [
        ("/nonexistent/model", "does not exist"),
        ("hf:not-a-repo", "not of the form hf:user/repo"),
    ],
)
def test_bad_source(src: str, expected: str, tmp_path: Path) -> None:
    with pytest.raises(EdgeStreamError, match=expected):
        attempt(src, tmp_path / "m.gguf")


def test_pickle_file_as_source(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(EdgeStreamError, match="pickle"):
        attempt(str(path), tmp_path / "m.gguf")


def test_a_full_disk_is_noticed_first(good: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(EdgeStreamError, match="MiB are free"):
        attempt(str(good["single"]), tmp_path / "m.gguf")
    assert list(tmp_path.iterdir()) == []


def test_too_little_memory_is_noticed_first(
    good: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(memory.mmap, "mmap", refuse)
    with pytest.raises(EdgeStreamError, match=r"not enough memory: .* MiB are needed"):
        attempt(str(good["single"]), tmp_path / "m.gguf")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_leaves_nothing(
    good: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(to_gguf.gguf.GGUFWriter, "write_tensor_data", full)
    with pytest.raises(EdgeStreamError, match="No space left"):
        attempt(str(good["single"]), tmp_path / "m.gguf")
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_leaves_nothing(good: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(to_gguf.gguf.GGUFWriter, "write_tensor_data", interrupt)
    with pytest.raises(KeyboardInterrupt):
        attempt(str(good["single"]), tmp_path / "m.gguf")
    assert list(tmp_path.iterdir()) == []


# convert in a process of its own, which stops where it says so, in the middle of the weights
STOPS = """
import signal, sys, time
from edge_stream.converters import quantize, to_gguf
from edge_stream.converters.mlc.tensor_cache import TensorCacheWriter
from edge_stream.cli import main

def stop(*args, **options):
    print("here", flush=True)
    time.sleep(60)

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
signal.signal(signal.SIGHUP, signal.SIG_DFL)
where, sys.argv = sys.argv[1], ["edge-stream", *sys.argv[2:]]
if where == "gguf":
    to_gguf.gguf.GGUFWriter.write_tensor_data = stop
elif where == "mlc":
    TensorCacheWriter.add = stop
else:
    quantize._interruptible = stop
main()
"""
STOPPED_BY = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129, signal.SIGKILL: -9}
TARGETS = {"gguf": ["--to", "gguf"], "quantize": ["--to", "gguf", "--quantize", "Q4_0"], "mlc": ["--to", "mlc"]}


@pytest.mark.parametrize("number", STOPPED_BY)
@pytest.mark.parametrize("where", TARGETS)
def test_a_signal_leaves_nothing_and_kill_nothing_for_long(
    where: str, number: signal.Signals, good: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out" / "m.gguf"
    command = ["convert", str(good["bytes"]), *TARGETS[where], "-o", str(out)]
    process = subprocess.Popen([sys.executable, "-c", STOPS, where, *command], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n"
    held = [p.name for p in out.parent.iterdir()]
    assert len(held) == 1 and held[0].startswith(".m.gguf.partial-")
    if number == signal.SIGKILL:  # while it lives, another conversion to the same place leaves its folder alone
        assert files.abandoned(out.parent, ".m.gguf.partial-") == []
    process.send_signal(number)
    assert process.wait(30) == STOPPED_BY[number]
    process.stdout.close()
    assert [p.name for p in out.parent.iterdir()] == (held if number == signal.SIGKILL else [])
    done = subprocess.run([sys.executable, "-m", "edge_stream.cli", *command], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [p.name for p in out.parent.iterdir()] == ["m.gguf"]


def test_the_source_is_not_overwritten(good: dict[str, Path], tmp_path: Path) -> None:
    attempt(str(good["single"]), tmp_path / "m.gguf")
    before = (tmp_path / "m.gguf").read_bytes()
    with pytest.raises(EdgeStreamError, match="is the source"):
        attempt(str(tmp_path / "m.gguf"), tmp_path / "m.gguf", quantize="Q4_0")
    assert (tmp_path / "m.gguf").read_bytes() == before


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"outtype": "q4_0"}, "outtype q4_0 is unknown"),
        ({"quantize": "Q99"}, "quantisation Q99 is unknown"),
        ({"quantize": "Q4_0", "outtype": "q8_0"}, "exclude each other"),
        ({"imatrix": Path("x")}, "with --quantize only"),
    ],
)
def test_bad_options(options: dict[str, Any], expected: str, good: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(EdgeStreamError, match=expected):
        attempt(str(good["single"]), tmp_path / "m.gguf", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_llama_cpp_trips_over(good: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(EdgeStreamError, match="without Phi-3's tokenizer"):
        attempt(str(good["bytes"]), tmp_path / "m.gguf", model_name="Phi-3")
    assert list(tmp_path.iterdir()) == []


def test_damaged_gguf_sources(good: dict[str, Path], tmp_path: Path) -> None:
    attempt(str(good["single"]), tmp_path / "good.gguf", outtype="f32")
    raw = (tmp_path / "good.gguf").read_bytes()
    (tmp_path / "out").mkdir()
    for keep in (6, 40, 500, 20_000, len(raw) - 64):
        (tmp_path / "cut.gguf").write_bytes(raw[:keep])
        with pytest.raises(EdgeStreamError) as caught:
            attempt(str(tmp_path / "cut.gguf"), tmp_path / "out" / "m.gguf")
        assert "\n" not in str(caught.value)
        assert list((tmp_path / "out").iterdir()) == []


def test_a_gguf_source_with_whole_numbers_as_weights(good: dict[str, Path], tmp_path: Path) -> None:
    attempt(str(good["single"]), tmp_path / "good.gguf", outtype="f32")
    raw = bytearray((tmp_path / "good.gguf").read_bytes())
    name = b"output_norm.weight"
    kind = raw.index(name) + len(name) + 4 + 8  # the number of dimensions, one dimension
    assert raw[kind : kind + 4] == struct.pack("<I", gguf.GGMLQuantizationType.F32)
    raw[kind : kind + 4] = struct.pack("<I", gguf.GGMLQuantizationType.I64)
    (tmp_path / "numbers.gguf").write_bytes(bytes(raw) + bytes(4096))
    (tmp_path / "out").mkdir()
    with pytest.raises(EdgeStreamError, match=r"output_norm\.weight is of type I64, which no weights have"):
        attempt(str(tmp_path / "numbers.gguf"), tmp_path / "out" / "m.gguf")
    assert list((tmp_path / "out").iterdir()) == []


# ---------------------------------------------------------------------------------------------------------
# fuzz: whatever headers and configs say, the answer is a result or an EdgeStreamError
# ---------------------------------------------------------------------------------------------------------

QUICK = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
KINDS = ("full_attention", "sliding_attention", "chunked_attention", "linear_attention", "conv", "mamba", "mlp", "moe")
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "F16", "BF16", "I8", "F64", ""]) | JSON,
        "shape": st.lists(st.integers(-2, 2**63), max_size=3) | JSON,
        "data_offsets": st.lists(st.integers(-8, 2**64), min_size=2, max_size=2) | JSON,
    },
)


@QUICK
@given(header=st.dictionaries(st.text(max_size=10), ENTRY | JSON, max_size=4) | JSON, tail=st.binary(max_size=64))
def test_fuzz_headers(header: Any, tail: bytes, tmp_path: Path) -> None:
    text = json.dumps(header).encode()
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + tail)
    _survives(lambda: safetensors_files.read_header(tmp_path / "x.safetensors"))


@QUICK
@given(raw=st.binary(max_size=200))
def test_fuzz_raw_files(raw: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(raw)
    _survives(lambda: safetensors_files.read_header(tmp_path / "x.safetensors"))


@QUICK
@given(st.data())
def test_fuzz_mutated_files(good: dict[str, Path], tmp_path: Path, data: st.DataObject) -> None:
    raw = bytearray((good["single"] / SINGLE).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, 4000))] = data.draw(st.integers(0, 255))
    (tmp_path / "x.safetensors").write_bytes(raw)
    _survives(lambda: safetensors_files.read_header(tmp_path / "x.safetensors"))


@QUICK
@given(data=st.data())
def test_fuzz_gguf_sources(good: dict[str, Path], tmp_path: Path, data: st.DataObject) -> None:
    whole = tmp_path / "good.gguf"
    if not whole.exists():
        attempt(str(good["single"]), whole, outtype="f16")
    raw = bytearray(whole.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(4, 2000))] = data.draw(st.integers(0, 255))
    (tmp_path / "x.gguf").write_bytes(raw)
    _survives(lambda: attempt(str(tmp_path / "x.gguf"), tmp_path / "m.gguf", dry_run=True))


def plan(config: dict[str, Any]) -> None:
    """All that a family's file says about a model."""
    model = read_config(text_config(config))
    gguf_metadata.check_supported(model)
    assert isinstance(gguf_metadata.notes(model), list)
    if model.n_layer < 100 and model.own.get("n_expert", 0) < 100:
        gguf_metadata.hyperparameters(model)
        for name in expected_tensors(model):
            model.family.gguf.places(model, name)


@QUICK
@given(st.data())
def test_fuzz_configs(data: st.DataObject) -> None:
    """One to three keys of a good config.json have other values, or there are more keys."""
    name = data.draw(st.sampled_from(sorted([*tiny.CHECKPOINTS, *FAMILIES])))
    config = dict(tiny.config_of(name) if name in tiny.CHECKPOINTS else family_config_of(name))
    family = find_family(config["model_type"])
    assert family is not None
    usual = ("sliding_window", "layer_types", "rope_parameters", "text_config", "partial_rotary_factor")
    keys = sorted({*config, *usual, *family.defaults, "attention_bias", "num_kv_shared_layers", "no_rope_layers"})
    for key in data.draw(st.lists(st.sampled_from(keys), min_size=1, max_size=3)):
        config[key] = data.draw(
            JSON
            | st.integers(-2, 40)
            | st.lists(st.sampled_from([*KINDS, 0, 1, 0.95]), min_size=4, max_size=5)
            | st.dictionaries(
                st.sampled_from(["type", "rope_type", "factor", "full_attention"]),
                JSON | st.sampled_from(["yarn", "llama3", "longrope"]),
            )
        )
    _survives(lambda: plan(config))


def _survives(call: Callable[[], object]) -> None:
    message = "fine"
    try:
        call()
    except EdgeStreamError as error:
        message = str(error)
    assert message
    assert "\n" not in message


def _replace_somewhere(value: Any, data: st.DataObject, new: Any) -> Any:
    """A copy of a JSON value with one node, at a random depth, replaced."""
    if not isinstance(value, (dict, list)) or not value or data.draw(st.integers(0, 5)) == 0:
        return new
    if isinstance(value, dict):
        key = data.draw(st.sampled_from(list(value)[:40]))
        return value | {key: _replace_somewhere(value[key], data, new)}
    index = data.draw(st.integers(0, min(len(value), 40) - 1))
    return [*value[:index], _replace_somewhere(value[index], data, new), *value[index + 1 :]]


@QUICK
@given(data=st.data())
def test_fuzz_tokenizers(good: dict[str, Path], tmp_path: Path, data: st.DataObject) -> None:
    folder = tmp_path / "model"
    base = data.draw(st.sampled_from(["single", "bytes"]))
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(good[base], folder)
    files = [f for f in ("tokenizer.json", "tokenizer_config.json", "generation_config.json") if (folder / f).exists()]
    file = folder / data.draw(st.sampled_from(files))
    value = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(_replace_somewhere(value, data, data.draw(JSON))), encoding="utf-8")
    _survives(lambda: attempt(str(folder), tmp_path / "m.gguf", dry_run=True))
