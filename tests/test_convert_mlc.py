"""`convert --to mlc`: names, values, configuration, refusals, memory; then the compiled library against references."""

from __future__ import annotations

import io
import json
import re
import signal
import sys
import tarfile
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from click.testing import CliRunner
from tiny_checkpoints import CHECKPOINTS, N_VOCAB, config_of, random_tensors, save_tensors, write_tiny

from edge_stream import Engine
from edge_stream.cli import cli
from edge_stream.converters import mlc, reference, to_gguf
from edge_stream.converters.gguf_metadata import copy_fields
from edge_stream.converters.gguf_source import end_tokens
from edge_stream.converters.mlc import MlcOptions, params
from edge_stream.converters.mlc.readback import ReadBack
from edge_stream.converters.mlc.tensor_cache import TensorCacheReader, from_bf16, to_bf16
from edge_stream.errors import EdgeStreamError
from edge_stream.families import Mlc, families
from edge_stream.mlc.folder import MlcFolder
from edge_stream.models.conversion import open_source

REFUSED = {
    "llama-linear": "rope scaling linear",
    "llama-yarn": "rope scaling yarn",
    "llama-yarn-factor": "attention biases",
    "qwen2-yarn": "rope scaling yarn",
}
CONVERTED = [name for name in CHECKPOINTS if name not in REFUSED and families()[CHECKPOINTS[name][0]].mlc.known]


def convert(folder: Path, out: Path, **options: Any) -> list[str]:
    """Convert a checkpoint and return what was said."""
    said: list[str] = []
    source = open_source(str(folder))
    try:
        assert mlc.convert(source, out, MlcOptions(**options), said.append) == [out]
    finally:
        source.close()
    return said


def config_of_model(out: Path) -> dict[str, Any]:
    return json.loads((out / "mlc-chat-config.json").read_text(encoding="utf-8"))


# ---------------------------------------------------------------------------------------------------------
# weights
# ---------------------------------------------------------------------------------------------------------

_LLAMA = {"model.embed_tokens", "model.norm", "lm_head"} | {
    f"model.layers.{i}.{part}"
    for i in range(2)
    for part in (
        "input_layernorm",
        "post_attention_layernorm",
        "self_attn.qkv_proj",
        "self_attn.o_proj",
        "mlp.gate_up_proj",
        "mlp.down_proj",
    )
}
_QWEN = {name.replace("qkv_proj", "c_attn") for name in _LLAMA}
_NORMS = {f"model.layers.{i}.{p}_feedforward_layernorm" for i in range(2) for p in ("pre", "post")}
_PHI = {
    name.replace("model.layers", "transformer.h")
    .replace("model.", "transformer.")
    .replace("embed_tokens", "embd")
    .replace("input_layernorm", "ln")
    .replace("self_attn.o_proj", "mixer.out_proj")
    .replace("self_attn", "mixer")
    for name in _LLAMA
}
# names in q0f16, less .weight
NAMES = {
    "llama2": _LLAMA,
    "mistral-v0.1": _LLAMA,
    "smollm": _LLAMA - {"lm_head"},
    "qwen2": _QWEN - {"lm_head"} | {f"model.layers.{i}.self_attn.c_attn.bias" for i in range(2)},
    "qwen3": _QWEN | {f"model.layers.{i}.self_attn.{c}_norm" for i in range(2) for c in "qk"},
    "phi3": _PHI,
    "gemma2": _LLAMA - {"lm_head"} | _NORMS,
}


@pytest.mark.parametrize("name", NAMES)
def test_parameters_have_the_names_of_mlc(tmp_path: Path, name: str) -> None:
    convert(write_tiny(tmp_path / "hf", name), tmp_path / "out", quantization="q0f16")
    names = {n.removesuffix(".weight") for n in TensorCacheReader(tmp_path / "out").records}
    assert names == NAMES[name]


