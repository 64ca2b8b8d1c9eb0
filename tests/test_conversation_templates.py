"""Conversations with thinking and tools under published templates: what the stream holds is what they render.

The demo model writes what a grammar makes it write. The templates are those that llama.cpp's source carries.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_stream.chat.conversation import Conversation
from edge_stream.chat.core import ChatCore, Message
from edge_stream.chat.options import ChatOptions
from edge_stream.engine import Engine
from edge_stream.sampling import Sampling

TEMPLATES = Path(__file__).parent.parent / "build/llama.cpp/llama.cpp/models/templates"
TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Looks something up.",
        "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]},
    },
}
# what each model writes: a call after a thought (None: llama.cpp knows no calls of this template), and two answers
ANSWERS: dict[str, tuple[str | None, str, str]] = {
    "Qwen-Qwen3-0.6B": (
        '<think>\nhm\n</think>\n\n<tool_call>\n{"name": "look", "arguments": {"x": 1}}\n</tool_call>',
        "<think>\nso\n</think>\n\nIt is 42.",
        "<think>\nwell\n</think>\n\nBye.",
    ),
    "HuggingFaceTB-SmolLM3-3B": (
        None,
        "<think>\nso\n</think>\nIt is 42.",
        "<think>\nwell\n</think>\nBye.",
    ),
    "openai-gpt-oss-120b": (
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>commentary to=functions.look "
        '<|constrain|>json<|message|>{"x": 1}',
        "<|channel|>analysis<|message|>so<|end|><|start|>assistant<|channel|>final<|message|>It is 42.",
        "<|channel|>analysis<|message|>well<|end|><|start|>assistant<|channel|>final<|message|>Bye.",
    ),
    "mistralai-Mistral-Nemo-Instruct-2407": (
        '[TOOL_CALLS][{"name": "look", "arguments": {"x": 1}, "id": "abcdef123"}]',
        "It is 42.",
        "Bye.",
    ),
}


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine.load("demo", n_ctx=2048, n_threads=2, proof=False) as made:
        yield made


def written(text: str) -> Sampling:
    """What makes a model write a text and end."""
    return Sampling(temp=0.0, grammar=f"root ::= {json.dumps(text)}")


@pytest.mark.skipif(not TEMPLATES.is_dir(), reason="llama.cpp's source is not here")
@pytest.mark.parametrize("name", ANSWERS)
def test_the_stream_holds_what_the_template_renders(engine: Engine, name: str) -> None:
    source = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    called, *answers = ANSWERS[name]
    tools = [TOOL] if called else []
    conversation = Conversation(engine, system="Be brief.", chat=ChatOptions(template=source), tools=tools)
    core = ChatCore(engine.backend.vocabulary, source)
    thoughts = []

    def turn(messages: list[Message], answer: str) -> Message:
        tokens = list(conversation.say(messages, sampling=written(answer)))
        said = [{"role": "system", "content": "Be brief."}, *conversation.messages[:-1]]
        prompt = core.request({"messages": said, "tools": tools or None}).prompt
        held = b"".join(engine.token_to_piece(t, special=True) for t in conversation.stream.tokens()).decode()
        assert held.removesuffix("<|im_end|>").removesuffix("<|endoftext|>") == prompt + answer
        thoughts.append("".join(t.text for t in tokens if t.reasoning).strip())
        return conversation.messages[-1]

    question: Message = {"role": "user", "content": "What is it?"}
    if called:
        message = turn([question], called)
        assert message["content"] == ""
        call: dict[str, Any] = message["tool_calls"][0]
        assert (call["function"]["name"], json.loads(call["function"]["arguments"])) == ("look", {"x": 1})
        question = {"role": "tool", "tool_call_id": call["id"], "name": "look", "content": "42"}
    assert turn([question], answers[0])["content"].strip() == "It is 42."
    assert turn([{"role": "user", "content": "Thanks."}], answers[1])["content"].strip() == "Bye."
    want = ["hm", "so", "well"][0 if called else 1 :]
    assert thoughts == (want if "Mistral" not in name else [""] * len(want))
    list(conversation.reply("Bye.", max_tokens=1))
    held = engine.detokenize(conversation.stream.tokens()).decode()
    assert not any(word + end in held for word in ("hm", "so", "well") for end in "\n<")  # no earlier thought is kept


@pytest.mark.skipif(not TEMPLATES.is_dir(), reason="llama.cpp's source is not here")
def test_only_what_changed_is_read_again(engine: Engine) -> None:
    """Qwen3 drops the thoughts of the last answer when a question follows: the answer is read again, nothing else."""
    source = (TEMPLATES / "Qwen-Qwen3-0.6B.jinja").read_text(encoding="utf-8")
    conversation = Conversation(engine, chat=ChatOptions(template=source))
    list(conversation.reply("word " * 300, sampling=written("<think>\nhm\n</think>\n\nIt is 42.")))
    assert conversation.n_read > 300
    list(conversation.reply("Two?", sampling=written("<think>\nhm\n</think>\n\nIt is 43.")))
    assert conversation.n_read < 30


@pytest.mark.skipif(not TEMPLATES.is_dir(), reason="llama.cpp's source is not here")
def test_a_thinking_budget_ends_the_thoughts(engine: Engine) -> None:
    source = (TEMPLATES / "Qwen-QwQ-32B.jinja").read_text(encoding="utf-8")  # it opens them
    thoughts = []
    for budget in (-1, 5):
        options = ChatOptions(template=source, reasoning_budget=budget, reasoning_budget_message=" Enough.")
        conversation = Conversation(engine, chat=options)
        list(conversation.reply("Tell me a story.", sampling=Sampling(temp=0.0), ignore_eos=True, max_tokens=40))
        thoughts.append(conversation.messages[-1])
    assert thoughts[0]["content"] == ""
    assert thoughts[1]["reasoning_content"].endswith(" Enough.")
    words = thoughts[1]["reasoning_content"].removesuffix(" Enough.")
    assert thoughts[0]["reasoning_content"].startswith(words) and len(engine.tokenize(words)) == 5
    assert thoughts[1]["content"] != ""
