"""`edge-stream inspect`: look inside a model."""

from __future__ import annotations

from typing import Any

import click

from edge_stream.cli import options
from edge_stream.cli.llama_flags import Command
from edge_stream.cli.measuring import emit, output_option, read_tokens, text_options
from edge_stream.errors import EdgeStreamError

N_TOKENS = 256


@click.group("inspect")
def main() -> None:
    """Show what happens inside a model."""


@main.command("attention", cls=Command)
@options.model_option()
@text_options
@click.option("-o", "--output", "picture", metavar="FILE.png", help="Plot a map of each layer.")
@output_option("--format")
@options.context_options()
@options.compute_options
def attention(**flags: Any) -> None:
    """How much of its attention each layer gives to the first 1, 2, 4 and 8 tokens of a text, and a map of each layer.

    That share is why these tokens stay in the cache. It is a mean over all heads, and over the tokens of the text's
    second half. Only the first 256 tokens are read, unless --max-tokens says otherwise, all at once: -c, -b, -ub and
    --keep have no effect.
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
