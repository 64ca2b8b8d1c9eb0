"""Streaming question answering (Xiao et al. 2023, section 4.3): questions joined into one long stream."""

from __future__ import annotations

import json
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_stream.errors import EdgeStreamError
from edge_stream.measure.modes import keep_of
from edge_stream.measure.ppl import Progress
from edge_stream.measure.reader_process import ReaderProcess
from edge_stream.measure.table import rounded

MAX_ANSWER = 16  # tokens
_EXAMPLES = "Question: What colour is snow?\nAnswer: white\n\nQuestion: How many legs has a dog?\nAnswer: four\n\n"


@dataclass(frozen=True)
class Item:
    """A question and its right answers."""

    question: str
    answers: tuple[str, ...]


def parse(text: str, name: str) -> list[Item]:
    """Items of JSON lines {"question": ..., "answer": ... or [...]}. Raises EdgeStreamError that names the line."""
    items = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            answers = value["answer"] if "answer" in value else value["answers"]
            answers = [answers] if isinstance(answers, str) else answers
            if not (isinstance(value["question"], str) and answers and all(isinstance(a, str) for a in answers)):
                raise TypeError
        except (ValueError, KeyError, TypeError):
            raise EdgeStreamError(
                f'{name}, line {number}: not a JSON object with a "question" and an "answer" (a text or a list)'
            ) from None
        items.append(Item(value["question"], tuple(answers)))
    if not items:
        raise EdgeStreamError(f"{name} has no questions")
    return items


def builtin() -> list[Item]:
    """A small set of easy questions: enough to see that nothing breaks, too few to rank models."""
    path = Path(__file__).with_name("questions.jsonl")
    return parse(path.read_text(encoding="utf-8"), path.name)


def normalise(answer: str) -> str:
    """An answer for exact match: lower case, without articles, punctuation and extra spaces."""
    words = answer.lower().translate(str.maketrans("", "", string.punctuation)).split()
    return " ".join(word for word in words if word not in ("a", "an", "the"))


def run(
    model: str, mode: str, items: Sequence[Item], n_ctx: int, n_keep: int, settings: dict[str, Any], progress: Progress
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The row: exact match over all questions and over each half; and a record per question.

    The model's answers stay in the stream, as in a conversation. one-shot: each question, after the same two examples,
    with an empty cache.
    """
    details: list[dict[str, Any]] = []
    one_shot = mode == "one-shot"
    cells = max(n_ctx, 256 * len(items)) if mode == "dense" else n_ctx
    with ReaderProcess(model, "stream" if one_shot else mode, cells, n_keep, settings) as process:
        for i, item in enumerate(items):
            if one_shot:
                process.call("reset")
            reply = process.call(
                "reply", (_EXAMPLES if one_shot or i == 0 else "") + f"Question: {item.question}\nAnswer:", MAX_ANSWER
            )
            good = normalise(reply) in {normalise(a) for a in item.answers}
            details.append({"mode": mode, "question": item.question, "said": reply.strip(), "right": good})
            progress(f"{mode}: questions", i + 1, len(items))
        n_past = process.call("depth")
    half = len(details) // 2

    def share(part: Sequence[dict[str, Any]]) -> float | None:
        return rounded(sum(d["right"] for d in part) / len(part)) if part else None

    row = {
        "mode": mode,
        "n_ctx": cells,
        "n_keep": keep_of(mode, n_keep),
        "questions": len(details),
        "n_past": None if one_shot else n_past,
        "exact_match": share(details),
        "first_half": share(details[:half]),
        "second_half": share(details[half:]),
    }
    return row, details
