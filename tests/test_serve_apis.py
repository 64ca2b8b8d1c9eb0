"""All APIs are one server: the same text for the same chat, and a conversation may change between them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
from serving import WORDS, Served, serve
from serving_apis import APIS, TEXT_APIS, ask
from serving_template import SPECIAL, THINKING
from tiny_models import write_tiny_llama

from edge_stream.chat.conversation import Conversation
from edge_stream.engine import Engine
from edge_stream.sampling import Sampling

Load = Callable[..., Engine]
Messages = list[dict[str, Any]]

SAMPLING = {"seed": 11, "temperature": 1.3, "top_k": 30, "top_p": 0.9, "min_p": 0.02, "repeat_penalty": 1.1}
OPTIONS: dict[str, Any] = {"max_tokens": 40, "grammar": WORDS, **SAMPLING}
QUESTIONS = ("Say hello", "And then?")


def dialogue(served: Served, name: str, stream: bool) -> list[str]:
    """The answers to QUESTIONS."""
    messages: Messages = [{"role": "system", "content": "Be brief."}]
    for question in QUESTIONS:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": ask(served, name, messages, stream=stream, **OPTIONS).text})
    return [m["content"] for m in messages if m["role"] == "assistant"]


def test_the_same_text_through_every_api(load: Load) -> None:
    """Same prompt, seed and settings; streamed, whole, and in Python."""
    settings = dict(SAMPLING)
    settings["temp"] = settings.pop("temperature")
    sampling = replace(Sampling(grammar=WORDS), **settings)
    conversation = Conversation(load("chat", n_ctx=512), system="Be brief.")
    expected = []
    for question in QUESTIONS:
        tokens = conversation.reply(question, max_tokens=40, sampling=sampling)
        expected.append("".join(token.text for token in tokens))
    assert len(set(expected)) == len(QUESTIONS) and all(expected)
    for name in APIS | TEXT_APIS:
        for stream in (False, True):
            with serve(load("chat", n_ctx=512, n_parallel=2)) as served:
                assert dialogue(served, name, stream) == expected, (name, stream)


def test_a_conversation_goes_on_through_another_api(load: Load) -> None:
    """Past the cache: every turn reads only what is new, whichever API brings it."""
    with serve(load("chat", n_ctx=128)) as served:
        messages: Messages = [{"role": "system", "content": "Be brief."}]
        names = [(name, stream) for stream in (False, True) for name in APIS]
        for turn, (name, stream) in zip(range(24), cycle(names), strict=False):
            messages.append({"role": "user", "content": f"Question {turn}"})
            said = ask(served, name, messages, stream=stream, max_tokens=40, grammar=WORDS, seed=turn)
            assert said.history == ("continued" if turn else "new"), (turn, name, stream)
            messages.append({"role": "assistant", "content": said.text})
        (slot,) = served.client.get("/slots").json()
        assert slot["n_past"] > 3 * slot["n_ctx"]


def test_calls_go_on_through_another_api(load: Load) -> None:
    """A call made in one API's form is sent back in the others': the conversation is known by what was said."""
    parameters = {"type": "object", "properties": {"city": {"enum": ["Oslo"]}}, "required": ["city"]}
    function = {"name": "weather", "parameters": parameters | {"additionalProperties": False}}
    tool = {"type": "function", "function": function}
    question = {"role": "user", "content": "Weather?"}
    with serve(load("chat", n_ctx=512)) as served:
        asked = {"messages": [question], "tools": [tool], "tool_choice": "required", "max_tokens": 100}
        asked["parallel_tool_calls"] = False
        message = served.client.post("/v1/chat/completions", json=asked).json()["choices"][0]["message"]
        (call,) = message["tool_calls"]
        assert json.loads(call["function"]["arguments"]) == {"city": "Oslo"}
        called, name, given = call["id"], "weather", {"city": "Oslo"}
        bodies: dict[str, dict[str, Any]] = {
            "/v1/chat/completions": {
                "messages": [question, message, {"role": "tool", "tool_call_id": called, "content": "rain"}],
                "tools": [tool],
            },
            "/v1/messages": {
                "messages": [
                    question,
                    {
                        "role": "assistant",
                        "content": [{"type": "tool_use", "id": called, "name": name, "input": given}],
                    },
                    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": called, "content": "rain"}]},
                ],
                "tools": [{"name": name, "input_schema": function["parameters"]}],
            },
            "/v1/responses": {
                "input": [
                    question,
                    {"type": "function_call", "call_id": called, "name": name, "arguments": '{"city":"Oslo"}'},
                    {"type": "function_call_output", "call_id": called, "output": "rain"},
                ],
                "tools": [{"type": "function", **function}],
            },
            "/api/chat": {
                "messages": [
                    question,
                    {"role": "assistant", "tool_calls": [{"function": {"name": name, "arguments": given}}]},
                    {"role": "tool", "tool_call_id": called, "content": "rain"},
                ],
                "tools": [tool],
                "stream": False,
                "options": {"num_predict": 1},
            },
        }
        for i, (path, body) in enumerate(bodies.items()):
            limits = {"max_output_tokens": 1} if path.endswith("responses") else {"max_tokens": 1}
            answer = served.client.post(path, json=body | limits)
            # the first continues the call; the others ask the same again
            assert answer.headers["X-Edge-Stream-History"] == ("branched" if i else "continued"), (path, answer.text)
            if path.endswith("completions"):
                n_read = answer.json()["edge_stream"]["n_to_read"]
            elif path.endswith("responses"):
                assert answer.json()["edge_stream"]["n_to_read"] <= n_read


@pytest.mark.parametrize("sends_back", [True, False])
def test_thinking_goes_on_through_another_api(sends_back: bool, tmp_path: Path) -> None:
    """It is told from the answer in every API, and the conversation goes on whether it is sent back or not."""
    path = tmp_path / "thinks.gguf"
    write_tiny_llama(path, head_dim=16, chat_template=THINKING, special_tokens=SPECIAL, seed=7)
    options = {"max_tokens": 60, "grammar": 'root ::= "<think>\\nHm.\\n</think>\\n\\nYes."'}
    # the thinking and the text of an answer, out of its JSON
    parts: dict[str, Callable[[Any], Any]] = {
        "chat": lambda answer: answer["choices"][0]["message"]["reasoning_content"],
        "messages": lambda answer: answer["content"][0]["thinking"],
        "responses": lambda answer: answer["output"][0]["content"][0]["text"],
        "ollama": lambda answer: answer["message"]["thinking"],
    }
    # an answer with its thinking, as each API has it in a request
    said: dict[str, Callable[[str], list[dict[str, Any]]]] = {
        "chat": lambda thought: [{"role": "assistant", "content": "Yes.", "reasoning_content": thought}],
        "messages": lambda thought: [
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": thought, "signature": "unsigned"},
                    {"type": "text", "text": "Yes."},
                ],
            }
        ],
        "responses": lambda thought: [
            {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": thought}]},
            {"role": "assistant", "content": "Yes."},
        ],
        "ollama": lambda thought: [{"role": "assistant", "content": "Yes.", "thinking": thought}],
    }
    thoughts: list[str] = []
    with Engine.load(path, n_ctx=256, flash_attn="off", n_threads=1) as engine, serve(engine) as served:
        for turn, name in zip(range(12), cycle(APIS), strict=False):
            messages: Messages = []
            for i, thought in enumerate(thoughts):
                messages.append({"role": "user", "content": f"Question {i}"})
                messages += said[name](thought) if sends_back else [{"role": "assistant", "content": "Yes."}]
            messages.append({"role": "user", "content": f"Question {turn}"})
            body = APIS[name].body(messages, options) | {"stream": False}
            answer = served.client.post(APIS[name].path, json=body)
            assert answer.headers["X-Edge-Stream-History"] == ("continued" if turn else "new"), (
                turn,
                name,
                answer.text,
            )
            thoughts.append(parts[name](answer.json()))
        assert {thought.strip() for thought in thoughts} == {"Hm."}
        (slot,) = served.client.get("/slots").json()
        assert slot["n_past"] > slot["n_ctx"]