def test_gemma3_keeps_q_k_v_apart(tmp_path: Path) -> None:
    config = {k: v for k, v in config_of("gemma3").items() if k != "rope_scaling"}
    folder = write_tiny(tmp_path / "hf", "gemma3")
    (folder / "config.json").write_text(json.dumps(config))
    convert(folder, tmp_path / "out", quantization="q4f16_1")
    names = set(TensorCacheReader(tmp_path / "out").records)
    layer = "language_model.model.layers.3."
    assert {f"{layer}self_attn.{c}_proj.q_weight" for c in "qkvo"} <= names
    assert f"{layer}self_attn.q_norm.weight" in names and "language_model.model.embed_tokens.q_scale" in names
    assert config_of_model(tmp_path / "out")["model_config"]["text_config"]["sliding_window"] == 16


def test_rows_are_put_together_and_norms_get_their_one(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "hf", "gemma2")
    convert(folder, tmp_path / "out", quantization="q0f32")
    source, cache = open_source(str(folder)), TensorCacheReader(tmp_path / "out")
    p = "model.layers.1."
    qkv = np.concatenate([source.load(f"{p}self_attn.{c}_proj.weight") for c in "qkv"])
    gate_up = np.concatenate([source.load(f"{p}mlp.{c}_proj.weight") for c in ("gate", "up")])
    assert np.array_equal(cache.read(p + "self_attn.qkv_proj.weight"), qkv)  # bf16 in the source: nothing is lost
    assert np.array_equal(cache.read(p + "mlp.gate_up_proj.weight"), gate_up)
    norm = source.load(p + "input_layernorm.weight") + np.float32(1)
    assert np.array_equal(cache.read(p + "input_layernorm.weight"), from_bf16(to_bf16(norm)))


def test_kn_layout_is_the_transposed_of_nk_but_for_the_embedding(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "hf", "mistral-v0.1")
    for q in ("q4f16_0", "q4f16_1"):
        convert(folder, tmp_path / q, quantization=q)
    kn, nk = TensorCacheReader(tmp_path / "q4f16_0"), TensorCacheReader(tmp_path / "q4f16_1")
    for name in nk.records:
        tensor = nk.read(name)
        turned = ".q_" in name and "embed_tokens" not in name
        assert np.array_equal(kn.read(name), tensor.T if turned else tensor), name


@pytest.mark.parametrize("name", CONVERTED)
def test_dequantised_weights_are_near_the_checkpoint(tmp_path: Path, name: str) -> None:
    folder = write_tiny(tmp_path / "hf", name, shards=2)
    convert(folder, tmp_path / "out", quantization="q4f16_1")
    source = open_source(str(folder))
    back = ReadBack(tmp_path / "out", source, "q4f16_1")
    for tensor in source.tensors:
        want, got = source.load(tensor).astype(np.float64), back.load(tensor).astype(np.float64)
        error = float(np.sqrt(np.mean((got - want) ** 2)))
        # random normal weights in steps of max/7 of 32: an error of about a tenth of their spread; vectors are in f16
        assert error <= (0.15 * float(np.sqrt(np.mean(want**2))) if want.ndim == 2 else 5e-4), tensor
    got_logits = reference.logits(back, [1, 5, 9])  # type: ignore[arg-type]
    assert np.isfinite(got_logits).all()


def test_zero_weights_convert(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "hf", "qwen3")
    tensors = dict(random_tensors(config_of("qwen3")))
    tensors["model.layers.0.mlp.down_proj.weight"][:] = 0
    tensors["lm_head.weight"][3, :32] = 0
    save_tensors(folder / "model.safetensors", tensors, "BF16")
    convert(folder, tmp_path / "out")
    cache = TensorCacheReader(tmp_path / "out")
    assert not cache.read("model.layers.0.mlp.down_proj.q_weight").any()
    assert not cache.read("model.layers.0.mlp.down_proj.q_scale").any()
    assert not cache.read("lm_head.q_weight")[3, :4].any() and cache.read("lm_head.q_weight")[3, 4:].all()


