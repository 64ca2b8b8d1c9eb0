"""Tiny random Hugging Face checkpoints: real config fields, real kinds of tokenizers, weights that do something.

Also `write_checkpoint`, which writes any Source as such a folder.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from edge_stream.converters.config import read_config, text_config
from edge_stream.converters.source import Source
from edge_stream.converters.tensor_names import expected_tensors

N_VOCAB = 640
_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_QWEN35 = _QWEN2.replace(r"\p{L}+", r"[\p{L}\p{M}]+").replace(r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_ENDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT4O = TEKKEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
_GPT4O = _GPT4O.replace("]+|[^\\r\\n\\p{L}", f"]+{_ENDS}?|[^\\r\\n\\p{{L}}")
_GPT4O = _GPT4O.replace(r"]*|\p{N}", rf"]*{_ENDS}?|\p{{N}}")
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


# ---------------------------------------------------------------------------------------------------------
# tokenizers
# ---------------------------------------------------------------------------------------------------------


def corpus() -> list[str]:
    """Text to train on: this repository's own documentation, and some of other scripts."""
    root = Path(__file__).resolve().parent.parent
    texts = [(root / name).read_text(encoding="utf-8") for name in ("README.md", "docs/architecture.md")]
    texts.append(
        "Größe naïve façade Привет мир, 你好世界 こんにちは 안녕하세요 مرحبا 3.14159 1,000,000 I'm you're WE'LL " * 20
    )
    return [line for text in texts for line in text.splitlines()]


@cache
def byte_level(kind: str) -> str:
    """tokenizer.json of a trained byte-level BPE; kind: llama3, qwen2, qwen35, smollm, gpt2, tekken or gpt-4o."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(ignore_merges=kind in ("llama3", "tekken")))
    expression = {"llama3": _LLAMA3, "qwen2": _QWEN2, "qwen35": _QWEN35, "tekken": TEKKEN, "gpt-4o": _GPT4O}.get(kind)
    if expression:
        split = pre_tokenizers.Split(Regex(expression), behavior="isolated")
        steps = [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    elif kind == "smollm":
        steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    else:
        steps = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if kind.startswith("qwen"):
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=N_VOCAB - 8,
        special_tokens=list(_SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    if kind in ("llama3", "tekken"):
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
        )
    return str(tokenizer.to_str())


@cache
def sentencepiece_model(add_dummy_prefix: bool) -> bytes:
    """tokenizer.model of a trained SentencePiece BPE with byte fallback, without normalisation, as Llama's."""
    import sentencepiece

    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()),
        model_writer=out,
        model_type="bpe",
        vocab_size=N_VOCAB - 8,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=add_dummy_prefix,
        split_digits=True,
        character_coverage=0.98,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return out.getvalue()


