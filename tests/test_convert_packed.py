"""Checkpoints with packed weights: every method gives the values that were packed, or is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import packing
import pytest
import tiny_checkpoints as tiny

from edge_stream.converters import to_gguf
from edge_stream.converters.gguf_reader import GgufReader
from edge_stream.errors import EdgeStreamError
from edge_stream.models.conversion import open_source


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.write_tiny(tmp_path / "model", "qwen3")


def tensors_of(name: str) -> dict[str, Any]:
    return dict(tiny.random_tensors(tiny.config_of(name)))


@pytest.mark.parametrize("method", packing.METHODS)
def test_the_values_are_those_that_were_packed(method: str, folder: Path, tmp_path: Path) -> None:
    want = packing.pack_folder(folder, tensors_of("qwen3"), method)
    source = open_source(str(folder))
    for name, values in want.items():
        assert np.allclose(source.load(name), values, rtol=1e-6, atol=1e-9), name
        for part in (slice(3, 9), slice(20, 50)):  # the second one begins and ends inside a block of scales
            assert np.array_equal(source.load(name, part.start, part.stop), source.load(name)[part])
    to_gguf.convert(source, tmp_path / "m.gguf", to_gguf.GgufOptions(outtype="f32"), lambda _: None)
    stored = {t.name: t.data for t in GgufReader(tmp_path / "m.gguf").tensors}
    assert np.allclose(stored["blk.1.ffn_up.weight"], want["model.layers.1.mlp.up_proj.weight"], rtol=1e-6, atol=1e-9)


def test_float8_values() -> None:
    known = {0x38: 1.0, 0xB8: -1.0, 0x7E: 448.0, 0x01: 2.0**-9, 0x08: 2.0**-6, 0x3C: 1.5, 0x00: 0.0}
    from edge_stream.converters.safetensors_files import _float8_table

    assert {bits: float(_float8_table()[bits]) for bits in known} == known
    assert np.isnan(_float8_table()[[0x7F, 0xFF]]).all()


def test_mxfp4_stays_mxfp4(tmp_path: Path) -> None:
    """gpt-oss: the file has the checkpoint's codes and scales in ggml's order, whatever the type of the rest."""
    folder = tmp_path / "model"
    config = write_gpt_oss(folder)
    rng = np.random.default_rng(0)
    n, n_ff, n_embd = config["num_local_experts"], config["intermediate_size"], config["hidden_size"]
    stored: packing.Stored = {}
    want = {}
    for layer in range(2):
        for part, shape in (("gate_up_proj", (n, 2 * n_ff, n_embd)), ("down_proj", (n, n_embd, n_ff))):
            name = f"model.layers.{layer}.mlp.experts.{part}"
            parts, want[name] = packing.mxfp4(name, rng.normal(0, 0.1, shape))
            stored |= parts
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (folder / "config.json").write_text(json.dumps(config))
    for name, values in tiny.random_tensors({k: v for k, v in config.items() if k != "quantization_config"}):
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            stored[name] = ("F32", values)
    packing.save(folder / "model.safetensors", stored)
    to_gguf.convert(open_source(str(folder)), tmp_path / "m.gguf", to_gguf.GgufOptions(outtype="q8_0"), lambda _: None)
    tensors = {t.name: t for t in GgufReader(tmp_path / "m.gguf").tensors}
    assert tensors["output.weight"].tensor_type == gguf.GGMLQuantizationType.Q8_0
    for name, rows in (("gate", slice(0, None, 2)), ("up", slice(1, None, 2))):
        tensor = tensors[f"blk.1.ffn_{name}_exps.weight"]
        assert tensor.tensor_type == gguf.GGMLQuantizationType.MXFP4
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(values, want["model.layers.1.mlp.experts.gate_up_proj"][:, rows].astype(np.float32))


def write_gpt_oss(folder: Path) -> dict[str, Any]:
    config = tiny.config_of("qwen3") | {
        "model_type": "gpt_oss",
        "num_local_experts": 3,
        "num_experts_per_tok": 2,
        "head_dim": 32,
        "sliding_window": 16,
        "attention_bias": True,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "truncate": False},
    }
    folder.mkdir()
    tiny.write_tokenizer(folder, "tekken")
    return config


CONSOLIDATED = {
    "model.embed_tokens": "tok_embeddings",
    "lm_head": "output",
    "model.norm": "norm",
    "model.layers": "layers",
    "self_attn.": "attention.",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
}


def write_params(folder: Path, tensors: dict[str, Any], **changes: Any) -> None:
    """Mistral's form of a Ministral 3: rows of q and k in pairs, names of its own."""
    stored: packing.Stored = {}
    for name, values in tensors.items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            n_heads = values.shape[0] // 32
            values = values.reshape(n_heads, 2, 16, -1).swapaxes(1, 2).reshape(values.shape)
        for old, new in CONSOLIDATED.items():
            name = name.replace(old, new)
        name = name.replace("attention.q_proj", "attention.wq").replace("attention.k_proj", "attention.wk")
        name = name.replace("attention.v_proj", "attention.wv").replace("attention.o_proj", "attention.wo")
        stored[name] = ("F32", values)
    stored["vision_encoder.ln_pre.weight"] = ("F32", np.ones(3))
    packing.save(folder / "consolidated.safetensors", stored)
    params = {
        "dim": 64,
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 2,
        "head_dim": 32,
        "hidden_dim": 96,
        "norm_eps": 1e-5,
        "vocab_size": tiny.N_VOCAB,
        "rope_theta": 1e6,
        "max_position_embeddings": 2048,
        "tied_embeddings": False,
        "yarn": {
            "factor": 4.0,
            "original_max_position_embeddings": 512,
            "beta": 32.0,
            "alpha": 1.0,
            "apply_scale": False,
        },
        "llama_4_scaling": {"beta": 0.1, "original_max_position_embeddings": 512},
    }
    (folder / "params.json").write_text(json.dumps(params | changes))


