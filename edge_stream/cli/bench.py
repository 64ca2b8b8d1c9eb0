"""`edge-stream bench`: speed, latency and memory, against the methods one would use otherwise."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import click

from edge_stream.cache_types import CACHE_TYPES
from edge_stream.cli import options
from edge_stream.cli.lists import ChoiceList, IntList
from edge_stream.errors import EdgeStreamError

MODES = ("stream", "window", "dense", "recompute", "shift")  # those of measure.modes, which imports NumPy


@click.command("bench")
@click.option(
    "-m",
    "--model",
    "models",
    envvar="LLAMA_ARG_MODEL",
    required=True,
    multiple=True,
    help="A model; several -m are compared.",
)
@click.option(
    "--mode", "modes", type=ChoiceList(MODES), default="stream", show_default=True, help=f"Any of {', '.join(MODES)}."
)
@click.option("-p", "--n-prompt", type=IntList(), default="512", show_default=True, help="Tests of reading. 0: none.")
@click.option("-n", "--n-gen", type=IntList(), default="128", show_default=True, help="Tests of generating. 0: none.")
@click.option("-pg", "pairs", multiple=True, metavar="P,N", help="A test of both, one after the other.")
@click.option(
    "-d",
    "--n-depth",
    type=IntList(words=["full"]),
    default="0",
    show_default=True,
    help="Tokens read before; may be far beyond -c. full: as many as the cache holds.",
)
@click.option(
    "--place",
    is_flag=True,
    help="Fill the cache and count that as the depth, in modes stream and window, instead of reading so far.",
)
@click.option("-c", "--ctx-size", "n_ctx", type=IntList(1), default="4096", show_default=True, help="Cache capacity.")
@click.option("--keep", "n_keep", type=IntList(), default="4", show_default=True, help="Sinks.")
@click.option(
    "-b", "--batch-size", "n_batch", type=IntList(1), default="512", show_default=True, help="Most tokens per decode."
)
@click.option(
    "-ub",
    "--ubatch-size",
    "n_ubatch",
    type=IntList(1),
    default="512",
    show_default=True,
    help="Most tokens computed at once.",
)
@click.option(
    "-ctk",
    "--cache-type-k",
    type=ChoiceList(list(CACHE_TYPES)),
    default="f16",
    show_default=True,
    help="Type of keys.",
)
@click.option("-ctv", "--cache-type-v", type=ChoiceList(list(CACHE_TYPES)), help="Type of values. Default: as -ctk.")
@click.option(
    "-fa",
    "--flash-attn",
    type=ChoiceList(["auto", "on", "off"]),
    default="auto",
    show_default=True,
    help="Flash attention.",
)
@click.option(
    "-t", "--threads", "n_threads", type=IntList(-1), default="-1", help="CPU threads. -1: chosen for this machine."
)
@click.option(
    "-ngl",
    "--gpu-layers",
    "--n-gpu-layers",
    "n_gpu_layers",
    type=options.GpuLayers(),
    default="auto",
    help="Layers on the GPU.",
)
@click.option("--sink-move", type=click.Choice(["auto", "bank", "redecode"]), default="auto", help="How sinks follow.")
@click.option("-r", "--repetitions", type=click.IntRange(1), default=5, show_default=True, help="Times of each test.")
@click.option(
    "--recompute-gen",
    type=click.IntRange(1),
    default=4,
    show_default=True,
    help="Tokens per repetition in mode recompute, where each costs a decode of the whole cache.",
)
@click.option("--startup", "with_startup", is_flag=True, help="Measure load time and time to the first token instead.")
@click.option(
    "-o", "--output", type=click.Choice(["md", "csv", "json", "jsonl"]), default="md", show_default=True, help="Format."
)
@click.option("--plot", metavar="FILE", help="A picture: ms per token by cache size and mode.")
def main(**flags: Any) -> None:
    """Measure speed, latency and memory of the modes, which take turns within one run.

    Flags, test names and columns are llama-bench's; comma lists and ranges (64-512+64, 64-512*2) make several tests.
    Tokens are random; tokenization and sampling are not counted. ms columns are times per generated token.
    """
    from edge_stream.measure import plots

    plots.check_plot(flags["plot"])
    if flags["with_startup"]:
        _startup(flags)
        return
    tests = _tests(flags)
    if not tests:
        raise click.UsageError("No test: -p and -n are both 0.")
    _bench(flags, tests)


def _bench(flags: dict[str, Any], tests: list[Any]) -> None:
    from edge_stream.cli.meter import Meter
    from edge_stream.measure import plots
    from edge_stream.measure.bench import Runner
    from edge_stream.measure.stamp import stamp
    from edge_stream.measure.table import as_json

    rows: list[dict[str, Any]] = []
    with Meter() as meter:
        runner = Runner(
            modes=flags["modes"],
            tests=tests,
            repetitions=flags["repetitions"],
            recompute_gen=flags["recompute_gen"],
            place=flags["place"],
            note=meter.note,
            progress=meter.show,
            stamp=stamp(),
        )
        for setup in _setups(flags):
            done = runner.group(setup)
            rows += done
            if flags["output"] == "jsonl":
                for row in done:
                    click.echo(as_json(row, line=True))
    if not rows:
        raise EdgeStreamError("nothing could be measured")
    _print(rows, runner.ratios, flags["output"])
    if flags["plot"]:
        plots.latency(rows, flags["plot"])
        click.echo(f"plot: {flags['plot']}", err=True)


def _tests(flags: dict[str, Any]) -> list[Any]:
    from edge_stream.measure.bench import Test

    pairs = []
    for pair in flags["pairs"]:
        numbers = pair.split(",")
        if len(numbers) != 2 or not all(n.isdecimal() and int(n) > 0 for n in numbers):
            raise click.UsageError(f"-pg {pair}: give two numbers, as in -pg 512,128.")
        pairs.append((int(numbers[0]), int(numbers[1])))
    sizes = [(p, 0) for p in flags["n_prompt"] if p] + [(0, n) for n in flags["n_gen"] if n] + pairs
    return [Test(p, n, None if d == "full" else d) for d in flags["n_depth"] for p, n in sizes]


def _setups(flags: dict[str, Any]) -> Iterator[Any]:
    from edge_stream.measure.bench import Setup

    names = ("n_batch", "n_ubatch", "cache_type_k", "cache_type_v", "flash_attn", "n_threads")
    lists = [flags["models"], flags["n_ctx"], flags["n_keep"], *(flags[n] or [None] for n in names)]
    for model, n_ctx, n_keep, *values in itertools.product(*lists):
        settings = dict(zip(names, values, strict=True))
        settings["cache_type_v"] = settings["cache_type_v"] or settings["cache_type_k"]
        settings["n_threads"] = settings["n_threads"] if settings["n_threads"] > 0 else None
        settings |= {"n_gpu_layers": flags["n_gpu_layers"], "sink_move": flags["sink_move"]}
        yield Setup(model, n_ctx, n_keep, settings)


def _print(rows: list[dict[str, Any]], ratios: list[dict[str, Any]], output: str) -> None:
    from edge_stream.measure.bench import table_rows
    from edge_stream.measure.table import as_csv, as_json, markdown

    if output == "json":
        click.echo(as_json(rows))
    elif output == "csv":
        click.echo(as_csv(rows))
    elif output == "md":
        click.echo(markdown(*table_rows(rows)))
        if ratios:
            click.echo("\nMedian ms per token beside stream's, modes taking turns:\n")
            click.echo(markdown(ratios, list(ratios[0])))
        first = rows[0]
        click.echo(f"\nbuild: {first['build_commit']}, edge-stream {first['edge_stream']}, {first['cpu_info']}")


def _startup(flags: dict[str, Any]) -> None:
    from edge_stream import models
    from edge_stream.measure.stamp import stamp
    from edge_stream.measure.startup import startup
    from edge_stream.measure.table import as_csv, as_json, markdown

    rows = []
    for model in flags["models"]:
        path = str(models.resolve(model))
        rows += [{"model": model, **row} for row in startup(path, flags["n_ctx"][0], flags["repetitions"])]
    if flags["output"] == "md":
        click.echo(markdown(rows, list(rows[0])))
        return
    rows = [{**stamp(), **row} for row in rows]
    if flags["output"] == "csv":
        click.echo(as_csv(rows))
    elif flags["output"] == "json":
        click.echo(as_json(rows))
    else:
        for row in rows:
            click.echo(as_json(row, line=True))
