"""The text part of Qwen3-VL: Qwen3 with three-part positions, which are equal in text."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from edge_stream.families import Keys, ModelConfig
from edge_stream.families.qwen3 import FAMILY as QWEN3

_SECTIONS = [24, 20, 20]


def read(keys: Keys, _n_layer: int) -> dict[str, Any]:
    """How the rotated pairs are shared by the parts of a position, and layers that take features of an image."""
    rope = keys.get("rope_parameters", None) or keys.get("rope_scaling", None) or {}
    sections = rope.get("mrope_section", _SECTIONS) if isinstance(rope, dict) else []
    if not isinstance(sections, list) or len(sections) != 3 or not all(type(n) is int and n >= 0 for n in sections):
        keys.refuse("mrope_section must be a list of 3 whole numbers")
    assert isinstance(sections, list)
    vision = keys.get("vision_config", None) or {}
    return {"sections": [*sections, 0], "deepstack": len(vision.get("deepstack_visual_indexes") or ())}


def keys(model: ModelConfig) -> dict[str, Any]:
    """As llama.cpp names them."""
    return {"rope.dimension_sections": model.own["sections"], "n_deepstack_layers": model.own["deepstack"]}


def lacks(model: ModelConfig) -> str | None:
    """What llama.cpp cannot represent."""
    pairs = sum(model.own["sections"])
    return None if pairs == model.n_rot // 2 else f"needs an mrope_section of {model.n_rot // 2} pairs, not {pairs}"


def dropped(model: ModelConfig) -> list[str]:
    """A note on pairs that llama.cpp does not rotate: those that follow the fourth part, which text leaves at 0."""
    s = model.own["sections"]
    lost = [i for i in range(model.n_rot // 2) if i >= 3 * s[i % 3]]
    if not lost:
        return []
    return [f"llama.cpp does not rotate the pairs {', '.join(map(str, lost))} of each head, which Qwen3-VL does"]


FAMILY = replace(
    QWEN3,
    model_type="qwen3_vl_text",
    aliases=("qwen3_vl",),
    hf_class="Qwen3VLForConditionalGeneration",
    models="Qwen3-VL (text)",
    gguf=replace(QWEN3.gguf, arch="qwen3vl", read_back=False, keys=keys, lacks=lacks, notes=dropped),
    mlc=type(QWEN3.mlc)(known=False),
    read=read,
    left_out=("model.visual.", "visual."),
)