def test_memory_stays_below_what_the_plan_says(tmp_path: Path) -> None:
    """The largest tensor is 64 MiB in float32; NumPy reports its allocations to tracemalloc."""
    config = config_of("llama2") | {"hidden_size": 512, "intermediate_size": 1024, "vocab_size": 32768}
    config |= {"num_attention_heads": 8, "num_hidden_layers": 1}
    folder = write_tiny(tmp_path / "hf", "llama2")
    (folder / "config.json").write_text(json.dumps(config))
    save_tensors(folder / "model.safetensors", dict(random_tensors(config)), "F16")
    for q in ("q4f16_0", "q4f32_1", "q0f32"):
        source = open_source(str(folder))
        plan = mlc.make_plan(source, MlcOptions(quantization=q))
        tracemalloc.start()
        mlc.convert(source, tmp_path / q, MlcOptions(quantization=q), lambda _line: None)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak <= plan.memory + (24 << 20), q  # the rest: the tokenizer as Python objects
        assert plan.memory < 3 * (64 << 20) + (300 << 20)


# ---------------------------------------------------------------------------------------------------------
# mlc-chat-config.json and the tokenizer
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONVERTED)
def test_config_streams_for_every_architecture(tmp_path: Path, name: str) -> None:
    convert(write_tiny(tmp_path / "hf", name), tmp_path / "out", n_ctx=200, n_keep=6)
    config = config_of_model(tmp_path / "out")
    assert (config["sliding_window_size"], config["attention_sink_size"]) == (200, 6)
    assert config["context_window_size"] == -1 and config["prefill_chunk_size"] == 48
    required = {"model_type", "quantization", "model_config", "vocab_size", "tensor_parallel_shards", "conv_template"}
    assert required <= set(config)
    assert config["vocab_size"] == N_VOCAB and config["model_type"] == CHECKPOINTS[name][0]
    assert config["temperature"] == 0.7 and config["top_p"] == 0.9 and config["repetition_penalty"] == 1.0
    assert set(config["tokenizer_files"]) <= {p.name for p in (tmp_path / "out").iterdir()}
    assert "tokenizer.json" in config["tokenizer_files"]
    spm = CHECKPOINTS[name][2].startswith("spm")
    assert config["tokenizer_info"]["token_postproc_method"] == ("byte_fallback" if spm else "byte_level")
    assert config["tokenizer_info"]["prepend_space_in_encode"] == (CHECKPOINTS[name][2] == "spm")


def test_rebuilt_tokenizer_is_that_of_sentencepiece(tmp_path: Path) -> None:
    import sentencepiece
    from tokenizers import Tokenizer

    folder = write_tiny(tmp_path / "hf", "llama2")
    assert not (folder / "tokenizer.json").exists()
    said = convert(folder, tmp_path / "out")
    assert any("tokenizer.json is rebuilt" in line for line in said)
    rebuilt = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    for text in ("Hello, world", "The window slides.", "Größe 你好 🙂", " two  spaces", "x = 3.14"):
        assert rebuilt.encode(text, add_special_tokens=False).ids == processor.encode(text), text


def test_stop_tokens_come_from_the_generation_config(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "hf", "qwen3")
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 7], "temperature": "hot"}')
    convert(folder, tmp_path / "out")
    config = config_of_model(tmp_path / "out")
    assert config["conv_template"]["stop_token_ids"] == [2, 7] and config["eos_token_id"] == [2, 7]
    assert config["temperature"] == 1.0
    (folder / "generation_config.json").write_text(f'{{"eos_token_id": {N_VOCAB}}}')
    with pytest.raises(EdgeStreamError, match=f"eos_token_id {N_VOCAB} is not in the vocabulary"):
        convert(folder, tmp_path / "again")


# the last rows of a tiny model's embedding; llama.cpp ends an answer at all but the last
_ENDS = ("<|eot_id|>", "<|eom_id|>", "<|fim_pad|>", "<|file_sep|>", "<|end|>", "<|python_tag|>")


