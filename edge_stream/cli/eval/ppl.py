"""`edge-stream eval ppl`: perplexity along a text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_stream.cli.llama_flags import Command
from edge_stream.cli.measuring import (
    KeepingDone,
    chunk_option,
    emit,
    engine_options,
    mode_option,
    output_option,
    read_tokens,
    text_options,
    untimed_option,
)
from edge_stream.cli.meter import Meter
from edge_stream.errors import EdgeStreamError
from edge_stream.output.files import check_writable, replace_file

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edge_stream.measure.ppl import Reading

N_SEGMENTS = 10


@click.command("ppl", cls=Command)
@mode_option()
@text_options
@chunk_option
@click.option("--segment", type=click.IntRange(min=0), default=0, help="Tokens per segment. 0: a tenth of the text.")
@click.option(
    "--recompute-every",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="K",
    help="In mode recompute, past the cache, score only every K-th token.",
)
@click.option(
    "--score-every",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="K",
    help="In the other modes, past the cache, score only every K-th block of 256 tokens and just read the rest.",
)
@click.option(
    "--fresh-tail",
    type=click.IntRange(min=0),
    default=0,
    metavar="N",
    help="Also read the last N tokens in a new stream that begins one cache before them, and compare.",
)
@untimed_option
@click.option("--beyond-training", is_flag=True, help="Let mode dense continue past the training length.")
@click.option("--save-nll", metavar="OUT.npy", help="Save NLLs; item i is that of token i + 1.")
@click.option("--plot", metavar="FILE", help="Plot perplexity and memory along the stream.")
@output_option("-o", "--output")
@engine_options
def main(**flags: Any) -> None:
    """Perplexity along a text, token by token: overall, after the cache filled, and per segment.

    NLL in nats, computed in float64. Each mode runs in its own process, whose memory is shown.
    With several modes --save-nll writes OUT.MODE.npy for each.
    """
    from edge_stream.measure import plots, ppl

    plots.check_plot(flags["plot"])
    outputs = _nll_files(flags["save_nll"], flags["modes"])
    tokens = read_tokens(flags)
    if flags["fresh_tail"] and flags["fresh_tail"] + flags["n_ctx"] >= len(tokens):
        raise EdgeStreamError(f"--fresh-tail {flags['fresh_tail']}: {len(tokens)} tokens are too few for that")
    readings: list[Reading] = []
    rows: list[dict[str, Any]] = []
    with KeepingDone(rows) as keeping, Meter() as meter:
        for mode in flags["modes"]:
            reading, row = _measure(mode, tokens, flags, outputs.get(mode), meter)
            readings.append(reading)
            rows.append(row)
    if len({reading.every for reading in readings}) > 1:
        at_samples = ppl.at_samples(readings)
        for row in rows:
            row["ppl_at_samples"] = at_samples.get(row["mode"])
    if flags["output"] == "md":
        _print(rows)
    else:
        emit(rows, list(rows[0]), flags["output"])
    if flags["plot"]:
        plots.perplexity(readings, flags["plot"])
    keeping.finish()


def _measure(
    mode: str, tokens: list[int], flags: dict[str, Any], output: Path | None, meter: Meter
) -> tuple[Reading, dict[str, Any]]:
    """Read the text in one mode: the reading, whose NLL is saved to output, and its row."""
    from edge_stream.measure import ppl

    shared = {"chunk": flags["chunk"], "settings": flags["settings"], "progress": meter.show}
    reading = ppl.read(
        flags["model"],
        mode,
        tokens,
        n_ctx=flags["n_ctx"],
        n_keep=flags["n_keep"],
        beyond_training=flags["beyond_training"],
        every=flags["recompute_every"],
        block_every=flags["score_every"],
        tail=flags["fresh_tail"],
        **shared,
    )
    if output:
        _save(output, reading.nll)
    # the same segments for all modes, one that ends early included
    row = {**reading.report(flags["segment"] or -(-(len(tokens) - 1) // N_SEGMENTS)), "chunk": flags["chunk"]}
    if flags["untimed"]:
        del row["tok_per_s"]
    if reading.stopped:
        meter.note(f"mode {mode} ended at {reading.stopped}")
    if flags["fresh_tail"]:
        row["fresh_tail"] = ppl.fresh_tail(flags["model"], tokens, flags["fresh_tail"], reading, **shared)
    return reading, row


def _print(rows: list[dict[str, Any]]) -> None:
    """Tables: a row per mode, a row per segment, and the comparison of --fresh-tail."""
    from edge_stream.measure.table import markdown

    click.echo(markdown(rows, [n for n in rows[0] if n not in ("stopped", "chunk", "segments", "fresh_tail")]))
    for row in rows:
        if row["stopped"]:
            click.echo(f"\nMode {row['mode']} ended at {row['stopped']}.")
    longest: list[dict[str, Any]] = max((row["segments"] for row in rows), key=len)
    lines: list[dict[str, Any]] = []
    for i, segment in enumerate(longest):
        line: dict[str, Any] = {"tokens": f"{segment['start']:,}..{segment['end'] - 1:,}"}
        for unit, name in (("ppl", "ppl"), ("MiB", "rss_mib")):
            for row in rows:
                line[f"{row['mode']} {unit}"] = row["segments"][i][name] if i < len(row["segments"]) else None
        lines.append(line)
    click.echo("\nPerplexity and memory along the stream:\n")
    click.echo(markdown(lines, list(lines[0])))
    tails = [{"mode": row["mode"], **row["fresh_tail"]} for row in rows if "fresh_tail" in row]
    if tails:
        click.echo("\nThe last tokens, beside a stream that began one cache before them:\n")
        click.echo(markdown(tails, list(tails[0])))


def _nll_files(name: str | None, modes: Sequence[str]) -> dict[str, Path]:
    """The file of each mode's NLL; {} without --save-nll. Raises EdgeStreamError if it cannot be written."""
    if not name:
        return {}
    path = Path(name if name.endswith(".npy") else f"{name}.npy")
    check_writable(path)
    if len(modes) == 1:
        return {modes[0]: path}
    return {mode: path.with_name(f"{path.stem}.{mode}.npy") for mode in modes}


def _save(path: Path, nll: NDArray[np.float64]) -> None:
    import numpy as np

    replace_file(path, lambda name: np.save(name, nll))
