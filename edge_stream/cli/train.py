"""`edge-stream train`: pre-train a small model, or continue one, with a sink."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from edge_stream.cli.console import read_text
from edge_stream.cli.llama_flags import Command
from edge_stream.cli.meter import Meter
from edge_stream.cli.options import F
from edge_stream.errors import EdgeStreamError, cannot_import
from edge_stream.training.settings import SINKS, Settings, Shape

_NEW, _DEFAULT = Shape(), Settings()


def _count(*names: str, default: int, help: str, least: int = 1) -> Callable[[F], F]:
    return click.option(
        *names, type=click.IntRange(min=least), default=default, show_default=True, metavar="N", help=help
    )


@click.command("train", cls=Command)
@click.argument("texts", nargs=-1, required=True, metavar="TEXT...")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="The Hugging Face folder to write.")
@click.option(
    "--sink",
    type=click.Choice(SINKS),
    default="none",
    show_default=True,
    help="token: a learned token in front of every sample. softmax1: a logit of 0 beside those of the keys.",
)
@click.option("--base", metavar="MODEL", help="Continue this model: a Hugging Face folder, a GGUF file or demo.")
@click.option(
    "--freeze", type=click.Choice(["all-but-sink"]), help="With --base: learn the sink token's embedding only."
)
@click.option("--eval-file", metavar="FILE", help="Evaluate on this text. Default: the last twentieth of each TEXT.")
@_count("--vocab", "n_vocab", default=_NEW.n_vocab, least=257, help="Words of a new model's tokenizer.")
@_count("--layers", "n_layer", default=_NEW.n_layer, help="Layers of a new model.")
@_count("--width", "n_embd", default=_NEW.n_embd, least=2, help="Width of a new model.")
@_count("--heads", "n_head", default=_NEW.n_head, help="Attention heads of a new model.")
@_count("-c", "--ctx-size", "length", default=_DEFAULT.length, least=2, help="Tokens of text per sample.")
@_count("-b", "--batch-size", "batch", default=_DEFAULT.batch, help="Samples per step.")
@_count(
    "-n", "--tokens", "n_tokens", default=_DEFAULT.n_tokens, help="Tokens to train on, in as many rounds as needed."
)
@click.option(
    "--lr", type=click.FloatRange(min=0, min_open=True), default=_DEFAULT.lr, show_default=True, help="Learning rate."
)
@click.option(
    "--weight-decay",
    type=click.FloatRange(min=0),
    default=_DEFAULT.weight_decay,
    show_default=True,
    help="Of matrices. In short runs a large one brings sinks about sooner.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the weights and the order.")
@_count("--save-every", "every", default=_DEFAULT.every, help="Steps from one evaluation and checkpoint to the next.")
@_count("--eval-samples", "n_held_out", default=_DEFAULT.n_held_out, help="Most samples to evaluate on.")
@click.option("-t", "--threads", type=click.IntRange(min=1), metavar="N", help="CPU threads. Default: torch's.")
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="auto: CUDA if there.",
)
@click.option("--restart", is_flag=True, help="Begin anew where a checkpoint of an unfinished run is found.")
@click.option("--overwrite", is_flag=True, help="Replace the folder if it exists.")
def main(texts: tuple[str, ...], out: Path, **flags: Any) -> None:
    """Train a Llama-type model on TEXT (UTF-8 files, - is stdin), so that one token, or none, is enough of a sink.

    A run that was stopped, by Ctrl-C or kill -9, goes on from its last checkpoint when the command is given again.

    \b
    edge-stream train book.txt --sink token -o small
    edge-stream train book.txt --base demo --sink token --freeze all-but-sink -c 256 -n 100000 -o demo-sink
    edge-stream convert small --to gguf --outtype f32 -o small.gguf
    """
    if flags["freeze"] and (not flags["base"] or flags["sink"] != "token"):
        raise click.UsageError("--freeze all-but-sink needs --base MODEL and --sink token.")
    _check_folder(out, flags["overwrite"])
    read = [read_text(Path(name)) for name in texts]
    held_out = [read_text(Path(flags["eval_file"]))] if flags["eval_file"] else []
    try:
        import torch

        from edge_stream.models.conversion import open_source
        from edge_stream.training import job
    except ImportError as error:
        raise cannot_import(error, "train", "train") from error
    settings = Settings(
        only_sink=flags["freeze"] is not None,
        **{
            name: flags[name]
            for name in ("sink", "length", "batch", "n_tokens", "lr", "weight_decay", "seed", "every", "n_held_out")
        },
    )
    shape = Shape(**{name: flags[name] for name in ("n_vocab", "n_layer", "n_embd", "n_head")})
    if flags["threads"]:
        torch.set_num_threads(flags["threads"])
    device = flags["device"] if flags["device"] != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise EdgeStreamError("torch finds no CUDA device here: use --device cpu")
    base = open_source(flags["base"]) if flags["base"] else None
    try:
        with Meter() as meter:

            def show(step: int, loss: float) -> None:
                meter.show("training", step, settings.n_steps, f"loss {loss:.3f}")

            log = job.run(
                read, held_out, out, settings, shape, base, device, meter.note, show, restart=flags["restart"]
            )
    finally:
        if base is not None:
            base.close()
    first, last = log[0]["held_out"], log[-1]["held_out"]
    click.echo(f"wrote {out}: held-out loss {first:.3f} before, {last:.3f} after {log[-1]['tokens']:,} tokens")


def _check_folder(out: Path, overwrite: bool) -> None:
    """Raise EdgeStreamError before the work if the folder cannot be written, or is none that train wrote."""
    if not out.exists():
        return
    if not out.is_dir() or (any(out.iterdir()) and not (out / "training.json").is_file()):
        raise EdgeStreamError(f"{out} exists already and was not written by train: choose another name")
    if not overwrite:
        raise EdgeStreamError(f"{out} exists already: choose another name, or --overwrite to replace it")
