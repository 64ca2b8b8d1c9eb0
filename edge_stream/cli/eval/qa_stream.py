"""`edge-stream eval qa-stream`: question answering in one long stream."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edge_stream.backends import MODES
from edge_stream.cli.console import read_text
from edge_stream.cli.llama_flags import Command
from edge_stream.cli.measuring import KeepingDone, emit, engine_options, mode_option, output_option, prepare
from edge_stream.cli.meter import Meter
from edge_stream.output.files import check_writable, replace_text


@click.command("qa-stream", cls=Command)
@mode_option("stream", (*MODES, "one-shot"))
@click.option(
    "-f",
    "--file",
    "qa_file",
    metavar="FILE.jsonl",
    help='Lines of {"question", "answer"}, where answer may be a list. Default: a small built-in set.',
)
@click.option("--rounds", type=click.IntRange(min=1), default=1, show_default=True, help="Ask every question N times.")
@click.option("--details", metavar="OUT.jsonl", help="Write each question with the model's answer.")
@output_option("-o", "--output")
@engine_options
def main(**flags: Any) -> None:
    """Ask many questions one after the other in one long stream, and count the answers that are exactly right.

    Mode one-shot asks each question on its own, with an empty cache, for comparison.
    """
    from edge_stream.measure import qa
    from edge_stream.measure.table import as_json

    if flags["details"]:
        check_writable(Path(flags["details"]), streams=True)
    items = qa.parse(read_text(Path(flags["qa_file"])), flags["qa_file"]) if flags["qa_file"] else qa.builtin()
    prepare(flags)
    rows: list[dict[str, Any]] = []
    details: list[dict[str, Any]] = []
    with KeepingDone(rows) as keeping, Meter() as meter:
        for mode in flags["modes"]:
            row, answers = qa.run(
                flags["model"],
                mode,
                items * flags["rounds"],
                flags["n_ctx"],
                flags["n_keep"],
                flags["settings"],
                meter.show,
            )
            rows.append(row)
            details += answers
    emit(rows, list(rows[0]), flags["output"])
    if flags["details"]:
        lines = "".join(as_json(d, line=True) + "\n" for d in details)
        replace_text(flags["details"], lines)
    keeping.finish()
