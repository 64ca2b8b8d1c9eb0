"""Mistral: v0.1 has sliding_window 4096, later ones null. llama.cpp loads it as Llama."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from edge_stream.families import Family, Mlc, ModelConfig
from edge_stream.families.llama import FAMILY as LLAMA


def _mlc_lacks(model: ModelConfig) -> str | None:
    return "has an output matrix of its own, and this checkpoint has none" if model.tied else None


def _mlc_config(_model: ModelConfig, config: dict[str, Any]) -> dict[str, Any]:
    return config | {"context_window_size": -1}


FAMILY = Family(
    model_type="mistral",
    hf_class="MistralForCausalLM",
    models="Mistral 7B (v0.1 with its sliding window), Nemo; SentencePiece and tekken",
    gguf=replace(LLAMA.gguf, read_back=False),
    mlc=Mlc(lacks=_mlc_lacks, config=_mlc_config),
    windowed=lambda _layer, _count: True,
    defaults={"rms_norm_eps": 1e-6, "sliding_window": 4096, "num_key_value_heads": 8},
)
