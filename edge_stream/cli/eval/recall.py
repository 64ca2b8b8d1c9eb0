"""`edge-stream eval recall`: facts that have left the window, with recall and without."""

from __future__ import annotations

from typing import Any

import click

from edge_stream.cli.lists import FloatList
from edge_stream.cli.llama_flags import Command
from edge_stream.cli.measuring import emit, engine_options, output_option, prepare
from edge_stream.cli.meter import Meter


@click.command("recall", cls=Command)
@click.option(
    "--distances",
    type=FloatList(0.05, 10000),
    default="0.5,1.5,10,100",
    show_default=True,
    help="Between fact and question, in caches. Beyond 100 the lines between are in the log only.",
)
@click.option("--questions", type=click.IntRange(min=1), default=120, show_default=True, help="Questions per distance.")
@click.option(
    "--recall",
    "n_recall",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    metavar="N",
    help="Tokens of a line that may come back.",
)
@click.option("-s", "--seed", type=int, default=0, show_default=True, help="Seed of the facts.")
@click.option("--plot", metavar="FILE", help="Plot accuracy against distance.")
@output_option("-o", "--output")
@engine_options
def main(**flags: Any) -> None:
    """Ask for facts that left the cache long ago: accuracy against distance, with recall and without."""
    from edge_stream.measure import plots, recall

    plots.check_plot(flags["plot"])
    prepare(flags)
    with Meter() as meter:
        rows = recall.run(
            flags["model"],
            flags["distances"],
            flags["questions"],
            flags["n_ctx"],
            flags["n_keep"],
            flags["n_recall"],
            flags["seed"],
            flags["settings"],
            meter.show,
        )
    emit(rows, list(rows[0]), flags["output"])
    if flags["plot"]:
        plots.recall(rows, flags["n_ctx"], flags["plot"])
