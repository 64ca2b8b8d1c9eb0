"""`edge-stream bench`: speed, latency and memory of a stream and of other methods."""

from __future__ import annotations

import itertools
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from edge_stream.cache_types import CACHE_TYPES
from edge_stream.cli import options
from edge_stream.cli.lists import ChoiceList, IntList
from edge_stream.cli.llama_flags import Command
from edge_stream.cli.measuring import KeepingDone, mode_option, output_option
from edge_stream.errors import EdgeStreamError

if TYPE_CHECKING:
    from edge_stream.measure.bench import Setup, Test

_list_option = partial(click.option, show_default=True)


@click.command("bench", cls=Command)
@click.option(
    "-m", "--model", "models", envvar="LLAMA_ARG_MODEL", required=True, multiple=True, help="A model. Repeatable."
)
@mode_option()
@_list_option("-p", "--n-prompt", type=IntList(), default="512", help="Prompt lengths to test. 0: none.")
@_list_option("-n", "--n-gen", type=IntList(), default="128", help="Numbers of tokens to generate. 0: none.")
@click.option("-pg", "pairs", multiple=True, metavar="P,N", help="Test a prompt of P tokens, then N generated ones.")
@_list_option(
    "-d",
    "--n-depth",
    type=IntList(words=["full"]),
    default="0",
    help="Tokens read before a test, which may exceed -c. full: as many as the cache holds.",
)
@click.option(
    "--place",
    is_flag=True,
    help="In modes stream and window, fill the cache and count that as the depth, instead of reading up to it.",
)
@_list_option("-c", "--ctx-size", "n_ctx", type=IntList(1), default="4096", help="Cache capacity.")
@_list_option("--keep", "n_keep", type=IntList(), default="4", help="Sinks.")
@_list_option("-b", "--batch-size", "n_batch", type=IntList(1), default="512", help="Maximum tokens per decode.")
@_list_option(
    "-ub", "--ubatch-size", "n_ubatch", type=IntList(1), default="512", help="Maximum tokens computed at once."
)
@_list_option("-ctk", "--cache-type-k", type=ChoiceList(list(CACHE_TYPES)), default="f16", help="Type of keys.")
@click.option("-ctv", "--cache-type-v", type=ChoiceList(list(CACHE_TYPES)), help="Type of values. Default: as -ctk.")
@_list_option("-fa", "--flash-attn", type=ChoiceList(["auto", "on", "off"]), default="auto", help="Flash attention.")
@_list_option(
    "-t", "--threads", "n_threads", type=IntList(-1), default="-1", help="CPU threads. -1: chosen for this machine."
)
@_list_option(
    "-ngl",
    "--gpu-layers",
    "--n-gpu-layers",
    "n_gpu_layers",
    type=options.GpuLayers(),
    default="auto",
    help="Layers on the GPU.",
)
@click.option(
    "--sink-move", type=click.Choice(["auto", "bank", "redecode"]), default="auto", help="How sinks are moved."
)
@click.option(
    "-r", "--repetitions", type=click.IntRange(1), default=5, show_default=True, help="Repetitions of each test."
)
@click.option(
    "--recompute-gen",
    type=click.IntRange(1),
    default=4,
    show_default=True,
    help="Tokens per repetition in mode recompute, where each costs a decode of the whole cache.",
)
@click.option("--startup", "with_startup", is_flag=True, help="Measure load time and time to the first token instead.")
@output_option("-o", "--output")
@click.option("--plot", metavar="FILE", help="Plot ms per token by cache size and mode.")
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


def _bench(flags: dict[str, Any], tests: list[Test]) -> None:
    from edge_stream.cli.meter import Meter
    from edge_stream.measure import plots
    from edge_stream.measure.bench import Runner
    from edge_stream.measure.stamp import stamp
    from edge_stream.measure.table import render

    rows: list[dict[str, Any]] = []
    setups = _setups(flags)
    with KeepingDone(rows) as keeping, Meter() as meter:
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
        for setup in setups:
            for done in runner.measure(setup):
                rows += done
                if flags["output"] == "jsonl" and done:
                    click.echo(render(done, "jsonl"))
    if not rows:
        raise EdgeStreamError("nothing could be measured")
    _print(rows, runner.ratios, flags["output"])
    if flags["plot"]:
        plots.latency(rows, flags["plot"])
        click.echo(f"plot: {flags['plot']}", err=True)
    keeping.finish()


def _tests(flags: dict[str, Any]) -> list[Test]:
    from edge_stream.measure.bench import Test

    pairs = []
    for pair in flags["pairs"]:
        numbers = pair.split(",")
        if len(numbers) != 2 or not all(n.isdecimal() and int(n) > 0 for n in numbers):
            raise click.UsageError(f"-pg {pair}: give two numbers, as in -pg 512,128.")
        pairs.append((int(numbers[0]), int(numbers[1])))
    sizes = [(p, 0) for p in flags["n_prompt"] if p] + [(0, n) for n in flags["n_gen"] if n] + pairs
    return [Test(p, n, None if d == "full" else d) for d in flags["n_depth"] for p, n in sizes]


def _setups(flags: dict[str, Any]) -> list[Setup]:
    """All combinations of the flags that take lists. Prints what `-fa auto` became, and why."""
    from edge_stream.measure.bench import Setup

    names = ("n_batch", "n_ubatch", "cache_type_k", "cache_type_v", "flash_attn", "n_threads")
    lists = [flags["models"], flags["n_ctx"], flags["n_keep"], *(flags[n] or [None] for n in names)]
    setups, notes = [], []
    for model, n_ctx, n_keep, *values in itertools.product(*lists):
        settings = dict(zip(names, values, strict=True))
        settings["cache_type_v"] = settings["cache_type_v"] or settings["cache_type_k"]
        settings["n_threads"] = settings["n_threads"] if settings["n_threads"] > 0 else None
        settings |= {"n_gpu_layers": flags["n_gpu_layers"], "sink_move": flags["sink_move"]}
        settings["flash_attn"], note = options.flash_attn({**settings, "model": model})
        notes.append(note)
        setups.append(Setup(model, n_ctx, n_keep, settings))
    for note in filter(None, dict.fromkeys(notes)):
        click.echo(note, err=True)
    return setups


def _print(rows: list[dict[str, Any]], ratios: list[dict[str, Any]], output: str) -> None:
    from edge_stream.measure.bench import table_rows
    from edge_stream.measure.table import markdown, render

    if output in ("json", "csv"):
        click.echo(render(rows, output))
    elif output == "md":
        click.echo(markdown(*table_rows(rows)))
        if ratios:
            click.echo("\nMedian ms per token beside stream's, modes taking turns:\n")
            click.echo(markdown(ratios, list(ratios[0])))
        first = rows[0]
        click.echo(f"\nbuild: {first['build_commit']}, edge-stream {first['edge_stream']}, {first['cpu_info']}")
        click.echo(f"on the CPU: attention {first['attention']}, products {first['products']}")


def _startup(flags: dict[str, Any]) -> None:
    from edge_stream.measure.stamp import stamp
    from edge_stream.measure.startup import startup
    from edge_stream.measure.table import render
    from edge_stream.models import names

    rows = []
    for model in flags["models"]:
        path = str(names.resolve(model))
        rows += [{"model": model, **row} for row in startup(path, flags["n_ctx"][0], flags["repetitions"])]
    if flags["output"] != "md":
        rows = [{**stamp(), **row} for row in rows]
    click.echo(render(rows, flags["output"]))
