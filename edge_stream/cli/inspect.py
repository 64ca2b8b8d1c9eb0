"""`edge-stream inspect`: look inside a model."""

from __future__ import annotations

from typing import Any

import click

from edge_stream.cli import options
from edge_stream.cli.eval import emit, engine_settings, output_option, text_options, tokens_of
from edge_stream.errors import EdgeStreamError

N_TOKENS = 256


@click.group("inspect")
def main() -> None:
    """Look inside: where the attention goes."""


@main.command("attention")
@options.model_option()
@text_options
@click.option("-o", "--output", "picture", metavar="FILE.png", help="A picture: one map per layer.")
@output_option("--format")
@options.context_options()
@options.compute_options()
def attention(**flags: Any) -> None:
    """The attention that the first 1, 2, 4 and 8 tokens draw, layer by layer, and a map of each layer.

    Mean over heads; the shares are means over the queries of the text's second half. The text is read at once into a
    cache of its size, its first 256 tokens unless --max-tokens says otherwise: -c, -b, -ub and --keep have no effect.
    """
    from edge_stream.measure import attention as measure
    from edge_stream.measure import plots

    if flags["flash_attn"] == "on":
        raise EdgeStreamError("flash attention never holds the attention weights: leave -fa on away")
    plots.check_plot(flags["picture"])
    if not flags["max_tokens"]:
        flags["max_tokens"] = N_TOKENS
    flags |= {"n_ctx": N_TOKENS, "n_keep": 0}
    tokens = tokens_of(flags)
    found = measure.maps(flags["model"], tokens, engine_settings(flags))
    rows = measure.mass(found)
    emit(rows, list(rows[0]), flags["output"])
    if flags["picture"]:
        plots.attention(found, flags["picture"])
