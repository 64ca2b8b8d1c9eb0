"""`edge-stream run`: complete a prompt of any length."""

from __future__ import annotations

import json
import math
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_stream.cli import options, prompts, sampling
from edge_stream.cli.console import LONG_PROMPT, Interrupt, Stopped, speeds
from edge_stream.cli.llama_flags import Command
from edge_stream.cli.meter import Meter
from edge_stream.errors import EdgeStreamError
from edge_stream.measure.metrics import Latencies, MemoryWatch, is_full, resident_mib
from edge_stream.output.files import check_writable, replace_text
from edge_stream.recall import Hit, Log

if TYPE_CHECKING:
    from edge_stream.engine import Engine
    from edge_stream.stream import Stream


@click.command("run", cls=Command)
@options.model_option()
@prompts.prompt_options
@click.argument("dash", metavar="[-]", required=False, type=click.Choice(["-"]))
@sampling.predict_option()
@options.option(
    "--echo/--no-display-prompt",
    "--display-prompt",
    "echo",
    default=False,
    show_default=False,
    help="Print the prompt first.",
)
@options.rare("-sp", "--special", is_flag=True)
@options.rare("-no-cnv", "--no-conversation", "-st", "--single-turn", is_flag=True, expose_value=False)
@options.rare("-co", "--color", expose_value=False)  # the output is the text and nothing else
@sampling.loop_guard_option(False)
@options.recall_option(
    "Read the prompt's last line with the line of it that belongs to it and has left the window, of at most N tokens "
    "(try 64). 0: never."
)
@click.option("--stats", "stats_file", metavar="FILE", type=click.Path(), help="Write measurements as JSON.")
@click.option("--save", "save_file", metavar="FILE", type=click.Path(), help="Save the stream at the end.")
@click.option("--load", "load_file", metavar="FILE", type=click.Path(), help="Continue a saved stream.")
@options.context_options()
@options.draft_options
@sampling.sampling_options
@options.compute_options
def main(**flags: Any) -> None:
    """Complete a prompt of any length (-p TEXT, -f FILE, or - for stdin).

    Stops after -n tokens or when the model ends its text; with --ignore-eos and -n -1 only Ctrl-C stops it.
    """
    prompt = _prompt(flags)
    if flags["stats_file"]:
        check_writable(Path(flags["stats_file"]), streams=True)
    if flags["save_file"]:
        check_writable(Path(flags["save_file"]))
    sampler = sampling.make_sampling(flags)
    interrupt = Interrupt()
    pinned = (lambda engine: _count(engine, prompt)) if flags["n_keep"] < 0 else None
    with options.load_engine(flags, pinned) as engine, closing(_open_stream(engine, flags, prompt)) as stream:
        stats = _Stats(stream)
        if flags["echo"]:
            click.echo(prompt, nl=False)
        try:
            with interrupt.watch():
                _read(stream, prompt, stats, interrupt, flags["n_recall"])
                if not interrupt.is_pending():
                    generating = stream.generate(
                        flags["n_predict"],
                        sampling=sampler,
                        stop=flags["stop"],
                        ignore_eos=flags["ignore_eos"],
                        special=flags["special"],
                        loop_guard=flags["loop_guard"],
                    )
                    with closing(generating) as tokens:  # type: ignore[type-var]
                        for token in tokens:
                            stats.token()
                            click.echo(token.text, nl=False)
                            sys.stdout.flush()
                            if interrupt.is_pending():
                                break
        finally:
            if flags["stats_file"]:
                replace_text(flags["stats_file"], json.dumps(stats.report(), indent=2, allow_nan=False) + "\n")
        if sys.stdout.isatty():
            click.echo()
        if flags["show_timings"]:
            report = stats.report()
            click.echo(speeds(report["prompt_tok_per_s"] or 0, report["tok_per_s"] or 0), err=True)
        if flags["save_file"]:
            stream.save(flags["save_file"])
    if interrupt.is_pending():
        raise KeyboardInterrupt


def _prompt(flags: dict[str, Any]) -> str:
    """The prompt; "" with --load alone. Raises UsageError unless one source was given."""
    if flags["dash"]:
        if flags["prompt"] is not None or flags["prompt_file"] is not None:
            raise click.UsageError("Give only one of -p TEXT, -f FILE and -.")
        flags["prompt_file"] = "-"
    prompt = prompts.given_prompt(flags)
    if prompt is None and not flags["load_file"]:
        raise click.UsageError("No prompt: give -p TEXT, -f FILE, or - to read it from stdin.")
    prompt = prompt or ""
    if not prompt and not flags["load_file"]:
        raise EdgeStreamError("the prompt is empty: give at least one character")
    return prompt


