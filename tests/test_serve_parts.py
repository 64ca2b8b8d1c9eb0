"""Parts of the server without an engine: grammars, depth of JSON, running hashes."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_stream.errors import EdgeStreamError
from edge_stream.sampling import schema_grammar
from edge_stream.server.history.prefix_matching import PrefixLog, TokenLog, chat_history
from edge_stream.server.http.grammar_check import check_ambiguity
from edge_stream.server.http.guard import depth_of

LETTERS = "abcdefghijklmnopqrstuvwxy"


@pytest.mark.parametrize(
    "grammar",
    [
        "\n".join(f"{a} ::= {b} {b}" for a, b in itertools.pairwise(("root", *LETTERS))) + '\ny ::= "a"?',
        "\n".join(f'{a} ::= {b} | {b} "x"' for a, b in itertools.pairwise(("root", *LETTERS))) + "\ny ::= [a-z]?",
        f"root ::= ({'[a-z]? ' * 12}){{0,50}}",
        f"root ::= {'[a-z]? ' * 200}",
        "root ::= ([a-z]?){0,1000}",
    ],
)
def test_grammars_that_would_take_for_ever_are_refused(grammar: str) -> None:
    with pytest.raises(EdgeStreamError, match="too ambiguous"):
        check_ambiguity(grammar)


def test_honest_grammars_are_not_refused() -> None:
    many = {f"p{i}": {"type": "string", "maxLength": 190} for i in range(30)}
    for schema in (
        {"type": "object", "properties": many},
        {"type": "object", "properties": many, "required": list(many)[::2], "additionalProperties": False},
        {"enum": [f"value {i}" for i in range(900)]},
        {"type": "array", "items": {"type": "array", "items": {"type": "number"}, "maxItems": 190}, "minItems": 3},
        {"type": "string", "format": "date-time"},
        {"type": "string", "pattern": "^[a-z]{1,20}(-[a-z]+)*$"},
        {},
    ):
        check_ambiguity(schema_grammar(schema))
    for grammar in (
        'root ::= "a" | root2 # x\nroot2 ::= [^\\]"]* "\\"" .',
        "root ::= (a | b)+ \n a ::= [0-9]{2,}\nb ::= <x>",
    ):
        check_ambiguity(grammar)


NESTED = st.recursive(
    st.text(max_size=5), lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=3), x), max_leaves=30
)


@given(NESTED)
def test_depth_is_that_of_the_value(value: object) -> None:
    def depth(x: object) -> int:
        if isinstance(x, list):
            return 1 + max(map(depth, x), default=0)
        return 1 + max(map(depth, x.values()), default=0) if isinstance(x, dict) else 0

    for most in range(depth(value)):
        assert depth_of(json.dumps(value).encode(), most) > most
    assert depth_of(json.dumps(value).encode(), depth(value)) <= depth(value)


def test_brackets_in_strings_are_no_depth() -> None:
    strings = ['"' * 3, "\\\\" * 3, '\\\\"', "[[[[", '"["', "\\", '}"{', "]" * 9, '\\"[[[[[[', ""]
    for texts in itertools.product(strings, repeat=3):
        body = json.dumps([*texts, {"a": [*texts]}]).encode()
        assert depth_of(body, 3) == (3 if body.count(b"[") + body.count(b"{") > 3 else 0)
        assert depth_of(body, 2) == 3


@given(st.lists(st.integers(0, 2**31 - 1), max_size=50), st.integers(0, 60))
def test_a_token_log_forgets_what_is_taken_back(tokens: list[int], n: int) -> None:
    one, two = TokenLog(b"x" * 32), TokenLog(b"x" * 32)
    one.add(tokens)
    if one.take_back(n):
        two.add(tokens[: len(tokens) - n])
        assert n <= len(tokens) and one.digest() == two.digest()
    else:
        assert n > len(tokens)


def test_a_token_log_is_as_bounded_as_it_says() -> None:
    log = TokenLog(b"")
    log.add(range(5000))
    assert not log.take_back(2049) and log.take_back(2048)


def test_histories_differ_where_messages_do() -> None:
    def keys(*texts: str, system: str | None = None, tools: object = None) -> list[bytes]:
        messages = [{"role": "system", "content": system}] if system else []
        messages += [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(texts)]
        history = chat_history(messages, {"tools": tools} if tools else {})
        return [history.root, *(unit.key for unit in history.units)]

    base = keys("a", "b", "c")
    assert keys("a", "b", "c") == base == keys("a", " b\n", "c")  # clients trim answers
    assert keys("a", "b", "d")[:3] == base[:3] and keys("a", "b", "d")[3] != base[3]
    assert not set(keys("a ", "b", "c")[1:]) & set(base)
    assert not set(keys("a", "b", "c", system="s")) & set(base)
    assert not set(keys("a", "b", "c", tools=[1])) & set(base)
    parts = chat_history([{"role": "user", "content": [{"type": "text", "text": "a"}]}], {})
    assert parts.units[0].key == base[1]


def test_a_log_drops_what_left_the_window_but_never_its_end() -> None:
    log = PrefixLog()
    for i in range(10):
        log.fed([i])
        log.add(bytes([i]), i + 1, "inputs")
    log.trim(n_past=10, n_window=4)
    assert [e.n_past for e in log.entries] == [6, 7, 8, 9, 10]
    log.trim(n_past=1000, n_window=4)
    assert [e.n_past for e in log.entries] == [10]
