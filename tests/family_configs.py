"""Tiny configurations of model families, for transformers' configuration classes and for config.json."""

from __future__ import annotations

from typing import Any

from tiny_checkpoints import N_VOCAB

SHAPE: dict[str, Any] = {
    "vocab_size": N_VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 512,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
_MINISTRAL = _YARN | {"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_GEMMA4 = {
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "global_head_dim": 64,
    "sliding_window": 16,
    "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh",
}
_GEMMA3N = {
    "layer_types": None,
    "vocab_size_per_layer_input": N_VOCAB - 40,
    "sliding_window": 16,
    "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh",
}
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5], "mrope_interleaved": True}
_EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_DELTA = {
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.25,
        "mrope_section": [2, 1, 1],
    },
}
_LFM2 = {"head_dim": None, "layer_types": ["conv", "full_attention", "conv", "conv"], "block_auto_adjust_ff_dim": False}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16}
_GRANITE4 = {
    "head_dim": None,
    "layer_types": ["attention"] * 4,
    "shared_intermediate_size": 96,
    "position_embedding_type": "rope",
    "embedding_multiplier": 2.0,
    "logits_scaling": 4.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.2,
    **_MAMBA,
}
_SWASH = {
    "head_dim": None,
    "embedding_multiplier": 2.0,
    "logits_scaling": 4.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.2,
}
_HYBRID = {"layer_types": ["mamba", "attention", "mamba", "mamba"], "position_embedding_type": "nope"}
_FALCON = {
    "mamba_d_ssm": 128,
    "mamba_n_groups": 2,
    "embedding_multiplier": 2.0,
    "lm_head_multiplier": 0.5,
    "key_multiplier": 0.8,
    "attention_in_multiplier": 0.9,
    "attention_out_multiplier": 1.1,
    "ssm_in_multiplier": 1.2,
    "ssm_out_multiplier": 0.7,
    "mlp_multipliers": [0.6, 1.3],
    "ssm_multipliers": [0.5, 0.6, 0.7, 0.8, 0.9],
    **_MAMBA,
}
_NEMOTRON = {
    "mamba_num_heads": 4,
    "mamba_head_dim": 32,
    "ssm_state_size": 16,
    "n_groups": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 48,
    # transformers limits the time step to this from below, llama.cpp and NVIDIA's own code do not
    "time_step_min": 1e-9,
}
# name -> transformers' config class, what differs from SHAPE, tokenizer
FAMILIES: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("LlamaConfig", {}, "llama3"),
    "smollm3": ("SmolLM3Config", {"head_dim": None}, "llama3"),
    "smollm3-tied": ("SmolLM3Config", {"head_dim": None, "tie_word_embeddings": True}, "llama3"),
    "ministral3": (
        "Ministral3Config",
        {"rope_parameters": _MINISTRAL},
        "tekken",
    ),
    "olmo2": ("Olmo2Config", {"head_dim": None}, "llama3"),
    "olmo3": (
        "Olmo3Config",
        {
            "head_dim": None,
            "sliding_window": 16,
            "rope_parameters": {
                "full_attention": _YARN,
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
        "llama3",
    ),
    "exaone4": (
        "Exaone4Config",
        {
            "head_dim": None,
            "sliding_window": None,
            "layer_types": ["full_attention"] * 4,
            "rope_parameters": _LLAMA3,
        },
        "gpt2",
    ),
    "exaone4-32b": (
        "Exaone4Config",
        {"head_dim": None, "sliding_window": 16, "num_hidden_layers": 64, "hidden_size": 32, "intermediate_size": 32},
        "gpt2",
    ),
    "cohere2": (
        "Cohere2Config",
        {"head_dim": None, "sliding_window": 16, "tie_word_embeddings": True, "rotary_pct": 1.0},
        "smollm",
    ),
    "glm4": (
        "Glm4Config",
        {
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
            "attention_bias": True,
        },
        "llama3",
    ),
    "granite": (
        "GraniteConfig",
        {
            "head_dim": None,
            "embedding_multiplier": 2.0,
            "logits_scaling": 4.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.2,
        },
        "smollm",
    ),
    "granite_swa": ("GraniteSWAConfig", _SWASH | {"sliding_window": 16}, "smollm"),
    "granite_swa-whole": ("GraniteSWAConfig", _SWASH | {"layer_types": ["full_attention"] * 4}, "gpt2"),
    "qwen3_moe": ("Qwen3MoeConfig", _EXPERTS | {"norm_topk_prob": True}, "qwen2"),
    "qwen3_5": ("Qwen3_5TextConfig", _DELTA, "qwen35"),
    "qwen3_5-equal-heads": ("Qwen3_5TextConfig", _DELTA | {"linear_num_value_heads": 2}, "qwen35"),
    "qwen3_5_moe": ("Qwen3_5MoeTextConfig", _DELTA | _EXPERTS | {"shared_expert_intermediate_size": 48}, "qwen35"),
    "lfm2": ("Lfm2Config", _LFM2, "llama3"),
    "lfm2-adjusted": ("Lfm2Config", _LFM2 | {"block_auto_adjust_ff_dim": True, "block_multiple_of": 32}, "llama3"),
    "lfm2_moe": ("Lfm2MoeConfig", _LFM2 | _EXPERTS | {"num_dense_layers": 1, "tie_word_embeddings": True}, "llama3"),
    "gpt_oss": (
        "GptOssConfig",
        {
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
            "sliding_window": 16,
            "rope_parameters": _YARN,
        },
        "tekken",
    ),
    "gpt_oss-mxfp4": (
        "GptOssConfig",
        # all experts are used: llama.cpp rounds activations to 8 bits for MXFP4, which would choose others
        {"num_local_experts": 4, "num_experts_per_tok": 4, "sliding_window": 16, "rope_parameters": _YARN},
        "tekken",
    ),
    "ministral3-fp8": ("Ministral3Config", {"rope_parameters": _MINISTRAL}, "tekken"),
    "qwen3-gptq": ("Qwen3Config", {}, "qwen2"),
    "qwen3-ct-int4": ("Qwen3Config", {}, "qwen2"),
    "mistral3": ("Mistral3Config", {"model_type": "ministral3", "rope_parameters": _MINISTRAL}, "tekken"),
    "qwen3_vl": ("Qwen3VLConfig", {"rope_parameters": _MROPE}, "qwen2"),
    "qwen3_vl_moe": (
        "Qwen3VLMoeConfig",
        {"rope_parameters": _MROPE, "norm_topk_prob": True, **_EXPERTS},
        "qwen2",
    ),
    "qwen3_5-vision": ("Qwen3_5Config", _DELTA, "qwen35"),
    "gemma4": (
        "Gemma4TextConfig",
        _GEMMA4
        | {
            "hidden_size_per_layer_input": 16,
            "vocab_size_per_layer_input": N_VOCAB,
            "num_kv_shared_layers": 2,
            "use_double_wide_mlp": True,
            "final_logit_softcapping": 30.0,
        },
        "gemma4",
    ),
    "gemma4-experts": (
        "Gemma4TextConfig",
        _GEMMA4
        | {
            "hidden_size_per_layer_input": 0,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 32,
        },
        "gemma4",
    ),
    "gemma3n": (
        "Gemma3nTextConfig",
        _GEMMA3N | {"num_hidden_layers": 5, "num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.95] * 5},
        "spm-gemma",
    ),
    "gemma3n-shared": (
        "Gemma3nTextConfig",
        _GEMMA3N | {"num_hidden_layers": 22, "num_kv_shared_layers": 2},
        "spm-gemma",
    ),
    # 30 layers, 10 of which share, as in E2B
    "gemma3n-e2b": (
        "Gemma3nTextConfig",
        _GEMMA3N | {"num_hidden_layers": 30, "num_kv_shared_layers": 10, "num_attention_heads": 8},
        "spm-gemma",
    ),
    "llama4": (
        "Llama4TextConfig",
        {
            "intermediate_size": 48,
            "intermediate_size_mlp": 96,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "interleave_moe_layer_step": 2,
            "rope_parameters": _LLAMA3 | {"low_freq_factor": 1.0, "high_freq_factor": 1.0},
        },
        "gpt-4o",
    ),
    "phi3-longrope": (
        "Phi3Config",
        {
            "head_dim": None,
            "partial_rotary_factor": 0.5,
            "original_max_position_embeddings": 512,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
                "original_max_position_embeddings": 512,
                "short_factor": [1.0, 1.1, 1.2, 1.3],
                "long_factor": [2.0, 3.0, 4.0, 5.0],
            },
        },
        "gpt2",
    ),
    "granite-4": ("GraniteMoeHybridConfig", _GRANITE4 | {"num_local_experts": 0}, "gpt2"),
    "granite-4-experts": ("GraniteMoeHybridConfig", _GRANITE4 | {"num_local_experts": 4}, "gpt2"),
    "granite-4-hybrid": ("GraniteMoeHybridConfig", _GRANITE4 | _HYBRID | {"num_local_experts": 4}, "gpt2"),
    "granite-4-hybrid-dense": ("GraniteMoeHybridConfig", _GRANITE4 | _HYBRID | {"num_local_experts": 0}, "gpt2"),
    "falcon_h1": ("FalconH1Config", _FALCON, "llama3"),
    "falcon_h1-tied": ("FalconH1Config", _FALCON | {"tie_word_embeddings": True}, "llama3"),
    "nemotron_h": (
        "NemotronHConfig",
        _NEMOTRON | {"layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp"]},
        "tekken",
    ),
    "nemotron_h-experts": (
        "NemotronHConfig",
        _NEMOTRON | {"layers_block_type": ["linear_attention", "moe", "full_attention", "moe"]},
        "tekken",
    ),
}
_VISION = {"hidden_size": 32, "intermediate_size": 48, "depth": 1, "num_heads": 2, "num_hidden_layers": 1}
_QWEN_VISION = _VISION | {"out_hidden_size": 64, "num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
# multimodal checkpoints, of which the text part is converted -> the vision tower
TOWERS: dict[str, dict[str, Any]] = {
    "mistral3": {"model_type": "pixtral", "num_attention_heads": 2, "head_dim": 16, **_VISION},
    "qwen3_vl": _QWEN_VISION,
    "qwen3_vl_moe": _QWEN_VISION,
    "qwen3_5-vision": {k: v for k, v in _QWEN_VISION.items() if k != "deepstack_visual_indexes"},
}
# transformers' class -> model_type of the language model
MODEL_TYPES = {
    "Gemma3nTextConfig": "gemma3n_text",
    "Gemma4TextConfig": "gemma4_text",
    "Llama4TextConfig": "llama4_text",
    "LlamaConfig": "llama",
    "SmolLM3Config": "smollm3",
    "Ministral3Config": "ministral3",
    "Olmo2Config": "olmo2",
    "Olmo3Config": "olmo3",
    "Exaone4Config": "exaone4",
    "Cohere2Config": "cohere2",
    "Glm4Config": "glm4",
    "GraniteConfig": "granite",
    "GraniteSWAConfig": "granite_swa",
    "Qwen3Config": "qwen3",
    "Qwen3MoeConfig": "qwen3_moe",
    "Qwen3_5TextConfig": "qwen3_5_text",
    "Qwen3_5MoeTextConfig": "qwen3_5_moe_text",
    "Lfm2Config": "lfm2",
    "Lfm2MoeConfig": "lfm2_moe",
    "GptOssConfig": "gpt_oss",
    "GraniteMoeHybridConfig": "granitemoehybrid",
    "FalconH1Config": "falcon_h1",
    "NemotronHConfig": "nemotron_h",
    "Phi3Config": "phi3",
    "Mistral3Config": "ministral3",
    "Qwen3VLConfig": "qwen3_vl_text",
    "Qwen3VLMoeConfig": "qwen3_vl_moe_text",
    "Qwen3_5Config": "qwen3_5_text",
}


def config_of(name: str) -> dict[str, Any]:
    """config.json of the language model, with the keys given here only."""
    kind, changes, _ = FAMILIES[name]
    shape = {k: v for k, v in (SHAPE | changes).items() if k != "head_dim" or v}
    return shape | {"model_type": MODEL_TYPES[kind]}


# More than 20 random layers make the rounding of llama.cpp's GELU, a table in float16, grow to a tenth of the logits
# (test_gelu_is_a_table in tests/transformers). Layers that add less to what they are given keep it below 1e-3: the
# norms at the end of their branches are this much smaller.
GENTLE = ("gemma3n-shared", "gemma3n-e2b")
BRANCH_ENDS = (
    "post_attention_layernorm",
    "post_feedforward_layernorm",
    "post_per_layer_input_norm",
    "post_laurel_norm",
)
SOFT = 0.2


def soften(name: str, tensors: dict[str, Any]) -> dict[str, Any]:
    """The tensors of a configuration's model, as GENTLE says."""
    if name not in GENTLE:
        return tensors
    return {n: values * SOFT if n.split(".")[-2] in BRANCH_ENDS else values for n, values in tensors.items()}
