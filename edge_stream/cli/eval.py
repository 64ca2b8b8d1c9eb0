"""`edge-stream eval`: what a stream is worth, against the methods one would use otherwise."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_stream.cli import options
from edge_stream.cli.bench import MODES
from edge_stream.cli.console import check_writable, read_text
from edge_stream.cli.lists import ChoiceList, IntList
from edge_stream.cli.meter import Meter
from edge_stream.errors import EdgeStreamError

if TYPE_CHECKING:
    from edge_stream.engine import Engine

F = Callable[..., Any]
N_SEGMENTS = 10


@click.group("eval")
def main() -> None:
    """Measure perplexity and recall along a stream, per mode, or stream for hours and watch."""


def _engine_flags(function: F) -> F:
    """The engine's flags, as the other commands have them."""
    parts: list[Callable[[F], F]] = [options.model_option(), options.context_options(), options.compute_options()]
    return options.compose(parts)(function)


def _mode_option(default: str = "stream", choices: Sequence[str] = MODES) -> Callable[[F], F]:
    return click.option(
        "--mode",
        "modes",
        type=ChoiceList(choices),
        default=default,
        show_default=True,
        help=f"Any of {', '.join(choices)}.",
    )


def text_options(function: F) -> F:
    """The flags of the text to read."""
    parts: list[Callable[[F], F]] = [
        click.option("-f", "--file", "text_file", metavar="FILE", help="The text; - is stdin. Default: Python's help."),
        click.option("--tokens", "ids_file", metavar="FILE.npy", help="Token ids instead of a text, as they are."),
        click.option("--max-tokens", type=click.IntRange(min=0), default=0, metavar="N", help="Read the first N only."),
    ]
    return options.compose(parts)(function)


_untimed = click.option("--untimed", is_flag=True, help="Leave the speed out: for runs that share the machine.")


def output_option(*names: str) -> Callable[[F], F]:
    """The format of the table."""
    kinds = click.Choice(["md", "csv", "json", "jsonl"])
    return click.option(*names, "output", type=kinds, default="md", show_default=True, help="Format.")


def engine_settings(flags: dict[str, Any]) -> dict[str, Any]:
    """The further arguments of Engine.load."""
    settings = {name: flags[name] for name in options._ENGINE}
    for name in ("n_threads", "n_threads_batch"):
        settings[name] = flags[name] if flags[name] > 0 else None
    return settings


def _prepare(flags: dict[str, Any], ask: Callable[[Engine], Any]) -> Any:
    """Resolve the model's name and -c 0, and ask the loaded model (its tokenizer) something; it is closed again."""
    from edge_stream import models
    from edge_stream.engine import Engine

    if flags["n_keep"] < 0:
        raise click.UsageError("--keep -1 (the whole prompt) means nothing here: give a number.")
    flags["model"] = str(models.resolve(str(flags["model"])))
    if flags["n_ctx"] and flags["n_keep"] >= flags["n_ctx"]:
        raise EdgeStreamError(f"n_keep = {flags['n_keep']} must be less than n_ctx = {flags['n_ctx']}")
    settings = engine_settings(flags) | {"n_slide": 0}
    with Engine.load(flags["model"], n_ctx=64, **settings) as engine:
        if flags["n_ctx"] == 0:
            flags["n_ctx"] = engine.n_ctx_train
            click.echo(f"ctx-size 0: using the model's training length, {engine.n_ctx_train} tokens", err=True)
        return ask(engine)


def tokens_of(flags: dict[str, Any]) -> list[int]:
    """What -f, --tokens and --max-tokens ask for."""
    from edge_stream.measure.corpus import help_topics, read_tokens

    if flags["text_file"] and flags["ids_file"]:
        raise click.UsageError("Give only one of -f FILE and --tokens FILE.npy.")
    text = None
    if not flags["ids_file"]:
        text = read_text(Path(flags["text_file"])) if flags["text_file"] else help_topics()
    most = flags["max_tokens"]
    tokens: list[int] = _prepare(flags, lambda engine: read_tokens(engine, text, flags["ids_file"], most))
    if len(tokens) < most:
        click.echo(f"the text ends after {len(tokens)} tokens", err=True)
    return tokens


