"""Families that are not Llama with a few changes: what `convert` writes is what llama.cpp's loader wants.

Their numbers are compared with transformers in tests/transformers, which needs torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_checkpoints as tiny
from click.testing import CliRunner
from family_configs import FAMILIES, MODEL_TYPES, config_of, soften

from edge_stream import Engine
from edge_stream.cli import cli
from edge_stream.converters import to_gguf
from edge_stream.converters.config import read_config
from edge_stream.converters.gguf_reader import GgufReader
from edge_stream.errors import EdgeStreamError
from edge_stream.families import REFUSED, families
from edge_stream.models.conversion import open_source

OWN = [n for n, (kind, *_) in FAMILIES.items() if not families()[MODEL_TYPES[kind]].plain and "mxfp4" not in n]


def write(folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    """A checkpoint with random weights; its tensors."""
    config = config_of(name) | changes
    folder.mkdir()
    tiny.write_tokenizer(folder, FAMILIES[name][2])
    (folder / "config.json").write_text(json.dumps(config))
    tensors = soften(name, dict(tiny.random_tensors(config)))
    tiny.save_tensors(folder / "model.safetensors", tensors, "F32")
    return tensors


def convert(folder: Path, out: Path, **options: Any) -> None:
    options = {"outtype": "f32"} | options
    to_gguf.convert(open_source(str(folder)), out, to_gguf.GgufOptions(**options), lambda _: None)


@pytest.mark.parametrize("name", OWN)
def test_llama_cpp_loads_it(name: str, tmp_path: Path) -> None:
    """It checks names and shapes, and that no tensor is left over. What the model says depends on the text."""
    write(tmp_path / "model", name)
    convert(tmp_path / "model", tmp_path / "m.gguf", outtype="bf16")
    with Engine.load(tmp_path / "m.gguf", n_ctx=64, n_threads=1) as engine:
        got = engine.stream().logits_of([20, 30, 40, 50])
        other = engine.stream().logits_of([21, 30, 40, 50])
    assert np.isfinite(got).all() and got.std() > 0.05
    assert np.abs(got[3] - other[3]).max() > 1e-3


@pytest.mark.parametrize("name", OWN)
def test_a_missing_a_misshapen_and_a_foreign_tensor(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    tensors = write(folder, name)
    for victim in [name for name in tensors if ".layers.1." in name]:
        left = {n: t for n, t in tensors.items() if n != victim}
        faults = {
            "no tensor": left,
            "must be": left | {victim: np.zeros((3, 5), np.float32)},
            "that .* does not": tensors | {victim + ".more": np.zeros(3, np.float32)},
        }
        for message, held in faults.items():
            tiny.save_tensors(folder / "model.safetensors", held, "F32")
            with pytest.raises(EdgeStreamError, match=message) as error:
                open_source(str(folder))
            assert "\n" not in str(error.value)
        if "experts" not in victim:
            continue
        break  # one expert is like the next


# family -> what is changed in its config.json, and what is said
BAD: dict[str, list[tuple[dict[str, Any], str]]] = {
    "smollm3": [
        ({"no_rope_layers": [1, 1, 1]}, "no_rope_layers must be a list of 4 values"),
        ({"no_rope_layers": [1, 0, 1, 0]}, "every fourth layer"),
    ],
    "ministral3": [
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "no linear rope scaling"),
        ({"rope_parameters": {"rope_type": "default", "llama_4_scaling_beta": 0.1}}, "needs yarn"),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "llama_4_scaling_beta": "x"}},
            "llama_4_scaling_beta",
        ),
    ],
    "olmo2": [({"tie_word_embeddings": True}, "has no tied embeddings")],
    "olmo3": [({"layer_types": ["conv"] * 4}, "layer_types must name full or sliding attention")],
    "exaone4": [({"sliding_window": 16}, "in models of 64 layers only")],
    "exaone4-32b": [({"sliding_window_pattern": "LG"}, "three of four layers only")],
    "cohere2": [
        ({"tie_word_embeddings": False}, "no output matrix of its own"),
        ({"logit_scale": "x"}, "logit_scale = 'x' must be a number"),
        ({"rotary_pct": 0.5}, "rotary_pct and use_parallel_block"),
        ({"use_qk_norm": True}, "use_qk_norm is not supported"),
    ],
    "qwen3_moe": [
        ({"norm_topk_prob": False}, "norm_topk_prob = false"),
        ({"mlp_only_layers": [0]}, "layers without experts"),
        ({"num_experts_per_tok": 7}, "more than the 6 experts"),
        ({"num_experts": None}, "config.json has no num_experts"),
    ],
    "qwen3_5": [
        ({"layer_types": ["linear_attention"] * 4}, "layers with a delta net and layers with attention"),
        ({"linear_num_value_heads": 3}, "no multiple of linear_num_key_heads"),
        ({"layer_types": [1, 2, 3, 4]}, "layer_types must be a list of 4 values, str each"),
    ],
    "qwen3_vl": [
        ({"rope_parameters": {"mrope_section": [1, 2]}}, "mrope_section must be a list of 3"),
        ({"rope_parameters": {"mrope_section": [1, 2, 3]}}, "an mrope_section of 16 pairs, not 6"),
    ],
    "gemma3n": [
        ({"altup_num_inputs": 2}, "altup_num_inputs other than 4"),
        ({"altup_active_idx": 1}, "altup_active_idx other than 0"),
        ({"laurel_rank": 32}, "laurel_rank other than 64"),
        ({"hidden_size_per_layer_input": 16}, "hidden_size_per_layer_input other than 256"),
        ({"final_logit_softcapping": 50.0}, "final_logit_softcapping other than 30"),
        ({"altup_correct_scale": False}, "altup_correct_scale = false"),
        ({"num_kv_shared_layers": 2}, "num_kv_shared_layers = 2 differs"),
        ({"activation_sparsity_pattern": 0.5}, "activation_sparsity_pattern must be 0.95"),
        ({"intermediate_size": [96, 96, 96, 96, 48]}, "intermediate_size = .* must be a whole number"),
        ({"vocab_size_per_layer_input": 10**6}, "no more embeddings per layer than tokens"),
        ({"layer_types": ["sliding_attention"] * 5}, "layers with a sliding window and layers without"),
    ],
    "llama4": [
        ({"moe_layers": [0, 1]}, "moe_layers must be every interleave_moe_layer_step-th"),
        ({"attention_chunk_size": 4096}, "attention_chunk_size other than 8192"),
        ({"floor_scale": 1024}, "floor_scale other than 8192"),
        ({"attn_scale": 0.2}, "attn_scale other than 0.1"),
        ({"no_rope_layers": [1, 0, 1, 0]}, "no_rope_layers must leave out every fourth"),
        ({"no_rope_layer_interval": 2}, "no_rope_layer_interval other than 4"),
        ({"attn_temperature_tuning": False}, "without attn_temperature_tuning"),
        ({"layer_types": ["full_attention"] * 4}, "layer_types must be chunked_attention but"),
        ({"use_qk_norm": False}, "except with 128 experts"),
        ({"num_local_experts": 1}, "more than the 1 experts"),
    ],
    "lfm2": [
        ({"conv_bias": True}, "conv_bias is not supported"),
        ({"layer_types": ["conv"] * 4}, "layers with a convolution and layers with attention"),
        ({"layer_types": ["mamba"] * 4}, "layer_types has 'mamba'"),
    ],
    "lfm2_moe": [
        ({"routed_scaling_factor": 2.0}, "routed_scaling_factor other than 1"),
        ({"use_expert_bias": False}, "use_expert_bias and norm_topk_prob"),
        ({"tie_word_embeddings": False}, "no output matrix of its own"),
    ],
    "gpt_oss": [
        ({"swiglu_limit": 5.0}, "swiglu_limit other than 7"),
        ({"layer_types": ["full_attention"] * 4}, "in every other layer"),
    ],
    "granite-4-hybrid": [
        ({"layer_types": ["mamba"] * 4}, "needs layers with attention"),
        ({"mamba_proj_bias": True}, "mamba_proj_bias is not supported"),
        ({"time_step_limit": [0.1, 1.0]}, "does not limit the time step"),
    ],
    "falcon_h1": [
        ({"mamba_rms_norm": True}, "mamba_norm_before_gate is not supported"),
        ({"ssm_multipliers": [1.0]}, "ssm_multipliers must be a list of 5 values"),
        ({"projectors_bias": True}, "projectors_bias is not supported"),
    ],
    "nemotron_h": [
        ({"layers_block_type": ["mamba"] * 4}, "a Mamba-2 mixer and layers with attention"),
        ({"layers_block_type": ["mamba", "attention", "mlp", "moe"]}, "not both"),
        ({"moe_latent_size": 8}, "moe_latent_size is not supported"),
        ({"hybrid_override_pattern": "M*-Q"}, "layers_block_type has 'Q'"),
    ],
}


@pytest.mark.parametrize(("name", "changes", "message"), [(n, *case) for n, cases in BAD.items() for case in cases])
def test_what_cannot_be_represented_is_one_sentence(name: str, changes: dict[str, Any], message: str) -> None:
    from edge_stream.converters.gguf_metadata import check_supported

    check_supported(read_config(config_of(name)))
    with pytest.raises(EdgeStreamError, match=message) as error:
        check_supported(read_config(config_of(name) | changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("model_type", REFUSED)
def test_refused_by_name(model_type: str) -> None:
    with pytest.raises(EdgeStreamError, match="normalises keys after rotating"):
        read_config({"model_type": model_type})


def test_fused_experts_in_either_orientation(tmp_path: Path) -> None:
    """Qwen3-VL's published experts are transposed, transformers 5 writes them like Qwen3.5's: one file comes of all."""
    tensors = write(tmp_path / "single", "qwen3_vl_moe")
    plain = {n: t for n, t in tensors.items() if ".experts." not in n}
    n_expert = config_of("qwen3_vl_moe")["num_experts"]
    read = {"single": tmp_path / "single"}
    for turned in (False, True):
        held = dict(plain)
        for layer in range(4):
            p = f"model.layers.{layer}.mlp.experts."
            gate, up, down = (
                np.stack([tensors[f"{p}{i}.{n}_proj.weight"] for i in range(n_expert)]) for n in ("gate", "up", "down")
            )
            both = np.concatenate([gate, up], axis=1)
            held[f"{p}gate_up_proj"] = both.swapaxes(1, 2).copy() if turned else both
            held[f"{p}down_proj"] = down.swapaxes(1, 2).copy() if turned else down
        folder = tmp_path / ("turned" if turned else "straight")
        folder.mkdir()
        for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            (folder / file).write_bytes((tmp_path / "single" / file).read_bytes())
        tiny.save_tensors(folder / "model.safetensors", held, "F32")
        read[folder.name] = folder
    for name, folder in read.items():
        convert(folder, tmp_path / f"{name}.gguf", model_name="m")
    files = {(tmp_path / f"{name}.gguf").read_bytes() for name in read}
    assert len(files) == 1


def test_every_end_is_an_end(tmp_path: Path) -> None:
    """Tokens at which generation stops, but which llama.cpp does not know by their text, are stored as such."""
    tiny.write_tiny(tmp_path / "model", "qwen3")
    words = json.loads((tmp_path / "model" / "tokenizer.json").read_text())["model"]["vocab"]
    a, b = sorted(words.values())[40:42]
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, a, 0, b]}))
    convert(tmp_path / "model", tmp_path / "m.gguf")
    source = open_source(str(tmp_path / "m.gguf"))
    assert set(source.generation_config["eos_token_id"]) >= {2, a, b}
    assert (source.vocab().special["eot"], source.vocab().special["eom"]) == (a, b)


@pytest.mark.parametrize("name", ["qwen3_moe", "llama4", "granite-4-hybrid"])
def test_a_gguf_file_that_is_not_read_can_be_quantised(name: str, tmp_path: Path) -> None:
    """libllama does it with the whole file; all metadata stay."""
    write(tmp_path / "model", name)
    convert(tmp_path / "model", tmp_path / "m.gguf", outtype="bf16")
    command = ["convert", str(tmp_path / "m.gguf"), "--to", "gguf", "-o", str(tmp_path / "q.gguf")]
    done = CliRunner().invoke(cli, [*command, "--quantize", "Q8_0", "--keep", "7"])
    assert done.exit_code == 0, done.output
    old, new = ({k: f.contents() for k, f in GgufReader(tmp_path / n).fields.items()} for n in ("m.gguf", "q.gguf"))
    changed = {key for key in new if key in old and old[key] != new[key]}
    assert changed <= {"edge_stream.n_keep", "general.file_type", "GGUF.kv_count"}
    assert new["edge_stream.n_keep"] == 7
    with (
        Engine.load(tmp_path / "m.gguf", n_ctx=64, n_threads=1) as whole,
        Engine.load(tmp_path / "q.gguf", n_ctx=64, n_threads=1) as engine,
    ):
        want, got = (one.stream().logits_of([20, 30, 40, 50]) for one in (whole, engine))
    assert 0 < np.abs(got - want).max() < 0.1 * np.abs(want).max()
    done = CliRunner().invoke(cli, command)
    assert "can only be quantised: use --quantize" in done.output
    done = CliRunner().invoke(cli, [*command, "--quantize", "Q8_0", "--outtype", "f16"])
    assert "--outtype is not for a GGUF file of this architecture" in done.output
