"""The first inputs of the fuzzers in tests/fuzz (`make endurance-fuzz` runs 100,000 of each), and faults they found."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_stream.errors import LONGEST, EdgeStreamError

FOLDER = Path(__file__).parent / "fuzz"
N = {"checkpoints": 150, "gguf": 300, "mlc": 200, "http": 200}


@pytest.fixture
def fuzz() -> Iterator[object]:
    sys.path.insert(0, str(FOLDER))
    try:
        import run

        yield run
    finally:
        sys.path.remove(str(FOLDER))


@pytest.mark.parametrize("target", N)
def test_first_inputs(target: str, fuzz: object) -> None:
    found = fuzz.run(target, 0, N[target])  # type: ignore[attr-defined]
    assert found["inputs"] == N[target]
    assert len(found["outcomes"]) > 1  # some are refused, some are read


def test_an_input_is_the_same_whatever_came_before(fuzz: object) -> None:
    import random

    import mutate

    def changed(seed: int) -> bytes:
        return mutate.dumps(mutate.change_json(random.Random(seed), {"a": [{"b": 1}, []]}, n=20))

    first = [changed(seed) for seed in range(20)]
    assert first == [changed(seed) for seed in range(20)]


def test_a_message_is_a_line_for_a_terminal() -> None:
    """Names from files may hold line feeds and a terminal's commands."""
    error = EdgeStreamError("key 'a\nb\x1b[2J\ud800' is wrong: ä" + "x" * 2000)
    text = str(error)
    assert text.isprintable() and text.startswith("key 'a\\nb\\x1b[2J\\ud800' is wrong: ä") and len(text) == LONGEST


def test_a_long_name_does_not_hide_what_is_wrong_with_it() -> None:
    for name in ("x" * 5000, "\n" * 5000):
        text = str(EdgeStreamError(f"cannot write {name}: it is a folder"))
        assert text.startswith("cannot write ") and text.endswith(": it is a folder") and len(text) == LONGEST
