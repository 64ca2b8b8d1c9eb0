"""mlc-chat-config.json, which MLC's runtime and compiler read.

Keys: mlc-llm, python/mlc_llm/protocol/mlc_chat_config.py; those of `model_config`: its Config classes. The runtime
(cpp/serve/model.cc) reads sliding_window_size and attention_sink_size at the top level for any model_type, and its
paged cache can slide for all of them, so both are written for every architecture. Only the compiler's command line
limits them to Mistral: other Config classes have no such field and check the chunk against context_window_size, so
`model_config` gives the capacity under both names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edge_stream.converters.streaming_defaults import StreamingDefaults
from edge_stream.errors import EdgeStreamError

if TYPE_CHECKING:
    from edge_stream.converters.source import Source

MAX_PREFILL_CHUNK = 2048
_SAMPLING: dict[str, float] = {
    "temperature": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "top_p": 1.0,
}
# keys of config.json, copied into model_config
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")


@dataclass(frozen=True)
class TokenizerFacts:
    """The tokenizer's part of the configuration. ids: bos, eos, pad."""

    files: tuple[str, ...]
    info: Mapping[str, Any]
    ids: Mapping[str, int]


def build(
    source: Source,
    quantization: str,
    streaming: StreamingDefaults,
    tokenizer: TokenizerFacts,
    conv_template: Mapping[str, Any] | str,
) -> dict[str, Any]:
    """The whole file as a JSON object. n_ctx counts the sinks, as MLC's sliding_window_size does."""
    stops = stop_token_ids(source, tokenizer.ids)
    if not isinstance(conv_template, str):
        conv_template = {**conv_template, "stop_token_ids": sorted({*conv_template["stop_token_ids"], *stops})}
    chunk = prefill_chunk_size(streaming)
    return {
        "version": "0.1.0",
        "model_type": source.model.family.model_type,
        "quantization": quantization,
        "model_config": model_config(source, streaming),
        "vocab_size": source.model.n_vocab,
        "context_window_size": -1,
        "sliding_window_size": streaming.n_ctx,
        "prefill_chunk_size": chunk,
        "attention_sink_size": streaming.n_keep,
        **({"attention_sink": source.model.sink} if source.model.sink else {}),
        "tensor_parallel_shards": 1,
        "pipeline_parallel_stages": 1,
        **_sampling(source.generation_config),
        "tokenizer_files": list(tokenizer.files),
        "tokenizer_info": dict(tokenizer.info),
        "conv_template": conv_template,
        "pad_token_id": tokenizer.ids.get("pad", 0),
        "bos_token_id": tokenizer.ids.get("bos", 1),
        "eos_token_id": stops if len(stops) > 1 else stops[0] if stops else 2,
        "model_task": "chat",
    }


def prefill_chunk_size(streaming: StreamingDefaults) -> int:
    """Tokens decoded at once: at most a quarter of the window, so that a prompt evicts little more than necessary."""
    return max(1, min(MAX_PREFILL_CHUNK, (streaming.n_ctx - streaming.n_keep) // 4))


def stop_token_ids(source: Source, ids: Mapping[str, int]) -> list[int]:
    """Tokens that end an answer: those of generation_config.json, else of config.json, and the tokenizer's eos."""
    found = source.generation_config.get("eos_token_id", source.config.get("eos_token_id"))
    numbers = found if isinstance(found, list) else [found]
    stops = [n for n in numbers if isinstance(n, int) and not isinstance(n, bool)]
    for n in stops:
        if not 0 <= n < source.model.n_vocab:
            raise EdgeStreamError(f"eos_token_id {n} is not in the vocabulary of {source.model.n_vocab} tokens")
    if "eos" in ids and ids["eos"] not in stops:
        stops.append(ids["eos"])
    return stops


def _sampling(given: Mapping[str, Any]) -> dict[str, float]:
    found = dict(_SAMPLING)
    for key in found:
        value = given.get(key)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            found[key] = float(value)
    return found


def model_config(source: Source, streaming: StreamingDefaults) -> dict[str, Any]:
    """The part from which MLC's compiler builds the model."""
    model, family = source.model, source.model.family
    config: dict[str, Any] = {key: source.config[key] for key in _SIZES if key in source.config}
    config |= {
        "vocab_size": model.n_vocab,
        "num_attention_heads": model.n_head,
        "num_key_value_heads": model.n_head_kv,
        "head_dim": model.head_dim,
        "rms_norm_eps": model.norm_eps,
        "hidden_act": family.activation,
        "tie_word_embeddings": model.tied,
        "position_embedding_base": model.rope_base,
        "rope_scaling": _rope_scaling(source),
        "context_window_size": streaming.n_ctx,
        "prefill_chunk_size": prefill_chunk_size(streaming),
        "sliding_window_size": streaming.n_ctx,
        "attention_sink_size": streaming.n_keep,
        "tensor_parallel_shards": 1,
        "pipeline_parallel_stages": 1,
        "max_batch_size": 1,
        "dtype": "float32",
    }
    return family.mlc.config(model, config)


def _rope_scaling(source: Source) -> dict[str, Any] | None:
    scaling = source.model.rope_scaling
    if scaling is None:
        return None
    config = source.model.family.normal(dict(source.config))
    found = config.get("rope_parameters") or config.get("rope_scaling")
    given = dict(found.get("full_attention", found)) if isinstance(found, Mapping) else {}
    return given | {"rope_type": scaling.kind, "original_max_position_embeddings": scaling.n_ctx_orig}