def emit(rows: list[dict[str, Any]], columns: list[str], output: str) -> None:
    """Print rows; JSON of a single row is an object, of several a list."""
    from edge_stream.measure.table import as_csv, as_json, markdown

    if output == "md":
        click.echo(markdown(rows, columns))
    elif output == "csv":
        click.echo(as_csv(rows))
    elif output == "json":
        click.echo(as_json(rows[0] if len(rows) == 1 else rows))
    else:
        for row in rows:
            click.echo(as_json(row, line=True))


@main.command("ppl")
@_mode_option()
@text_options
@click.option("--chunk", type=click.IntRange(min=1), default=1, show_default=True, help="Tokens per decode.")
@click.option("--segment", type=click.IntRange(min=0), default=0, help="Tokens per segment. 0: a tenth of the text.")
@click.option(
    "--recompute-every",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="K",
    help="In mode recompute, beyond the cache, score each K-th token only.",
)
@click.option(
    "--score-every",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="K",
    help="In the other modes, beyond the cache, score each K-th block of 256 tokens; the others are read only.",
)
@click.option(
    "--fresh-tail",
    type=click.IntRange(min=0),
    default=0,
    metavar="N",
    help="Read the last N tokens also in a new stream, which begins one cache before them, and compare.",
)
@_untimed
@click.option("--beyond-training", is_flag=True, help="Let dense go on after the length the model was trained on.")
@click.option("--save-nll", metavar="OUT.npy", help="Item i: NLL of token i+1 given the stream up to token i.")
@click.option("--plot", metavar="FILE", help="A picture: perplexity along the stream, all modes.")
@output_option("-o", "--output")
@_engine_flags  # fmt: skip
def ppl(**flags: Any) -> None:
    """Perplexity along a text, token by token: overall, after the cache filled, and per segment.

    NLL in nats, computed in float64. Every mode runs in a process of its own, whose memory is shown.
    With several modes --save-nll writes OUT.MODE.npy for each.
    """
    from edge_stream.measure import plots
    from edge_stream.measure import ppl as measure
    from edge_stream.measure.table import replace_file

    plots.check_plot(flags["plot"])
    outputs = _nll_files(flags["save_nll"], flags["modes"])
    tokens = tokens_of(flags)
    if flags["fresh_tail"] and flags["fresh_tail"] + flags["n_ctx"] >= len(tokens):
        raise EdgeStreamError(f"--fresh-tail {flags['fresh_tail']}: {len(tokens)} tokens are too few for that")
    readings, rows = [], []
    with Meter() as meter:
        for mode in flags["modes"]:
            reading = measure.read(
                flags["model"],
                mode,
                tokens,
                n_ctx=flags["n_ctx"],
                n_keep=flags["n_keep"],
                chunk=flags["chunk"],
                settings=engine_settings(flags),
                beyond_training=flags["beyond_training"],
                every=flags["recompute_every"],
                block_every=flags["score_every"],
                tail=flags["fresh_tail"],
                progress=meter.show,
            )
            readings.append(reading)
            # the same segments for every mode, one that ends early included
            row = {**reading.report(flags["segment"] or -(-(len(tokens) - 1) // N_SEGMENTS)), "chunk": flags["chunk"]}
            if flags["untimed"]:
                del row["tok_per_s"]
            rows.append(row)
            if reading.stopped:
                meter.note(f"mode {mode} ended at {reading.stopped}")
            if mode in outputs:
                import numpy as np

                with_suffix, nll = outputs[mode], reading.nll
                replace_file(with_suffix, lambda name, nll=nll: np.save(name, nll))  # type: ignore[misc]
            if flags["fresh_tail"]:
                row["fresh_tail"] = measure.fresh_tail(
                    flags["model"],
                    tokens,
                    flags["fresh_tail"],
                    reading,
                    chunk=flags["chunk"],
                    settings=engine_settings(flags),
                    progress=meter.show,
                )
    if len({reading.every for reading in readings}) > 1:
        there = measure.at_samples(readings)
        for row in rows:
            row["ppl_at_samples"] = there.get(row["mode"])
    if flags["output"] == "md":
        _print_ppl(rows)
    else:
        emit(rows, list(rows[0]), flags["output"])
    if flags["plot"]:
        plots.perplexity(readings, flags["plot"])


def _print_ppl(rows: list[dict[str, Any]]) -> None:
    """Tables: one row per mode; one row per segment; and the comparison of --fresh-tail."""
    from edge_stream.measure.table import markdown

    click.echo(markdown(rows, [n for n in rows[0] if n not in ("stopped", "chunk", "segments", "fresh_tail")]))
    for row in rows:
        if row["stopped"]:
            click.echo(f"\nMode {row['mode']} ended at {row['stopped']}.")
    longest = max((row["segments"] for row in rows), key=len)
    parts: list[dict[str, Any]] = []
    for i, segment in enumerate(longest):
        part: dict[str, Any] = {"tokens": f"{segment['start']:,}..{segment['end'] - 1:,}"}
        for row in rows:
            mine = row["segments"][i] if i < len(row["segments"]) else {}
            part[f"{row['mode']} ppl"] = mine.get("ppl")
            part[f"{row['mode']} MiB"] = mine.get("rss_mib")
        parts.append(part)
    kinds = [name for name in parts[0] if name.endswith(" ppl")] + [n for n in parts[0] if n.endswith(" MiB")]
    click.echo("\nPerplexity and memory along the stream:\n")
    click.echo(markdown(parts, ["tokens", *kinds]))
    tails = [{"mode": row["mode"], **row["fresh_tail"]} for row in rows if "fresh_tail" in row]
    if tails:
        click.echo("\nThe last tokens, beside a stream that began one cache before them:\n")
        click.echo(markdown(tails, list(tails[0])))


def _nll_files(name: str | None, modes: Sequence[str]) -> dict[str, Path]:
    if not name:
        return {}
    path = Path(name if name.endswith(".npy") else f"{name}.npy")
    check_writable(path)
    if len(modes) == 1:
        return {modes[0]: path}
    return {mode: path.with_name(f"{path.stem}.{mode}.npy") for mode in modes}


@main.command("sinks")
@click.option("--sinks", type=IntList(), default="0,1,2,4,8", show_default=True, help="Numbers of sinks to try.")
@text_options
@click.option("--chunk", type=click.IntRange(min=1), default=1, show_default=True, help="Tokens per decode.")
@_untimed
@output_option("-o", "--output")
@_engine_flags
def sinks(**flags: Any) -> None:
    """Perplexity with 0, 1, 2, 4 and 8 sinks, and which number to use. --keep is not used."""
    from edge_stream.measure import sinks as measure

    tokens = tokens_of(flags)
    with Meter() as meter:
        rows = measure.table(
            flags["model"], tokens, flags["sinks"], flags["n_ctx"], flags["chunk"], engine_settings(flags), meter.show
        )
    best = measure.recommend(rows)
    if flags["output"] != "md":
        rows = [{**row, "recommended": row["n_keep"] == best} for row in rows]
    hidden = ["mode", "segments", "stopped", "n_scored", *(["tok_per_s"] if flags["untimed"] else [])]
    emit(rows, [name for name in rows[0] if name not in hidden], flags["output"])
    if flags["output"] == "md":
        click.echo(f"\nuse --keep {best}: the smallest number within 1% of the best perplexity after the cache filled")


@main.command("streameval")
@_mode_option("stream,window,shift")
@click.option(
    "--format",
    "fact_format",
    type=click.Choice(["words", "paper"]),
    default="words",
    show_default=True,
    help="words: facts among prose; paper: every line `line N: REGISTER_CONTENT is <M>`.",
)
@click.option("--distances", type=IntList(1), help="Lines between fact and question. Default: by -c.")
@click.option("--questions", type=click.IntRange(min=1), default=20, show_default=True, help="Per distance.")
@click.option("--interval", type=click.IntRange(min=1), default=10, show_default=True, help="Lines per question.")
@click.option("-s", "--seed", type=int, default=0, show_default=True, help="Of the facts.")
@click.option("--plot", metavar="FILE", help="A picture: accuracy against distance.")
@output_option("-o", "--output")
@_engine_flags  # fmt: skip
def streameval(**flags: Any) -> None:
    """Facts stream by, and every few lines one some lines back is asked for: accuracy against distance."""
    from edge_stream.measure import plots
    from edge_stream.measure import streameval as measure

    plots.check_plot(flags["plot"])
    plan = _prepare(flags, lambda engine: measure.plan(
        engine, flags["fact_format"], flags["distances"] or [], flags["questions"], flags["interval"], flags["n_ctx"],
        flags["seed"]))  # fmt: skip
    rows: list[dict[str, Any]] = []
    with Meter() as meter:
        for mode in flags["modes"]:
            rows += measure.run(
                flags["model"],
                mode,
                plan,
                flags["n_ctx"],
                flags["n_keep"],
                engine_settings(flags),
                meter.show,
                meter.note,
            )
    if not rows:
        raise EdgeStreamError("no question was asked")
    emit(rows, list(rows[0]), flags["output"])
    if flags["plot"]:
        plots.distance(rows, flags["n_ctx"], flags["plot"])


@main.command("qa-stream")
@_mode_option("stream", (*MODES, "one-shot"))
@click.option(
    "-f",
    "--file",
    "qa_file",
    metavar="FILE.jsonl",
    help='Lines {"question", "answer"}; a list of answers is fine. Default: a small set of ours.',
)
@click.option("--rounds", type=click.IntRange(min=1), default=1, show_default=True, help="Ask everything N times over.")
@click.option("--details", metavar="OUT.jsonl", help="Write every question with its answer.")
@output_option("-o", "--output")
@_engine_flags  # fmt: skip
def qa_stream(**flags: Any) -> None:
    """Questions joined into one endless stream: exact match. one-shot: every question to an empty cache."""
    from edge_stream.measure import qa as measure
    from edge_stream.measure.table import as_json, replace_file

    if flags["details"]:
        check_writable(Path(flags["details"]))
    items = measure.load(read_text(Path(flags["qa_file"])), flags["qa_file"]) if flags["qa_file"] else measure.small()
    _prepare(flags, lambda engine: None)
    rows, details = [], []
    with Meter() as meter:
        for mode in flags["modes"]:
            row, answers = measure.run(
                flags["model"],
                mode,
                items * flags["rounds"],
                flags["n_ctx"],
                flags["n_keep"],
                engine_settings(flags),
                meter.show,
            )
            rows.append(row)
            details += answers
    emit(rows, list(rows[0]), flags["output"])
    if flags["details"]:
        lines = "".join(as_json(d, line=True) + "\n" for d in details)
        replace_file(flags["details"], lambda name: Path(name).write_text(lines, encoding="utf-8"))  # type: ignore[arg-type]


@main.command("soak")
@click.option("--log", "log_file", required=True, metavar="FILE.jsonl", help="One line per interval, as it goes.")
@click.option("--session", "session_file", metavar="FILE", help="The stream, to resume from. Default: LOG.session.")
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
    help="Tokens per interval; each reads the same text.",
)
@click.option("--chunk", type=click.IntRange(min=1), default=1, show_default=True, help="Tokens per decode.")
@text_options
@_engine_flags  # fmt: skip
def soak(**flags: Any) -> None:
    """Stream for hours; fail (exit 1) if memory, latency or NLL trend upwards. Ctrl-C stops, the same command resumes.

    The test: a seasonal Kendall test over the intervals of each process, one-sided, p < 0.01, and a Theil-Sen slope
    over the run of more than 1% (memory: also more than 1 MiB; latency 5%).
    """
    from edge_stream.cli.console import Interrupt
    from edge_stream.measure import soak as measure

    log = Path(flags["log_file"])
    check_writable(log)
    if not flags["hours"] and not flags["intervals"]:
        click.echo("no --hours and no --intervals: until Ctrl-C", err=True)
    tokens = tokens_of(flags)
    interrupt = Interrupt()
    plan = measure.Plan(
        model=flags["model"],
        tokens=tokens,
        n_ctx=flags["n_ctx"],
        n_keep=flags["n_keep"],
        settings=engine_settings(flags),
        log=log,
        session=Path(flags["session_file"] or f"{log}.session"),
        interval=flags["interval"],
        chunk=flags["chunk"],
        n_intervals=flags["intervals"],
        hours=flags["hours"],
    )
    with interrupt.watch(), Meter() as meter:
        records = measure.run(plan, meter.show, meter.note, interrupt.is_pending)
    verdict = measure.verdict(records)
    click.echo(json.dumps(verdict, indent=2))
    if interrupt.is_pending():
        click.echo(f"stopped; the same command resumes at {records[-1]['n_past'] if records else 0} tokens", err=True)
        raise KeyboardInterrupt
    rising = [name for name, trend in verdict["trends"].items() if trend["rises"]]
    if rising:
        raise EdgeStreamError(f"{' and '.join(rising)} trend{'s' if len(rising) == 1 else ''} upwards")