def test_a_gguf_files_stop_tokens_are_those_of_llama_cpp(tmp_path: Path) -> None:
    """eos, end of turn, end of message, and what else llama.cpp's vocabulary takes for an end; the folder keeps all."""
    folder = write_tiny(tmp_path / "hf", "llama3")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    first = N_VOCAB - len(_ENDS)
    tokenizer["added_tokens"] += [{"id": first + i, "content": t, "special": True} for i, t in enumerate(_ENDS)]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    to_gguf.convert(open_source(str(folder)), tmp_path / "m.gguf", to_gguf.GgufOptions(), lambda _line: None)
    with Engine.load(tmp_path / "m.gguf", n_ctx=64) as engine:
        ends, eos = set(engine.backend.vocabulary.eog_tokens), engine.eos
    # <|endoftext|> 0, <|im_end|> 2, and five of the six
    assert ends == {0, 2, *range(first, N_VOCAB - 1)} and eos == 2
    convert(tmp_path / "m.gguf", tmp_path / "out")
    config = config_of_model(tmp_path / "out")
    assert config["eos_token_id"][0] == eos and set(config["eos_token_id"]) == ends
    assert len(config["eos_token_id"]) == len(ends)
    assert config["conv_template"]["stop_token_ids"] == sorted(ends)
    MlcFolder(tmp_path / "out").write_vocab(tmp_path / "vocab.gguf")
    assert set(end_tokens(tmp_path / "vocab.gguf")) == ends


def test_stop_tokens_that_only_the_metadata_name(tmp_path: Path) -> None:
    """eot and eom of texts that mean nothing to llama.cpp."""
    to_gguf.convert(
        open_source(str(write_tiny(tmp_path / "hf", "llama3"))), tmp_path / "a.gguf", to_gguf.GgufOptions(), print
    )
    source = open_source(str(tmp_path / "a.gguf"))
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    copy_fields(writer, source.gguf_fields)  # type: ignore[attr-defined]
    writer.add_eot_token_id(70)
    writer.add_eom_token_id(80)
    for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    convert(tmp_path / "m.gguf", tmp_path / "out")
    config = config_of_model(tmp_path / "out")
    assert config["eos_token_id"] == [2, 70, 80, 0]
    assert config["conv_template"]["stop_token_ids"] == [0, 2, 70, 80]
    MlcFolder(tmp_path / "out").write_vocab(tmp_path / "vocab.gguf")
    assert set(end_tokens(tmp_path / "vocab.gguf")) == {0, 2, 70, 80}


def test_demo_gguf_becomes_mlc(tmp_path: Path) -> None:
    said = convert("demo", tmp_path / "out", quantization="q4f16_1")  # type: ignore[arg-type]
    config = config_of_model(tmp_path / "out")
    assert config["conv_template"]["roles"]["user"] == "<|im_start|>user\n"
    assert "system_prefix_token_ids" not in config["conv_template"]
    cache = TensorCacheReader(tmp_path / "out")
    cache.verify()
    assert cache.records["model.embed_tokens.q_weight"]["shape"] == [49152, 72]
    assert "lm_head.q_weight" not in cache.records
    assert "q4f16_1" in said[0]


# ---------------------------------------------------------------------------------------------------------
# what is refused, and what is left behind
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REFUSED)
def test_what_mlc_cannot_compute_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(EdgeStreamError, match=REFUSED[name]):
        convert(write_tiny(tmp_path / "hf", name), tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_a_family_that_mlc_does_not_have_is_refused(tmp_path: Path) -> None:
    model = open_source(str(write_tiny(tmp_path / "hf", "llama3"))).model
    params.check_supported(model)
    with pytest.raises(EdgeStreamError, match="MLC has no model of Llama"):
        params.check_supported(replace(model, family=replace(model.family, mlc=Mlc(known=False))))
    with pytest.raises(EdgeStreamError, match="MLC's Mistral has an output matrix of its own"):
        params.check_supported(replace(model, family=families()["mistral"], rope_scaling=None, tied=True))


def test_experts_are_not_transposed(tmp_path: Path) -> None:
    with pytest.raises(EdgeStreamError, match="MLC has no q4f16_0 of models with experts: use q4f16_1"):
        convert(write_tiny(tmp_path / "hf", "qwen3-moe"), tmp_path / "out", quantization="q4f16_0")


def test_failure_leaves_nothing_and_keeps_the_old(tmp_path: Path) -> None:
    folder, out = write_tiny(tmp_path / "hf", "qwen3"), tmp_path / "out"
    convert(folder, out, quantization="q4f16_1")
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-2:] = b"\xc0\x7f"  # NaN
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(EdgeStreamError, match="NaN"):
        convert(folder, out, overwrite=True)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "out"]


