"""The text part of Qwen3-VL with experts, stored as one transposed matrix each for gate and up, and for down."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from edge_stream.families import Keys, Mlc, ModelConfig
from edge_stream.families._layers import expert_keys
from edge_stream.families.qwen3_moe import FAMILY as QWEN3_MOE
from edge_stream.families.qwen3_moe import read as read_experts
from edge_stream.families.qwen3_vl_text import FAMILY as QWEN3_VL
from edge_stream.families.qwen3_vl_text import dropped, lacks
from edge_stream.families.qwen3_vl_text import keys as position_keys
from edge_stream.families.qwen3_vl_text import read as read_positions


def _read(keys: Keys, n_layer: int) -> dict[str, Any]:
    return read_positions(keys, n_layer) | read_experts(keys, n_layer) | {"transposed": True}


def _keys(model: ModelConfig) -> dict[str, Any]:
    return position_keys(model) | expert_keys(model)


FAMILY = replace(
    QWEN3_MOE,
    model_type="qwen3_vl_moe_text",
    aliases=("qwen3_vl_moe",),
    hf_class="Qwen3VLMoeForConditionalGeneration",
    models="Qwen3-VL with experts (text)",
    gguf=replace(QWEN3_MOE.gguf, arch="qwen3vlmoe", keys=_keys, lacks=lacks, notes=dropped),
    mlc=Mlc(known=False),
    experts=False,
    read=_read,
    left_out=QWEN3_VL.left_out,
    defaults=dict(QWEN3_MOE.defaults) | {"norm_topk_prob": True},
)
