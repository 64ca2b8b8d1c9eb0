"""StreamEval's facts far beyond the cache, with recall and without.

Lines of prose, of which a quarter are facts, so that what is asked for is one of many that are worded alike. Every few
lines one of them is asked for, and no fact twice. Both answers are to the same stream: without recall first, then,
after a rewind, with the line that recall found between sinks and window. The right answer stays in the stream, so that
mistakes do not add up. Up to 100 caches every token is streamed; what lies further back is in the log only.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edge_stream.errors import EdgeStreamError
from edge_stream.measure import streameval
from edge_stream.measure.modes import StreamReader, open_reader
from edge_stream.measure.ppl import Progress
from edge_stream.measure.table import rounded
from edge_stream.recall import Hit, Log, StreamLog

MOST_STREAMED = 100  # caches
FACTS = 0.25  # of the lines
# Beyond it a fact would be stated again with another answer, and the newer one would rightly come back.
_MOST_FACTS = 9 * streameval.N_FACTS // 10
_INTERVAL = 10  # lines between questions
_STEP = 120  # tokens fed at once


@dataclass(frozen=True)
class _Line:
    text: str
    fact: tuple[str, str] | None  # the question and its answer


def _lines(n: int, wanted: set[int], draw: random.Random) -> list[_Line]:
    """n lines; those wanted are facts."""
    fact, prose = streameval.words(draw), streameval.prose(draw)
    share = min(FACTS, (_MOST_FACTS - len(wanted)) / n)
    out = []
    for i in range(n):
        if i in wanted or draw.random() < share:
            text, question, answer = fact(i)
            out.append(_Line(text, (question, answer)))
        else:
            out.append(_Line(prose(), None))
    return out


def run(
    model: str,
    caches: Sequence[float],
    n_questions: int,
    n_ctx: int,
    n_keep: int,
    n_recall: int,
    seed: int,
    settings: dict[str, Any],
    progress: Progress,
) -> list[dict[str, Any]]:
    """A row per distance, which is given in caches. found: share of questions whose own fact came back."""
    with open_reader(model, "stream", n_ctx, n_keep, **settings) as reader:
        assert isinstance(reader, StreamReader)
        return _Run(reader, seed, n_recall).rows(caches, n_questions, progress)


class _Run:
    def __init__(self, reader: StreamReader, seed: int, n_recall: int) -> None:
        self._stream, self._engine = reader.stream, reader.engine
        self._draw = random.Random(seed)
        self._log = StreamLog(self._stream, Log(max_bytes=1 << 30), n_recall)
        self._pending: list[int] = []
        self._n_skipped = 0  # tokens that only the log has

    @property
    def _seen(self) -> int:
        return self._n_skipped + self._stream.stats.n_past + len(self._pending)

    def rows(self, caches: Sequence[float], n_questions: int, progress: Progress) -> list[dict[str, Any]]:
        n_ctx = self._engine.n_ctx
        per_line = len(self._tokens("".join(line.text for line in _lines(200, set(), random.Random(0))))) / 200
        by_lines = {round(c * n_ctx / per_line): c for c in caches}
        if len(by_lines) < len(caches) or 0 in by_lines:
            raise EdgeStreamError("these distances are less than a line apart: give others")
        n_streamed = max((n for n, c in by_lines.items() if c <= MOST_STREAMED), default=round(2 * n_ctx / per_line))
        n_skipped = max(0, max(by_lines) - n_streamed)
        asked = self._schedule(sorted(by_lines), n_questions)
        lines = _lines(max(asked), {fact for fact, _ in asked.values()}, self._draw)
        ends: list[int] = []  # tokens up to the end of each line
        results: dict[float, list[tuple[int, bool, bool, bool]]] = {}
        self._pending = self._engine.tokenize(streameval.INTRO["words"], add_bos=self._engine.add_bos)
        for i, line in enumerate(lines):
            tokens = self._tokens(line.text)
            if i < n_skipped:
                self._log.add(line.text, 0)
                self._n_skipped += len(tokens)
            else:
                self._read(line.text, tokens)
            ends.append(self._seen)
            if i + 1 in asked:
                fact, distance = asked[i + 1]
                n_between = self._seen - ends[fact]
                results.setdefault(by_lines[distance], []).append((n_between, *self._ask(lines[fact])))
            progress("recall: lines", i + 1, len(lines))
        return [_row(c, n_ctx, results[c]) for c in sorted(results)]

    def _schedule(self, distances: list[int], n_questions: int) -> dict[int, tuple[int, int]]:
        """After how many lines to ask, for which line, and how many lines that is meant to be before."""
        asked: dict[int, tuple[int, int]] = {}
        taken = set[int]()
        after = max(distances)
        for _ in range(n_questions):
            for distance in self._draw.sample(distances, len(distances)):
                after += _INTERVAL
                fact = next(i for i in range(after - distance, after) if i not in taken)
                taken.add(fact)
                asked[after] = fact, distance
        return asked

    def _tokens(self, text: str) -> list[int]:
        return self._engine.tokenize(text)

    def _read(self, line: str, tokens: list[int]) -> None:
        self._log.add(line, self._stream.stats.n_past + len(self._pending))
        self._pending += tokens
        if len(self._pending) >= _STEP:
            self._flush()

    def _flush(self) -> None:
        if self._pending:
            self._stream.feed_tokens(self._pending)
        self._pending = []

    def _ask(self, line: _Line) -> tuple[bool, bool, bool]:
        """Whether the answer is right with recall and without, and whether the line itself came back."""
        assert line.fact
        question, answer = streameval.split(self._engine, *line.fact)
        self._flush()
        self._stream.unrecall()
        hit: Hit | None = self._log.find(line.fact[0])
        on = off = self._is_right(question, answer)
        if hit:
            self._stream.rewind(len(question) + len(answer) - 1)
            self._stream.recall(hit.block)
            on = self._is_right(question, answer)
        self._pending = [answer[-1], *self._tokens(".\n")]
        return on, off, hit is not None and hit.text == line.text.strip()

    def _is_right(self, question: list[int], answer: list[int]) -> bool:
        rows = self._stream.logits_of([*question, *answer[:-1]])[len(question) - 1 :]
        return bool(np.array_equal(rows.argmax(axis=1), answer))


def _row(caches: float, n_ctx: int, results: list[tuple[int, bool, bool, bool]]) -> dict[str, Any]:
    distance, on, off, found = (sum(column) / len(results) for column in zip(*results, strict=True))
    return {
        "n_ctx": n_ctx,
        "caches": caches,
        "distance": round(distance),
        "streamed": "yes" if caches <= MOST_STREAMED else "log only",
        "n": len(results),
        "accuracy": rounded(on),
        "accuracy_off": rounded(off),
        "found": rounded(found),
    }
