"""LoRA adapters of PEFT's as llama.cpp's: the model with the adapter is the model with merged weights."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny_checkpoints as tiny
from click.testing import CliRunner
from family_configs import FAMILIES, MODEL_TYPES, config_of, soften
from safetensors.numpy import load_file, save_file

from edge_stream import Engine
from edge_stream.cli import cli
from edge_stream.converters import lora, to_gguf
from edge_stream.converters.config import read_config
from edge_stream.converters.gguf_reader import GgufReader
from edge_stream.errors import EdgeStreamError
from edge_stream.families import families
from edge_stream.hardware import memory
from edge_stream.models.conversion import open_source

TOKENS = [int(t) for t in np.random.default_rng(0).integers(10, 600, 40)]
RANK = 4
ATTENTION = re.compile(r"self_attn\.[qv]_proj\.weight")
OWN = [n for n, (kind, *_) in FAMILIES.items() if not families()[MODEL_TYPES[kind]].plain and "mxfp4" not in n]
Tensors = dict[str, np.ndarray]


def checkpoint(folder: Path, name: str) -> Tensors:
    """A model with random weights of CHECKPOINTS or FAMILIES."""
    config, tokenizer = tiny.config_of(name) if name in tiny.CHECKPOINTS else config_of(name), tokenizer_of(name)
    folder.mkdir()
    tiny.write_tokenizer(folder, tokenizer)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = soften(name, dict(tiny.random_tensors(config)))
    tiny.save_tensors(folder / "model.safetensors", tensors, "F32")
    return tensors


def tokenizer_of(name: str) -> str:
    return tiny.CHECKPOINTS[name][2] if name in tiny.CHECKPOINTS else FAMILIES[name][2]


def adapter(folder: Path, base: Path, tensors: Tensors, wanted: Callable[[str], bool], **changes: Any) -> Tensors:
    """A random adapter of some matrices, as PEFT saves it; what it adds to them, at a scale of 1."""
    rng, parts, added = np.random.default_rng(1), {}, {}
    for name, values in tensors.items():
        if not wanted(name):
            continue
        a = rng.normal(0, 1, (RANK, values.shape[1])) / math.sqrt(values.shape[1])
        b = rng.normal(0, 0.5, (values.shape[0], RANK)) * np.abs(values).mean()
        added[name] = b @ a
        module = f"base_model.model.{name.removesuffix('.weight')}"
        if name == "model.embed_tokens.weight":
            parts |= {f"{module}.lora_embedding_A": b.T, f"{module}.lora_embedding_B": a.T}
        else:
            parts |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 8,
        "bias": "none",
        "use_dora": False,
        "modules_to_save": None,
        "base_model_name_or_path": str(base),
    }
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    save_file({n: np.ascontiguousarray(v, np.float32) for n, v in parts.items()}, folder / "adapter_model.safetensors")
    return added


def convert(folder: Path, out: Path, **options: Any) -> Path:
    to_gguf.convert(open_source(str(folder)), out, to_gguf.GgufOptions(outtype="f32", **options), lambda _: None)
    return out


def convert_adapter(folder: Path, out: Path, base: Path | None = None, **options: Any) -> Path:
    assert lora.convert(folder, base, out, to_gguf.GgufOptions(**options), lambda _: None) == [out]
    return out


def logits(model: Path, *adapters: tuple[Path, float]) -> np.ndarray:
    chosen = [(str(path), scale) for path, scale in adapters]
    exact = {
        "n_ctx": 64,
        "n_threads": 1,
        "proof": False,
        "cache_type_k": "f32",
        "cache_type_v": "f32",
        "flash_attn": "off",
    }
    with Engine.load(model, lora=chosen, **exact) as engine:
        return np.array(engine.stream().logits_of(TOKENS))


def merged(folder: Path, base: Path, tensors: Tensors, added: Tensors, scale_of: Callable[[str], float]) -> Path:
    folder.mkdir()
    for file in base.iterdir():
        if file.suffix == ".json" or file.name == "tokenizer.model":
            (folder / file.name).write_bytes(file.read_bytes())
    whole = {n: (v + scale_of(n) * added[n]).astype(np.float32) if n in added else v for n, v in tensors.items()}
    tiny.save_tensors(folder / "model.safetensors", whole, "F32")
    return convert(folder, folder.with_suffix(".gguf"))


def relative(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.abs(got - want).max() / np.abs(want).max())


@pytest.mark.parametrize("name", [*tiny.CHECKPOINTS, *OWN])
def test_logits_are_those_of_merged_weights(name: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    tensors = checkpoint(base, name)
    ignored = read_config(config_of(name) if name in FAMILIES else tiny.config_of(name)).family.gguf.no_adapter
    layers = {n for n, v in tensors.items() if v.ndim == 2 and ".layers." in n and n.endswith(".weight")}
    matrices = {n for n in layers if not n.endswith(ignored)}
    added = adapter(tmp_path / "adapter", base, tensors, matrices.__contains__)
    assert len(added) > 4
    file = convert_adapter(tmp_path / "adapter", tmp_path / "adapter.gguf")
    plain = convert(base, tmp_path / "base.gguf")
    want = logits(merged(tmp_path / "merged", base, tensors, added, lambda _: 8 / RANK))
    error = relative(logits(plain, (file, 1.0)), want)
    # Gemma's GELU is a table in float16; rounding grows in the delta nets (each part alone is within 2e-5)
    assert error < (1e-3 if "gemma" in name else 2e-4 if name == "qwen3_5_moe" else 1e-4)
    assert relative(logits(plain), want) > 0.03


def test_embedding_and_output_matrix(tmp_path: Path) -> None:
    tensors = checkpoint(tmp_path / "base", "llama3")
    ends = ("model.embed_tokens.weight", "lm_head.weight")
    added = adapter(tmp_path / "adapter", tmp_path / "base", tensors, ends.__contains__)
    file = convert_adapter(tmp_path / "adapter", tmp_path / "adapter.gguf")
    plain = convert(tmp_path / "base", tmp_path / "base.gguf")
    want = logits(merged(tmp_path / "merged", tmp_path / "base", tensors, added, lambda _: 8 / RANK))
    assert relative(logits(plain, (file, 1.0)), want) < 1e-4
    assert relative(logits(plain), want) > 0.03


@pytest.mark.parametrize("rslora", [False, True])
def test_scales(rslora: bool, tmp_path: Path) -> None:
    """alpha / rank, with rsLoRA alpha / sqrt(rank); alpha of some matrices; a scale of the user's; two adapters."""
    tensors = checkpoint(tmp_path / "base", "llama3")
    more = {"use_rslora": rslora, "alpha_pattern": {r"layers\.1\..*v_proj": 3, "k_proj": 100}}
    one = adapter(tmp_path / "one", tmp_path / "base", tensors, lambda n: ATTENTION.search(n) is not None, **more)
    two = adapter(tmp_path / "two", tmp_path / "base", tensors, lambda n: "down_proj" in n)
    files = [convert_adapter(tmp_path / name, tmp_path / f"{name}.gguf") for name in ("one", "two")]

    def scale_of(name: str) -> float:
        if "down_proj" in name:
            return 8 / RANK
        alpha = 3 if "layers.1." in name and "v_proj" in name else 8
        return 0.5 * alpha / (math.sqrt(RANK) if rslora else RANK)

    want = logits(merged(tmp_path / "merged", tmp_path / "base", tensors, one | two, scale_of))
    plain = convert(tmp_path / "base", tmp_path / "base.gguf")
    assert relative(logits(plain, (files[0], 0.5), (files[1], 1.0)), want) < 1e-4
    assert relative(logits(plain, (files[0], 0.6), (files[1], 1.0)), want) > 1e-3


