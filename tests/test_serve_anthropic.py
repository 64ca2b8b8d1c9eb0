"""Anthropic's API: what it makes of requests, how answers are sent, and its errors."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from serving import WORDS, Served, serve
from synthetic_answers import CALLS, answer, chunks, text, whole

from edge_stream.engine import Engine
from edge_stream.server.apis.anthropic import MessageForm, MessagesRequest, chat_request, error_body
from edge_stream.server.errors import ApiError, unavailable

PATH = "/v1/messages"
HELLO = [{"role": "user", "content": "Hello"}]
WEATHER = {
    "name": "weather",
    "description": "of a city",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"enum": ["Oslo", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


@pytest.fixture(scope="module")
def served(tiny: Callable[[str], Any]) -> Iterator[Served]:
    """One server for all tests here."""
    with Engine.load(tiny("chat"), n_parallel=2, n_ctx=256, flash_attn="off", n_threads=1) as engine:
        with serve(engine) as running:
            yield running


def inside(**body: Any) -> dict[str, Any]:
    """A request as it is inside, without what was not given."""
    asked = chat_request(MessagesRequest.model_validate({"messages": HELLO, "max_tokens": 5} | body))
    return asked.model_dump(exclude_unset=True, exclude_none=True)


def events_of(raw: str) -> list[dict[str, Any]]:
    """The events of a stream; each is named as its type."""
    out = []
    for event in raw.strip().split("\n\n"):
        name, data = event.split("\n")
        out.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {out[-1]['type']}"
    return out


#
# requests
#


def test_a_request_as_it_is_inside() -> None:
    body = inside(
        system=[{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
        messages=[
            {"role": "user", "content": [{"type": "text", "text": "One"}, {"type": "text", "text": "two"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "user", "content": "Three"},
        ],
        stop_sequences=["END"],
        temperature=0.5,
        top_k=3,
        seed=7,
        metadata={"user_id": "me"},
        stream=True,
    )
    assert body["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One\ntwo"},
        {"role": "assistant", "content": "ab"},
        {"role": "user", "content": "Three"},
    ]
    del body["messages"]
    assert body == {
        "n": 1,
        "max_tokens": 5,
        "stop": ["END"],
        "temperature": 0.5,
        "top_k": 3,
        "seed": 7,
        "stream": True,
    }


def test_thinking_calls_and_results_are_messages() -> None:
    messages = [
        *HELLO,
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Hm.", "signature": "unsigned"},
                {"type": "redacted_thinking", "data": "x"},
                {"type": "text", "text": "I ask."},
                {"type": "tool_use", "id": "call_1", "name": "weather", "input": {"city": "Æ"}},
                {"type": "tool_use", "id": "call_2", "name": "weather", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "call_1", "content": "rain"},
                {"type": "tool_result", "tool_use_id": "call_2", "content": [{"type": "text", "text": "sun"}]},
                {"type": "text", "text": "And?"},
                {"type": "tool_result", "tool_use_id": "call_3", "is_error": True},
            ],
        },
    ]
    sent = inside(messages=messages)["messages"]
    call = {"name": "weather", "arguments": '{"city": "Æ"}'}
    assert sent[1]["content"] == "I ask." and sent[1]["reasoning_content"] == "Hm."
    assert [c["function"] for c in sent[1]["tool_calls"]] == [call, {"name": "weather", "arguments": "{}"}]
    assert [c["id"] for c in sent[1]["tool_calls"]] == ["call_1", "call_2"]
    assert sent[2:] == [
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
        {"role": "tool", "tool_call_id": "call_2", "content": "sun"},
        {"role": "user", "content": "And?"},
        {"role": "tool", "tool_call_id": "call_3", "content": ""},
    ]


@pytest.mark.parametrize(
    ("choice", "inner", "parallel"),
    [
        ({"type": "auto"}, "auto", None),
        ({"type": "any", "disable_parallel_tool_use": True}, "required", False),
        ({"type": "none"}, "none", None),
        ({"type": "tool", "name": "weather"}, {"type": "function", "function": {"name": "weather"}}, None),
    ],
)
def test_tools_and_their_choice(choice: Any, inner: Any, parallel: bool | None) -> None:
    body = inside(tools=[WEATHER], tool_choice=choice)
    function = {"name": "weather", "description": "of a city", "parameters": WEATHER["input_schema"]}
    assert body["tools"] == [{"type": "function", "function": function}]
    assert body["tool_choice"] == inner
    assert body.get("parallel_tool_calls") == parallel


@pytest.mark.parametrize(
    ("thinking", "enabled", "budget"),
    [
        ({"type": "enabled", "budget_tokens": 50}, True, 50),
        ({"type": "adaptive"}, True, None),
        ({"type": "disabled"}, False, None),
        (None, None, None),
    ],
)
def test_how_much_to_think(thinking: Any, enabled: bool | None, budget: int | None) -> None:
    body = inside(thinking=thinking, output_config={"effort": "low"})
    assert body.get("enable_thinking") == enabled
    assert body.get("thinking_budget_tokens") == budget
    assert body["reasoning_effort"] == "low"


def test_a_schema_for_the_answer() -> None:
    body = inside(output_config={"format": {"type": "json_schema", "schema": {"type": "object"}}})
    assert body["response_format"]["type"] == "json_schema"
    assert body["response_format"]["json_schema"]["schema_"] == {"type": "object"}


def test_the_header_that_differs_in_every_request_is_left_out() -> None:
    header = "x-anthropic-billing-header: cc_version=2.1.101.e51; cc_entrypoint=cli; cch={};"
    for separate in (True, False):
        texts = []
        for stamp in ("a5145", "ef01a"):
            parts = [header.format(stamp), "Be brief."] if separate else [header.format(stamp) + "Be brief."]
            body = inside(system=[{"type": "text", "text": part} for part in parts])
            texts.append(body["messages"][0]["content"])
        assert texts == ["Be brief."] * 2
    assert inside(system=header.format("a5145"))["messages"] == HELLO


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ({"messages": []}, "messages: "),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "image input is not supported"),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "tool_result", "tool_use_id": "1", "content": [IMAGE]}],
                    }
                ]
            },
            "image input is not supported",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "document"}]}]}, "'document'"),
        ({"messages": [{"role": "user", "content": [{"type": "thinking", "thinking": ""}]}]}, "'thinking'"),
        ({"messages": [{"role": "assistant", "content": [IMAGE]}]}, "'image'"),
        ({"tools": [{"name": "web_search", "type": "web_search_20250305"}]}, "'web_search_20250305'"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "nothing"}}, "nothing"),
        ({"repeat_penalty": 0}, "repeat_penalty: "),
        ({"stop_sequences": ["x"] * 17}, "17 stop strings"),
        ({"max_tokens": -5}, "max_tokens: "),
    ],
)
def test_what_is_refused(served: Served, body: dict[str, Any], problem: str) -> None:
    refused = served.client.post(PATH, json={"messages": HELLO, "max_tokens": 1} | body)
    assert refused.status_code == 400
    assert refused.json()["type"] == "error" and refused.json()["error"]["type"] == "invalid_request_error"
    assert problem in refused.json()["error"]["message"]


#
# answers
#


def test_the_events_of_an_answer() -> None:
    events = events_of(chunks(MessageForm("tiny"), CALLS))
    begin, ping, *blocks, delta, stop = events
    assert begin["message"] | {"id": ""} == {
        "id": "",
        "type": "message",
        "role": "assistant",
        "model": "tiny",
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {
            "input_tokens": 8,
            "cache_read_input_tokens": 2,
            "cache_creation_input_tokens": 0,
            "output_tokens": 0,
        },
    }
    assert begin["message"]["id"].startswith("msg_") and ping == {"type": "ping"}
    lines = [
        (event["type"].removeprefix("content_block_"), event["index"], event.get("content_block") or event.get("delta"))
        for event in blocks
    ]
    call = {"type": "tool_use", "name": "weather", "input": {}}

    def json_of(part: str) -> dict[str, str]:
        return {"type": "input_json_delta", "partial_json": part}

    assert lines == [
        ("start", 0, {"type": "thinking", "thinking": "", "signature": ""}),
        ("delta", 0, {"type": "thinking_delta", "thinking": "Two "}),
        ("delta", 0, {"type": "thinking_delta", "thinking": "cities."}),
        ("delta", 0, {"type": "signature_delta", "signature": "unsigned"}),
        ("stop", 0, None),
        ("start", 1, {"type": "text", "text": ""}),
        ("delta", 1, {"type": "text_delta", "text": "I "}),
        ("delta", 1, {"type": "text_delta", "text": "ask."}),
        ("stop", 1, None),
        ("start", 2, call | {"id": "call_1"}),
        ("delta", 2, json_of('{"city":')),
        ("delta", 2, json_of(' "Oslo"}')),
        ("stop", 2, None),
        ("start", 3, call | {"id": "call_2"}),
        ("delta", 3, json_of('{"city": "Rome"}')),
        ("stop", 3, None),
    ]
    assert delta["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert delta["usage"]["output_tokens"] == 9 and delta["usage"]["input_tokens"] == 8
    assert stop == {"type": "message_stop"}


def test_the_same_answer_whole() -> None:
    message = whole(MessageForm("tiny"), CALLS)
    call = {"type": "tool_use", "name": "weather"}
    assert message["content"] == [
        {"type": "thinking", "thinking": "Two cities.", "signature": "unsigned"},
        {"type": "text", "text": "I ask."},
        call | {"id": "call_1", "input": {"city": "Oslo"}},
        call | {"id": "call_2", "input": {"city": "Rome"}},
    ]
    assert message["stop_reason"] == "tool_use" and message["usage"]["output_tokens"] == 9


@pytest.mark.parametrize(
    ("finished", "reason", "sequence"),
    [
        ({"reason": "stop"}, "end_turn", None),
        ({"reason": "length", "how": "length"}, "max_tokens", None),
        ({"reason": "stop", "how": "stop", "stop_string": "END"}, "stop_sequence", "END"),
        ({"reason": "stop", "how": "grammar"}, "end_turn", None),
        ({"reason": "length", "how": "cut"}, "max_tokens", None),
    ],
)
def test_why_an_answer_ended(finished: dict[str, Any], reason: str, sequence: str | None) -> None:
    events = answer(text("a"), **finished)
    expected = {"stop_reason": reason, "stop_sequence": sequence}
    assert events_of(chunks(MessageForm("tiny"), events))[-2]["delta"] == expected
    message = whole(MessageForm("tiny"), events)
    assert {name: message[name] for name in expected} == expected


def test_an_answer_of_nothing() -> None:
    assert whole(MessageForm("tiny"), answer())["content"] == []
    types = [event["type"] for event in events_of(chunks(MessageForm("tiny"), answer()))]
    assert types == ["message_start", "ping", "message_delta", "message_stop"]


def test_errors_have_types_of_their_own() -> None:
    assert error_body(unavailable("busy")) == {
        "type": "error",
        "error": {"type": "overloaded_error", "message": "busy"},
    }
    assert error_body(ApiError(401, "a key"))["error"]["type"] == "authentication_error"
    failure = MessageForm("tiny").failure(ApiError(500, "broken")).decode()
    assert events_of(failure) == [{"type": "error", "error": {"type": "api_error", "message": "broken"}}]


#
# the server
#


def test_streamed_and_whole_answers_are_the_same(served: Served) -> None:
    body = {"messages": HELLO, "max_tokens": 40, "seed": 3, "grammar": WORDS}
    message = served.client.post(PATH, json=body).json()
    (block,) = message["content"]
    assert message["stop_reason"] == "end_turn" and block["text"].endswith(".")
    with served.client.stream("POST", "/messages", json=body | {"stream": True}) as streamed:
        assert streamed.headers["content-type"].startswith("text/event-stream")
        events = events_of(streamed.read().decode())
    assert "".join(e["delta"]["text"] for e in events if e["type"] == "content_block_delta") == block["text"]
    assert events[-2]["usage"]["output_tokens"] == message["usage"]["output_tokens"]
    assert events[0]["message"]["usage"]["input_tokens"] == events[-2]["usage"]["input_tokens"]


def test_counted_tokens_are_those_of_the_prompt(served: Served) -> None:
    body = {"messages": [{"role": "user", "content": "Count this"}], "system": "Be exact."}
    counted = served.client.post(PATH + "/count_tokens", json=body).json()
    usage = served.client.post(PATH, json=body | {"max_tokens": 1}).json()["usage"]
    assert counted == {"input_tokens": usage["input_tokens"] + usage["cache_read_input_tokens"]}
    more = served.client.post(PATH + "/count_tokens", json=body | {"tools": [WEATHER]}).json()
    assert more["input_tokens"] > counted["input_tokens"]


def test_a_prefilled_answer_is_continued(served: Served) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "The answer is ("}]
    message = served.client.post(PATH, json={"messages": messages, "max_tokens": 9, "grammar": 'root ::= "B)"'}).json()
    assert message["content"] == [{"type": "text", "text": "B)"}]


def test_a_forced_call_and_its_result(served: Served) -> None:
    """The blocks of an answer are sent back as they came, and the conversation goes on."""
    messages: list[dict[str, Any]] = [{"role": "user", "content": "What is the weather in Oslo?"}]
    options = {"tools": [WEATHER], "max_tokens": 100, "seed": 1}
    asked = {"messages": messages, "tool_choice": {"type": "tool", "name": "weather"}} | options
    message = served.client.post(PATH, json=asked).json()
    assert message["stop_reason"] == "tool_use"
    (block,) = message["content"]
    assert block["type"] == "tool_use" and block["name"] == "weather" and block["input"]["city"] in ("Oslo", "Rome")
    result = {"type": "tool_result", "tool_use_id": block["id"], "content": "rain"}
    messages += [{"role": "assistant", "content": message["content"]}, {"role": "user", "content": [result]}]
    after = served.client.post(PATH, json={"messages": messages} | options | {"max_tokens": 3})
    assert after.json()["usage"]["output_tokens"] > 0, after.text
    assert after.headers["X-Edge-Stream-History"] == "continued"


def test_keys_and_other_paths(load: Callable[..., Engine]) -> None:
    with serve(load("chat", n_ctx=64), api_keys=("secret",)) as served:
        body = {"messages": HELLO, "max_tokens": 1}
        refused = served.client.post(PATH, json=body, headers={"x-api-key": "wrong"})
        assert refused.status_code == 401 and refused.json()["error"]["type"] == "authentication_error"
        headers = {"x-api-key": "secret", "anthropic-version": "2023-06-01", "anthropic-beta": "interleaved-thinking"}
        assert served.client.post(PATH, json=body, headers=headers).status_code == 200
        missing = served.client.post(PATH + "/batches", json={}, headers=headers)
        assert missing.status_code == 404 and missing.json()["error"]["type"] == "not_found_error"


def test_the_stop_sequence_is_named(served: Served) -> None:
    body = {"messages": HELLO, "max_tokens": 9, "grammar": 'root ::= "xyz!"', "stop_sequences": ["q", "z!"]}
    message = served.client.post(PATH, json=body).json()
    assert (message["stop_reason"], message["stop_sequence"]) == ("stop_sequence", "z!")
    assert message["content"] == [{"type": "text", "text": "xy"}]
