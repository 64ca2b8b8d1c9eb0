"""LoRA adapters: a folder of PEFT's becomes an adapter file of llama.cpp's, for `--lora`.

PEFT adds scale * B A to a matrix [out, in], where A is [rank, in] and B [out, rank]; the scale is alpha / rank, with
rsLoRA alpha / sqrt(rank). llama.cpp knows one alpha and divides by each matrix's rank. What else differs goes into B.
Sources: peft (tuners/lora/layer.py, utils/save_and_load.py), llama.cpp (convert_lora_to_gguf.py, llama-adapter.cpp).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from edge_stream.converters import gguf_tensors, mistral_params, safetensors_files, to_gguf
from edge_stream.converters.config import read_config, text_config
from edge_stream.converters.gguf_tensors import PlannedTensor
from edge_stream.converters.hf_source import OTHER_TOWERS, read_json, text_name
from edge_stream.converters.progress import Progress, silent
from edge_stream.converters.tensor_names import expected_tensors
from edge_stream.converters.text import quoted
from edge_stream.errors import EdgeStreamError
from edge_stream.families import ModelConfig
from edge_stream.hardware.memory import check_obtainable
from edge_stream.output.staging import check_space, publish, staging_folder

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PART = re.compile(r"base_model\.model\.(.+)\.lora_(?:(embedding)_)?([AB])(?:\.default)?(?:\.weight)?")
# settings of adapter_config.json that change more than a product of two matrices can -> what they are
_REFUSED = {
    "use_dora": "DoRA, which also changes the length of a matrix's columns",
    "modules_to_save": "whole modules (modules_to_save) beside the low-rank matrices",
    "lora_bias": "biases (lora_bias)",
    "fan_in_fan_out": "transposed matrices (fan_in_fan_out)",
    "layer_replication": "layers that are repeated (layer_replication)",
    "trainable_token_indices": "embeddings of single tokens (trainable_token_indices)",
    "alora_invocation_tokens": "an activated LoRA, which a stream would switch on and off",
    "use_qalora": "QALoRA, which averages the inputs",
}
Values = NDArray[np.float32]
Pair = tuple[Values, Values]  # A, B


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a LoRA adapter and no whole model."""
    model = any((folder / name).exists() for name in ("model.safetensors", "model.safetensors.index.json"))
    return (folder / CONFIG).is_file() and not model


def convert(
    folder: Path,
    base: Path | None,
    out: Path,
    options: to_gguf.GgufOptions,
    say: to_gguf.Say,
    progress: Progress = silent,
) -> list[Path]:
    """Write an adapter file and return what was written; nothing with --dry-run. Raises EdgeStreamError.

    base: the model that the adapter is for, a folder with config.json (weights are not needed) or a GGUF file;
    None: the folder that adapter_config.json names.
    """
    config = _read_config(folder)
    model = _base_model(folder, base or _named_base(config))
    alpha, pairs = _read_pairs(folder, config, model, say)
    outtype = "f32" if options.outtype == "auto" else options.outtype
    tensors = _place(model, pairs)
    planned = [
        PlannedTensor(n, v.shape, gguf_tensors.type_of(n[: -len(".lora_a")], v.shape, outtype))
        for n, v in tensors.items()
    ]
    say(f"source            {folder.name}, a LoRA adapter of {len(pairs)} matrices for {model.family.model_type}")
    say(f"converts to       {out}, {outtype}, {sum(t.nbytes for t in planned) / 2**20:,.1f} MiB")

    def describe(writer: gguf.GGUFWriter) -> None:
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        metadata = gguf.Metadata.load(None, folder, options.model_name, writer.get_total_parameter_count()[0])
        metadata.name = metadata.name or folder.name
        writer.add_type("adapter")
        metadata.set_gguf_meta_model(writer)
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", alpha)

    def encode(tensor: PlannedTensor) -> list[NDArray[Any]]:
        return [gguf_tensors.as_type(tensors[tensor.name], tensor, tensor.name)]

    if options.dry_run:
        return []
    out = to_gguf.target(out, options)
    check_space(out, sum(t.nbytes for t in planned))
    with staging_folder(out) as staged:
        writer = gguf.GGUFWriter(staged / out.name, model.arch)
        to_gguf.write(writer, planned, encode, describe, progress)
        return publish([staged / out.name], out.parent, options.overwrite)


#
# what the folder says
#


