"""StreamEval (Xiao et al. 2023, section 4.3), whose data was described but not released.

Every few lines of a stream, a question asks for a fact that was stated some lines before. The answer is right if greedy
decoding would give exactly it. The right answer then stays in the stream, so that mistakes do not add up; no fact is
asked for twice.

words  Facts like `The secret word of Anna Bell is mango.` among lines of prose. Names do not repeat, answers are single
       words, the question is the beginning of the sentence. Only facts that will be asked for are stated, so that small
       models can answer and distance is what is measured. Guessing gives 1 in 24.
paper  Every line is a fact, `line 17: REGISTER_CONTENT is <4321>`; questions are about line numbers, as in LongEval.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edge_stream.errors import EdgeStreamError
from edge_stream.measure.modes import keep_of
from edge_stream.measure.ppl import Progress
from edge_stream.measure.reader_process import ReaderProcess
from edge_stream.measure.table import rounded

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
# different beginnings, because small models confuse facts that begin alike
_FRAMES = (
    "The secret word of {} is",
    "For breakfast {} always wants",
    "In the bag of {} there was nothing but",
    "The ship of {} was loaded with",
    "At the market {} paid for",
    "The cellar of {} is full of",
    "Last year {} wrote a song about",
    "Doctors told {} to stay away from",
    "Every Sunday {} dreams of",
    "The painting by {} shows",
    "Above the door of {} hangs a picture of",
    "For the birthday of {} we chose",
)
_PROSE = (
    "The grass is green and the sky is blue.",
    "We walked along the river for an hour.",
    "The train was late again this morning.",
    "Nobody knew what time it was.",
    "The kitchen smelled of fresh paint.",
    "It rained for most of the afternoon.",
    "A small bird sat on the fence.",
    "The old clock on the wall had stopped.",
    "They talked about the weather and the news.",
    "The children played in the garden until dark.",
    "He closed the window and sat down.",
    "The road to the village was long and narrow.",
    "She wrote a letter to her sister.",
    "There was a light across the street.",
    "The shop on the corner opens at nine.",
    "In winter the lake freezes over.",
    "Somebody had left the gate open.",
    "The meeting ended earlier than usual.",
    "A lorry stopped in front of the station.",
    "The stairs creaked at every step.",
)
N_FACTS = math.lcm(len(_FRAMES), len(_FIRST) * len(_LAST))  # of `words`, before one comes again
INTRO = {"words": "Here is a long story.\n", "paper": "Here is a list of facts.\n"}
_Fact = tuple[str, str, str]  # its line, the question, the answer


@dataclass(frozen=True)
class Question:
    """Tokens of the lines since the last question (text), of the question and of the answer."""

    text: list[int]
    question: list[int]
    answer: list[int]
    lines: int  # between fact and question
    distance: int  # tokens between the end of the fact and the end of the question


def plan(
    engine: Engine, kind: str, distances: Sequence[int], per_distance: int, interval: int, n_ctx: int, seed: int
) -> list[Question]:
    """The whole text and its questions, the same for all modes. kind: words or paper.

    distances: lines between fact and question; empty: from a twentieth of the cache to twice the cache. Raises
    EdgeStreamError for a distance that is far longer than the cache.
    """
    draw = random.Random(seed)
    fact, filler = (words(draw), prose(draw)) if kind == "words" else (_numbers(draw), None)
    sample = [fact(0)[0]] + [filler() if filler else fact(i)[0] for i in range(1, 20)]
    per_line = len(engine.tokenize("".join(sample))) / 20
    distances = list(distances) or _default_distances(n_ctx, per_line)
    if max(distances) * per_line > 50 * n_ctx:
        raise EdgeStreamError(f"a distance of {max(distances)} lines is far too long for a cache of {n_ctx} tokens")
    asked = _schedule([d for _ in range(per_distance) for d in draw.sample(distances, len(distances))], interval)
    stated = {after - lines for after, lines in asked}

    facts: dict[int, tuple[_Fact, int]] = {}  # by line: the fact, and the tokens seen when it ended
    out: list[Question] = []
    seen = line = 0
    pending = engine.tokenize(INTRO[kind], add_bos=engine.add_bos)
    for after, lines in asked:
        while line < after:
            if filler and line not in stated:
                pending += engine.tokenize(filler())
            else:
                new = fact(line)
                pending += engine.tokenize(new[0])
                facts[line] = (new, seen + len(pending))
            line += 1
        (_, question, answer), end = facts[after - lines]
        q_tokens, a_tokens = split(engine, question, answer)
        distance = seen + len(pending) + len(q_tokens) - end
        out.append(Question(pending, q_tokens, a_tokens, lines, distance))
        seen += len(pending) + len(q_tokens) + len(a_tokens)
        pending = engine.tokenize(".\n" if kind == "words" else ">\n")
    return out


def _schedule(wanted: list[int], interval: int) -> list[tuple[int, int]]:
    """Pairs (lines before a question, distance in lines), in order; each fact is asked for once."""
    wanted, taken, out, after = list(wanted), set[int](), [], 0
    while wanted:
        after += interval
        lines = next((d for d in wanted if d <= after and after - d not in taken), None)
        if lines is not None:  # else it is too early for all of them
            wanted.remove(lines)
            taken.add(after - lines)
            out.append((after, lines))
    return out


def _default_distances(n_ctx: int, per_line: float) -> list[int]:
    lines = n_ctx / per_line
    return sorted({max(1, round(lines * share)) for share in (0.05, 0.2, 0.4, 0.6, 0.8, 1.2, 1.6, 2.0)})


def split(engine: Engine, question: str, answer: str) -> tuple[list[int], list[int]]:
    """Tokens of a question and of its answer, as the tokenizer splits the two together."""
    both, alone = engine.tokenize(question + answer), engine.tokenize(question)
    n = len(alone)
    if both[:n] != alone:
        return alone, engine.tokenize(answer)
    return alone, both[n:]


def words(draw: random.Random) -> Callable[[int], _Fact]:
    """A function that states another fact, whatever line it is given."""
    names = [f"{a} {b}" for a in _FIRST for b in _LAST]
    draw.shuffle(names)

    count = itertools.count()

    def fact(_line: int) -> _Fact:
        # a name repeats after more than a thousand facts
        i = next(count)
        question, thing = _FRAMES[i % len(_FRAMES)].format(names[i % len(names)]), draw.choice(_THINGS)
        return f"{question} {thing}.\n", question, f" {thing}"

    return fact


def prose(draw: random.Random) -> Callable[[], str]:
    """A function that gives a line of prose."""
    return lambda: draw.choice(_PROSE) + "\n"


def _numbers(draw: random.Random) -> Callable[[int], _Fact]:
    def fact(line: int) -> _Fact:
        number = draw.randrange(1000, 50000)
        text = f"line {line + 1}: REGISTER_CONTENT is <{number}>\n"
        return text, f"The REGISTER_CONTENT in line {line + 1} is <", str(number)

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
    """A row per distance: accuracy, and whether the fact was still in the cache.

    Mode dense gets a cache for the whole text, or of the training length if that is less, and stops there with a note.
    """
    total = sum(len(q.text) + len(q.question) + len(q.answer) for q in questions)
    size = max(n_ctx, total + 1) if mode == "dense" else n_ctx
    if mode == "dense":
        with ReaderProcess(model, mode, 64, 0, settings) as probe:
            size = min(size, int(probe.facts["n_ctx_train"]))
    right: dict[int, list[bool]] = {}
    distance: dict[int, list[int]] = {}
    seen = 0
    with ReaderProcess(model, mode, size, n_keep, settings) as process:
        for i, q in enumerate(questions):
            seen += len(q.text) + len(q.question) + len(q.answer)
            if mode == "dense" and seen >= size:
                note(f"mode dense ended at {size} tokens, the training length: {i} of {len(questions)} questions")
                break
            good = process.call("answer", q.text + q.question, q.answer)
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
