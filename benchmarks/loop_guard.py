"""Greedy answers of the demo model under the loop guard: which end in a cycle, and how soon after the bound.

    python benchmarks/loop_guard.py [-n 200] [--max-tokens 800]

Sixteen answers are written at a time, in one batch.

Every answer is searched afterwards, by comparing the whole text with itself at every distance, for the token at which
an exact cycle first reached the bound; that is where the guard must have ended it. The legitimate texts of
tests/loop_texts.py are searched alike, for how close they come to the bound.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import numpy as np

from edge_stream import Engine, Sampling
from edge_stream.chat.core import ChatCore
from edge_stream.generation import Token, Writer
from edge_stream.loop_guard import LoopGuard
from edge_stream.measure.table import markdown

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from loop_texts import legitimate

MAX_PERIOD = 512
TOPICS = (
    "the sea", "a lighthouse", "bread", "an old map", "the moon", "a lost dog", "chess", "rain", "a train", "honey",
    "the desert", "a clock", "music", "winter", "a garden", "the number seven", "a bridge", "tea", "a dragon", "stars",
)  # fmt: skip
ASKS = (
    "Tell me a long story about {}.", "List a hundred facts about {}.", "Write a song about {} with a refrain.",
    "Write a Python program about {}.", "Make a table about {}.", "Explain {} to a child.",
    "Write a poem of twenty verses about {}.", "Repeat after me: {}, {}, {}.", "Write a diary about {}, day by day.",
    "Ask me questions about {}.",
)  # fmt: skip


def bound(period: int) -> int:
    """Tokens that a cycle must have, as edge_stream.h says."""
    return 384 + 4 * period


def cycles(tokens: list[int]) -> tuple[int | None, float]:
    """The index of the token at which a cycle first reaches the bound, and the largest part of a bound reached."""
    array, first, most = np.array(tokens), None, 0.0
    for period in range(1, min(MAX_PERIOD + 1, len(tokens))):
        # runs of tokens that equal the one a period before: between the places where they do not
        breaks = np.flatnonzero(np.concatenate(([True], array[period:] != array[:-period], [True])))
        lengths = np.diff(breaks) - 1
        n = int(lengths.max()) + period
        most = max(most, n / bound(period)) if n > period else most
        for start in breaks[:-1][lengths + period >= bound(period)]:
            at = int(start) + bound(period) - 1
            first = at if first is None else min(first, at)
    return first, most


def answers(engine: Engine, prompts: list[str], max_tokens: int) -> Iterator[list[Token]]:
    """The answers, as they end."""
    core = ChatCore(engine.backend.vocabulary)
    waiting, free = list(reversed(prompts)), list(range(engine.n_parallel))
    writing: dict[int, tuple[Writer, list[Token]]] = {}  # by sequence
    while waiting or writing:
        while waiting and free:
            seq_id = free.pop()
            request = core.request({"messages": [{"role": "user", "content": waiting.pop()}]})
            stream = engine.stream(seq_id=seq_id)
            stream.feed(engine.tokenize(request.prompt, add_bos=engine.add_bos, special=True))
            writing[seq_id] = (stream.writer(max_tokens, sampling=Sampling(temp=0), loop_guard=True), [])
        order = sorted(writing)
        engine.feed_each([writing[i][0].stream for i in order], [writing[i][0].choose() for i in order])
        for i in order:
            writer, tokens = writing[i]
            tokens.append(writer.record())
            if writer.finished:
                writer.stream.close()
                del writing[i]
                free.append(i)
                yield tokens


def guard_seconds() -> float:
    """Seconds per token of the guard, Python's call included."""
    tokens = [random.randrange(50_000) for _ in range(50_000)]
    guard, start = LoopGuard(), time.perf_counter()
    for token in tokens:
        guard.find(token)
    return (time.perf_counter() - start) / len(tokens)


def main() -> None:
    """Print the table of answers that ended in a loop, and what was found about all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=200, help="answers")
    parser.add_argument("--max-tokens", type=int, default=800)
    parser.add_argument("-c", "--ctx-size", type=int, default=512)
    args = parser.parse_args()
    prompts = [ask.replace("{}", topic) for topic in TOPICS for ask in ASKS][: args.n]
    ends: Counter[str | None] = Counter()
    periods: list[int] = []
    late: list[float] = []
    missed = n_tokens = n_taken = 0
    with Engine.load("demo", n_ctx=args.ctx_size, n_parallel=16) as engine:
        for i, answer in enumerate(answers(engine, prompts, args.max_tokens)):
            last = answer[-1]
            ends[last.finish_reason] += 1
            n_tokens += len(answer)
            at, _ = cycles([t.token for t in answer])
            if last.loop:
                periods.append(last.loop.period)
                n_taken += last.loop.n_taken
                late.append((len(answer) - 1 - at) / last.loop.period if at is not None else float("nan"))
            else:
                missed += at is not None
            print(f"\r{i + 1}/{len(prompts)} {dict(ends)}", end="", file=sys.stderr, flush=True)
        texts = [(kind, cycles(engine.tokenize(text))) for kind, text in legitimate(200)]
    print(file=sys.stderr)
    closest, kind = max((most, kind) for kind, (_, most) in texts)
    rows = [
        ["answers, greedy", f"{len(prompts):,}"],
        ["tokens", f"{n_tokens:,}"],
        *([f"ended by: {reason}", f"{n:,}"] for reason, n in sorted(ends.items(), key=lambda e: -e[1])),
        ["cycles that reached the bound", f"{len(periods) + missed:,}"],
        ["of these ended", f"{len(periods):,}"],
        ["latest end, in periods beyond the bound", f"{max(late, default=0):g}"],
        [
            "their periods, in tokens",
            f"{min(periods)} to {max(periods)}, median {median(periods):g}" if periods else "-",
        ],
        ["tokens taken back", f"{n_taken:,}"],
        ["legitimate texts, alarms", f"{len(texts)}, {sum(at is not None for _, (at, _) in texts)}"],
        ["closest to the bound", f"{100 * closest:.0f} % ({kind})"],
        ["the guard, called from Python", f"{1e6 * guard_seconds():.1f} microseconds per token"],
    ]
    print(markdown([{"what": what, "result": result} for what, result in rows], ["what", "result"]))
    if missed or not all(x <= 3 for x in late):
        raise SystemExit("a cycle went on for more than 3 periods beyond the bound")


if __name__ == "__main__":
    main()
