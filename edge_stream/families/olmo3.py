"""OLMo 3: OLMo 2 with a sliding window in three of four layers, whose positions are not scaled."""

from __future__ import annotations

from dataclasses import replace

from edge_stream.families.olmo2 import FAMILY as OLMO2

FAMILY = replace(
    OLMO2,
    model_type="olmo3",
    hf_class="Olmo3ForCausalLM",
    models="OLMo 3",
    own_swa_rope=True,
    windowed=lambda layer, _count: (layer + 1) % 4 != 0,
    defaults={"rms_norm_eps": 1e-5, "sliding_window": 4096},
)
