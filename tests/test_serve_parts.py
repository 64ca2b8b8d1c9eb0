"""Parts of the server without an engine: tool calls in a text, depth of JSON, running hashes."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_stream.errors import EdgeStreamError
from edge_stream.sampling import schema_grammar
from edge_stream.server.history.prefix_matching import PrefixLog, TokenLog, chat_history
from edge_stream.server.history.tools import HERMES, LLAMA3, MISTRAL, ToolFormat, ToolParser, format_of
from edge_stream.server.http.grammar_check import check_ambiguity
from edge_stream.server.http.guard import depth_of

CALL = {"name": "f", "arguments": {"x": 1}}


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


@pytest.mark.parametrize(
    ("form", "text", "shown", "n"),
    [
        (HERMES, f"Well. <tool_call>\n{json.dumps(CALL)}\n</tool_call>", "Well.", 1),
        (HERMES, f"<tool_call>{json.dumps(CALL)}</tool_call>\n<tool_call>{json.dumps(CALL)}</tool_call>", "", 2),
        (HERMES, "a < b and <tool", "a < b and <tool", 0),
        (HERMES, "<tool_call>no JSON</tool_call> on", "<tool_call>no JSON</tool_call> on", 0),
        (HERMES, '<tool_call>{"name": "g", "arguments": {}}</tool_call>', None, 0),  # there is no g
        (HERMES, '<tool_call>{"name": "f"', '<tool_call>{"name": "f"', 0),
        (MISTRAL, f"[TOOL_CALLS]{json.dumps([CALL, CALL])}", "", 2),
        (LLAMA3, '{"name": "f", "parameters": {"x": 1}}', "", 1),
        (LLAMA3, "It is {not} a call", "It is {not} a call", 0),
    ],
)
@pytest.mark.parametrize("step", [1, 3, 1000])
def test_calls_in_a_text(form: ToolFormat, text: str, shown: str | None, n: int, step: int) -> None:
    """However the text is cut into tokens."""
    parser = ToolParser(form, ["f"])
    pieces, calls = [], []
    for i in range(0, len(text), step):
        piece, more = parser.push(text[i : i + step])
        pieces.append(piece)
        calls += more
    piece, more = parser.flush()
    assert "".join([*pieces, piece]).strip() == (text if shown is None else shown)
    assert [json.loads(c["function"]["arguments"]) for c in calls + more] == [{"x": 1}] * n
    assert parser.shown == "".join([*pieces, piece])


ARGUED = {"name": "f", "parameters": {"x": 1}}
ONE, TWO = (f"<tool_call>\n{json.dumps(CALL)}\n</tool_call>" for _ in range(2))


@pytest.mark.parametrize(
    ("form", "text", "shown", "n"),
    [
        (HERMES, f" Well,  now. {ONE}  And \n then {TWO}\n\nso  on. ", " Well,  now.   And \n then \n\nso  on. ", 2),
        (HERMES, f"{ONE} then <tool_call>no</tool_call> on", " then <tool_call>no</tool_call> on", 1),
        (MISTRAL, f" Well. [TOOL_CALLS] {json.dumps([CALL, CALL])}  so  on. ", " Well.   so  on. ", 2),
        (MISTRAL, "a [TOOL_CALLS] of [ what", "a [TOOL_CALLS] of [ what", 0),
        (LLAMA3, f" {json.dumps(ARGUED)}  so  on {{1}} ", "   so  on {1} ", 1),
        (LLAMA3, f" It is  {json.dumps(ARGUED)} ", f" It is  {json.dumps(ARGUED)} ", 0),
    ],
)
def test_text_around_calls_is_kept_wherever_it_is_cut(form: ToolFormat, text: str, shown: str, n: int) -> None:
    for cut in range(len(text) + 1):
        for second in {min(cut + 1, len(text)), len(text)}:
            parser = ToolParser(form, ["f"])
            parts = [parser.push(part) for part in (text[:cut], text[cut:second], text[second:])] + [parser.flush()]
            assert "".join(part for part, _ in parts) == parser.shown == shown
            calls = [call for _, some in parts for call in some]
            assert calls == parser.calls and len({call["id"] for call in calls}) == n
            assert all(json.loads(call["function"]["arguments"]) == {"x": 1} for call in calls)


@pytest.mark.parametrize("form", [HERMES, MISTRAL, LLAMA3])
def test_text_after_a_call_is_shown_at_once(form: ToolFormat) -> None:
    parser = ToolParser(form, ["f"])
    call = json.dumps([CALL] if form.is_list else CALL | {"parameters": {}})
    parser.push(form.start + call + form.end)
    assert [parser.push(word)[0] for word in (" and", " so", " on ")] == [" and", " so", " on "]
    assert len(parser.calls) == 1


@pytest.mark.parametrize("form", [HERMES, MISTRAL, LLAMA3])
def test_a_call_without_end_does_not_grow_for_ever(form: ToolFormat) -> None:
    parser = ToolParser(form, ["f"])
    text = parser.push(form.start + '{"name": "')[0] + "".join(parser.push("x" * 1000)[0] for _ in range(100))
    assert len(parser._held) <= 65 << 10 and len(text) + len(parser._held) == len(form.start.strip()) + 100_010 + (
        form is HERMES
    )


def test_arguments_that_utf8_cannot_carry_are_replaced() -> None:
    parser = ToolParser(HERMES, ["f"])
    calls = parser.push('<tool_call>{"name": "f", "arguments": {"x": "\\ud800"}}</tool_call>')[1]
    assert json.loads(calls[0]["function"]["arguments"].encode()) == {"x": "?"}


def test_formats_are_found_in_templates() -> None:
    assert format_of("{% if tools %}<tool_call>{% endif %}") == HERMES
    assert format_of("{% if tools %}[TOOL_CALLS]{% endif %}") == MISTRAL
    assert format_of("{{ messages }}") is None


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
