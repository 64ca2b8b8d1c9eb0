"""`edge-stream recall`: look into a log that `chat --recall` keeps."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from edge_stream.recall import Hit, Log


@click.group("recall")
def main() -> None:
    """Search the log of a conversation, or delete what was said in it."""


_log = click.argument("log_file", metavar="LOG", type=click.Path(exists=True, dir_okay=False, path_type=Path))


@main.command("search")
@_log
@click.argument("text")
@click.option("-n", "n_hits", type=click.IntRange(1, 1000), default=8, show_default=True, help="Lines to show.")
@click.option("-o", "--output", type=click.Choice(["md", "csv", "json", "jsonl"]), default="md", show_default=True)
def search(log_file: Path, text: str, n_hits: int, output: str) -> None:
    """Show the lines of LOG that match TEXT best. `belongs`: a message of this text might be read with it."""
    from edge_stream.measure.table import render

    with Log(log_file, 1 << 30) as log:
        rows = [_row(hit) for hit in log.search(text, n_hits)]
    if rows or output.startswith("json"):
        click.echo(render(rows, output))
    else:
        click.echo("nothing matches", err=True)


@main.command("forget")
@_log
@click.argument("message", type=click.IntRange(min=0))
def forget(log_file: Path, message: int) -> None:
    """Delete message number MESSAGE from LOG."""
    with Log(log_file, 1 << 30) as log:
        log.forget(message)


def _row(hit: Hit) -> dict[str, Any]:
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(hit.when)) if hit.when else ""
    return {
        "message": hit.turn,
        "role": hit.role,
        "when": when,
        "score": round(hit.score, 3),
        "coverage": round(hit.coverage, 3),
        "belongs": "yes" if hit.belongs else "no",
        "text": hit.text,
    }
