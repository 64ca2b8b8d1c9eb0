"""GGUF metadata: general.*, the architecture's hyperparameters, rope scaling, the streaming defaults.

Keys and meanings: ggml's docs/gguf.md; what each architecture requires: llama.cpp's loader (src/models).
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

import gguf

from edge_stream.converters import chat_templates
from edge_stream.converters.streaming_defaults import StreamingDefaults
from edge_stream.errors import EdgeStreamError
from edge_stream.families import ModelConfig, families

if TYPE_CHECKING:
    from edge_stream.converters.source import Source

KEY_N_KEEP = "edge_stream.n_keep"
KEY_N_CTX = "edge_stream.n_ctx"
KEY_SINK = "edge_stream.sink"
_FILE_TYPES = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "bf16": gguf.LlamaFileType.MOSTLY_BF16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}
# keys that every conversion sets itself
_OURS = ("GGUF.", "general.architecture", "general.file_type", "general.quantization_version", "split.", "edge_stream.")


def check_supported(model: ModelConfig) -> None:
    """Raise EdgeStreamError for settings that llama.cpp's loader of the architecture cannot represent."""
    loader = model.family.gguf
    name = model.arch
    scaling = model.rope_scaling.kind if model.rope_scaling else None
    if scaling is not None and scaling not in loader.rope_scalings:
        raise EdgeStreamError(f"llama.cpp has no {scaling} rope scaling for {name}")
    if model.rope_scaling and not model.rope_scaling.truncate and not loader.rounds_yarn:
        raise EdgeStreamError(
            "config.json: yarn without truncate is not supported by llama.cpp, which rounds the range"
        )
    if not loader.free_head_dim and model.n_head * model.head_dim != model.n_embd:
        raise EdgeStreamError(
            f"llama.cpp's {name} needs heads x head_dim = hidden_size, not "
            f"{model.n_head} x {model.head_dim} and {model.n_embd}"
        )
    if not loader.partial_rotary and model.n_rot != model.head_dim:
        raise EdgeStreamError(f"llama.cpp's {name} has no partial rotary positions (partial_rotary_factor)")
    if (model.qkv_bias and not loader.qkv_bias) or (model.o_bias and not loader.o_bias):
        raise EdgeStreamError(f"llama.cpp's {name} has no attention biases (attention_bias)")
    scalar = loader.attn_scalar(model.n_layer, model.n_embd, model.n_head, model.head_dim)
    if not math.isclose(1.0 / math.sqrt(scalar), model.attn_scale, rel_tol=1e-6):
        raise EdgeStreamError(
            f"config.json: query_pre_attn_scalar = {model.attn_scale**-2:g}; "
            f"llama.cpp would take {scalar:g} for this shape"
        )
    if (model.attn_softcap and not loader.attn_softcap) or (model.logit_softcap and not loader.logit_softcap):
        raise EdgeStreamError(f"llama.cpp's {name} has no soft cap on logits")
    lacking = loader.lacks(model)
    if lacking is not None:
        raise EdgeStreamError(f"llama.cpp's {name} {lacking}")


def notes(model: ModelConfig) -> list[str]:
    """Notes for the user on what llama.cpp will compute differently from the checkpoint."""
    loader, said = model.family.gguf, []
    if model.sliding_window and not loader.masks_window:
        layers = sum(model.swa_layers)
        said.append(
            f"llama.cpp does not mask {loader.arch}'s sliding window of {model.sliding_window} tokens "
            f"({layers} layers): that makes no difference in a cache of at most that many tokens"
        )
    if model.rope_scaling and not model.rope_scaling.truncate:
        said.append("llama.cpp rounds the ends of yarn's range of frequencies to whole pairs, the checkpoint does not")
    return said + loader.notes(model)


def add_metadata(
    writer: gguf.GGUFWriter, source: Source, outtype: str, defaults: StreamingDefaults, model_name: str | None = None
) -> None:
    """Add all metadata to a writer that has the tensors. model_name: general.name, if not the source's."""
    packed = any(t.dtype == "mxfp4" for t in source.tensors.values())
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_MXFP4_MOE if packed else _FILE_TYPES[outtype])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_uint32(KEY_N_KEEP, defaults.n_keep)
    writer.add_uint32(KEY_N_CTX, defaults.n_ctx)
    if source.model.sink:
        writer.add_string(KEY_SINK, source.model.sink)
    fields = getattr(source, "gguf_fields", None)
    if fields is not None:
        copy_fields(writer, {k: v for k, v in fields.items() if k != "general.name" or model_name is None})
        if model_name is not None:
            writer.add_name(model_name)
        return
    _add_general(writer, source, model_name)
    for key, value in hyperparameters(source.model).items():
        _add(writer, f"{source.model.arch}.{key}", value)
    source.vocab().write(writer)
    chat_templates.write(writer, source.chat_templates)


