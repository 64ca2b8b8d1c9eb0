"""The chat core: what a turn adds to a stream, answers split into content, thinking and calls, schemas as grammars.

The templates are those that llama.cpp's source carries, of models as they were published.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_stream.backends import loading
from edge_stream.chat.core import Addition, ChatCore, ChatRequest
from edge_stream.engine import Engine
from edge_stream.errors import EdgeStreamError
from edge_stream.native.callbacks import Callbacks
from edge_stream.sampling import Sampling, check_sampling, schema_grammar
from edge_stream.vocabulary import Vocabulary

TEMPLATES = Path(__file__).parent.parent / "build/llama.cpp/llama.cpp/models/templates"
NAMES = sorted(path.stem for path in TEMPLATES.glob("*.jinja"))

TOOL = {
    "type": "function",
    "function": {
        "name": "f",
        "description": "Looks something up.",
        "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]},
    },
}
CALL = {"id": "abcdef123", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}


@pytest.fixture(scope="module")
def vocabulary() -> Iterator[Vocabulary]:
    with Engine.load("demo", n_ctx=256, proof=False) as engine:
        yield engine.backend.vocabulary


# SentencePiece puts a space before words; these templates' markup holds tokens that it was made with
SPACED = ("google-gemma-2-2b-it", "microsoft-Phi-3.5-mini-instruct", "mistralai-Mistral-Nemo-Instruct-2407")


@pytest.fixture(scope="module")
def any_vocabulary(request: pytest.FixtureRequest) -> Iterator[Vocabulary]:
    """Of llama.cpp's: one that keeps every byte, and one that puts a space before words."""
    llama = loading.start(False)
    params = llama.llama_model_default_params()
    params.vocab_only = True
    model = loading.load_model(TEMPLATES.parent / f"ggml-vocab-{request.param}.gguf", params, Callbacks())
    yield Vocabulary(model)
    llama.llama_model_free(model)


def source(name: str) -> str:
    return (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")


def chat(kind: str) -> list[dict[str, Any]]:
    """Four questions and three answers."""
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello there"},
        {"role": "assistant", "content": "Hi! How are you?"},
        {"role": "user", "content": "What is 2+2?"},
        {"role": "assistant", "content": "It is 4."},
        {"role": "user", "content": "Thanks"},
        {"role": "assistant", "content": "You are welcome."},
        {"role": "user", "content": "Bye now"},
    ]
    if kind == "thinking":
        for i in (2, 4, 6):
            messages[i]["reasoning_content"] = f"Let me think {i}."
    if kind == "tools":
        messages[4:5] = [
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "abcdef123", "name": "f", "content": "4"},
            {"role": "assistant", "content": "It is 4."},
        ]
    return messages


