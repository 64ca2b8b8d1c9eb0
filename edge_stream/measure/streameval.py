"""StreamEval (Xiao et al. 2023, section 4.3), whose data its authors describe but did not release.

Facts stream by, one per line; every few lines one of them, some lines back, is asked for. The answer counts as right
if greedy decoding would give exactly it. The right answer then stays in the stream, so that one mistake does not make
the next one, and no fact is asked for twice.

words  `Anna Bell likes mango.`: names are pairs that do not come again, answers single words. The question is the
       sentence's beginning. Guessing gives 1 in 24.
paper  `line 17: REGISTER_CONTENT is <4321>` and a question about the line's number, as LongEval has it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edge_stream.errors import EdgeStreamError
from edge_stream.measure.modes import keep_of
from edge_stream.measure.ppl import Progress
from edge_stream.measure.table import rounded
from edge_stream.measure.worker import Worker

if TYPE_CHECKING:
    from edge_stream.engine import Engine

_FIRST = """
    Anna Ben Clara David Emma Felix Grace Henry Ivy Jack Kate Leo Mary Noah Olive Paul Rose Sam Tom Uma Victor
    Wendy Adam Bella Carl Diana Eric Fiona George Helen Ian Julia Kevin Laura Mark Nina Oscar Peter Quinn Ruth
    Simon Tina
""".split()  # noqa: SIM905
_LAST = """
    Bell Carter Dixon Ellis Fisher Gray Hunt Irwin Jones King Lane Moore Nash Owen Price Reed Stone Turner Vance
    Wood Young Adams Baker Clark Drake Evans Ford Green Hill James Kent Lewis Miller North Park Ross Smith Taylor
    Ward
""".split()  # noqa: SIM905
_THINGS = """
    apples bread cheese coffee fish honey lemons milk music nuts pears pizza plums rice salad soup sugar tea water
    wine books cats dogs horses
""".split()  # noqa: SIM905
_INTRO = "Here is a list of facts.\n"


@dataclass(frozen=True)
class Question:
    """Tokens of the facts since the last question, of the question and of its answer."""

    facts: list[int]
    question: list[int]
    answer: list[int]
    lines: int  # between fact and question
    distance: int  # tokens between the end of the fact and the end of the question


def plan(
    engine: Engine, kind: str, distances: Sequence[int], per_distance: int, interval: int, n_ctx: int, seed: int
) -> list[Question]:
    """Everything that is going to stream by, the same for every mode.

    distances: lines between fact and question; empty: from a tenth of the cache to twice the cache.
    """
    draw = random.Random(seed)
    facts = _words(draw) if kind == "words" else _numbers(draw)
    per_line = len(engine.tokenize("".join(facts(i)[0] for i in range(20)))) / 20
    distances = list(distances) or _default_distances(n_ctx, per_line)
    if max(distances) * per_line > 50 * n_ctx:
        raise EdgeStreamError(f"a distance of {max(distances)} lines is far too long for a cache of {n_ctx} tokens")
    wanted = [d for _ in range(per_distance) for d in draw.sample(distances, len(distances))]

    said: list[tuple[str, str, int]] = []  # question, answer, tokens seen when the fact ended
    asked: set[int] = set()
    out: list[Question] = []
    seen = 0
    pending = engine.tokenize(_INTRO, add_bos=engine.add_bos)
    while wanted:
        for _ in range(interval):
            line, question, answer = facts(len(said))
            pending += engine.tokenize(line)
            said.append((question, answer, seen + len(pending)))
        at = next((d for d in wanted if d <= len(said) and len(said) - d not in asked), None)
        if at is None:  # too early for any of them
            continue
        wanted.remove(at)
        index = len(said) - at
        asked.add(index)
        question, answer, end = said[index]
        q_tokens, a_tokens = _split(engine, question, answer)
        tail = engine.tokenize(".\n" if kind == "words" else ">\n")
        distance = seen + len(pending) + len(q_tokens) - end
        out.append(Question(pending, q_tokens, a_tokens, at, distance))
        seen += len(pending) + len(q_tokens) + len(a_tokens)
        pending = tail
    return out


def _default_distances(n_ctx: int, per_line: float) -> list[int]:
    lines = n_ctx / per_line
    return sorted({max(1, round(lines * share)) for share in (0.05, 0.2, 0.4, 0.6, 0.8, 1.2, 1.6, 2.0)})


def _split(engine: Engine, question: str, answer: str) -> tuple[list[int], list[int]]:
    """Tokens of a question and of the answer that goes on from it, as the tokenizer joins them."""
    both, alone = engine.tokenize(question + answer), engine.tokenize(question)
    n = len(alone)
    if both[:n] != alone:
        return alone, engine.tokenize(answer)
    return alone, both[n:]


def _words(draw: random.Random) -> Callable[[int], tuple[str, str, str]]:
    names = [f"{a} {b}" for a in _FIRST for b in _LAST]
    draw.shuffle(names)

    def fact(i: int) -> tuple[str, str, str]:
        # names come again only after all of them, more than a thousand lines later
        name, thing = names[i % len(names)], draw.choice(_THINGS)
        return f"{name} likes {thing}.\n", f"{name} likes", f" {thing}"

    return fact


def _numbers(draw: random.Random) -> Callable[[int], tuple[str, str, str]]:
    def fact(i: int) -> tuple[str, str, str]:
        number = draw.randrange(1000, 50000)
        line = f"line {i + 1}: REGISTER_CONTENT is <{number}>\n"
        return line, f"The REGISTER_CONTENT in line {i + 1} is <", str(number)

    return fact


def run(
    model: str,
    mode: str,
    questions: Sequence[Question],
    n_ctx: int,
    n_keep: int,
    settings: dict[str, Any],
    progress: Progress,
    note: Callable[[str], None],
) -> list[dict[str, Any]]:
    """One row per distance: accuracy, and whether the fact was in the cache when it was asked for.

    dense gets a cache for everything; where that exceeds the training length it is asked what comes before, and that
    is said.
    """
    total = sum(len(q.facts) + len(q.question) + len(q.answer) for q in questions)
    size = max(n_ctx, total + 1) if mode == "dense" else n_ctx
    if mode == "dense":
        with Worker(model, mode, 64, 0, settings) as probe:
            size = min(size, int(probe.facts["n_ctx_train"]))
    right: dict[int, list[bool]] = {}
    distance: dict[int, list[int]] = {}
    seen = 0
    with Worker(model, mode, size, n_keep, settings) as worker:
        for i, q in enumerate(questions):
            seen += len(q.facts) + len(q.question) + len(q.answer)
            if mode == "dense" and seen >= size:
                note(f"mode dense ended at {size} tokens, the training length: {i} of {len(questions)} questions")
                break
            good = worker.call("answer", q.facts + q.question, q.answer)
            right.setdefault(q.lines, []).append(good)
            distance.setdefault(q.lines, []).append(q.distance)
            progress(f"{mode}: questions", i + 1, len(questions))
    rows = []
    for lines in sorted(right):
        mean = sum(distance[lines]) / len(distance[lines])
        rows.append(
            {
                "mode": mode,
                "n_ctx": size,
                "n_keep": keep_of(mode, n_keep),
                "lines": lines,
                "distance": round(mean),
                "in_cache": "yes" if mean <= size - keep_of(mode, n_keep) - 2 else "no",
                "questions": len(right[lines]),
                "accuracy": rounded(sum(right[lines]) / len(right[lines])),
            }
        )
    return rows
