"""The patterns of JSON schemas: what comes out is JSON and matches, or the pattern is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from edge_stream import EdgeStreamError, Sampling
from edge_stream.sampling import schema_grammar

PATTERNS = [
    r"^[A-Z]{2}-\d{3,5}$",
    r"^\w+@\w+\.(com|org)$",
    r'^a"b$',
    r"^a\\b$",
    r"^C:\\[a-z]{3}\\$",
    r"^.{3}$",
    r"^[^a-y]{4}$",
    r"^[\D]{1,3}\S\W$",
    r"^[ -~]{5}$",
    r'^["\\]{4}$',
    r"^\n\t[\r\f]$",
    r"^\x41\u00e9[\u4e00-\u9fff]$",
    r"^[\x01]\x00$",
    r"^(?:ab|[cd]+?)*z$",
    r"^a/b\/c\.d\-e$",
    r"^\s[\s]$",
    r"^\$[0-9]{1,3}(,[0-9]{3}){0,2}\^$",
    "^é[ö-ü]?$",
    "^$",
]


def answers(engine: Any, pattern: str, n: int = 8, likely: str = "") -> list[str]:
    """Whole answers of a random model held to a pattern. likely: characters that it is to write often."""
    bias = {token: 5.0 for c in likely for token in engine.tokenize(c)}
    found = []
    for seed in range(n):
        sampling = Sampling(temp=1.0, seed=seed, logit_bias=bias, json_schema={"type": "string", "pattern": pattern})
        with engine.stream() as stream:
            stream.feed([1])
            tokens = list(stream.generate(120, sampling=sampling))
        if tokens[-1].finish_reason != "length":
            found.append("".join(t.text for t in tokens))
    return found


@pytest.mark.parametrize("pattern", PATTERNS)
def test_answers_are_json_that_matches(load: Callable[..., Any], pattern: str) -> None:
    texts = answers(load("gqa", n_ctx=256), pattern)
    assert texts
    kind = re.UNICODE if r"\s" in pattern else re.ASCII  # ECMA's \s is Unicode's, its \d and \w are ASCII's
    for text in texts:
        assert re.fullmatch(pattern, json.loads(text), re.DOTALL | kind), text


@pytest.mark.parametrize("pattern", ["b", "^b", "b$", "c|b"])
def test_what_is_not_anchored_may_have_anything_beside_it(load: Callable[..., Any], pattern: str) -> None:
    texts = answers(load("gqa", n_ctx=256), pattern, 16, 'b"')
    assert texts and max(map(len, texts)) > 3
    for text in texts:
        assert re.search(pattern, json.loads(text)), text


@pytest.mark.parametrize(
    ("pattern", "match"),
    [
        (r"^(?=a)a$", "ahead"),
        (r"^(?<name>a)$", "groups"),
        (r"^(a)\1$", r"no \\1"),
        (r"\bfoo\b", r"no \\b"),
        (r"^\p{L}$", r"no \\p"),
        (r"^a^b$", "anchor"),
        (r"^a$b$", "anchor"),
        (r"^(a$", "parentheses|anchor"),
        (r"^a)$", "balanced"),
        (r"^[a$", "too early"),
        (r"^[]$", "no character"),
        (r"^[z-a]$", "order"),
        (r"^*a$", "repeat"),
        (r"^a{2001}$", "2000"),
        (r"^a{x}$", "2000"),
        (r"^\u12$", "hexadecimal"),
        (r"^\ud800$", "half"),
        ("^" + "(" * 100 + "a" + ")" * 100 + "$", "deeper than 64"),
        ("^a\\", "too early"),
    ],
)
def test_what_a_grammar_cannot_express_is_refused(pattern: str, match: str) -> None:
    with pytest.raises(EdgeStreamError, match=match):
        schema_grammar({"type": "object", "properties": {"x": {"type": "string", "pattern": pattern}}})


@pytest.mark.parametrize("word", ["minLength", "maxLength", "format"])
def test_a_pattern_stands_alone(word: str) -> None:
    with pytest.raises(EdgeStreamError, match=word):
        schema_grammar({"type": "string", "pattern": "^a$", word: "date" if word == "format" else 2})
