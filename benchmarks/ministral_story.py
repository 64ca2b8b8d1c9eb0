"""Ministral 3's 3B shape from a checkpoint to both engines and to an iPhone, with time, memory and speed of each step.

    python benchmarks/ministral_story.py FOLDER [-c 4096] [-n 64] [--layers 26] [--beside]

The weights are random (make_checkpoint.py has the config and its source); speed and memory do not depend on them. Each
step is a process of its own, whose peak memory is shown; a step whose output is in FOLDER already is not repeated, but
for streaming. Takes 20 GB of disk. --beside: other programs were running, which the output then says.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from make_checkpoint import measure

HERE = Path(__file__).parent


def main() -> None:
    """Run the steps, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("-c", dest="n_ctx", type=int, default=4096)
    parser.add_argument("-n", dest="n_tokens", type=int, default=64, help="tokens decoded one by one, twice")
    parser.add_argument("-t", dest="n_threads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=26)
    parser.add_argument("--beside", action="store_true")
    parser.add_argument("--skip-fill", action="store_true", help="MLC: random keys and values instead of a prompt")
    parser.add_argument("--stream", type=Path, help=argparse.SUPPRESS)  # the process that streams
    args = parser.parse_args()
    if args.stream:
        print(json.dumps(stream(args.stream, args)))
        return
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.beside:
        print("Beside other work: times are longer than on a quiet machine.\n")
    convert(args)
    print()
    engines(args)
    print()
    phone(args)


def convert(args: argparse.Namespace) -> None:
    """The checkpoint, and what becomes of it."""
    folder, checkpoint = args.folder, args.folder / "checkpoint"
    gguf, mlc = folder / "ministral.gguf", folder / "ministral-MLC"
    size, phone = ("-c", args.n_ctx), ("--device", "iphone-15-pro")
    steps: dict[str, tuple[Path, tuple[Any, ...]]] = {
        "checkpoint, bf16": (checkpoint, ("--model", "ministral-3-3b", "--layers", args.layers)),
        "GGUF, Q4_K_M": (gguf, ("convert", checkpoint, "--to", "gguf", "--quantize", "Q4_K_M", *size)),
        "MLC, q4f16_1, and its iPhone library": (
            mlc,
            ("convert", checkpoint, "--to", "mlc", "--quantization", "q4f16_1", "--device", "iphone", *size),
        ),
        "export-ios of the GGUF file": (folder / "for-the-app", ("export-ios", "-m", gguf, *phone)),
        "export-ios of the MLC folder": (folder / "for-mlc", ("export-ios", "-m", mlc, *phone)),
    }
    print("| step | seconds | of CPU | peak MiB | MiB on disk |\n|---|--:|--:|--:|--:|")
    for name, (out, words) in steps.items():
        took = " | | "
        if not out.exists():
            program = [str(HERE / "make_checkpoint.py"), out] if out == checkpoint else ["-m", "edge_stream.cli"]
            target = () if out == checkpoint else ("-o", out)
            seconds, peak, cpu = measure([str(word) for word in (sys.executable, *program, *words, *target)])
            took = f"{seconds:,.0f} | {cpu:,.0f} | {peak:,.0f}"
        files = [out] if out.is_file() else [path for path in out.rglob("*") if path.is_file()]
        print(f"| {name} | {took} | {sum(path.stat().st_size for path in files) / 2**20:,.0f} |", flush=True)


def engines(args: argparse.Namespace) -> None:
    """A full cache that slides with every token, in a process of its own for each engine."""
    print(
        f"| engine, n_ctx {args.n_ctx} | prompt, tok/s | sliding, ms per token | best | slides | MiB when full | "
        f"after {args.n_tokens} more tokens | after {2 * args.n_tokens} |\n|---|--:|--:|--:|--:|--:|--:|--:|"
    )
    for name, model in (("llama.cpp, Q4_K_M", "ministral.gguf"), ("MLC, q4f16_1", "ministral-MLC")):
        words = ["-c", args.n_ctx, "-n", args.n_tokens, "-t", args.n_threads, "--stream", args.folder / model]
        command = [sys.executable, __file__, args.folder, *words, *(["--skip-fill"] if args.skip_fill else [])]
        done = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, text=True, check=True)
        r = json.loads(done.stdout.splitlines()[-1])
        memory = " | ".join(f"{mib:,.0f}" for mib in r["memory"])
        print(
            f"| {name} | {r['prompt']:.1f} | {r['ms']:.0f} | {r['best']:.0f} | {r['slides']} | {memory} |", flush=True
        )