def test_an_mlc_model_is_replaced_and_anything_else_is_not(tmp_path: Path) -> None:
    folder, out = write_tiny(tmp_path / "hf", "qwen3"), tmp_path / "out"
    out.mkdir()
    convert(folder, out, quantization="q0f16")  # an empty folder is no model
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    with pytest.raises(EdgeStreamError, match=r"exists already: choose another name, or --overwrite to replace it$"):
        convert(folder, out, quantization="q4f16_1")
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    convert(folder, out, quantization="q4f16_1", overwrite=True)
    assert config_of_model(out)["quantization"] == "q4f16_1"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "out"]
    (out / "diary.txt").write_text("mine")
    with pytest.raises(EdgeStreamError, match=r"holds diary\.txt, which is not part of an MLC model"):
        convert(folder, out, overwrite=True)
    with pytest.raises(EdgeStreamError, match="is not a folder"):
        convert(folder, out / "diary.txt")
    assert (out / "diary.txt").read_text() == "mine"


def test_a_link_to_a_folder_is_followed(tmp_path: Path) -> None:
    folder, real, link = write_tiny(tmp_path / "hf", "qwen3"), tmp_path / "real", tmp_path / "link"
    link.symlink_to(real)
    source = open_source(str(folder))
    assert mlc.convert(source, link, MlcOptions(), lambda _line: None) == [real]
    assert link.is_symlink() and config_of_model(real)["quantization"] == "q4f16_1"
    with pytest.raises(EdgeStreamError, match="exists already"):
        mlc.convert(source, link, MlcOptions(), lambda _line: None)
    mlc.convert(source, link, MlcOptions(quantization="q0f16", overwrite=True), lambda _line: None)
    assert link.is_symlink() and config_of_model(real)["quantization"] == "q0f16"


def test_disk_space_is_checked_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_tiny(tmp_path / "hf", "qwen3")
    monkeypatch.setattr("edge_stream.output.staging.shutil.disk_usage", lambda _path: _Usage())
    with pytest.raises(EdgeStreamError, match="MiB are free"):
        convert(folder, tmp_path / "out")


class _Usage:
    free = 1 << 20


def test_memory_is_checked_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: int) -> None:
        raise OSError(12, "Cannot allocate memory")

    folder = write_tiny(tmp_path / "hf", "qwen3")
    monkeypatch.setattr("edge_stream.hardware.memory.mmap.mmap", refuse)
    with pytest.raises(EdgeStreamError, match=r"not enough memory: .* MiB are needed"):
        convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_dry_run_writes_nothing(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "hf", "llama3")
    arguments = ["convert", str(folder), "--to", "mlc", "-o", str(tmp_path / "out"), "--dry-run", "--verbose"]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0 and "attention_sink_size 4" in result.output
    assert "model.layers.1.mlp.down_proj.q_weight [64, 12] uint32" in result.output
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_command_reports_and_sinks_need_a_window(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "hf", "llama3")
    arguments = ["convert", str(folder), "--to", "mlc", "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(cli, [*arguments, "--quantization", "q4f32_1", "-c", "64", "--keep", "8"])
    assert result.exit_code == 0, result.output
    assert f"wrote {tmp_path / 'out'}" in result.output
    result = CliRunner().invoke(cli, [*arguments, "--overwrite", "-c", "8", "--keep", "8"])
    assert result.exit_code == 1 and "error: 8 sinks leave no window in a cache of 8 tokens" in result.output
    result = CliRunner().invoke(cli, [*arguments, "--device", "cpu", "--outtype", "f32"])
    assert result.exit_code == 2


# ---------------------------------------------------------------------------------------------------------
# the compiled library
# ---------------------------------------------------------------------------------------------------------


def tokens(n: int, seed: int = 0) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(0, N_VOCAB - 8, n)]