def _read_config(folder: Path) -> dict[str, Any]:
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict):
        raise EdgeStreamError(f"{CONFIG} is not a JSON object")
    if config.get("peft_type") != "LORA":
        raise EdgeStreamError(f"{CONFIG}: peft_type {quoted(config.get('peft_type'), 40)} is not LORA")
    for key, what in _REFUSED.items():
        if config.get(key):
            raise EdgeStreamError(f"the adapter has {what}: llama.cpp's adapters cannot, so merge it into its model")
    if config.get("bias") not in (None, "none"):
        raise EdgeStreamError(
            f"the adapter has biases (bias = {quoted(config['bias'], 40)}): llama.cpp's adapters cannot, so merge it "
            "into its model"
        )
    return config


def _named_base(config: Mapping[str, Any]) -> Path:
    name = config.get("base_model_name_or_path")
    if not isinstance(name, str) or not name or not Path(name).is_dir():
        raise EdgeStreamError(
            f"{CONFIG} names {quoted(name, 80)} as the base model, which is no folder here: use --base"
        )
    return Path(name)


def _base_model(folder: Path, base: Path) -> ModelConfig:
    if base.is_file():
        from edge_stream.converters.gguf_source import GgufSource

        return GgufSource(base).model
    if base.resolve() == folder.resolve() or not base.exists():
        raise EdgeStreamError(f"{base} is not the base model of an adapter: use --base")
    if (base / "config.json").is_file():
        raw = read_json(base / "config.json")
    elif (base / mistral_params.FILE).is_file():
        raw = mistral_params.as_config(read_json(base / mistral_params.FILE))
    else:
        raise EdgeStreamError(f"the base model {base} has no config.json")
    model = read_config(text_config(raw))
    return replace(model, tied=model.tied or raw.get("tie_word_embeddings") is True)


