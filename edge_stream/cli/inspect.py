"""`edge-stream inspect`: look inside a model."""

from __future__ import annotations

from typing import Any

import click

from edge_stream.cli import options
from edge_stream.cli.measuring import emit, output_option, read_tokens, text_options
from edge_stream.errors import EdgeStreamError

N_TOKENS = 256


@click.group("inspect")
def main() -> None:
    """Show what happens inside a model."""


@main.command("attention")
@options.model_option()
@text_options
@click.option("-o", "--output", "picture", metavar="FILE.png", help="Plot a map of each layer.")
@output_option("--format")
@options.context_options()
@options.compute_options
def attention(**flags: Any) -> None:
    """The share of attention that the first 1, 2, 4 and 8 tokens get in each layer, and a map of each layer.

    Means over heads and over the queries of the text's second half. The text, by default its first 256 tokens, is read
    in one batch into a cache of its size: -c, -b, -ub and --keep have no effect.
    """
    from edge_stream.measure import attention, plots

    if flags["flash_attn"] == "on":
        raise EdgeStreamError("flash attention never holds the attention weights: leave out -fa on")
    plots.check_plot(flags["picture"])
    flags |= {"n_ctx": N_TOKENS, "n_keep": 0, "max_tokens": flags["max_tokens"] or N_TOKENS, "flash_attn": "off"}
    tokens = read_tokens(flags)
    maps = attention.maps(flags["model"], tokens, flags["settings"])
    rows = attention.mass(maps)
    emit(rows, list(rows[0]), flags["output"])
    if flags["picture"]:
        plots.attention(maps, flags["picture"])