@pytest.mark.parametrize(
    ("name", "quantization", "tolerance"),
    [
        ("qwen2", "q4f32_1", 1e-4),
        ("qwen3", "q4f16_0", 0.2),
        ("llama3", "q3f16_1", 0.2),
        ("mistral-nemo", "q0f32", 1e-4),
        ("phi3", "q4f32_1", 1e-4),
        ("ministral3", "q0f32", 1e-4),
        ("gemma", "q4f32_1", 1e-4),
        ("qwen3-moe", "q4f32_1", 1e-4),
        ("smollm3", "q4f32_1", 1e-4),
        ("gemma3", "q4f32_1", 1e-4),
    ],
)
def test_library_computes_what_the_converted_weights_say(
    tmp_path: Path, name: str, quantization: str, tolerance: float
) -> None:
    pytest.importorskip("tvm")
    from edge_stream.converters.mlc.runtime import MlcLibrary

    folder, out = write_tiny(tmp_path / "hf", name), tmp_path / "out"
    convert(folder, out, quantization=quantization, device="cpu", n_ctx=128)
    ids = tokens(60)
    library = MlcLibrary(out)
    got = np.concatenate([library.feed(ids[:20]), library.feed(ids[20:21]), library.feed(ids[21:])])
    want = reference.logits(ReadBack(out, open_source(str(folder)), quantization), ids)  # type: ignore[arg-type]
    assert np.abs(got - want).max() < tolerance
    assert want.std() > 1.0  # so that the tolerance means something
    # the functions that MLC's runtime calls, and their order of arguments
    last = library.step("prefill", ids[:1])
    assert last.shape == (1, 1, N_VOCAB)
    picked = library.step("batch_prefill", ids[:5], [0, 4])
    assert picked.shape == (1, 2, N_VOCAB) and np.isfinite(picked).all()
    config = library.metadata
    assert (config["sliding_window_size"], config["attention_sink_size"]) == (128, 4)
    assert config["kv_cache"]["num_key_value_heads"] == 2 and config["kv_state_kind"] == "kv_cache"


def test_library_streams_as_the_reference(tmp_path: Path) -> None:
    """Token by token far beyond the window: TVM evicts after attention, so its window of W is the reference's W + 1."""
    pytest.importorskip("tvm")
    from reference import load_reference

    from edge_stream.converters.mlc.runtime import MlcLibrary

    folder, out = write_tiny(tmp_path / "hf", "smollm"), tmp_path / "out"
    convert(folder, out, quantization="q0f32", device="cpu", n_ctx=33, n_keep=4)
    gguf_options = to_gguf.GgufOptions(outtype="f32")
    to_gguf.convert(open_source(str(folder)), tmp_path / "model.gguf", gguf_options, lambda _line: None)
    ids = tokens(150)
    library = MlcLibrary(out)
    got = np.concatenate([library.feed([token]) for token in ids])
    assert library.total_length() == 33
    model = load_reference(tmp_path / "model.gguf")
    assert np.abs(got - model.stream(34, 4).feed(ids)).max() < 1e-3
    assert np.abs(got - model.stream(33, 4).feed(ids)).max() > 0.01


def test_verify_compares_with_the_checkpoint(tmp_path: Path) -> None:
    pytest.importorskip("tvm")
    folder = write_tiny(tmp_path / "hf", "smollm")
    arguments = [
        "convert",
        str(folder),
        "--to",
        "mlc",
        "-o",
        str(tmp_path / "out"),
        "--quantization",
        "q0f32",
        "--verify",
    ]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    assert "same best token at 100% of positions" in result.output
    assert not (tmp_path / "out" / "lib.so").exists()


