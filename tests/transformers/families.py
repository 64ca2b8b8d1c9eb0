"""Tiny random checkpoints written by transformers itself, one or more for every family that `convert` takes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import packing
import safetensors.torch
import tiny_checkpoints as tiny
import torch
import transformers
from awkward_strings import decomposed, mixed_case
from family_configs import BRANCH_ENDS, FAMILIES, GENTLE, SHAPE, SOFT, TOWERS

# tokens that llama.cpp's converter looks up
MORE_TOKENS: dict[str, tuple[str, ...]] = {"glm4": ("<|user|>",)}


def write(folder: Path, name: str, gentle: bool = True) -> transformers.PreTrainedModel:
    """Write a checkpoint of FAMILIES; the model, in float64. gentle: see GENTLE."""
    kind, changes, tokenizer = (FAMILIES | MLC_ONLY)[name]
    shape = {k: v for k, v in (SHAPE | changes).items() if k != "head_dim" or v}
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    torch.manual_seed(0)
    if name in TOWERS:
        config = getattr(transformers, kind)(text_config=shape, vision_config=TOWERS[name])
        model = transformers.AutoModelForImageTextToText.from_config(config, **eager)
    else:
        config = getattr(transformers, kind)(**shape)
        model = transformers.AutoModelForCausalLM.from_config(config, **eager)
    randomise(model)
    if gentle and name in GENTLE:
        soften(model)
    model.save_pretrained(folder)
    if name in PACKED:
        _pack(folder, model, PACKED[name])
    tiny.write_tokenizer(folder, tokenizer)
    settings = folder / "tokenizer_config.json"  # else transformers takes the class of the model's type
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    if name in MORE_TOKENS:
        ends = [2, *(tiny.N_VOCAB - 8 + i for i in range(len(MORE_TOKENS[name])))]
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
        path = folder / "tokenizer.json"
        content = json.loads(path.read_text())
        for i, text in enumerate(MORE_TOKENS[name]):
            token = {"id": tiny.N_VOCAB - 8 + i, "content": text, "special": True, "normalized": False}
            content["added_tokens"].append(token | dict.fromkeys(("single_word", "lstrip", "rstrip"), False))
        path.write_text(json.dumps(content))
    if name.startswith("gemma3n"):  # what the conversion's note says
        kind = transformers.models.gemma3n.modeling_gemma3n.Gemma3nTextMLP
        kind._gaussian_topk = _sample_topk
    return model.double().eval()


def _sample_topk(mlp: Any, inputs: torch.Tensor) -> torch.Tensor:
    """Gemma 3n's sparse activations with the deviation of a sample, as llama.cpp has them."""
    deviations = torch.distributions.normal.Normal(0, 1).icdf(torch.tensor(mlp.activation_sparsity))
    return torch.relu(inputs - inputs.mean(-1, keepdim=True) - deviations * inputs.std(-1, keepdim=True))