class Stream:
    """Tokens as a stream would hold them, and where it has read or written which messages."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self.tokens: list[int] = []
        self.places: list[tuple[int, int]] = []
        self.notes: list[str] = []

    def read(self, request: ChatRequest, n_system: int = 0, n_ctx: int = 1 << 16) -> None:
        plan = request.plan(self.places, self.tokens) if self.places else request.plan(n_ctx=n_ctx)
        self.notes += [plan.note] if plan.note else []
        del self.tokens[plan.keep :]
        self.places = [place for place in self.places if place[1] <= plan.keep]
        for piece in plan.pieces:
            self.tokens += piece.tokens
            if piece.n_messages > n_system:
                self.places.append((piece.n_messages, len(self.tokens)))
        self.tokens += plan.start

    def write(self, text: str, n_messages: int) -> None:
        self.tokens += self.vocabulary.tokenize(text, special=True)
        self.places.append((n_messages, len(self.tokens)))

    @property
    def data(self) -> bytes:
        return self.text_of(self.tokens)

    def text_of(self, tokens: list[int]) -> bytes:
        return b"".join(self.vocabulary.token_to_piece(token, special=True) for token in tokens)


def answer_of(core: ChatCore, messages: list[dict[str, Any]], i: int, **options: Any) -> str:
    """What a model would write for message i: what the template writes for it while it is the last one."""
    before = core.request({"messages": messages[:i], **options}).prompt
    closed = {"add_generation_prompt": False, "continue_final_message": False}
    whole = core.request({"messages": messages[: i + 1], **options, **closed}).prompt
    # where the template writes it otherwise than it asks for it
    return whole[len(before) :].rstrip("\n") if whole.startswith(before) else str(messages[i]["content"])


def whole(vocabulary: Vocabulary, request: ChatRequest) -> list[int]:
    """The tokens of the template rendered whole."""
    return vocabulary.tokenize(request.prompt, add_bos=vocabulary.add_bos, special=True)


@pytest.mark.parametrize("kind", ["plain", "thinking", "tools"])
@pytest.mark.parametrize(
    ("any_vocabulary", "name"),
    [("qwen2", name) for name in NAMES] + [("llama-spm", name) for name in SPACED],
    indirect=["any_vocabulary"],
)
def test_turn_by_turn_it_is_the_template_rendered_whole(any_vocabulary: Vocabulary, name: str, kind: str) -> None:
    core = ChatCore(any_vocabulary, source(name))
    options = {"tools": [TOOL]} if kind == "tools" else {}
    messages, stream = chat(kind), Stream(any_vocabulary)
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            request = core.request({"messages": messages[:i], **options})
            stream.read(request, 1)
            assert stream.data == stream.text_of(whole(any_vocabulary, request))
            stream.write(answer_of(core, messages, i, **options), i + 1)
    request = core.request({"messages": messages, **options})
    stream.read(request, 1)
    assert stream.data == stream.text_of(whole(any_vocabulary, request))
    assert not stream.notes


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("any_vocabulary", ["qwen2"], indirect=True)
def test_content_in_parts_is_the_same_text(any_vocabulary: Vocabulary, name: str) -> None:
    """Some templates leave parts out or print them as lists, GLM 4.6 and Gemma 4 of a tool's result, say."""
    core = ChatCore(any_vocabulary, source(name))
    for kind in ("plain", "thinking", "tools"):
        options = {"tools": [TOOL]} if kind == "tools" else {}
        messages = [m | {"content": m["content"] and m["content"] + "\nAnd more."} for m in chat(kind)]
        parts = [
            m | {"content": [{"type": "text", "text": line} for line in m["content"].split("\n")]} for m in messages
        ]
        prompt = core.request({"messages": parts, **options}).prompt
        assert prompt == core.request({"messages": messages, **options}).prompt
        assert "2+2" in prompt and prompt.count("And more.") >= sum(m["role"] == "user" for m in messages)


def test_parts_other_than_text_are_refused(vocabulary: Vocabulary) -> None:
    content = [{"type": "text", "text": "What is this?"}, {"type": "media_marker", "text": "<__media__>"}]
    with pytest.raises(EdgeStreamError, match="parts of type text, not media_marker"):
        ChatCore(vocabulary).request({"messages": [{"role": "user", "content": content}]})


def test_thinking_of_earlier_turns_leaves_the_stream(vocabulary: Vocabulary) -> None:
    core, stream = ChatCore(vocabulary, source("Qwen-Qwen3-0.6B")), Stream(vocabulary)
    messages: list[dict[str, Any]] = []
    sizes = []
    for i in range(20):
        messages.append({"role": "user", "content": f"Question {i}"})
        stream.read(core.request({"messages": messages}))
        assert b"hmm" not in stream.data
        sizes.append(len(stream.tokens))
        stream.write(f"<think>\n{'hmm ' * 500}\n</think>\n\nAnswer {i}<|im_end|>", 2 * i + 2)
        messages.append({"role": "assistant", "content": f"Answer {i}", "reasoning_content": "hmm " * 500})
    assert max(b - a for a, b in itertools.pairwise(sizes)) < 40


def test_the_tokens_a_model_wrote_stay(vocabulary: Vocabulary) -> None:
    core, stream = ChatCore(vocabulary), Stream(vocabulary)
    stream.read(core.request({"messages": [{"role": "user", "content": "Hi"}]}))
    odd = [token for letter in "Hello" for token in vocabulary.tokenize(letter)]  # not as the tokenizer would
    before = len(stream.tokens)
    stream.tokens += [*odd, *vocabulary.tokenize("<|im_end|>", special=True)]
    stream.places.append((2, len(stream.tokens)))
    more = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    stream.read(core.request({"messages": [*more, {"role": "user", "content": "Bye"}]}))
    assert stream.tokens[before : before + len(odd)] == odd and stream.data.endswith(b"assistant\n")


