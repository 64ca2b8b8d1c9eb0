"""Tiny random checkpoints written by transformers itself, one or more for every family that `convert` takes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import packing
import tiny_checkpoints as tiny
import torch
import transformers
from awkward_strings import decomposed, mixed_case

N_VOCAB = tiny.N_VOCAB
_SHAPE: dict[str, Any] = {
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
# name -> transformers' config class, what differs from _SHAPE, tokenizer
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
# tokens that llama.cpp's converter looks up
MORE_TOKENS: dict[str, tuple[str, ...]] = {"glm4": ("<|user|>",)}


def write(folder: Path, name: str) -> transformers.PreTrainedModel:
    """Write a checkpoint of FAMILIES; the model, in float64."""
    kind, changes, tokenizer = FAMILIES[name]
    shape = {k: v for k, v in (_SHAPE | changes).items() if k != "head_dim" or v}
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    torch.manual_seed(0)
    if name in TOWERS:
        config = getattr(transformers, kind)(text_config=shape, vision_config=TOWERS[name])
        model = transformers.AutoModelForImageTextToText.from_config(config, **eager)
    else:
        config = getattr(transformers, kind)(**shape)
        model = transformers.AutoModelForCausalLM.from_config(config, **eager)
    randomise(model)
    model.save_pretrained(folder)
    if name in PACKED:
        _pack(folder, model, PACKED[name])
    tiny.write_tokenizer(folder, tokenizer)
    settings = folder / "tokenizer_config.json"  # else transformers takes the class of the model's type
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    if name in MORE_TOKENS:
        ends = [2, *(N_VOCAB - 8 + i for i in range(len(MORE_TOKENS[name])))]
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
        path = folder / "tokenizer.json"
        content = json.loads(path.read_text())
        for i, text in enumerate(MORE_TOKENS[name]):
            token = {"id": N_VOCAB - 8 + i, "content": text, "special": True, "normalized": False}
            content["added_tokens"].append(token | dict.fromkeys(("single_word", "lstrip", "rstrip"), False))
        path.write_text(json.dumps(content))
    return model.double().eval()


# name -> how the weights are packed
PACKED = {"gpt_oss-mxfp4": "mxfp4", "ministral3-fp8": "fp8", "qwen3-gptq": "gptq", "qwen3-ct-int4": "ct-int4"}


def _pack(folder: Path, model: torch.nn.Module, method: str) -> None:
    """Store the matrices packed, and give the model the values that they stand for."""
    mxfp4 = method == "mxfp4"
    config, packer = ({"quant_method": method}, packing.mxfp4) if mxfp4 else packing.METHODS[method]
    stored: packing.Stored = {}
    for name, values in model.state_dict().items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj") if mxfp4 else "_proj.weight"):
            w = values.numpy().astype("float64")
            parts, back = packer(name.removesuffix(".weight"), w.swapaxes(1, 2) if mxfp4 else w)
            stored |= parts
            values.copy_(torch.from_numpy((back.swapaxes(1, 2) if mxfp4 else back).copy()))
        else:
            stored[name] = ("F32", values.numpy())
    packing.save(folder / "model.safetensors", stored)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": config}))


def publish(folder: Path) -> None:
    """Write words of published configurations, which llama.cpp's converter reads, in place of transformers 5's."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    if config["model_type"] == "phi3":  # a tokenizer that is not Phi-3's is told by its class
        settings = folder / "tokenizer_config.json"
        settings.write_text(json.dumps(json.loads(settings.read_text()) | {"tokenizer_class": "GPT2Tokenizer"}))
    if config["model_type"] == "granitemoehybrid":
        words = {"linear_attention": "mamba", "full_attention": "attention"}
        config["layer_types"] = [words.get(kind, kind) for kind in config["layer_types"]]
        if not config["num_local_experts"]:
            del config["num_experts_per_tok"]
    path.write_text(json.dumps(config))


def randomise(model: torch.nn.Module) -> None:
    """Weights that do something: attention is not uniform, no norm is neutral, no bias is zero."""
    for name, values in model.named_parameters():
        with torch.no_grad():
            if values.ndim < 2 or "norm" in name.rsplit(".", 2)[-2]:
                values.add_(torch.empty_like(values).uniform_(-0.2, 0.2))
            else:
                gain = 2.0 if "embed" in name or "lm_head" in name else 1.5
                values.normal_(0.0, gain / values.shape[-1] ** 0.5)


# ---------------------------------------------------------------------------------------------------------
# what differs, and why
# ---------------------------------------------------------------------------------------------------------

# the tokenizer's kind -> strings that llama.cpp cannot tokenise as the original does; the conversion says so
KNOWN_TOKENS: dict[str, Callable[[str], bool]] = {"tekken": mixed_case, "qwen2": decomposed, "qwen35": decomposed}
NOT_IN_LLAMA_CPP: dict[str, str] = {
    "nemotron_h": "with transformers 5 its converter takes every Nemotron-H for one with experts",
}
# keys of every file, and why
DIFFERENT: dict[str, str] = {
    "GGUF.kv_count": "the sum of the others",
    "edge_stream.n_ctx": "ours",
    "edge_stream.n_keep": "ours",
}
# keys that ours states, if false, and theirs may not: it is llama.cpp's default
FALSE = ("tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_eos_token")
# keys that ours has and theirs has not: llama.cpp's default is the same
MORE = ("attention.key_length", "attention.value_length", "rope.dimension_count", "vocab_size")
_UNUSED = (*(f"ssm.{k}" for k in ("conv_kernel", "group_count", "inner_size", "state_size", "time_step_rank")),)
DIFFERENT_IN: dict[str, tuple[str, ...]] = {
    "glm4": ("tokenizer.ggml.unknown_token_id",),  # a byte-level tokenizer has none
    # theirs describes a mixer that no layer has, and states the same number of key-value heads for each layer
    "granite-4": ("attention.head_count_kv", "expert_count", "expert_shared_feed_forward_length", *_UNUSED),
    "granite-4-experts": ("attention.head_count_kv", *_UNUSED),
    # theirs claims a context of 2^20 for hybrids without rotation, ours what config.json says
    "granite-4-hybrid": ("context_length",),
    "granite-4-hybrid-dense": ("context_length", "expert_count", "expert_shared_feed_forward_length"),
    "nemotron_h-experts": ("context_length", "rope.dimension_count"),  # nothing is rotated
    "phi3-longrope": ("rope.scaling.type",),  # theirs leaves the kind of scaling out
    "falcon_h1-tied": ("GGUF.tensor_count", "general.size_label"),  # see MORE_TENSORS
}
# theirs leaves the factor on the logits out, so that the embedding's is used for both
MORE_TENSORS = {"falcon_h1-tied": {"output.weight"}}
