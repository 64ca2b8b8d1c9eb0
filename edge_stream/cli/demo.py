"""`edge-stream demo`: a stream several times longer than its cache."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any

import click

from edge_stream.cli import options
from edge_stream.cli.llama_flags import Command
from edge_stream.errors import EdgeStreamError
from edge_stream.measure.corpus import help_topics
from edge_stream.measure.metrics import Latencies, MemoryWatch, is_full, resident_mib

if TYPE_CHECKING:
    from edge_stream.engine import Engine
    from edge_stream.stream import Stream

# in cache lengths, and at most so many tokens, so that the demo takes less than two minutes on two slow cores
READ_LENGTHS, READ_MAX = 4, 6144
WRITE_LENGTHS, WRITE_MAX = 3, 2048
SCORE_LENGTHS, SCORE_MAX = 2, 1536
# tokens per decode while perplexity is measured: the cache slides each time
SCORE_CHUNK = 16


class Screen:
    """Shows what the demo does: in a rich panel if `live` has one, else in a line now and then."""

    def __init__(self, live: Any = None, err: bool = False) -> None:
        self._live, self._err = live, err
        self._text = ""
        self._next = time.monotonic() + 2

    def say(self, text: str) -> None:
        """Print a line that stays."""
        if self._live:
            self._live.console.print(text, highlight=False, markup=False)
        else:
            click.echo(text, err=self._err)

    def update(self, doing: str, text: str, stream: Stream, tok_per_s: float) -> None:
        """Show what is happening. text: what was written since the last call."""
        if self._live:
            self._text = (self._text + text)[-600:]
            self._live.update(_panel(doing, self._text, stream, tok_per_s))
        elif time.monotonic() >= self._next:
            self._next = time.monotonic() + 2
            self.say(f"  {doing}: {_status(stream, tok_per_s)}")


def _panel(doing: str, text: str, stream: Stream, tok_per_s: float) -> Any:
    from rich.console import Group
    from rich.panel import Panel
    from rich.progress_bar import ProgressBar
    from rich.text import Text

    bar = ProgressBar(total=stream.stats.n_ctx, completed=stream.stats.n_cached)
    return Panel(Group(Text(text, style="dim"), bar, Text(_status(stream, tok_per_s))), title=doing)


def _status(stream: Stream, tok_per_s: float) -> str:
    stats, memory = stream.stats, resident_mib()
    parts = [
        f"{stats.n_past:,} tokens seen",
        f"cache {stats.n_cached}/{stats.n_ctx}",
        f"{stats.n_slides:,} slides",
        f"{tok_per_s:.0f} tok/s",
        *([f"{memory:.0f} MiB"] if memory else []),
    ]
    return " | ".join(parts)


@click.command("demo", cls=Command)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout and nothing else.")
@options.model_option(required=False, default=options.DEMO_MODEL)
@options.context_options(512)
@options.compute_options
def main(**flags: Any) -> None:
    """Read and write several cache lengths of text at constant memory, then compare with and without sinks.

    In the JSON object, rss_start_mib is the memory when the cache was first full; the perplexities are those of one
    text, past the cache, in decodes of 16 tokens.
    """
    n_keep = options.SINKS_DEFAULT if flags["n_keep"] < 0 else flags["n_keep"]
    with options.load_engine(flags) as engine, _screen(flags["as_json"]) as screen:
        screen.say(
            f"model: {engine.desc}, cache: {engine.n_ctx} tokens of which {n_keep} are sinks ({engine.sink_move})"
        )
        tokens = _text_tokens(engine, min(READ_LENGTHS * engine.n_ctx, max(READ_MAX, 2 * engine.n_ctx)))
        result = _stream_on(engine, n_keep, tokens, screen)
        result |= _compare(engine, n_keep, tokens, screen)
    click.echo(json.dumps(result) if flags["as_json"] else "\n" + _summary(result))


@contextmanager
def _screen(as_json: bool) -> Iterator[Screen]:
    if as_json or not sys.stdout.isatty():
        yield Screen(err=as_json)
        return
    from rich.live import Live

    with Live(refresh_per_second=8, transient=True) as live:
        yield Screen(live)


def _text_tokens(engine: Engine, n: int) -> list[int]:
    """N tokens of the topics of Python's `help()`."""
    text = help_topics()
    # enough characters for n tokens: the whole text would take seconds to tokenize on a slow device
    tokens = engine.tokenize(text[: n * 12], add_bos=engine.add_bos)
    if len(tokens) < n:
        raise EdgeStreamError(f"the demo's text has {len(tokens):,} tokens, too few for this --ctx-size")
    return tokens[:n]