def _number(config: Mapping[str, Any], key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value == 0:
        raise EdgeStreamError(f"{CONFIG}: {key} = {quoted(value, 40)} must be a number other than 0")
    return float(value)


def _alpha_of(config: Mapping[str, Any], module: str) -> float:
    """lora_alpha of a module, which a pattern may change: a key is a regular expression for the end of the name."""
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise EdgeStreamError(f"{CONFIG}: alpha_pattern is not a JSON object")
    for pattern, value in patterns.items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return _number(config, "alpha_pattern", value)
        except re.error as error:
            raise EdgeStreamError(f"{CONFIG}: alpha_pattern has {quoted(pattern, 40)}, which is no pattern") from error
    return _number(config, "lora_alpha", config.get("lora_alpha"))


def _read_pairs(
    folder: Path, config: Mapping[str, Any], model: ModelConfig, say: to_gguf.Say
) -> tuple[float, dict[str, Pair]]:
    """llama.cpp's alpha, and A and B of every matrix by the name of its weight; B times what alpha does not say."""
    path = folder / WEIGHTS
    if not path.is_file():
        pickle = " (adapter_model.bin is pickle, which is never loaded)" if path.with_suffix(".bin").exists() else ""
        raise EdgeStreamError(f"{folder} has no {WEIGHTS}{pickle}")
    expected, elsewhere = expected_tensors(model), (*OTHER_TOWERS, *model.family.left_out)
    found: dict[str, dict[str, safetensors_files.Entry]] = {}
    modules: dict[str, str] = {}
    skipped: list[str] = []
    for stored, entry in safetensors_files.read_header(path).items():
        match = _PART.fullmatch(stored)
        if match is None:
            raise EdgeStreamError(f"{WEIGHTS} holds {quoted(stored, 80)}, which is no part of a LoRA adapter")
        name = text_name(f"{match[1]}.weight", model.family)
        if name.startswith(elsewhere) or f"{match[1]}.".startswith(elsewhere):
            skipped.append(stored)
            continue
        shape = expected.get(name)
        if shape is None or len(shape) != 2:
            what = "with tied embeddings " if model.tied and name == "lm_head.weight" else ""
            raise EdgeStreamError(
                f"the adapter changes {quoted(match[1], 80)}, but a {model.family.model_type} model {what}has no such "
                "matrix: it belongs to another base model"
            )
        if name.endswith(model.family.gguf.no_adapter):
            raise EdgeStreamError(
                f"the adapter changes {quoted(match[1], 80)}, for which llama.cpp's {model.arch} has no adapters: "
                "merge it into its model"
            )
        if name == "model.embed_tokens.weight" and model.tied:
            raise EdgeStreamError(
                "the adapter changes the embedding, which is the output matrix too: llama.cpp's adapters cannot, so "
                "merge it into its model"
            )
        found.setdefault(name, {})[match[3]] = entry
        modules[name] = match[1]
    if not found:
        raise EdgeStreamError(f"{WEIGHTS} holds no matrices of the language model")
    if skipped:
        say(f"note: {len(skipped)} tensors for images or sound are left out, e.g. {skipped[0]}")
    n_values = sum(math.prod(entry.shape) for pair in found.values() for entry in pair.values())
    check_obtainable(3 * 4 * n_values)  # as read, scaled, placed
    return _scaled(found, modules, expected, config)


def _scaled(
    found: Mapping[str, Mapping[str, safetensors_files.Entry]],
    modules: Mapping[str, str],
    expected: Mapping[str, tuple[int, ...]],
    config: Mapping[str, Any],
) -> tuple[float, dict[str, Pair]]:
    reader = safetensors_files.Reader()
    parts: dict[str, Pair] = {}
    alphas: dict[str, float] = {}
    try:
        for name, pair in found.items():
            if len(pair) != 2:
                raise EdgeStreamError(f"the adapter has only one of the two matrices of {quoted(modules[name], 80)}")
            a, b = (reader.read(name, pair[letter]).astype(np.float32) for letter in "AB")
            rows, columns = expected[name]
            if name == "model.embed_tokens.weight":
                rows, columns = columns, rows
            if a.shape[1:] != (columns,) or b.shape != (rows, a.shape[0]) or not a.size:
                raise EdgeStreamError(
                    f"the adapter's matrices of {quoted(modules[name], 80)} are {list(b.shape)} and {list(a.shape)}, "
                    f"which does not fit the base model's {list(expected[name])}"
                )
            parts[name] = a, b
            alphas[name] = _alpha_of(config, modules[name]) * (math.sqrt(len(a)) if config.get("use_rslora") else 1.0)
    finally:
        reader.close()
    usual = next(iter(alphas.values()))
    return usual, {n: (a, b * np.float32(alphas[n] / usual)) for n, (a, b) in parts.items()}


#
# where it goes
#


def _place(model: ModelConfig, pairs: Mapping[str, Pair]) -> dict[str, Values]:
    """The adapter file's tensors by name, A before B."""
    gguf_name = gguf_tensors.namer(model)
    stacks: dict[str, list[Pair | None]] = {}  # of experts, which are one tensor
    tensors: dict[str, Values] = {}
    for name in expected_tensors(model):
        change = partial(gguf_tensors.to_pairs, head_dim=model.head_dim) if gguf_tensors.in_pairs(model, name) else None
        for place in model.family.gguf.places(model, name):
            pair = _changed(*pairs[name], place.change or change, name) if name in pairs else None
            if place.stack:
                stacks.setdefault(gguf_name(name, place), []).append(pair)
            elif pair is not None:
                tensors |= _named(gguf_name(name, place), pair)
    for target, experts in stacks.items():
        held = [pair for pair in experts if pair is not None]
        if held:
            if len(held) != len(experts) or len({len(a) for a, _ in held}) != 1:
                raise EdgeStreamError(
                    f"the adapter's experts have different ranks, or some have none ({target}): llama.cpp's adapters "
                    "cannot, so merge it into its model"
                )
            tensors |= _named(target, (np.stack([a for a, _ in held]), np.stack([b for _, b in held])))
    return tensors


def _named(target: str, pair: Pair) -> dict[str, Values]:
    a, b = pair
    return {f"{target}.lora_a": a.T if target == "token_embd.weight" else a, f"{target}.lora_b": b}


def _changed(a: Values, b: Values, change: Callable[[NDArray[Any]], NDArray[Any]] | None, name: str) -> Pair:
    """A and B of a matrix after its change, which must concern rows only or columns only."""
    if change is None:
        return a, b
    check_obtainable(6 * 4 * len(b) * a.shape[1])  # both products, and what compares them
    want = change(b @ a)
    for rows, columns in ((change, None), (None, change)):
        try:
            pair = columns(a) if columns else a, rows(b) if rows else b
            product = pair[1] @ pair[0]
        except (ValueError, IndexError):
            continue
        if product.shape == want.shape and np.allclose(product, want, rtol=1e-3, atol=1e-5 * np.abs(want).max()):
            return np.ascontiguousarray(pair[0], np.float32), np.ascontiguousarray(pair[1], np.float32)
    raise EdgeStreamError(f"llama.cpp stores {name} in a form that an adapter cannot change: merge it into its model")