@pytest.mark.parametrize(("model", "kind"), [("llama2", "llama"), ("qwen3-moe", "qwen3_moe")])
def test_iphone_library_is_mach_o_with_metal_source(model: str, kind: str, tmp_path: Path) -> None:
    pytest.importorskip("tvm")
    folder = write_tiny(tmp_path / "hf", model)
    said = convert(folder, tmp_path / "out", quantization="q4f16_1", device="iphone")
    assert "compiled lib.tar for iphone: compiled, not run" in said
    with tarfile.open(tmp_path / "out" / "lib.tar") as archive:
        files = {m.name: _content(archive, m) for m in archive.getmembers()}
    assert set(files) == {"lib0.o", f"{kind}_q4f16_1_devc.o"}
    for content in files.values():
        assert content[:8] == bytes.fromhex("cffaedfe0c000001")  # 64-bit Mach-O, arm64
    assert b"kernel void" in files[f"{kind}_q4f16_1_devc.o"]
    assert f"{kind}_q4f16_1_".encode() in files["lib0.o"]


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    assert isinstance(file, io.BufferedIOBase)
    return file.read()


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (f"import os, signal; os.kill(os.getpid(), {int(signal.SIGSEGV)})", "TVM crashed \\(SIGSEGV\\)"),
        ("raise ValueError('no such schedule')", "TVM cannot compile this model for cpu: ValueError: no such schedule"),
        ("pass", "TVM cannot compile this model for cpu"),
    ],
)
def test_a_crash_of_the_compiler_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, message: str
) -> None:
    pytest.importorskip("tvm")
    monkeypatch.setattr("edge_stream.converters.mlc.compile._command", lambda *_a: [sys.executable, "-c", program])
    with pytest.raises(EdgeStreamError, match=message):
        convert(write_tiny(tmp_path / "hf", "smollm"), tmp_path / "out", device="cpu")
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize(
    ("name", "reason", "note"),
    [
        ("gemma2", "no soft cap on scores", "has soft caps"),
        ("phi3-longrope", "no longrope factors", "does not know rope scaling longrope"),
    ],
)
def test_what_cannot_be_compiled_is_refused_and_verified_in_numpy(
    tmp_path: Path, name: str, reason: str, note: str
) -> None:
    folder = write_tiny(tmp_path / "hf", name)
    with pytest.raises(EdgeStreamError, match=f"cannot compile this model: .*{reason}"):
        convert(folder, tmp_path / "out", device="cpu")
    arguments = ["convert", str(folder), "--to", "mlc", "-o", str(tmp_path / "out"), "--quantization", "q0f32"]
    result = CliRunner().invoke(cli, [*arguments, "--verify"])
    assert result.exit_code == 0, result.output
    assert note in result.stderr and "in NumPy, and no engine" in result.stderr
    # the weights are stored in bfloat16; trained tokenizers differ from run to run, and with them close calls
    found = re.search(r"mean ([\d.]+) .* deviation is ([\d.]+)\); same best token at (\d+)%", result.stderr)
    assert found is not None, result.stderr
    assert float(found[1]) < 0.02 * float(found[2]) and int(found[3]) >= 90


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        # yarn's original length is 512 here; a chunk is a quarter of the window
        ("ministral3", {"n_ctx": 412, "n_keep": 4}, "no attention temperature, which ministral3 needs above -c 409"),
    ],
)
def test_what_only_our_engine_computes(tmp_path: Path, name: str, options: dict[str, int], reason: str) -> None:
    folder = write_tiny(tmp_path / "hf", name)
    with pytest.raises(EdgeStreamError, match=f"--device cannot compile this model: .*{reason}; use --device none"):
        convert(folder, tmp_path / "out", device="iphone", **options)
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_a_model_that_a_kill_moved_aside_comes_back(tmp_path: Path) -> None:
    folder, out = write_tiny(tmp_path / "hf", "smollm"), tmp_path / "out"
    convert(folder, out)
    (tmp_path / ".out.old-abcd").mkdir()
    out.rename(tmp_path / ".out.old-abcd" / "model")  # as it is between the two renames of a replacement
    with pytest.raises(EdgeStreamError, match="leave no window"):
        convert(folder, out, n_ctx=4, n_keep=4, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "out"]
    TensorCacheReader(out).verify()
