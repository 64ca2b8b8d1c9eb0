"""`edge-stream eval sinks`: how many sinks a model needs."""

from __future__ import annotations

from typing import Any

import click

from edge_stream.cli.lists import IntList
from edge_stream.cli.llama_flags import Command
from edge_stream.cli.measuring import (
    chunk_option,
    emit,
    engine_options,
    output_option,
    read_tokens,
    text_options,
    untimed_option,
)
from edge_stream.cli.meter import Meter


@click.command("sinks", cls=Command)
@click.option("--sinks", type=IntList(), default="0,1,2,4,8", show_default=True, help="Numbers of sinks to try.")
@text_options
@chunk_option
@untimed_option
@output_option("-o", "--output")
@engine_options
def main(**flags: Any) -> None:
    """Perplexity with 0, 1, 2, 4 and 8 sinks, and which number to use. --keep has no effect."""
    from edge_stream.measure import sinks

    tokens = read_tokens(flags)
    with Meter() as meter:
        rows = sinks.table(
            flags["model"], tokens, flags["sinks"], flags["n_ctx"], flags["chunk"], flags["settings"], meter.show
        )
    best = sinks.recommend(rows)
    if flags["output"] != "md":
        rows = [{**row, "recommended": row["n_keep"] == best} for row in rows]
    hidden = ["mode", "segments", "stopped", "n_scored", *(["tok_per_s"] if flags["untimed"] else [])]
    emit(rows, [name for name in rows[0] if name not in hidden], flags["output"])
    if flags["output"] == "md":
        click.echo(f"\nuse --keep {best}: the smallest number within 1% of the best perplexity after the cache filled")