def test_the_file(tmp_path: Path) -> None:
    """Names and keys as convert_lora_to_gguf.py writes them; the base may be a GGUF file; types."""
    tensors = checkpoint(tmp_path / "base", "llama3")
    adapter(tmp_path / "my-adapter", tmp_path / "none", tensors, lambda n: ATTENTION.search(n) is not None)
    plain = convert(tmp_path / "base", tmp_path / "base.gguf")
    file = convert_adapter(tmp_path / "my-adapter", tmp_path / "a.gguf", plain, outtype="f16")
    same = convert_adapter(tmp_path / "my-adapter", tmp_path / "b.gguf", tmp_path / "base", outtype="f16")
    assert file.read_bytes() == same.read_bytes()
    reader = GgufReader(file)
    keys = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert keys["general.type"] == "adapter"
    assert keys["adapter.type"] == "lora"
    assert keys["adapter.lora.alpha"] == 8.0
    assert keys["general.architecture"] == "llama"
    assert keys["general.name"] == "My Adapter"
    assert not [key for key in keys if key.startswith(("tokenizer.", "llama.", "edge_stream."))]
    held = {t.name: t for t in reader.tensors}
    assert set(held) == {f"blk.{i}.attn_{n}.weight.lora_{x}" for i in range(2) for n in "qv" for x in "ab"}
    n_embd = tensors["model.norm.weight"].size
    assert list(held["blk.0.attn_q.weight.lora_a"].shape) == [n_embd, RANK]
    assert held["blk.0.attn_q.weight.lora_a"].tensor_type == gguf.GGMLQuantizationType.F16