# families whose GGUF files tests/test_convert_gguf.py covers
MLC_ONLY: dict[str, tuple[str, dict[str, object], str]] = {
    "gemma3": (
        "Gemma3TextConfig",
        {
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "query_pre_attn_scalar": 24,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
        "spm-gemma",
    ),
}
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
    """Turn what transformers 5 writes into what is published: llama.cpp's converter reads that where they differ."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    if config["model_type"] == "phi3":  # a tokenizer that is not Phi-3's is told by its class
        settings = folder / "tokenizer_config.json"
        settings.write_text(json.dumps(json.loads(settings.read_text()) | {"tokenizer_class": "GPT2Tokenizer"}))
    if config["model_type"] == "qwen3_vl_moe":  # published ones are transposed
        weights = safetensors.torch.load_file(folder / "model.safetensors")
        for tensor in [n for n in weights if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
            weights[tensor] = weights[tensor].swapaxes(1, 2).contiguous()
        safetensors.torch.save_file(weights, folder / "model.safetensors")
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
                gain = 2.0 if "embed" in name or "lm_head" in name else 0.1 if "_coefs" in name else 1.5
                values.normal_(0.0, gain / values.shape[-1] ** 0.5)


def soften(model: torch.nn.Module) -> None:
    """See GENTLE."""
    for name, values in model.named_parameters():
        if name.split(".")[-2] in BRANCH_ENDS:
            with torch.no_grad():
                values.mul_(SOFT)


class TableGelu(torch.nn.Module):
    """GELU as ggml has it on the CPU: a table over float16, of float16 values."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Any shape."""
        found = torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().to(x.dtype)
        return torch.where(x <= -10, 0.0, torch.where(x >= 10, x, found))


# ---------------------------------------------------------------------------------------------------------
# what differs, and why
# ---------------------------------------------------------------------------------------------------------

# the tokenizer's kind -> strings that llama.cpp cannot tokenise as the original does; the conversion says so
KNOWN_TOKENS: dict[str, Callable[[str], bool]] = {
    "tekken": mixed_case,
    "gpt-4o": mixed_case,
    "qwen2": decomposed,
    "qwen35": decomposed,
}
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
_GEMMA4 = tuple(f"tokenizer.ggml.{key}" for key in ("pre", "scores", "token_type", "tokens"))
DIFFERENT_IN: dict[str, tuple[str, ...]] = {
    "glm4": ("tokenizer.ggml.unknown_token_id",),  # a byte-level tokenizer has none
    # theirs describes a mixer that no layer has, and states the same number of key-value heads for each layer
    "granite-4": ("attention.head_count_kv", "expert_count", "expert_shared_feed_forward_length", *_UNUSED),
    "granite-4-experts": ("attention.head_count_kv", *_UNUSED),
    # theirs claims a context of 2^20 for hybrids without rotation, ours what config.json says
    "granite-4-hybrid": ("context_length",),
    "granite-4-hybrid-dense": ("context_length", "expert_count", "expert_shared_feed_forward_length"),
    # theirs is a file on which llama.cpp aborts: no layer has a window
    "granite_swa-whole": ("attention.sliding_window", "attention.sliding_window_pattern"),
    "nemotron_h-experts": ("context_length", "rope.dimension_count"),  # nothing is rotated
    # the name of the pre-tokenizer follows from the tokenizer's; theirs takes <pad> for text, and does not fill up the
    # vocabulary to the embedding; the second model has no soft cap on logits, which theirs does not say
    "gemma4": _GEMMA4,
    "gemma4-experts": (*_GEMMA4, "final_logit_softcapping"),
    # theirs states the same width for each layer, and no unknown token; see MORE_TENSORS
    "gemma3n": ("feed_forward_length", "tokenizer.ggml.unknown_token_id"),
    "gemma3n-shared": (
        *("feed_forward_length", "tokenizer.ggml.unknown_token_id"),
        *("GGUF.tensor_count", "general.size_label"),
    ),
    "gemma3n-e2b": (
        *("feed_forward_length", "tokenizer.ggml.unknown_token_id"),
        *("GGUF.tensor_count", "general.size_label"),
    ),
    "phi3-longrope": ("rope.scaling.type",),  # theirs leaves the kind of scaling out
    "falcon_h1-tied": ("GGUF.tensor_count", "general.size_label"),  # see MORE_TENSORS
}
# theirs leaves the factor on the logits out, so that the embedding's is used for both
MORE_TENSORS = {"falcon_h1-tied": {"output.weight"}}
# llama.cpp cannot load theirs: it demands keys of layers that share others, which transformers 5 leaves out
_SHARED = ("attn_k.weight", "attn_k_norm.weight", "attn_v.weight")
for _name, _last in (("gemma3n-shared", 22), ("gemma3n-e2b", 30)):
    MORE_TENSORS[_name] = {f"blk.{layer}.{name}" for layer in range(20, _last) for name in _SHARED}
