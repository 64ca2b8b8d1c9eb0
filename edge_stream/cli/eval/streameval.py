"""`edge-stream eval streameval`: recall against distance."""

from __future__ import annotations

from typing import Any

import click

from edge_stream.cli.lists import IntList
from edge_stream.cli.llama_flags import Command
from edge_stream.cli.measuring import KeepingDone, emit, engine_options, mode_option, output_option, prepare
from edge_stream.cli.meter import Meter
from edge_stream.errors import EdgeStreamError


@click.command("streameval", cls=Command)
@mode_option("stream,window,shift")
@click.option(
    "--format",
    "fact_format",
    type=click.Choice(["words", "paper"]),
    default="words",
    show_default=True,
    help="words: facts among prose; paper: every line `line N: REGISTER_CONTENT is <M>`.",
)
@click.option("--distances", type=IntList(1), help="Lines between fact and question. Default: depends on -c.")
@click.option("--questions", type=click.IntRange(min=1), default=20, show_default=True, help="Questions per distance.")
@click.option("--interval", type=click.IntRange(min=1), default=10, show_default=True, help="Lines between questions.")
@click.option("-s", "--seed", type=int, default=0, show_default=True, help="Seed of the facts.")
@click.option("--plot", metavar="FILE", help="Plot accuracy against distance.")
@output_option("-o", "--output")
@engine_options
def main(**flags: Any) -> None:
    """Stream facts, and every few lines ask for one stated some lines before: accuracy against distance."""
    from edge_stream.measure import plots, streameval

    plots.check_plot(flags["plot"])
    plan = prepare(
        flags,
        lambda engine: streameval.plan(
            engine,
            flags["fact_format"],
            flags["distances"] or [],
            flags["questions"],
            flags["interval"],
            flags["n_ctx"],
            flags["seed"],
        ),
    )
    rows: list[dict[str, Any]] = []
    with KeepingDone(rows) as keeping, Meter() as meter:
        for mode in flags["modes"]:
            rows += streameval.run(
                flags["model"], mode, plan, flags["n_ctx"], flags["n_keep"], flags["settings"], meter.show, meter.note
            )
    if not rows:
        raise EdgeStreamError("no question was asked")
    emit(rows, list(rows[0]), flags["output"])
    if flags["plot"]:
        plots.distance(rows, flags["n_ctx"], flags["plot"])
    keeping.finish()
