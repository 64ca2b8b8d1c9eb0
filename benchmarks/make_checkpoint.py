"""Write a random Hugging Face checkpoint of a real model's shape, sharded, in bfloat16, to measure the converters.

    python benchmarks/make_checkpoint.py OUT                 # Mistral-7B v0.1: 32 layers, about 13.5 GiB
    python benchmarks/make_checkpoint.py OUT --layers 4      # the same with fewer layers
    python benchmarks/make_checkpoint.py OUT --model ministral-3-3b   # 26 layers, 6.4 GiB
    python benchmarks/make_checkpoint.py OUT --model tinyllama-1b     # 22 layers, 2.1 GiB

    python benchmarks/make_checkpoint.py OUT --measure       # and convert it: time, peak memory, the disk's own speed
    python benchmarks/make_checkpoint.py OUT --measure --to mlc --quantization q4f16_1

Weights are generated a block at a time. The tokenizer is a trained one of at most 32,000 pieces; the rest is padding.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import tiny_checkpoints as tiny

from edge_stream.converters.config import read_config
from edge_stream.converters.tensor_names import expected_tensors

SHARD_BYTES = 5_000_000_000  # what transformers' save_pretrained aims at
MISTRAL_7B: dict[str, Any] = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}
# config.json of TinyLlama/TinyLlama-1.1B-Chat-v1.0
TINYLLAMA_1B: dict[str, Any] = MISTRAL_7B | {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "sliding_window": None,
}
# published with Ministral3ForCausalLM of this shape: huggingface.co/rootlocalghost/ERNIE-Image, pe/config.json; the
# figures are those of Mistral AI's model card (26 layers, 3072, 32 heads, 8 of them KV, tied, yarn to 262,144)
MINISTRAL_3_3B: dict[str, Any] = {
    "architectures": ["Ministral3ForCausalLM"],
    "model_type": "ministral3",
    "hidden_size": 3072,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 131072,
    "max_position_embeddings": 262144,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 16.0,
        "llama_4_scaling_beta": 0.1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 16384,
        "rope_theta": 1000000.0,
        "rope_type": "yarn",
    },
    "sliding_window": None,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "bfloat16",
}
# the shapes of published checkpoints, from memory
SMOLLM3_3B: dict[str, Any] = {
    "model_type": "smollm3",
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 128256,
    "max_position_embeddings": 65536,
    "rms_norm_eps": 1e-6,
    "rope_theta": 5000000.0,
    "no_rope_layer_interval": 4,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "dtype": "bfloat16",
}
GEMMA_3_1B: dict[str, Any] = {
    "model_type": "gemma3_text",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "num_hidden_layers": 26,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "vocab_size": 262144,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0,
    "query_pre_attn_scalar": 256,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "dtype": "bfloat16",
}
GEMMA_3_4B = GEMMA_3_1B | {
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "num_hidden_layers": 34,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
    "sliding_window": 1024,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
}
# name -> config.json, and the kind of tokenizer
MODELS = {
    "mistral-7b": (MISTRAL_7B, "spm"),
    "ministral-3-3b": (MINISTRAL_3_3B, "tekken"),
    "tinyllama-1b": (TINYLLAMA_1B, "spm"),
    "smollm3-3b": (SMOLLM3_3B, "llama3"),
    "gemma-3-1b": (GEMMA_3_1B, "spm-gemma"),
    "gemma-3-4b": (GEMMA_3_4B, "spm-gemma"),
}
_BLOCK = 1 << 22


def write_random(folder: Path, config: dict[str, Any], tokenizer: str, seed: int = 0) -> int:
    """Write the checkpoint; returns the bytes of its weights."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    tiny.write_tokenizer(folder, tokenizer)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    held = 0
    for name, shape in expected_tensors(read_config(config)).items():
        size = 2 * int(np.prod(shape))
        if held and held + size > SHARD_BYTES:
            shards.append({})
            held = 0
        shards[-1][name] = shape
        held += size
    # the same few million values over and over, from another place each time: random enough, and fast
    pool = np.random.default_rng(seed).normal(0.0, 0.02, _BLOCK + 7919).astype(np.float32)
    bits = (pool.view(np.uint32) >> 16).astype(np.uint16)
    weight_map: dict[str, str] = {}
    total = 0
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(shard, file)
        total += _write_shard(folder / file, shard, bits)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return total