def test_mistrals_own_form_is_the_same_model(tmp_path: Path) -> None:
    """params.json and consolidated.safetensors give the file that config.json and model.safetensors give."""
    standard, own = tiny.write_tiny(tmp_path / "ministral", "ministral3"), tmp_path / "own" / "ministral"
    own.mkdir(parents=True)
    tiny.write_tokenizer(own, "tekken")
    write_params(own, tensors_of("ministral3"))
    read = {}
    for name, folder in (("standard", standard), ("own", own)):
        source = open_source(str(folder))
        to_gguf.convert(source, tmp_path / f"{name}.gguf", to_gguf.GgufOptions(outtype="f32"), lambda _: None)
        read[name] = GgufReader(tmp_path / f"{name}.gguf")
    a, b = read["standard"], read["own"]
    keys = [{k: f.contents() for k, f in r.fields.items() if not k.startswith("general.sampling")} for r in (a, b)]
    del keys[0]["GGUF.kv_count"], keys[1]["GGUF.kv_count"]
    assert keys[0] == keys[1]
    assert keys[0]["mistral3.rope.scaling.yarn_log_multiplier"] == 1.0
    assert keys[0]["mistral3.attention.temperature_scale"] == pytest.approx(0.1)
    ours, theirs = ({t.name: t.data for t in r.tensors} for r in (a, b))
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "bitsandbytes": ("fp8", {"quant_method": "bitsandbytes"}, "quantised already, by 'bitsandbytes'"),
    "three bits": ("gptq", {"bits": 3}, "gptq with bits 3 is not supported"),
    "awq gemv": ("awq", {"version": "gemv"}, "awq with bits and version '4, gemv' is not supported"),
    "nvfp4": ("ct-int4", {"format": "nvfp4-pack-quantized"}, "with format 'nvfp4-pack-quantized' is not supported"),
    "zero points": (
        "ct-int4",
        {"config_groups": {"g": {"weights": {"num_bits": 4, "symmetric": False}}}},
        "4 bits, symmetric False",
    ),
    "other blocks": ("fp8-blocks", {"weight_block_size": [128, 128]}, "does not fit"),
    "not an object": ("fp8", {"quant_method": 7}, "quantised already, by 7"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_supported_is_refused_by_name(case: str, folder: Path) -> None:
    method, changes, message = REFUSED[case]
    packing.pack_folder(folder, tensors_of("qwen3"), method)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(EdgeStreamError, match=message) as error:
        open_source(str(folder))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moe": {"num_experts": 4}}, "with experts or latent attention"),
        ({"yarn": 3}, "yarn or llama_4_scaling is not a JSON object"),
        ({"quantization": {"qformat_weight": "int3"}}, "quantised as 'int3'"),
        ({"llama_4_scaling": {"beta": 0.1, "original_max_position_embeddings": 7}}, "different original"),
        ({"dim": None}, "config.json has no hidden_size"),
    ],
)
def test_bad_params(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    tiny.write_tokenizer(tmp_path, "tekken")
    write_params(tmp_path, tensors_of("ministral3"), **changes)
    with pytest.raises(EdgeStreamError, match=message):
        open_source(str(tmp_path))
