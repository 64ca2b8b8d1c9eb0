"""OpenAI's Responses API: what it makes of requests, how answers are sent, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from serving import WORDS, Served, serve
from synthetic_answers import CALLS, TIMINGS, answer, chunks, text, whole

from edge_stream.engine import Engine
from edge_stream.server.apis.responses import ResponseForm, ResponsesRequest, chat_request
from edge_stream.server.errors import ApiError

PATH = "/v1/responses"
FUNCTION = {
    "name": "weather",
    "description": "of a city",
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Oslo", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
WEATHER = {"type": "function", "strict": True, **FUNCTION}


@pytest.fixture(scope="module")
def served(tiny: Callable[[str], Any]) -> Iterator[Served]:
    """One server for all tests here."""
    with Engine.load(tiny("chat"), n_parallel=2, n_ctx=256, flash_attn="off", n_threads=1) as engine:
        with serve(engine) as running:
            yield running


def inside(**body: Any) -> dict[str, Any]:
    """A request as it is inside, without what was not given."""
    asked = chat_request(ResponsesRequest.model_validate({"input": "Hello"} | body))
    return asked.model_dump(exclude_unset=True, exclude_none=True)


def form(**body: Any) -> ResponseForm:
    """How the answer to a request is written."""
    return ResponseForm("tiny", ResponsesRequest.model_validate({"input": "Hello"} | body))


def events_of(raw: str) -> list[dict[str, Any]]:
    """The events of a stream; each is named as its type, and they are numbered."""
    out: list[dict[str, Any]] = []
    for event in raw.strip().split("\n\n"):
        name, data = event.split("\n")
        out.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {out[-1]['type']}"
    assert [event["sequence_number"] for event in out] == list(range(len(out)))
    return out


#
# requests
#


def test_a_request_as_it_is_inside() -> None:
    body = inside(
        instructions="Be brief.",
        input=[
            {"role": "user", "content": "One"},
            {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Two"}]},
        ],
        max_output_tokens=5,
        temperature=0.5,
        seed=7,
        store=True,
        stream=True,
        include=["reasoning.encrypted_content"],
    )
    assert body["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One"},
        {"role": "developer", "content": "Two"},
    ]
    del body["messages"]
    assert body == {"n": 1, "max_tokens": 5, "temperature": 0.5, "seed": 7, "stream": True}
    assert inside()["messages"] == [{"role": "user", "content": "Hello"}]


def test_thinking_texts_and_calls_in_a_row_are_one_answer() -> None:
    call = {"type": "function_call", "name": "weather", "id": "fc_1", "status": "completed"}
    items = [
        {"role": "user", "content": "Weather?"},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
        {
            "type": "message",
            "id": "msg_1",
            "role": "assistant",
            "status": "completed",
            "content": [
                {"type": "output_text", "text": "I ", "annotations": []},
                {"type": "refusal", "refusal": "ask."},
            ],
        },
        call | {"call_id": "call_1", "arguments": '{"city": "Oslo"}'},
        call | {"call_id": "call_2", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "call_1", "output": "rain"},
        {"type": "function_call_output", "call_id": "call_2", "output": [{"type": "input_text", "text": "sun"}]},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Done."}], "encrypted_content": None},
        {"role": "assistant", "content": "Rain."},
    ]
    sent = inside(input=items)["messages"]
    assert [m["role"] for m in sent] == ["user", "assistant", "tool", "tool", "assistant"]
    assert sent[1]["reasoning_content"] == "Hm." and sent[1]["content"] == "I ask."
    assert [(c["id"], c["function"]["arguments"]) for c in sent[1]["tool_calls"]] == [
        ("call_1", '{"city": "Oslo"}'),
        ("call_2", "{}"),
    ]
    assert sent[2:4] == [
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
        {"role": "tool", "tool_call_id": "call_2", "content": "sun"},
    ]
    assert sent[4] == {"role": "assistant", "content": "Rain.", "reasoning_content": "Done."}


def test_tools_thinking_and_forms() -> None:
    body = inside(
        tools=[WEATHER],
        tool_choice={"type": "function", "name": "weather"},
        parallel_tool_calls=False,
        reasoning={"effort": "high", "summary": "auto"},
        text={"format": {"type": "json_schema", "name": "x", "schema": {"type": "object"}, "strict": True}},
    )
    assert body["tools"] == [{"type": "function", "function": FUNCTION}]
    assert body["tool_choice"] == {"type": "function", "function": {"name": "weather"}}
    assert body["parallel_tool_calls"] is False and body["reasoning_effort"] == "high"
    assert body["response_format"]["json_schema"] == {"name": "x", "schema_": {"type": "object"}}
    assert inside(text={"format": {"type": "json_object"}})["response_format"] == {"type": "json_object"}
    assert inside(tools=[WEATHER], tool_choice="required")["tool_choice"] == "required"


def test_tools_that_are_no_functions_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    """Codex sends them unasked."""
    others = [{"type": "web_search"}, {"type": "local_shell"}, {"type": "custom", "name": "apply_patch", "format": {}}]
    with caplog.at_level("INFO", "edge_stream.server"):
        body = inside(tools=[others[0], WEATHER, *others], tool_choice="auto")
    assert body["tools"] == [{"type": "function", "function": FUNCTION}] and body["tool_choice"] == "auto"
    assert caplog.messages == [
        "tools that are no functions are left out of a request: 'custom', 'local_shell', 'web_search'"
    ]
    assert inside(tools=others, tool_choice="auto") == inside(tool_choice="auto")
    told = whole(form(tools=[others[0], WEATHER]), answer(text("On")))["tools"]
    assert [tool["name"] for tool in told] == ["weather"]


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "messages: "),
        ({"previous_response_id": "resp_1"}, "previous_response_id is not supported"),
        ({"conversation": "conv_1"}, "conversation is not supported"),
        ({"background": True}, "background is not supported"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "'item_reference'"),
        ({"input": [{"type": "web_search_call"}]}, "'web_search_call'"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "image input is not"),
        ({"tools": [{"type": "web_search"}], "tool_choice": "required"}, "there are no tools"),
        ({"tools": [WEATHER], "tool_choice": {"type": "web_search"}}, "'web_search'"),
        ({"tools": [WEATHER], "tool_choice": {"type": "allowed_tools"}}, "'allowed_tools'"),
        ({"tool_choice": {"type": "function", "name": "nothing"}, "tools": [WEATHER]}, "nothing"),
        ({"repeat_penalty": 0}, "repeat_penalty: "),
    ],
)
def test_what_is_refused(served: Served, body: dict[str, Any], problem: str) -> None:
    refused = served.client.post(PATH, json={"input": "Hello", "max_output_tokens": 1} | body)
    assert refused.status_code == 400 and refused.json()["error"]["type"] == "invalid_request_error"
    assert problem in refused.json()["error"]["message"]


#
# answers
#


def test_the_events_of_an_answer() -> None:
    events = events_of(chunks(form(), CALLS))
    types = [event["type"].removeprefix("response.") for event in events]
    part = ["content_part.added", "{0}.delta", "{0}.delta", "{0}.done", "content_part.done"]
    call = ["function_call_arguments.delta", "function_call_arguments.done"]
    assert types == [
        "created",
        "in_progress",
        "output_item.added",
        *(name.format("reasoning_text") for name in part),
        "output_item.done",
        "output_item.added",
        *(name.format("output_text") for name in part),
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        *call,
        "output_item.done",
        "output_item.added",
        *call,
        "output_item.done",
        "completed",
    ]
    added = [event for event in events if event["type"] == "response.output_item.added"]
    done = [event for event in events if event["type"] == "response.output_item.done"]
    assert [event["output_index"] for event in added] == [event["output_index"] for event in done] == [0, 1, 2, 3]
    assert [event["item"]["id"] for event in added] == [event["item"]["id"] for event in done]
    assert [event["item"]["status"] for event in added] == ["in_progress"] * 4
    assert [event["item"].get("content") for event in added] == [[], [], None, None]
    assert [event["item"].get("arguments") for event in added] == [None, None, "", ""]
    for event in events:
        if "item_id" in event:
            assert event["item_id"] == added[event["output_index"]]["item"]["id"]
    last = events[-1]
    assert last["response"]["output"] == [event["item"] for event in done]
    assert last["response"]["id"] == events[0]["response"]["id"] and last["timings"] == TIMINGS
    assert events[0]["response"]["output"] == [] and events[0]["response"]["usage"] is None


def test_the_same_answer_whole() -> None:
    response = whole(form(tools=[WEATHER], instructions="Be brief."), CALLS)
    thought, said, *calls = response["output"]
    assert thought["type"] == "reasoning" and thought["id"].startswith("rs_") and thought["summary"] == []
    assert thought["content"] == [{"type": "reasoning_text", "text": "Two cities."}]
    assert said["type"] == "message" and said["id"].startswith("msg_") and said["role"] == "assistant"
    assert [part["text"] for part in said["content"]] == ["I ask."]
    assert [(c["type"], c["call_id"], c["name"], c["arguments"]) for c in calls] == [
        ("function_call", "call_1", "weather", '{"city": "Oslo"}'),
        ("function_call", "call_2", "weather", '{"city": "Rome"}'),
    ]
    assert response["object"] == "response" and response["status"] == "completed"
    assert response["instructions"] == "Be brief." and response["tools"][0]["name"] == "weather"
    usage = response["usage"]
    assert (usage["input_tokens"], usage["output_tokens"], usage["total_tokens"]) == (10, 9, 19)
    assert usage["input_tokens_details"]["cached_tokens"] == 2


def test_an_answer_that_was_cut_is_incomplete() -> None:
    events = answer(text("On"), reason="length", how="length")
    for response in (whole(form(), events), events_of(chunks(form(), events))[-1]["response"]):
        assert response["status"] == response["output"][-1]["status"] == "incomplete"
        assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert whole(form(), answer())["output"] == []


def test_an_error_within_a_stream() -> None:
    (event,) = events_of(form().failure(ApiError(500, "broken")).decode())
    assert event == {"type": "error", "sequence_number": 0, "param": None, "code": "500", "message": "broken"}


#
# the server
#


def test_streamed_and_whole_answers_are_the_same(served: Served) -> None:
    body = {"input": "Hello", "max_output_tokens": 40, "seed": 3, "grammar": WORDS}
    whole = served.client.post(PATH, json=body).json()
    text = whole["output"][0]["content"][0]["text"]
    assert whole["status"] == "completed" and text.endswith(".") and "timings" in whole
    with served.client.stream("POST", "/responses", json=body | {"stream": True}) as streamed:
        assert streamed.headers["X-Edge-Stream-History"] == "branched"
        events = events_of(streamed.read().decode())
    assert "".join(event["delta"] for event in events if event["type"].endswith("text.delta")) == text
    last = events[-1]["response"]
    assert last["output"][0]["content"] == whole["output"][0]["content"]
    assert last["usage"]["output_tokens"] == whole["usage"]["output_tokens"]
    cut = served.client.post(PATH, json=body | {"max_output_tokens": 1}).json()
    assert cut["status"] == "incomplete" and cut["usage"]["output_tokens"] == 1


def test_a_forced_call_and_its_result(served: Served) -> None:
    """The items of an answer are sent back as they came, and the conversation goes on."""
    items: list[dict[str, Any]] = [{"role": "user", "content": "What is the weather in Oslo?"}]
    options = {"tools": [WEATHER], "max_output_tokens": 100, "seed": 1}
    first = served.client.post(PATH, json={"input": items, "tool_choice": "required"} | options).json()
    (call,) = first["output"]
    assert call["type"] == "function_call" and call["name"] == "weather" and first["status"] == "completed"
    assert json.loads(call["arguments"])["city"] in ("Oslo", "Rome")
    items += [call, {"type": "function_call_output", "call_id": call["call_id"], "output": "rain"}]
    after = served.client.post(PATH, json={"input": items} | options | {"max_output_tokens": 3})
    assert after.json()["usage"]["output_tokens"] > 0, after.text
    assert after.json()["edge_stream"]["history"] == after.headers["X-Edge-Stream-History"] == "continued"


def test_a_schema_for_the_answer(served: Served) -> None:
    schema = {"type": "object", "properties": {"yes": {"type": "boolean"}}, "required": ["yes"]}
    form = {"type": "json_schema", "name": "answer", "schema": schema | {"additionalProperties": False}}
    body = {"input": "Well?", "text": {"format": form}, "max_output_tokens": 40, "temperature": 0}
    response = served.client.post(PATH, json=body).json()
    assert list(json.loads(response["output"][0]["content"][0]["text"])) == ["yes"]
    assert response["text"] == {"format": dict(form)}


def test_what_is_sent_back_may_be_no_text(served: Served) -> None:
    """Half a surrogate pair is JSON, but no UTF-8."""
    body = b'{"input": "x", "max_output_tokens": 1, "metadata": {"a": "\\ud800"}, "stream": %s}'
    for stream in (b"true", b"false"):
        response = served.client.post(PATH, content=body % stream, headers={"Content-Type": "application/json"})
        assert response.status_code == 200 and '{"a":"?"}' in response.text


def test_an_answer_that_was_cut_within_a_call_is_incomplete(served: Served) -> None:
    body = {"input": "What is the weather in Oslo?", "tools": [WEATHER], "tool_choice": "required", "seed": 1}
    response = served.client.post(PATH, json=body | {"max_output_tokens": 10}).json()
    assert response["status"] == "incomplete" and response["usage"]["output_tokens"] == 10