@pytest.mark.parametrize("n_dropped", [0, 2, 4])
def test_an_unknown_history_is_the_newest_of_it_rendered_whole(vocabulary: Vocabulary, n_dropped: int) -> None:
    # a template with a system prompt of its own: it must not come back for every message
    core, messages = ChatCore(vocabulary, source("Qwen-Qwen2.5-7B-Instruct")), chat("plain")[1:]
    wanted = vocabulary.tokenize(core.request({"messages": messages[n_dropped:]}).prompt, special=True)
    plan = core.request({"messages": messages}).plan(n_ctx=len(wanted))
    assert plan.n_dropped == n_dropped
    assert [token for piece in plan.pieces for token in piece.tokens] + plan.start == wanted


def test_the_head_is_the_system_prompt(vocabulary: Vocabulary) -> None:
    core = ChatCore(vocabulary)
    request = core.request({"messages": chat("plain")})
    text = b"".join(vocabulary.token_to_piece(token, special=True) for token in request.head).decode()
    assert "Be brief." in text and "Hello" not in text
    assert request.plan(n_ctx=4096).n_head == len(request.head)


PARSED = {
    "Qwen-Qwen3-0.6B": '<think>\nhm\n</think>\n\n<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>',
    "Qwen3-Coder": "<tool_call>\n<function=f>\n<parameter=x>\n1\n</parameter>\n</function>\n</tool_call>",
    "GLM-4.6": "\n<think>hm</think>\n<tool_call>f\n<arg_key>x</arg_key>\n<arg_value>1</arg_value>\n</tool_call>",
    "openai-gpt-oss-120b": "<|channel|>analysis<|message|>hm<|end|><|start|>assistant"
    '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"x": 1}',
    "meta-llama-Llama-3.1-8B-Instruct": '{"name": "f", "parameters": {"x": 1}}',
    "mistralai-Mistral-Nemo-Instruct-2407": '[TOOL_CALLS][{"name": "f", "arguments": {"x": 1}, "id": "123456789"}]',
    "mistralai-Ministral-3-14B-Reasoning-2512": '[THINK]hm[/THINK][TOOL_CALLS]f[ARGS]{"x": 1}',
}


def parse(request: ChatRequest, text: str, step: int) -> tuple[Addition, dict[str, Any]]:
    """All that is added, in one, and the message."""
    parser, whole = request.parser(), Addition()
    for i in range(0, len(text), step):
        more = parser.push(text[i : i + step], last=i + step >= len(text))
        whole = Addition(
            whole.content + more.content, whole.reasoning + more.reasoning, whole.tool_calls + more.tool_calls
        )
    return whole, parser.message


@pytest.mark.parametrize("step", [1, 7, 10_000])
@pytest.mark.parametrize("name", PARSED)
def test_calls_and_thinking_are_told_from_text(vocabulary: Vocabulary, name: str, step: int) -> None:
    core = ChatCore(vocabulary, source(name))
    request = core.request({"messages": [{"role": "user", "content": "x?"}], "tools": [TOOL]})
    added, message = parse(request, PARSED[name], step)
    (call,) = message["tool_calls"]
    assert call["function"]["name"] == "f" and json.loads(call["function"]["arguments"]) == {"x": 1}
    assert "".join(c["function"]["arguments"] for c in added.tool_calls) == call["function"]["arguments"]
    assert [c["id"] for c in added.tool_calls if "id" in c] == [call["id"]]
    assert message["content"].strip() == added.content.strip() == ""
    assert added.reasoning.strip() == ("hm" if "hm" in PARSED[name] else "")
    if name.startswith("mistralai"):
        assert len(call["id"]) == 9


@pytest.mark.parametrize("step", [1, 10_000])
@pytest.mark.parametrize(
    ("text", "shown", "n"),
    [
        ('a <tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call> b', "a  b", 1),
        ('<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>', None, 0),  # no such tool
        ("<tool_call>not JSON</tool_call>", None, 0),
        ("text with <tool_ in it, and {", None, 0),
        ("<tool_call>", None, 0),
        ("a\nb", None, 0),
    ],
)
def test_what_is_no_call_is_text(vocabulary: Vocabulary, text: str, shown: str | None, n: int, step: int) -> None:
    core = ChatCore(vocabulary, source("Qwen-Qwen2.5-7B-Instruct"))
    request = core.request({"messages": [{"role": "user", "content": "x?"}], "tools": [TOOL]})
    added, message = parse(request, text, step)
    assert added.content == message["content"] == (text if shown is None else shown)
    assert len(message.get("tool_calls", [])) == n


