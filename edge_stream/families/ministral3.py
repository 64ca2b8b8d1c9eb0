"""Ministral 3: Mistral with yarn, and queries that grow with the position beyond yarn's original length."""

from __future__ import annotations

from typing import Any

from edge_stream.families import Family, Gguf, Keys, Mlc, ModelConfig
from edge_stream.families.mistral import FAMILY as MISTRAL

_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}


def _normal(config: dict[str, Any]) -> dict[str, Any]:
    return (
        config if config.get("rope_parameters") or config.get("rope_scaling") else config | {"rope_parameters": _ROPE}
    )


def _read(keys: Keys, _n_layer: int) -> dict[str, Any]:
    rope = keys.get("rope_parameters", None) or keys.get("rope_scaling")
    beta, all_dim = (rope.get(key) or 0.0 for key in ("llama_4_scaling_beta", "mscale_all_dim"))
    if not all(isinstance(x, (int, float)) and 0.0 <= x < 1e3 for x in (beta, all_dim)):
        keys.refuse("rope_parameters has no valid llama_4_scaling_beta or mscale_all_dim")
    # llama.cpp takes mscale for 1
    return {"temperature": float(beta), "log_multiplier": float(all_dim) if rope.get("mscale", 1.0) == 1.0 else 0.0}


def _keys(model: ModelConfig) -> dict[str, Any]:
    own = model.own
    keys: dict[str, Any] = {"attention.temperature_scale": own["temperature"]}
    if model.rope_scaling and model.rope_scaling.kind == "yarn" and own["log_multiplier"]:
        keys |= {"rope.scaling.yarn_log_multiplier": own["log_multiplier"], "rope.scaling.attn_factor": None}
    return keys


def _lacks(model: ModelConfig) -> str | None:
    yarn = model.rope_scaling is not None and model.rope_scaling.kind == "yarn"
    return None if yarn or not model.own["temperature"] else "needs yarn for its attention temperature"


def _mlc_config(_model: ModelConfig, config: dict[str, Any]) -> dict[str, Any]:
    return config | {"rope_parameters": config["rope_scaling"], "context_window_size": -1}


FAMILY = Family(
    model_type="ministral3",
    hf_class="Ministral3ForCausalLM",
    models="Ministral 3",
    gguf=Gguf(
        arch="mistral3",
        read_back=False,
        permuted=True,
        partial_rotary=False,
        rope_scalings=("yarn",),
        keys=_keys,
        lacks=_lacks,
    ),
    mlc=Mlc(
        rope_scalings=("yarn",),
        lacks=_lacks,
        config=_mlc_config,
        note="mlc-llm's own Ministral 3 scales attention in another way than the checkpoint: use edge-stream's engine, "
        "or a library of --device",
    ),
    normal=_normal,
    read=_read,
    windowed=MISTRAL.windowed,
    defaults={"rms_norm_eps": 1e-5, "head_dim": 128, "num_key_value_heads": 8, "max_position_embeddings": 262144},
)