def _open_stream(engine: Engine, flags: dict[str, Any], prompt: str) -> Stream:
    if flags["load_file"]:
        stream = engine.restore(flags["load_file"])
        options.note_kept_sizes(flags, stream)
        return stream
    if flags["n_keep"] >= 0:
        return engine.stream(n_keep=flags["n_keep"])
    whole = _count(engine, prompt)
    if whole > engine.n_ctx * 3 // 4:
        raise EdgeStreamError(
            f"--keep -1 would pin {whole} tokens, more than three quarters of the cache "
            f"({engine.n_ctx} tokens): shorten the prompt or raise --ctx-size"
        )
    return engine.stream(n_keep=whole)


def _count(engine: Engine, prompt: str) -> int:
    return len(engine.tokenize(prompt, add_bos=engine.add_bos))


def _read(stream: Stream, prompt: str, stats: _Stats, interrupt: Interrupt, n_recall: int) -> None:
    """Feed the prompt; without one, a loaded stream continues where it was.

    n_recall: tokens of a line of the prompt that may be read again before its last line, which is then said.
    """
    if not prompt:
        if stream.logits is None:
            raise EdgeStreamError("the saved stream is empty and no prompt was given")
        return
    start, before = time.monotonic(), stream.stats.n_past
    with Meter(min_total=LONG_PROMPT) as meter:
        on_progress = interrupt.reading(meter)

        def watched(done: int, total: int) -> None:
            stats.memory.sample(is_full(stream))
            on_progress(done, total)

        try:
            body, question = _last_line(prompt) if n_recall else ("", prompt)
            if body:
                with Log() as log:
                    stream.use_log(log, n_recall)
                    stream.feed(body, on_progress=watched)
                    hit = stream.search(question)
                    stream.use_log(None)
                if hit:
                    click.echo(f"(recalled: line {hit.turn + 1}: {hit.text})", err=True)
                    question = _recalled(stream, hit) + question
            stream.feed(question, on_progress=watched)
        except Stopped:
            pass  # the caller sees that interrupt is pending
    stats.read(stream.stats.n_past - before, time.monotonic() - start)


def _recalled(stream: Stream, hit: Hit) -> str:
    """Recall a line; returns what must be read of it, where it cannot be held between sinks and window."""
    tokens = stream.backend.vocabulary.tokenize(hit.block)
    if len(tokens) > stream.stats.n_recall_max:
        return f"{hit.text}\n"
    stream.recall(tokens)
    return ""


def _last_line(prompt: str) -> tuple[str, str]:
    """What comes before a prompt's last line that is not empty, and the rest."""
    at = prompt.rstrip().rfind("\n") + 1
    return prompt[:at], prompt[at:]


class _Stats:
    """The measurements that --stats writes."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._latencies = Latencies()
        self._last = time.perf_counter()
        self._prompt_tokens, self._prompt_s = 0, 0.0
        self.memory = MemoryWatch()

    def read(self, n_tokens: int, seconds: float) -> None:
        """Note that the prompt was read."""
        self._prompt_tokens, self._prompt_s = n_tokens, seconds
        self._last = time.perf_counter()

    def token(self) -> None:
        """Note a generated token."""
        now = time.perf_counter()
        self._latencies.add(1000 * (now - self._last))
        self._last = now
        if not self.memory.filled:
            self.memory.sample(is_full(self._stream))

    def report(self) -> dict[str, Any]:
        """The content of the --stats file."""
        stats, times = self._stream.stats, self._latencies
        self.memory.sample(is_full(self._stream))
        return {
            "tokens_seen": stats.n_past,
            "n_ctx": stats.n_ctx,
            "n_keep": stats.n_keep,
            "slides": stats.n_slides,
            "rebases": stats.n_rebases,
            "rss_start_mib": _rounded(self.memory.start),
            "rss_end_mib": _rounded(resident_mib()),
            "tok_per_s": _rounded(times.per_second),
            "p50_ms": _rounded(times.percentile(50)),
            "p99_ms": _rounded(times.percentile(99)),
            "max_ms": _rounded(times.max_ms),
            "sink_move": stats.sink_move,
            "tokens_generated": times.count,
            "prompt_tokens": self._prompt_tokens,
            "prompt_tok_per_s": _rounded(self._prompt_tokens / self._prompt_s if self._prompt_s else 0.0),
            "drafted": stats.n_drafted,
            "accepted": stats.n_accepted,
            "slide_ms": _rounded(stats.t_slide_us / 1000),
        }


def _rounded(value: float | None) -> float | None:
    """For JSON, which has no nan: what was not measured is null."""
    return None if value is None or math.isnan(value) else round(value, 3)