def test_tools_for_a_template_that_knows_none(vocabulary: Vocabulary) -> None:
    core = ChatCore(vocabulary)
    assert not core.info["supports_tools"]
    request = core.request({"messages": chat("tools"), "tools": [TOOL]})
    assert request.is_parsed and "Looks something up." in request.prompt
    assert '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>' in request.prompt
    assert "<tool_response>\n4\n</tool_response>" in request.prompt
    _, message = parse(request, '<tool_call>\n{"name": "f", "arguments": {"x": 2}}\n</tool_call>', 3)
    assert json.loads(message["tool_calls"][0]["function"]["arguments"]) == {"x": 2}
    # where calls are not wanted, tools are described all the same, and an answer is text
    request = core.request({"messages": chat("tools"), "tools": [TOOL], "tool_choice": "none"})
    assert not request.is_parsed and request.sampling is None


@pytest.mark.parametrize("step", [5_000, 40_000])
def test_an_answer_nested_without_end_is_text(vocabulary: Vocabulary, step: int) -> None:
    core = ChatCore(vocabulary, source("Qwen-Qwen3-0.6B"))
    request = core.request({"messages": [{"role": "user", "content": "x?"}], "tools": [TOOL]})
    text = '<tool_call>\n{"name": "f", "arguments": {"x": ' + "[" * 20_000
    added, message = parse(request, text, step)
    assert not message.get("tool_calls") and added.content == message["content"] == text


def test_a_required_call_is_not_preceded_by_text(vocabulary: Vocabulary) -> None:
    body = {"messages": [{"role": "user", "content": "x?"}], "tools": [TOOL], "tool_choice": "required"}
    rules = ChatCore(vocabulary, source("Qwen-Qwen2.5-7B-Instruct")).request(body).sampling
    assert rules is not None
    root = next(line for line in json.loads(rules)["grammar"].splitlines() if line.startswith("root ::="))
    assert "tool-call" in root and "until-" not in root


@pytest.mark.parametrize("template", [None, "Qwen-Qwen2.5-7B-Instruct", "Qwen-Qwen3-0.6B"])
@pytest.mark.parametrize("choice", ["required", "auto"])
def test_one_call_where_several_are_not_wanted(vocabulary: Vocabulary, template: str | None, choice: str) -> None:
    core = ChatCore(vocabulary, source(template) if template else None)
    body = {"messages": [{"role": "user", "content": "x?"}], "tools": [TOOL], "tool_choice": choice}

    def calls(**more: Any) -> str:
        rules = core.request(body | more).sampling
        assert rules is not None
        return next(x for x in json.loads(rules)["grammar"].splitlines() if x.startswith("tool-calls ::="))

    assert calls().endswith(")+") and calls(parallel_tool_calls=True).endswith(")+")
    assert calls(parallel_tool_calls=False) == calls().removesuffix("+")


def test_an_answer_that_ends_inside_a_character(vocabulary: Vocabulary) -> None:
    parser = ChatCore(vocabulary).request({"messages": [{"role": "user", "content": "x?"}]}).parser()
    assert parser.push("é").content == "é" and parser.push("", last=True).content == ""


