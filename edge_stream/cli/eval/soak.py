"""`edge-stream eval soak`: stream for hours and test for trends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from edge_stream.cli.console import Interrupt
from edge_stream.cli.llama_flags import Command
from edge_stream.cli.measuring import chunk_option, engine_options, read_tokens, text_options
from edge_stream.cli.meter import Meter
from edge_stream.errors import EdgeStreamError
from edge_stream.output.files import check_writable


@click.command("soak", cls=Command)
@click.option("--log", "log_file", required=True, metavar="FILE.jsonl", help="Append a line per interval to FILE.")
@click.option("--session", "session_file", metavar="FILE", help="The saved stream to resume. Default: LOG.session.")
@click.option(
    "--hours", type=click.FloatRange(min=0), default=0.0, metavar="H", help="Stop after H hours. 0: no limit."
)
@click.option(
    "--intervals", type=click.IntRange(min=0), default=0, metavar="N", help="Stop after N in all. 0: no limit."
)
@click.option(
    "--interval",
    type=click.IntRange(min=16),
    default=4096,
    show_default=True,
    metavar="N",
    help="Tokens per interval; each interval reads the same text.",
)
@chunk_option
@text_options
@engine_options
def main(**flags: Any) -> None:
    """Read text for hours, and exit with 1 if memory, latency or prediction error (NLL) keep growing.

    Ctrl-C stops; the same command goes on from there. What counts as growing: a trend that chance would show in less
    than one of a hundred runs (a seasonal Kendall test over the intervals of each process), and a slope (Theil-Sen) of
    more than 1% over the run; for memory also more than 1 MiB, for latency 5%.
    """
    from edge_stream.measure import soak

    log = Path(flags["log_file"])
    session = Path(flags["session_file"] or f"{log}.session")
    for path in (log, session):
        check_writable(path)
    if not flags["hours"] and not flags["intervals"]:
        click.echo("no --hours and no --intervals: until Ctrl-C", err=True)
    tokens = read_tokens(flags)
    interrupt = Interrupt()
    plan = soak.Plan(
        model=flags["model"],
        tokens=tokens,
        n_ctx=flags["n_ctx"],
        n_keep=flags["n_keep"],
        settings=flags["settings"],
        log=log,
        session=session,
        interval=flags["interval"],
        chunk=flags["chunk"],
        n_intervals=flags["intervals"],
        hours=flags["hours"],
    )
    with interrupt.watch(), Meter() as meter:
        records = soak.run(plan, meter.show, meter.note, interrupt.is_pending)
    verdict = soak.verdict(records)
    click.echo(json.dumps(verdict, indent=2))
    if interrupt.is_pending():
        click.echo(f"stopped; the same command resumes at {records[-1]['n_past'] if records else 0} tokens", err=True)
        raise KeyboardInterrupt
    rising = [name for name, trend in verdict["trends"].items() if trend["rises"]]
    if rising:
        raise EdgeStreamError(f"{' and '.join(rising)} trend{'s' if len(rising) == 1 else ''} upwards")