def test_experts(tmp_path: Path) -> None:
    """An adapter of all experts is one tensor; one of some of them cannot be."""
    tensors = checkpoint(tmp_path / "base", "qwen3_moe")
    adapter(tmp_path / "all", tmp_path / "base", tensors, lambda n: "layers.1.mlp.experts." in n and "up_proj" in n)
    file = convert_adapter(tmp_path / "all", tmp_path / "a.gguf")
    assert {t.name: list(t.shape)[1:] for t in GgufReader(file).tensors} == {
        "blk.1.ffn_up_exps.weight.lora_a": [RANK, 6],
        "blk.1.ffn_up_exps.weight.lora_b": [32, 6],
    }
    adapter(tmp_path / "some", tmp_path / "base", tensors, lambda n: "layers.1.mlp.experts.2.up_proj" in n)
    with pytest.raises(EdgeStreamError, match="some have none"):
        convert_adapter(tmp_path / "some", tmp_path / "b.gguf")


def setting(**changes: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return apply


def weights(change: Callable[[Tensors], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        held = dict(load_file(folder / "adapter_model.safetensors"))
        change(held)
        save_file(held, folder / "adapter_model.safetensors")

    return apply


P = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
# what is done to an adapter, and what is said
BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "dora": (setting(use_dora=True), "DoRA"),
    "a magnitude": (weights(lambda t: t.update({P + "magnitude_vector": np.ones(9, np.float32)})), "no part of a LoRA"),
    "whole modules": (setting(modules_to_save=["lm_head"]), "modules_to_save"),
    "biases": (setting(bias="all"), "biases .bias = 'all'."),
    "a bias of the adapter": (setting(lora_bias=True), "lora_bias"),
    "transposed": (setting(fan_in_fan_out=True), "fan_in_fan_out"),
    "repeated layers": (setting(layer_replication=[[0, 2]]), "layers that are repeated"),
    "single tokens": (setting(trainable_token_indices=[3]), "embeddings of single tokens"),
    "activated": (setting(alora_invocation_tokens=[3]), "activated LoRA"),
    "qalora": (setting(use_qalora=True), "QALoRA"),
    "another method": (setting(peft_type="IA3"), "peft_type 'IA3' is not LORA"),
    "no alpha": (setting(lora_alpha=None), "lora_alpha = None must be a number"),
    "alpha is text": (setting(lora_alpha="8"), "lora_alpha = '8' must be a number"),
    "alpha is 0": (setting(lora_alpha=0), "lora_alpha = 0 must be a number other than 0"),
    "a bad pattern": (setting(alpha_pattern={"(": 3}), "no pattern"),
    "patterns are a list": (setting(alpha_pattern=[3]), "alpha_pattern is not a JSON object"),
    "not an object": (lambda f: (f / "adapter_config.json").write_text("[]"), "not a JSON object"),
    "not JSON": (lambda f: (f / "adapter_config.json").write_text("{"), "not valid JSON"),
    "no base": (setting(base_model_name_or_path=None), "names None as the base model"),
    "a base of the hub": (setting(base_model_name_or_path="a/b"), "names 'a/b' as the base model.*use --base"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors"),
    "only B": (weights(lambda t: t.pop(P + "A.weight")), "only one of the two matrices"),
    "a foreign layer": (
        weights(lambda t: t.update({P.replace("layers.0", "layers.9") + "A.weight": np.ones((4, 4), np.float32)})),
        "another base model",
    ),
    "another width": (weights(lambda t: t.update({P + "A.weight": np.ones((RANK, 7), np.float32)})), "does not fit"),
    "another rank": (weights(lambda t: t.update({P + "B.weight": np.ones((64, 3), np.float32)})), "does not fit"),
    "a norm": (
        weights(lambda t: t.update({"base_model.model.model.norm.weight": np.ones(9, np.float32)})),
        "no part of a LoRA",
    ),
    "not a number": (weights(lambda t: t[P + "A.weight"].fill(np.nan)), "NaN or infinity"),
    "nothing": (weights(lambda t: t.clear()), "no matrices of the language model"),
    "cut off": (
        lambda f: (f / "adapter_model.safetensors").write_bytes((f / "adapter_model.safetensors").read_bytes()[:-9]),
        "is cut off",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_adapters(case: str, tmp_path: Path) -> None:
    assert len(BAD) >= 25
    tensors = checkpoint(tmp_path / "base", "llama3")
    adapter(tmp_path / "adapter", tmp_path / "base", tensors, lambda n: ATTENTION.search(n) is not None)
    change, message = BAD[case]
    change(tmp_path / "adapter")
    with pytest.raises(EdgeStreamError, match=message) as error:
        convert_adapter(tmp_path / "adapter", tmp_path / "a.gguf")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("*.gguf")) + list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("name", "ending"),
    [
        ("gemma3n", "altup.modality_router.weight"),
        ("gemma3n", "altup_projections.1.weight"),
        ("gemma4", "per_layer_model_projection.weight"),
    ],
)
def test_what_llama_cpp_would_ignore_is_refused(name: str, ending: str, tmp_path: Path) -> None:
    tensors = checkpoint(tmp_path / "base", name)
    adapter(tmp_path / "adapter", tmp_path / "base", tensors, lambda n: n.endswith(ending))
    with pytest.raises(EdgeStreamError, match="has no adapters: merge it"):
        convert_adapter(tmp_path / "adapter", tmp_path / "a.gguf")


@pytest.mark.parametrize("n_allowed", [0, 1])
def test_too_little_memory_is_noticed_before_it_is_used(
    n_allowed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = checkpoint(tmp_path / "base", "llama3")  # whose matrices of queries and keys have another order of rows
    adapter(tmp_path / "adapter", tmp_path / "base", tensors, lambda n: ATTENTION.search(n) is not None)
    asked: list[int] = []

    def refuse(_: int, n_bytes: int) -> Any:
        asked.append(n_bytes)
        if len(asked) > n_allowed:
            raise OSError(12, "Cannot allocate memory")
        return io.BytesIO()

    monkeypatch.setattr(memory.mmap, "mmap", refuse)
    with pytest.raises(EdgeStreamError, match=r"not enough memory: .* MiB are needed"):
        convert_adapter(tmp_path / "adapter", tmp_path / "a.gguf")
    assert len(asked) == n_allowed + 1 and not list(tmp_path.glob("*.gguf")) + list(tmp_path.glob(".*"))


def test_tied_embeddings(tmp_path: Path) -> None:
    tensors = checkpoint(tmp_path / "base", "smollm")
    adapter(tmp_path / "one", tmp_path / "base", tensors, lambda n: "embed" in n)
    with pytest.raises(EdgeStreamError, match="which is the output matrix too"):
        convert_adapter(tmp_path / "one", tmp_path / "a.gguf")
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    adapter(tmp_path / "two", tmp_path / "base", tensors | head, lambda n: "lm_head" in n)
    with pytest.raises(EdgeStreamError, match="with tied embeddings has no such matrix"):
        convert_adapter(tmp_path / "two", tmp_path / "a.gguf")


def test_the_command(tmp_path: Path) -> None:
    tensors = checkpoint(tmp_path / "base", "llama3")
    adapter(tmp_path / "adapter", tmp_path / "none", tensors, lambda n: ATTENTION.search(n) is not None)
    run = CliRunner().invoke
    command = ["convert", str(tmp_path / "adapter"), "--to", "gguf", "-o", str(tmp_path)]
    done = run(cli, [*command, "--base", str(tmp_path / "base")])
    assert done.exit_code == 0, done.output
    assert "a LoRA adapter of 4 matrices for llama" in done.output
    assert (tmp_path / "adapter-LoRA.gguf").is_file()
    for more, message in {
        (): "use --base",
        ("--base", str(tmp_path / "base"), "--quantize", "Q4_0"): "--quantize is not for a LoRA adapter",
        ("--base", str(tmp_path / "base"), "-c", "64"): "--ctx-size is not for a LoRA adapter",
    }.items():
        done = run(cli, [*command, *more])
        assert done.exit_code != 0
        assert message in done.output
    done = run(cli, ["convert", str(tmp_path / "adapter"), "--to", "mlc"])
    assert "converts to GGUF only" in done.output
    done = run(cli, ["convert", str(tmp_path / "base"), "--to", "gguf", "--base", str(tmp_path)])
    assert "--base is for LoRA adapters" in done.output