def _write_shard(path: Path, shapes: dict[str, tuple[int, ...]], bits: np.ndarray) -> int:
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    one = np.array([0x3F80], dtype=np.uint16)  # 1.0, for the norms
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for k, shape in enumerate(shapes.values()):
            left = int(np.prod(shape))
            if len(shape) == 1:
                file.write(np.repeat(one, left).tobytes())
                continue
            while left:
                start = (left + 131 * k) % 7919
                part = bits[start : start + min(left, _BLOCK)]
                part.tofile(file)
                left -= len(part)
    return end


# Linux counts what a process held before exec, its parent's memory, into its peak: so a small process starts it
_SMALL_PARENT = """
import resource, subprocess, sys
status = subprocess.call(sys.argv[1:], stdout=subprocess.DEVNULL)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(used.ru_maxrss, used.ru_utime + used.ru_stime)
sys.exit(status != 0)
"""


def measure(command: list[str]) -> tuple[float, float, float]:
    """Run a command; seconds, the peak resident memory of its process in MiB, and seconds of CPU time."""
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", _SMALL_PARENT, *command], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    scale = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in KiB on Linux
    peak, cpu = done.stdout.split()
    return time.monotonic() - start, int(peak) * scale / 2**20, float(cpu)


def copy_speed(folder: Path) -> float:
    """MiB/s at which the disk copies the first shard, including fsync."""
    source = next(iter(sorted(folder.glob("*.safetensors"))))
    with tempfile.NamedTemporaryFile(dir=folder.parent) as target, source.open("rb") as opened:
        start = time.monotonic()
        shutil.copyfileobj(opened, target, 1 << 22)
        target.flush()
        os.fsync(target.fileno())
        return source.stat().st_size / 2**20 / (time.monotonic() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the folder to write; it must not exist")
    parser.add_argument("--model", choices=MODELS, default="mistral-7b", help="whose shape (default: mistral-7b)")
    parser.add_argument("--layers", type=int, help="layers (default: as many as the model has)")
    parser.add_argument("--measure", action="store_true", help="convert it, and print time and peak memory")
    args, extra = parser.parse_known_args()
    config, tokenizer = MODELS[args.model]
    config = config | {"num_hidden_layers": args.layers or config["num_hidden_layers"]}
    start = time.monotonic()
    if not args.out.exists():
        total = write_random(args.out, config, tokenizer)
        print(f"wrote {total / 2**30:.2f} GiB in {time.monotonic() - start:.0f} s")
    config = json.loads((args.out / "config.json").read_text(encoding="utf-8"))
    if not args.measure:
        return
    largest = max(int(np.prod(s)) for s in expected_tensors(read_config(config)).values())
    limit = largest * 4 * 3 / 2**20 + 300
    print(f"copying a shard: {copy_speed(args.out):,.0f} MiB/s")
    with tempfile.TemporaryDirectory(dir=args.out.parent) as folder:
        flags = extra or ["--to", "gguf", "--quantize", "Q4_0"]
        out = Path(folder) / "model.gguf"
        command = [sys.executable, "-m", "edge_stream.cli", "convert", str(args.out), *flags, "-o", str(out)]
        seconds, peak, _ = measure(command)
        size = sum(p.stat().st_size for p in Path(folder).rglob("*") if p.is_file())
        print(f"convert {' '.join(flags)}: {seconds:.0f} s, {size / 2**30:.2f} GiB written")
        print(f"peak resident memory {peak:,.0f} MiB; the limit, 3 x the largest tensor + 300 MiB, is {limit:,.0f} MiB")
        if peak > limit:
            raise SystemExit("over the limit")


if __name__ == "__main__":
    main()