def stream(model: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Fill the cache, then decode token by token."""
    n_ctx, n_tokens = args.n_ctx, args.n_tokens
    from edge_stream import Engine
    from edge_stream.measure.metrics import resident_mib

    with Engine.load(model, n_ctx=n_ctx, n_threads=args.n_threads) as engine, engine.stream() as stream:
        tokens = [int(t) for t in np.random.default_rng(0).integers(300, engine.n_vocab, n_ctx + 2 * n_tokens)]
        n_prompt = 256 if args.skip_fill and model.is_dir() else n_ctx
        start = time.perf_counter()
        stream.feed(tokens[:n_prompt])
        prompt = n_prompt / (time.perf_counter() - start)
        if n_prompt < n_ctx:
            pretend(engine.backend.decoder, stream, tokens[n_prompt:n_ctx])
        memory, times = [resident_mib()], []
        for i, token in enumerate(tokens[n_ctx:]):
            start = time.perf_counter()
            stream.feed([token])
            times.append(time.perf_counter() - start)
            if (i + 1) % n_tokens == 0:
                memory.append(resident_mib())
        ms, best = 1000 * statistics.median(times), 1000 * min(times)
        return {"prompt": prompt, "ms": ms, "best": best, "memory": memory, "slides": stream.stats.n_slides}


def pretend(decoder: Any, stream: Any, tokens: list[int]) -> None:
    """Feed tokens without computing anything: what later tokens cost does not depend on what the cache holds."""
    random = np.random.default_rng(0)
    for memory in (decoder._keys.np, decoder._values.np):
        for layer in memory:
            layer[:] = random.normal(size=layer.shape)
    decode, decoder.decode = decoder.decode, lambda *_: np.zeros((1, decoder.config.n_vocab), np.float32)
    try:
        stream.feed(tokens)
    finally:
        decoder.decode = decode


def phone(args: argparse.Namespace) -> None:
    """What the packages hold."""
    from mlc_libraries import macho_symbols

    from edge_stream.ios.mlc_package import CONFIG, memory_plan
    from edge_stream.mlc.folder import MlcFolder

    folder = MlcFolder(args.folder / "ministral-MLC")
    config = json.loads((args.folder / "for-mlc" / CONFIG).read_text(encoding="utf-8"))
    print("| iPhone library (compiled, not run) | bytes | symbols |\n|---|--:|---|")
    with tarfile.open(args.folder / "for-mlc" / "lib.tar") as archive:
        for member in archive.getmembers():
            file = archive.extractfile(member)
            data = file.read() if file else b""
            names = macho_symbols(data)
            first = f", `{names[0]}`" if len(names) == 1 else ""
            print(f"| {member.name} | {member.size:,} | {len(names)}{first} |")
    (model,) = config["model_list"]
    manifest = json.loads((args.folder / "for-the-app" / "manifest.json").read_text(encoding="utf-8"))
    plans = {"app (GGUF)": manifest["memory"], f"MLC, `{model['model_lib']}`": memory_plan(folder)}
    print("\n| memory plan, MiB | parts |\n|---|---|")
    for name, plan in plans.items():
        print(f"| {name} | {', '.join(f'{part} {size / 2**20:,.0f}' for part, size in plan.items())} |")


if __name__ == "__main__":
    main()