def _stream_on(engine: Engine, n_keep: int, tokens: list[int], screen: Screen) -> dict[str, Any]:
    """Read and write far past the cache: the numbers of the JSON object."""
    from edge_stream.sampling import Sampling

    memory, latencies = MemoryWatch(), Latencies()
    with closing(engine.stream(n_keep=n_keep)) as stream:
        screen.say(f"1. reading {len(tokens):,} tokens, {len(tokens) / engine.n_ctx:.1f} times the cache")
        start = time.monotonic()

        def on_progress(done: int, _total: int) -> None:
            memory.sample(is_full(stream))
            screen.update("reading", "", stream, done / max(time.monotonic() - start, 1e-9))

        stream.feed(tokens, on_progress=on_progress)
        read_s = time.monotonic() - start
        n_write = min(WRITE_LENGTHS * engine.n_ctx, WRITE_MAX)
        screen.say(f"2. writing {n_write:,} tokens, {n_write / engine.n_ctx:.1f} times the cache")
        last = time.perf_counter()
        # without a penalty a small model repeats itself; the fixed seed gives everyone the same text
        sampling = Sampling(seed=1, repeat_penalty=1.1)
        for token in stream.generate(n_write, sampling=sampling, ignore_eos=True):
            now = time.perf_counter()
            latencies.add(1000 * (now - last))
            last = now
            screen.update("writing", token.text, stream, token.tok_per_s)
        stats = stream.stats
        return {
            "tokens_seen": stats.n_past,
            "n_ctx": stats.n_ctx,
            "n_keep": stats.n_keep,
            "slides": stats.n_slides,
            "rss_start_mib": _round(memory.start),
            "rss_end_mib": _round(resident_mib()),
            "tok_per_s": _round(latencies.per_second),
            "read_tok_per_s": _round(len(tokens) / max(read_s, 1e-9)),
            "p50_ms": _round(latencies.percentile(50)),
            "p99_ms": _round(latencies.percentile(99)),
            "rebases": stats.n_rebases,
            "sink_move": stats.sink_move,
            "model": engine.desc,
        }


def _compare(engine: Engine, n_keep: int, tokens: list[int], screen: Screen) -> dict[str, Any]:
    """Perplexity of the same tokens past the cache, with and without sinks."""
    n_score = min(SCORE_LENGTHS * engine.n_ctx, SCORE_MAX, len(tokens) - engine.n_ctx)
    screen.say(f"3. predicting the {n_score:,} tokens after a full cache, with and without sinks")
    found = {}
    for name, keep in (("ppl_sinks", n_keep), ("ppl_no_sinks", 0)):
        with closing(engine.stream(n_keep=keep)) as stream:
            # a full cache: from here on every decode evicts tokens
            stream.feed(tokens[: engine.n_ctx])
            start, total = time.monotonic(), 0.0
            for at in range(engine.n_ctx, engine.n_ctx + n_score, SCORE_CHUNK * 8):
                part = tokens[at : min(at + SCORE_CHUNK * 8, engine.n_ctx + n_score)]
                total += float(stream.score(part, chunk=SCORE_CHUNK).sum())
                done = at + len(part) - engine.n_ctx
                screen.update(
                    "with sinks" if keep else "without sinks", "", stream, done / max(time.monotonic() - start, 1e-9)
                )
            found[name] = round(math.exp(total / n_score), 3)
    return {**found, "ppl_tokens": n_score, "ppl_chunk": SCORE_CHUNK}


def _round(value: float | None) -> float | None:
    return None if value is None else round(value, 2)


def _summary(result: dict[str, Any]) -> str:
    memory = "Memory could not be read on this system."
    if result["rss_start_mib"] is not None and result["rss_end_mib"] is not None:
        memory = (
            f"Memory went from {result['rss_start_mib']:.0f} MiB (cache just full) to {result['rss_end_mib']:.0f} MiB."
        )
    return f"""\
The model saw {result["tokens_seen"]:,} tokens through a cache of {result["n_ctx"]}.
The oldest tokens made room for new ones {result["slides"]:,} times.
{memory} It wrote {result["tok_per_s"]:.0f} tokens per second.
Perplexity (how many tokens the model hesitates between; lower is better) of {result["ppl_tokens"]:,} tokens
past the cache:
  with the first {result["n_keep"]} tokens kept as sinks   {result["ppl_sinks"]:10.1f}
  without them, window only          {result["ppl_no_sinks"]:10.1f}
Models rest their attention on the first tokens. A plain window loses them; a stream keeps them and works at
any length.
Next: edge-stream chat -m {options.DEMO_MODEL}"""
