"""Ministral 3's 3B shape from a checkpoint to both engines and to an iPhone, with time, memory and speed of each step.

    python benchmarks/ministral_story.py FOLDER [-c 4096] [-n 32] [--layers 26] [--mlc-c 1024] [--under COMMAND]

The weights are random (make_checkpoint.py has the config and its source); speed and memory do not depend on them. Every
step is a process of its own, and what it measured is kept in FOLDER/story.json: after an interruption the same command
goes on with the next step. Reading: an empty cache is filled with a prompt of its length, then slides with each of 2n
tokens; that stream is saved. Speed: the saved stream goes on for n tokens, one at a time, first on one engine, then on
the other. These steps take a minute each; --under runs them with another command, such as one that pauses other work.
--mlc-c: a smaller cache for MLC, which reads more slowly. Takes 16 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from make_checkpoint import measure

HERE = Path(__file__).parent
ENGINES = {"llama.cpp, Q4_K_M": "ministral.gguf", "MLC, q4f16_1": "ministral-MLC"}


def main() -> None:
    """Run the steps, and print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("-c", dest="n_ctx", type=int, default=4096)
    parser.add_argument("--mlc-c", dest="mlc_n_ctx", type=int, metavar="N", help="n_ctx of the MLC engine (-c)")
    parser.add_argument("-n", dest="n_tokens", type=int, default=32, help="tokens decoded one by one")
    parser.add_argument("-t", dest="n_threads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=26)
    parser.add_argument("--under", metavar="COMMAND", default="", help="runs the steps that measure speed")
    parser.add_argument("--reading", type=Path, metavar="MODEL", help=argparse.SUPPRESS)  # one step
    parser.add_argument("--speed", type=Path, metavar="MODEL", help=argparse.SUPPRESS)  # another
    args = parser.parse_args()
    if args.reading or args.speed:
        print(json.dumps(fill(args.reading, args) if args.reading else speed(args.speed, args)))
        return
    args.folder.mkdir(parents=True, exist_ok=True)
    story = Story(args)
    convert(story, args)
    engines(story, args)
    phone(args)
    print(f"\nAll steps together: {story.seconds() / 60:.0f} minutes, the first begun at {story.began()}.")


class Story:
    """What the steps measured, in story.json; a step that is there is not repeated."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.path = args.folder / "story.json"
        self.settings = {name: getattr(args, name) for name in ("n_ctx", "n_tokens", "n_threads", "layers")}
        self.steps: dict[str, dict[str, Any]] = {}
        self.told: set[str] = set()  # the steps of this run's tables
        if self.path.exists():
            kept = json.loads(self.path.read_text(encoding="utf-8"))
            if kept["settings"] != self.settings:
                raise SystemExit(f"{self.path} was measured with other options: name another folder, or remove it")
            self.steps = kept["steps"]

    def step(self, name: str, do: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The step's measurements, now or earlier."""
        self.told.add(name)
        if name not in self.steps:
            print(f"{time.strftime('%H:%M:%S')} {name}", file=sys.stderr, flush=True)
            when, start = time.strftime("%Y-%m-%d %H:%M"), time.monotonic()
            self.steps[name] = do() | {"when": when, "whole": time.monotonic() - start}
            temporary = self.path.with_suffix(".tmp")
            kept = {"settings": self.settings, "steps": self.steps}
            temporary.write_text(json.dumps(kept, indent=1), encoding="utf-8")
            os.replace(temporary, self.path)
        return self.steps[name]

    def seconds(self) -> float:
        """The time that the steps took."""
        return sum(float(self.steps[name]["whole"]) for name in self.told)

    def began(self) -> str:
        """When the first step began."""
        return min(str(self.steps[name]["when"]) for name in self.told)


def convert(story: Story, args: argparse.Namespace) -> None:
    """The checkpoint, and what becomes of it."""
    folder, checkpoint = args.folder, args.folder / "checkpoint"
    gguf, mlc = (folder / name for name in ENGINES.values())
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
        made = story.step(name, lambda out=out, words=words: make(out, words, checkpoint))
        print(
            f"| {name} | {made['seconds']:,.0f} | {made['cpu']:,.0f} | {made['peak']:,.0f} | {made['size']:,.0f} |",
            flush=True,
        )


def make(out: Path, words: tuple[Any, ...], checkpoint: Path) -> dict[str, Any]:
    """Run a command that writes a file or folder; an unfinished one is removed first."""
    if out.is_dir():
        shutil.rmtree(out)
    out.unlink(missing_ok=True)
    own = [str(HERE / "make_checkpoint.py"), out, *words]
    program = own if out == checkpoint else ["-m", "edge_stream.cli", *words, "-o", out]
    seconds, peak, cpu = measure([str(word) for word in (sys.executable, *program)])
    files = [out] if out.is_file() else [path for path in out.rglob("*") if path.is_file()]
    return {"seconds": seconds, "cpu": cpu, "peak": peak, "size": sum(p.stat().st_size for p in files) / 2**20}


def engines(story: Story, args: argparse.Namespace) -> None:
    """Both engines read a whole cache and slide; then both are timed."""
    n, sizes = args.n_tokens, dict(zip(ENGINES, (args.n_ctx, args.mlc_n_ctx or args.n_ctx), strict=True))

    def step(kind: str, engine: str) -> dict[str, Any]:
        n_ctx = sizes[engine]
        name = engine if n_ctx == args.n_ctx else f"{engine}, n_ctx {n_ctx}"
        return story.step(f"{name}: {kind}", lambda: run(f"--{kind}", ENGINES[engine], n_ctx, args))

    filled = {name: step("reading", name) for name in ENGINES}
    timed = {name: step("speed", name) for name in ENGINES}
    print(
        f"\n| engine | n_ctx, all of it read | seconds | of CPU | slides | MiB when full | after {n} more "
        f"tokens | after {2 * n} | sliding, ms per token | best |\n|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|"
    )
    for name in ENGINES:
        read, went = filled[name], timed[name]
        memory = " | ".join(f"{mib:,.1f}" for mib in read["memory"])
        print(
            f"| {name} | {sizes[name]:,} | {read['seconds']:,.0f} | {read['cpu']:,.0f} | {read['slides']} "
            f"| {memory} | {went['ms']:.0f} | {went['best']:.0f} |",
            flush=True,
        )
    print()


def run(kind: str, model: str, n_ctx: int, args: argparse.Namespace) -> dict[str, Any]:
    """A step on an engine, in a process of its own."""
    words = ["-c", n_ctx, "-n", args.n_tokens, "-t", args.n_threads, kind, args.folder / model]
    command = [sys.executable, __file__, args.folder, *words]
    under = shlex.split(args.under) if kind == "--speed" else []
    done = subprocess.run([*under, *(str(word) for word in command)], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{kind} of {model} failed")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def fill(model: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Fill an empty cache, then slide token by token, and save the stream."""
    n_ctx, n_tokens = args.n_ctx, args.n_tokens
    from edge_stream import Engine
    from edge_stream.measure.metrics import resident_mib

    with Engine.load(model, n_ctx=n_ctx, n_threads=args.n_threads) as engine, engine.stream() as stream:
        tokens = random_tokens(engine.n_vocab, n_ctx + 2 * n_tokens)
        start, cpu = time.perf_counter(), time.process_time()
        stream.feed(tokens[:n_ctx])
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        memory = [resident_mib()]
        for i, token in enumerate(tokens[n_ctx:]):
            stream.feed([token])
            if (i + 1) % n_tokens == 0:
                memory.append(resident_mib())
        slides = stream.stats.n_slides
        stream.save(session(model))
    return {"seconds": seconds, "cpu": cpu, "memory": memory, "slides": slides}


def speed(model: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The time of tokens that follow the saved stream."""
    from edge_stream import Engine

    with Engine.load(model, n_ctx=args.n_ctx, n_threads=args.n_threads) as engine:
        stream = engine.restore(session(model))
        times = []
        for token in random_tokens(engine.n_vocab, 2 + args.n_tokens):
            start = time.perf_counter()
            stream.feed([token])
            times.append(time.perf_counter() - start)
        stream.close()
    times = times[2:]  # the first ones touch memory for the first time
    return {"ms": 1000 * statistics.median(times), "best": 1000 * min(times), "times": times}


def session(model: Path) -> Path:
    """Where the stream of a model is kept."""
    return model.parent / f"{model.name}.session"


def random_tokens(n_vocab: int, n: int) -> list[int]:
    """Tokens that are no special ones."""
    return [int(t) for t in np.random.default_rng(0).integers(300, n_vocab, n)]


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
