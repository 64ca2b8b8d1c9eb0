"""How many sinks a model needs, by how it was trained: table 3 of Xiao et al. 2023 in small.

    python benchmarks/sink_training.py TEXT FOLDER [--plot FILE.png] [--seeds 0,1,2] [--tokens N] [--flags "FLAGS"]

For each kind of `edge-stream train --sink` and each seed a model is trained on TEXT, unless FOLDER has it already; a
run that was stopped goes on. FLAGS are further ones of train. All have the same text, order and weights to begin with.
Where lines begin with a verse (Gen1:1), it is left out: models would attend to it as to a sink. Each is converted to
GGUF, and streams the text that was held out, with caches of several lengths, token by token.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from edge_stream import Engine
from edge_stream.measure import attention, corpus, plots
from edge_stream.measure.table import markdown
from edge_stream.output.files import replace_text
from edge_stream.training.settings import SINKS

CLI = (sys.executable, "-m", "edge_stream.cli")
LENGTH = 128  # tokens of a sample
# deep and narrow: in models as small as this, heads with nothing to do come with depth
SHAPE = ("--layers", "6", "--width", "96", "--heads", "6", "--vocab", "512")
TRAINING = ("-c", str(LENGTH), "-b", "8", "--lr", "0.006", "--save-every", "100", "-t", "1")
TOKENS = 1_200_000
CACHES = (32, 64, 96, 128)
KEPT = (0, 1, 2, 4)
STREAMED = 2048  # tokens that are scored
HELD_OUT = 20  # the last part of the text in so many, as train holds it out


def without_verses(text: Path, folder: Path) -> Path:
    """A copy of the text in FOLDER, each line without the verse that it begins with."""
    out = folder / "text.txt"
    if not out.exists():
        content = re.sub(r"^[0-9]?[A-Za-z]+[0-9]+:[0-9]+ ", "", text.read_text(encoding="utf-8"), flags=re.MULTILINE)
        replace_text(out, content)
    return out


def held_out_of(text: str) -> str:
    """What was not trained on."""
    return text[len(text) - len(text) // HELD_OUT :]


def convert(checkpoint: Path, to: str, out: Path, *flags: str) -> Path:
    """`edge-stream convert`, if `out` is missing."""
    if not out.exists():
        command = [*CLI, "convert", str(checkpoint), "--to", to, "-o", str(out), *flags]
        subprocess.run(command, check=True, stdout=sys.stderr)
    return out


def model(text: Path, folder: Path, kind: str, seed: int, flags: list[str]) -> Path:
    """The trained model as a GGUF file, made where it is missing."""
    checkpoint = folder / f"{kind}-{seed}"
    if not checkpoint.exists():
        asked = ("--sink", kind, "--seed", str(seed), *SHAPE, *TRAINING, *flags, "-o", str(checkpoint))
        subprocess.run([*CLI, "train", str(text), *asked], check=True, stdout=sys.stderr)
    return convert(checkpoint, "gguf", folder / f"{kind}-{seed}.gguf", "--outtype", "f32")


def streamed(path: Path, text: str) -> dict[tuple[int, int], float]:
    """(cache, sinks) -> perplexity of the same STREAMED tokens of the text, all of them beyond the largest cache."""
    found = {}
    with Engine.load(path, n_ctx=max(CACHES), n_keep=max(KEPT), n_threads=1) as engine:
        tokens = engine.tokenize(text, add_bos=engine.add_bos)[: STREAMED + LENGTH + 1]
        for n_ctx in CACHES:
            for n_keep in KEPT:
                scores = engine.stream(n_ctx=n_ctx, n_keep=n_keep).score(tokens, chunk=1)
                found[n_ctx, n_keep] = float(np.exp(scores[-STREAMED:].mean()))
    return found


def spread(values: list[float]) -> str:
    """Mean and standard deviation."""
    mean = float(np.mean(values))
    digits = 0 if mean >= 1000 else 1 if mean >= 100 else 2
    return f"{mean:,.{digits}f}" + (f" ± {np.std(values, ddof=1):,.{digits}f}" if len(values) > 1 else "")


def draw(path: str, curves: dict[str, list[list[dict[str, Any]]]], maps: dict[str, list[np.ndarray]]) -> None:
    """Held-out loss along the training, and below it the attention map of each kind's first model, mean over layers."""
    figure = plots._figure(8, 6)
    above, below = figure.subfigures(2, 1, height_ratios=(1.1, 1))
    axes = above.subplots()
    for (kind, runs), colour in zip(curves.items(), ("C0", "C1", "C2"), strict=True):
        for i, rows in enumerate(runs):
            x, y = [row["tokens"] / 1e6 for row in rows], [row["held_out"] for row in rows]
            axes.plot(x, y, color=colour, linewidth=1, label=kind if i == 0 else None)
    axes.set_xlabel("million tokens")
    axes.set_ylabel("held-out loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    for panel, (kind, layers) in zip(below.subplots(1, len(maps)), maps.items(), strict=True):
        mean = np.mean(layers, axis=0)[:48, :48]
        panel.imshow(np.log10(np.maximum(mean, 1e-4)), vmin=-3, vmax=0, cmap="viridis")
        panel.set_title(f"{kind}: {mean[24:, 0].mean():.0%} on the first", fontsize=9)
    plots._save(figure, path)


def main() -> None:
    """Train what is missing, measure, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, metavar="TEXT")
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="to train on")
    parser.add_argument("--flags", default="", help="of edge-stream train")
    parser.add_argument("--done", action="store_true", help="measure what FOLDER has, and train nothing")
    parser.add_argument("--plot", metavar="FILE.png")
    args = parser.parse_args()
    plots.check_plot(args.plot)
    args.folder.mkdir(parents=True, exist_ok=True)
    seeds = [int(seed) for seed in args.seeds.split(",")]
    text = without_verses(args.text, args.folder)
    held_out = held_out_of(text.read_text(encoding="utf-8"))
    flags = ["-n", str(args.tokens), *shlex.split(args.flags)]
    wanted = [(kind, seed) for seed in seeds for kind in SINKS]
    if args.done:
        wanted = [(kind, seed) for kind, seed in wanted if (args.folder / f"{kind}-{seed}").is_dir()]
    files = {(kind, seed): model(text, args.folder, kind, seed, flags) for kind, seed in wanted}
    seeds_of = {kind: [seed for other, seed in wanted if other == kind] for kind in SINKS}
    logs = {
        key: json.loads((args.folder / f"{key[0]}-{key[1]}" / "training.json").read_text(encoding="utf-8"))
        for key in files
    }
    found = {key: streamed(path, held_out) for key, path in files.items()}
    rows = [
        {"trained with": kind, "seeds": len(seeds_of[kind]), "cache": n_ctx}
        | {f"{k} sinks": spread([found[kind, seed][n_ctx, k] for seed in seeds_of[kind]]) for k in KEPT}
        for n_ctx in CACHES
        for kind in SINKS
    ]
    with Engine.load(files[SINKS[0], seeds[0]], n_ctx=64) as engine:
        n_params = engine.backend.facts.n_params
    print(
        f"{n_params / 1e6:.2f} M parameters, {args.tokens:,} tokens in samples of {LENGTH}; mean and standard "
        "deviation over the seeds.\n"
    )
    print(markdown(rows, list(rows[0])))
    maps, shares = {}, []
    for kind in SINKS:
        path = str(files[kind, seeds[0]])
        with Engine.load(path, n_ctx=256) as engine:
            tokens = corpus.read_tokens(engine, held_out, None, LENGTH)
        maps[kind] = attention.maps(path, tokens, {})
        last = [logs[kind, seed]["log"][-1]["held_out"] for seed in seeds_of[kind]]
        mass = {f"layer {row['layer']}": row["first 1"] for row in attention.mass(maps[kind])}
        shares.append({"trained with": kind, "held-out loss": spread(last)} | mass)
    print(
        "\nHeld-out loss in nats, and the share of attention that each layer gives to the first token (first seed):\n"
    )
    print(markdown(shares, list(shares[0])))
    if args.plot:
        draw(args.plot, {kind: [logs[kind, seed]["log"] for seed in seeds_of[kind]] for kind in SINKS}, maps)


if __name__ == "__main__":
    main()