@pytest.mark.parametrize(
    ("body", "match"),
    [
        ({"messages": []}, "at least one message"),
        ({"messages": [{"role": "system", "content": "x"}]}, "nothing to answer"),
        ({"messages": [{"content": "x"}]}, "role"),
        ({"messages": [{"role": "user", "content": 7}]}, "content"),
        ({"messages": [{"role": "user", "content": "x"}], "reasoning_format": "odd"}, "reasoning format"),
        ({"messages": [{"role": "user", "content": "x"}], "json_schema": {"not": {"type": "null"}}}, "not"),
        (
            {"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"enable_thinking": "yes"}},
            "true or false",
        ),
    ],
)
def test_faulty_requests_are_refused(vocabulary: Vocabulary, body: dict[str, Any], match: str) -> None:
    with pytest.raises(EdgeStreamError, match=match):
        ChatCore(vocabulary, source("Qwen-Qwen3-0.6B")).request(body)


@pytest.mark.parametrize("template", ["{{ 1 +", "{% for %}", "no template", "{{ raise_exception('never') }}"])
def test_faulty_templates_are_refused(vocabulary: Vocabulary, template: str) -> None:
    with pytest.raises(EdgeStreamError):
        ChatCore(vocabulary, template).request({"messages": [{"role": "user", "content": "x"}]})


@pytest.mark.parametrize(
    "schema",
    [
        {"type": ["string", "null"], "enum": ["a", None]},
        {"allOf": [{"$ref": "#/$defs/a"}], "$defs": {"a": {"type": "object", "properties": {"x": {"type": "string"}}}}},
        {"type": "integer", "minimum": 3, "maximum": 12},
        {"type": "object", "properties": {"root": {}, "x": True}},
        {"type": "string", "pattern": "^\\d+$"},
        {"type": "string", "maxLength": 1500},
    ],
)
def test_schemas_become_grammars_that_a_sampler_takes(vocabulary: Vocabulary, schema: dict[str, Any]) -> None:
    check_sampling(vocabulary, Sampling(grammar=schema_grammar(schema)), 256)


@pytest.mark.parametrize(
    ("schema", "match"),
    [
        ({"not": {}}, "not"),
        ({"type": "object", "properties": {"x": {"type": "number", "multipleOf": 3}}}, "multipleOf"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "unknown"}, "JSON schema"),
        ({"type": "integer", "minimum": 2**64}, "minimum is beyond integers of 16 digits"),
        ({"type": "integer", "exclusiveMaximum": -1e300}, "exclusiveMaximum is beyond"),
        ({"type": "integer", "minimum": 2.5, "maximum": 2.7}, "minimum is above maximum"),
        ({"type": "integer", "minimum": True}, "minimum must be a number"),
        ({"$ref": "https://example.com/schema.json"}, "JSON schema"),
    ],
)
def test_schemas_that_no_grammar_can_express_are_refused(schema: dict[str, Any], match: str) -> None:
    with pytest.raises(EdgeStreamError, match=match):
        schema_grammar(schema)


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        ({"minimum": 0, "maximum": 2**64 - 1}, {"minimum": 0}),
        ({"minimum": -(2**63), "maximum": 2**63 - 1}, {}),
        ({"minimum": -1e30, "exclusiveMaximum": 1e30}, {}),
        ({"minimum": 0, "exclusiveMinimum": 5, "maximum": 9, "exclusiveMaximum": 100}, {"minimum": 6, "maximum": 9}),
        (
            {"minimum": 3, "exclusiveMinimum": True, "maximum": 7.0, "exclusiveMaximum": True},
            {"minimum": 4, "maximum": 6},
        ),
        ({"exclusiveMinimum": -2.5, "exclusiveMaximum": 2.5}, {"minimum": -2, "maximum": 2}),
        ({"minimum": -0.5, "exclusiveMaximum": 3}, {"minimum": 0, "maximum": 2}),
    ],
)
def test_bounds_of_an_integer(given: dict[str, Any], plain: dict[str, Any]) -> None:
    grammars = [
        schema_grammar({"type": "object", "properties": {"x": {"type": "integer", **bounds}}})
        for bounds in (given, plain)
    ]
    assert grammars[0] == grammars[1]


@pytest.mark.parametrize("name", ["Qwen-Qwen3-0.6B", "Qwen3-Coder"])
def test_bounds_of_a_tools_integer(vocabulary: Vocabulary, name: str) -> None:
    parameters = {"type": "object", "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 2**64 - 1}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters | {"required": ["x"]}}}
    body = {"messages": [{"role": "user", "content": "x?"}], "tools": [tool], "tool_choice": "required"}
    assert "::= ([0] | [1-9] [0-9]{0,15})\\n" in ChatCore(vocabulary, source(name)).request(body).sampling


def test_a_sampler_takes_the_rules_of_a_chat(vocabulary: Vocabulary) -> None:
    for name in PARSED:
        core = ChatCore(vocabulary, source(name))
        for choice in ("auto", "required"):
            body = {"messages": [{"role": "user", "content": "x?"}], "tools": [TOOL], "tool_choice": choice}
            request = core.request(body | {"reasoning_budget_tokens": 10})
            check_sampling(vocabulary, Sampling(chat=request.sampling), 256)