def copy_fields(writer: gguf.GGUFWriter, fields: dict[str, gguf.ReaderField]) -> None:
    """Copy the metadata of another GGUF file, except the keys that the conversion sets itself."""
    for key, found in fields.items():
        if key.startswith(_OURS):
            continue
        kind = found.types[0]
        inner = found.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(key, found.contents(), kind, sub_type=inner)


def _add_general(writer: gguf.GGUFWriter, source: Source, model_name: str | None) -> None:
    """Name, licence, sampling settings, as the gguf package reads them from folder name, model card and configs."""
    folder = getattr(source, "folder", None)
    counts = writer.get_total_parameter_count()  # all, shared, one expert's, experts
    metadata = gguf.Metadata.load(None, folder, model_name, counts[0])
    if metadata.name is None:
        metadata.name = source.name
    if metadata.size_label is None:
        metadata.size_label = gguf.size_label(*counts)
    tokens = set(source.vocab().tokens)
    for reserved in filter(None, (family.gguf.reserved_name for family in families().values())):
        if re.search(reserved.pattern, metadata.name, re.IGNORECASE) and not reserved.tokens <= tokens:
            raise EdgeStreamError(
                f"llama.cpp cannot load a model named {metadata.name!r} without {reserved.models}'s tokenizer: "
                "use --model-name"
            )
    writer.add_type("model")
    metadata.set_gguf_meta_model(writer)


def hyperparameters(model: ModelConfig) -> dict[str, Any]:
    """The architecture's keys, without its prefix."""
    values = _usual_keys(model) | _rope_keys(model) | model.family.gguf.keys(model)
    return {key: value for key, value in values.items() if value is not None}


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """One key in the type that llama.cpp expects: flags, counts (uint32), numbers (float32), text, lists of them."""
    if isinstance(value, (list, tuple)):
        writer.add_array(key, list(value))
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        (writer.add_uint32 if isinstance(value, int) else writer.add_float32)(key, value)


def _usual_keys(model: ModelConfig) -> dict[str, Any]:
    loader = model.family.gguf
    keys: dict[str, Any] = {
        "block_count": model.n_layer,
        "context_length": model.n_ctx_train,
        "embedding_length": model.n_embd,
        "feed_forward_length": model.n_ff,
        "attention.head_count": model.n_head,
        "attention.head_count_kv": model.n_head_kv,
        "attention.layer_norm_rms_epsilon": model.norm_eps,
        "attention.key_length": model.head_dim,
        "attention.value_length": model.head_dim,
        "vocab_size": model.n_vocab,
    }
    if loader.window_key or (loader.masks_window and model.sliding_window):
        keys["attention.sliding_window"] = model.sliding_window
    if loader.masks_window and model.sliding_window:
        keys["attention.sliding_window_pattern"] = list(model.swa_layers)
    keys["attn_logit_softcapping"] = model.attn_softcap or None
    keys["final_logit_softcapping"] = model.logit_softcap or None
    return keys


def _rope_keys(model: ModelConfig) -> dict[str, Any]:
    keys: dict[str, Any] = {"rope.dimension_count": model.n_rot, "rope.freq_base": model.rope_base}
    if model.family.own_swa_rope and model.sliding_window:
        keys["rope.freq_base_swa"] = model.rope_base_swa
    scaling = model.rope_scaling
    if scaling is None or scaling.kind == "llama3":  # llama3's is a tensor
        return keys
    keys["rope.scaling.type"] = scaling.kind
    if scaling.kind in ("linear", "yarn"):
        keys["rope.scaling.factor"] = scaling.factor
    if scaling.kind in ("yarn", "longrope"):
        keys["rope.scaling.original_context_length"] = scaling.n_ctx_orig
    if scaling.kind == "longrope":
        keys["rope.scaling.attn_factor"] = scaling.magnitude
    if scaling.kind == "yarn":
        # llama.cpp multiplies by 1 + 0.1 ln(factor) by itself (llama-context.cpp), and by this key in addition
        usual = 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1.0 else 1.0
        if not math.isclose(scaling.magnitude, usual, rel_tol=1e-6):
            keys["rope.scaling.attn_factor"] = scaling.magnitude / usual
        keys["rope.scaling.yarn_beta_fast"] = scaling.beta_fast
        keys["rope.scaling.yarn_beta_slow"] = scaling.beta_slow
    return keys