@cache
def ranked_pieces() -> str:
    """tokenizer.json of Gemma 4's kind: pieces with a visible space, bytes as a fallback, split at line ends."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[^\n]+|\n+"), behavior="isolated")
    specials = ["<pad>", "<s>", "</s>", "<unk>", *(f"<0x{b:02X}>" for b in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=N_VOCAB - 4, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = content["added_tokens"][:4]
    content["pre_tokenizer"] = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious"}
    content["pre_tokenizer"]["invert"] = False
    return json.dumps(content)


def write_tokenizer(folder: Path, kind: str) -> None:
    """Tokenizer files of a kind: those of byte_level, `spm` (Llama's) or `spm-gemma` (no space in front)."""
    settings: dict[str, Any] = {"chat_template": TEMPLATE}
    if kind == "gemma4":
        (folder / "tokenizer.json").write_text(ranked_pieces(), encoding="utf-8")
        settings |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    elif kind.startswith("spm"):
        (folder / "tokenizer.model").write_bytes(sentencepiece_model(kind == "spm"))
        settings |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
        settings["added_tokens_decoder"] = {
            str(N_VOCAB - 8 + i): {"content": text, "special": True} for i, text in enumerate(_SPECIALS)
        }
    else:
        (folder / "tokenizer.json").write_text(byte_level(kind), encoding="utf-8")
        settings |= {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------
# models
# ---------------------------------------------------------------------------------------------------------

_SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": N_VOCAB,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32, "tie_word_embeddings": True, "hidden_act": "gelu_pytorch_tanh"}
_LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_LONGROPE = {
    "type": "longrope",
    "short_factor": [1.0 + 0.05 * i for i in range(8)],
    "long_factor": [1.0 + 1.5 * i for i in range(8)],
}
# name -> model_type, what differs from _SHAPE, tokenizer, dtype of the weights
CHECKPOINTS: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "llama2": ("llama", {}, "spm", "F16"),
    "llama3": ("llama", {"rope_theta": 500000.0, "rope_scaling": _LLAMA3_SCALING}, "llama3", "BF16"),
    "llama-linear": ("llama", {"rope_scaling": {"type": "linear", "factor": 4.0}}, "spm", "F32"),
    "llama-yarn": (
        "llama",
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
        "spm",
        "F32",
    ),
    "llama-yarn-factor": (
        "llama",
        {
            "head_dim": 32,
            "attention_bias": True,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 8.0,
                "attention_factor": 1.1,
                "original_max_position_embeddings": 64,
            },
        },
        "llama3",
        "F32",
    ),
    "smollm": ("llama", {"tie_word_embeddings": True, "num_attention_heads": 4}, "smollm", "BF16"),
    "mistral-v0.1": ("mistral", {"sliding_window": 256}, "spm", "BF16"),
    "mistral-nemo": ("mistral", {"sliding_window": None, "head_dim": 32, "rope_theta": 1e6}, "tekken", "BF16"),
    "ministral3": (
        "ministral3",
        {
            "head_dim": 32,
            "rope_theta": 1e6,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e6,
                "factor": 4.0,
                "original_max_position_embeddings": 512,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.1,
            },
        },
        "tekken",
        "F32",
    ),
    "smollm3": ("smollm3", {"num_hidden_layers": 4, "tie_word_embeddings": True}, "llama3", "BF16"),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 4.0,
            "attention_multiplier": 0.1,
            "residual_multiplier": 0.5,
            "logits_scaling": 2.0,
            "tie_word_embeddings": True,
        },
        "smollm",
        "BF16",
    ),
    "qwen2": ("qwen2", {"rope_theta": 1e6, "tie_word_embeddings": True, "use_sliding_window": False}, "qwen2", "BF16"),
    "qwen2-yarn": (
        "qwen2",
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}},
        "qwen2",
        "F32",
    ),
    "qwen3": ("qwen3", {"head_dim": 32, "rope_theta": 1e6, "attention_bias": False}, "qwen2", "BF16"),
    "qwen3-moe": (
        "qwen3_moe",
        {
            "head_dim": 32,
            "rope_theta": 1e6,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 40,
            "norm_topk_prob": True,
        },
        "qwen2",
        "F32",
    ),
    "phi3": ("phi3", {"original_max_position_embeddings": 2048, "sliding_window": 2047}, "spm", "BF16"),
    "phi3-longrope": ("phi3", {"original_max_position_embeddings": 512, "rope_scaling": _LONGROPE}, "spm", "F32"),
    "phi4-mini": (
        "phi3",
        {
            "partial_rotary_factor": 0.5,
            "tie_word_embeddings": True,
            "original_max_position_embeddings": 512,
            "rope_scaling": _LONGROPE | {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0]},
        },
        "gpt2",
        "F32",
    ),
    "gemma": ("gemma", {"head_dim": 32, "tie_word_embeddings": True, "hidden_act": "gelu"}, "spm-gemma", "BF16"),
    "gemma2": (
        "gemma2",
        _GEMMA | {"sliding_window": 16, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        "spm-gemma",
        "BF16",
    ),
    "gemma3": (
        "gemma3_text",
        _GEMMA
        | {
            "num_hidden_layers": 4,
            "sliding_window": 16,
            "sliding_window_pattern": 2,
            "rope_theta": 1e6,
            "rope_local_base_freq": 10000.0,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
        "spm-gemma",
        "BF16",
    ),
}


def config_of(name: str) -> dict[str, Any]:
    """config.json of a checkpoint of CHECKPOINTS."""
    model_type, changes, _, dtype = CHECKPOINTS[name]
    config = _SHAPE | changes | {"model_type": model_type, "torch_dtype": {"F16": "float16"}.get(dtype, "bfloat16")}
    return {"architectures": [read_config(config).family.hf_class]} | config


def random_tensors(config: dict[str, Any], seed: int = 0) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Every tensor of a checkpoint, scaled so that attention is not uniform and logits have a spread of about 2."""
    model = read_config(text_config(config))
    rng = np.random.default_rng(seed)
    gains = {"q_proj": 1.5, "k_proj": 1.5, "qkv_proj": 1.4, "o_proj": 1.5, "lm_head": 2.0}
    gains |= {"prediction_coefs": 0.1, "correction_coefs": 0.1}  # of Gemma 3n: larger ones make noise grow by layers
    for name, shape in expected_tensors(model).items():
        part = name.split(".")[-2]
        if name.endswith(".bias"):
            values = rng.normal(0.0, 0.5, shape)
        elif len(shape) == 1:
            values = rng.uniform(0.8, 1.2, shape) * (1.5 if part in ("q_norm", "k_norm") else 1.0)
            values -= model.family.norm_offset
        elif part == "embed_tokens":
            values = rng.normal(0.0, 2.0 / np.sqrt(shape[1]) if model.tied else 1.0, shape)
        else:
            values = rng.normal(0.0, gains.get(part, 1.0) / np.sqrt(shape[1]), shape)
        yield name, values.astype(np.float32)


def save_tensors(path: Path, tensors: dict[str, NDArray[np.float32]], dtype: str) -> None:
    """A safetensors file of F32, F16 or BF16. BF16 is written by hand: NumPy has no such type."""
    if dtype != "BF16":
        save_file({n: t.astype({"F32": "<f4", "F16": "<f2"}[dtype]) for n, t in tensors.items()}, path)
        return
    from edge_stream.converters.gguf_tensors import round_bf16

    header: dict[str, Any] = {}
    blobs, offset = [], 0
    for name, values in tensors.items():
        blob = round_bf16(np.ascontiguousarray(values)).tobytes()
        header[name] = {"dtype": "BF16", "shape": list(values.shape), "data_offsets": [offset, offset + len(blob)]}
        blobs.append(blob)
        offset += len(blob)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(blobs))


def write_tiny(folder: Path, name: str, *, shards: int = 1, seed: int = 0) -> Path:
    """Write a checkpoint of CHECKPOINTS."""
    _, _, tokenizer, dtype = CHECKPOINTS[name]
    config = config_of(name)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.7, "top_p": 0.9}), encoding="utf-8")
    write_tokenizer(folder, tokenizer)
    save_sharded(folder, dict(random_tensors(config, seed)), dtype, shards)
    return folder


def save_sharded(folder: Path, tensors: dict[str, NDArray[np.float32]], dtype: str, shards: int) -> None:
    """model.safetensors, or several files and their index."""
    if shards == 1:
        save_tensors(folder / "model.safetensors", tensors, dtype)
        return
    names = list(tensors)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        held = {n: tensors[n] for n in names[i::shards]}
        save_tensors(folder / file, held, dtype)
        weight_map |= dict.fromkeys(held, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def write_checkpoint(source: Source, folder: Path) -> Path:
    """Write any source as a Hugging Face folder with float32 weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(source.config), indent=1), encoding="utf-8")
    (folder / "generation_config.json").write_text(json.dumps(dict(source.generation_config)), encoding="utf-8")
    for file, content in source.tokenizer_files.items():
        (folder / file).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    tensors = {name: source.load(name).astype(np.float32) for name in source.tensors}
    save_tensors(folder / "model.safetensors", tensors, "F32")
    return folder


Writer = Callable[..., Path]
