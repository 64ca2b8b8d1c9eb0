"""Ollama's API: what it makes of requests, how answers are sent, and what describes the model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

import pytest
from serving import WORDS, Served, serve
from synthetic_answers import CALLS, answer, call, chunks, text, whole

from edge_stream.embedder import Embedder
from edge_stream.engine import Engine
from edge_stream.server.apis.ollama import (
    GenerateRequest,
    OllamaChatRequest,
    OllamaForm,
    chat_request,
    generate_request,
)
from edge_stream.server.errors import ApiError
from edge_stream.server.http.schemas import CompletionRequest

HELLO = [{"role": "user", "content": "Hello"}]
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
WEATHER = {"type": "function", "function": FUNCTION}


@pytest.fixture(scope="module")
def served(tiny: Callable[[str], Any]) -> Iterator[Served]:
    """One server for all tests here."""
    with Engine.load(tiny("chat"), n_parallel=2, n_ctx=256, flash_attn="off", n_threads=1) as engine:
        with serve(engine) as running:
            yield running


def inside(**body: Any) -> dict[str, Any]:
    """A chat as it is inside, without what was not given."""
    asked = chat_request(OllamaChatRequest.model_validate({"messages": HELLO} | body))
    return asked.model_dump(exclude_unset=True, exclude_none=True)


def lines_of(raw: str) -> list[dict[str, Any]]:
    """The lines of a stream, without their times."""
    lines = [json.loads(line) for line in raw.splitlines()]
    for line in lines:
        assert datetime.fromisoformat(line.pop("created_at").replace("Z", "+00:00"))
    return lines


#
# requests
#


def test_options_have_other_names_inside() -> None:
    options = {"num_predict": 5, "num_ctx": 64, "temperature": 0.5, "seed": 7, "stop": ["END"], "repeat_penalty": 1.1}
    body = inside(options=options, model="x", keep_alive="5m")
    assert body.pop("messages") == HELLO
    named = {name: options[name] for name in ("temperature", "seed", "stop", "repeat_penalty")}
    assert body == {"n": 1, "stream": True, "max_tokens": 5, **named}
    assert inside(options={"num_predict": -2})["max_tokens"] == -1
    assert inside(stream=False)["stream"] is False


def test_forms_and_thinking() -> None:
    assert inside(format="json")["response_format"] == {"type": "json_object"}
    assert inside(format={"type": "object"})["response_format"]["json_schema"] == {"schema_": {"type": "object"}}
    assert "response_format" not in inside(format="")
    assert inside(think=True)["enable_thinking"] is True
    assert inside(think=False)["enable_thinking"] is False
    body = inside(think="low")
    assert body["enable_thinking"] is True and body["reasoning_effort"] == "low"
    assert "enable_thinking" not in inside()


def test_calls_and_results_find_each_other() -> None:
    """Without ids they do by the function's name, and in their order."""

    def call(name: str, **more: Any) -> dict[str, Any]:
        return {"function": {"name": name, "arguments": {"city": "Æ"}}, **more}

    sent = inside(
        messages=[
            *HELLO,
            {"role": "assistant", "thinking": "Hm.", "tool_calls": [call("a"), call("b"), call("a", id="call_9")]},
            {"role": "tool", "tool_name": "b", "content": "1"},
            {"role": "tool", "tool_name": "a", "content": "2"},
            {"role": "tool", "tool_call_id": "call_9", "content": "3"},
            {"role": "tool", "content": "4"},
        ],
        tools=[WEATHER],
    )
    message = sent["messages"][1]
    assert message["content"] == "" and message["reasoning_content"] == "Hm."
    assert [c["id"] for c in message["tool_calls"]] == ["000000000", "000000001", "call_9"]
    assert [json.loads(c["function"]["arguments"]) for c in message["tool_calls"]] == [{"city": "Æ"}] * 3
    results = [(m["content"], m.get("tool_call_id")) for m in sent["messages"][2:]]
    assert results == [("1", "000000001"), ("2", "000000000"), ("3", "call_9"), ("4", None)]
    assert sent["tools"] == [WEATHER]


def test_generate_is_a_chat_or_a_text() -> None:
    def generated(**body: Any) -> Any:
        return generate_request(GenerateRequest.model_validate({"prompt": "Hello"} | body))

    chat = generated(system="Be brief.", options={"num_predict": 3})
    messages = chat.messages
    assert messages == [{"role": "system", "content": "Be brief."}, *HELLO] and chat.max_tokens == 3
    raw = generated(raw=True, system="left out")
    assert isinstance(raw, CompletionRequest) and raw.prompt == "Hello" and raw.max_tokens is None
    filled = generated(suffix="end")
    assert isinstance(filled, CompletionRequest) and filled.suffix == "end"


@pytest.mark.parametrize(
    ("path", "body", "problem"),
    [
        ("chat", {"messages": [{"role": "user", "content": "x", "images": ["AAAA"]}]}, "image input is not supported"),
        ("chat", {"messages": [{"role": "nobody", "content": "x"}]}, "role"),
        ("chat", {"messages": HELLO, "options": {"repeat_penalty": 0}}, "repeat_penalty: "),
        ("chat", {"messages": HELLO, "tools": [{"type": "web_search"}]}, "tools.0"),
        ("chat", {"messages": HELLO, "format": "xml"}, "format"),
        ("generate", {"prompt": "x", "images": ["AAAA"]}, "image input is not supported"),
        ("generate", {"prompt": "x", "template": "{{ .Prompt }}"}, "template"),
        ("generate", {"prompt": "x", "context": [1, 2]}, "context is not supported"),
        ("pull", {"model": "other"}, "this server has one model, tiny"),
        ("create", {"model": "other"}, "this server has one model, tiny"),
    ],
)
def test_what_is_refused(served: Served, path: str, body: dict[str, Any], problem: str) -> None:
    refused = served.client.post(f"/api/{path}", json=body)
    assert refused.status_code == 400
    assert list(refused.json()) == ["error"] and problem in refused.json()["error"]


#
# answers
#


def test_the_lines_of_an_answer() -> None:
    *lines, last = lines_of(chunks(OllamaForm("tiny", is_chat=True), CALLS))
    assert all(line["model"] == "tiny" and line["done"] is False for line in lines)

    def said(**more: Any) -> dict[str, Any]:
        return {"role": "assistant", "content": "", **more}

    def called(city: str, **more: Any) -> dict[str, Any]:
        function = {"index": 0, "name": "weather", "arguments": {"city": city}}
        return {**more, "function": function}

    assert [line["message"] for line in lines] == [
        said(thinking="Two "),
        said(thinking="cities."),
        said(content="I "),
        said(content="ask."),
        said(tool_calls=[called("Oslo", id="call_1")]),
        said(tool_calls=[called("Rome", id="call_2")]),
    ]
    assert last == {
        "model": "tiny",
        "message": said(),
        "done": True,
        "done_reason": "stop",
        "total_duration": 5_750_000,
        "load_duration": 500_000,
        "prompt_eval_count": 10,
        "prompt_eval_duration": 2_000_000,
        "eval_count": 9,
        "eval_duration": 3_250_000,
    }


def test_the_same_answer_whole() -> None:
    body = whole(OllamaForm("tiny", is_chat=True), CALLS)
    message = body["message"]
    assert (message["thinking"], message["content"]) == ("Two cities.", "I ask.")
    assert [c["function"]["arguments"]["city"] for c in message["tool_calls"]] == ["Oslo", "Rome"]
    assert [c["function"]["index"] for c in message["tool_calls"]] == [0, 1]
    assert body["done"] is True and body["eval_count"] == 9
    generated = whole(OllamaForm("tiny", is_chat=False), answer(text("So"), text("on.", "Hm.")))
    assert (generated["response"], generated["thinking"]) == ("Soon.", "Hm.") and "message" not in generated


def test_a_call_that_was_cut_is_no_call() -> None:
    events = answer(call(0, "", id="call_1", name="weather"), call(0, '{"city": "Os'), reason="length", how="length")
    body = whole(OllamaForm("tiny", is_chat=True), events)
    assert "tool_calls" not in body["message"] and body["done_reason"] == "length"
    assert all(
        "tool_calls" not in line["message"] for line in lines_of(chunks(OllamaForm("tiny", is_chat=True), events))
    )


def test_an_error_within_a_stream_is_a_line() -> None:
    assert OllamaForm("tiny", is_chat=True).failure(ApiError(500, "broken")) == b'{"error":"broken"}\n'


#
# the server
#


def test_streamed_and_whole_answers_are_the_same(served: Served) -> None:
    """It streams unless it is asked not to."""
    body = {"model": "tiny", "messages": HELLO, "options": {"num_predict": 40, "seed": 3, "grammar": WORDS}}
    whole = served.client.post("/api/chat", json=body | {"stream": False}).json()
    assert whole["message"]["content"].endswith(".") and whole["done_reason"] == "stop"
    with served.client.stream("POST", "/api/chat", json=body) as streamed:
        assert streamed.headers["content-type"] == "application/x-ndjson"
        lines = lines_of(streamed.read().decode())
    assert "".join(line["message"]["content"] for line in lines) == whole["message"]["content"]
    assert lines[-1]["eval_count"] == whole["eval_count"] and lines[-1]["prompt_eval_count"] == 21
    for name in ("total_duration", "prompt_eval_duration", "eval_duration"):
        assert isinstance(whole[name], int) and whole[name] > 0
    generate = {"prompt": "Hello", "options": body["options"], "stream": False}
    assert served.client.post("/api/generate", json=generate).json()["response"] == whole["message"]["content"]


def test_a_model_is_always_loaded(served: Served) -> None:
    for path, body in (("chat", {"messages": []}), ("chat", {}), ("generate", {"keep_alive": 0}), ("generate", {})):
        answer = served.client.post(f"/api/{path}", json={"model": "tiny", **body}).json()
        assert answer["done"] is True and answer["done_reason"] == "load"


def test_a_call_and_its_result(served: Served) -> None:
    """The message of an answer is sent back as it came, and the conversation goes on."""
    messages: list[dict[str, Any]] = [{"role": "user", "content": "What is the weather in Oslo?"}]
    body = {"messages": messages, "tools": [WEATHER], "stream": False}
    forced = {"tool_choice": "required", "num_predict": 100, "seed": 1}
    first = served.client.post("/api/chat", json=body | {"options": forced}).json()
    (called,) = first["message"]["tool_calls"]
    assert called["function"]["name"] == "weather" and called["function"]["arguments"]["city"] in ("Oslo", "Rome")
    messages += [first["message"], {"role": "tool", "tool_name": "weather", "content": "rain"}]
    after = served.client.post("/api/chat", json=body | {"options": {"num_predict": 3}})
    assert after.json()["eval_count"] > 0, after.text
    assert after.headers["X-Edge-Stream-History"] == "continued"


def test_what_describes_the_model(served: Served) -> None:
    (model,) = served.client.get("/api/tags").json()["models"]
    assert model["name"] == model["model"] == "tiny" and len(model["digest"]) == 64
    assert model["details"]["family"] == "llama" and model["details"]["format"] == "gguf"
    (running,) = served.client.get("/api/ps").json()["models"]
    assert running["digest"] == model["digest"] and running["context_length"] == 256
    shown = served.client.post("/api/show", json={"model": "tiny", "verbose": True}).json()
    assert shown["model_info"]["general.architecture"] == "llama"
    assert shown["model_info"]["llama.context_length"] == served.engine.n_ctx_train
    assert "completion" in shown["capabilities"] and "tools" in shown["capabilities"]
    assert "im_start" in shown["template"]


def test_the_server_says_that_it_runs(served: Served) -> None:
    assert served.client.get("/api/version").json()["version"].count(".") == 2
    for path in ("/", "/api/version", "/api/tags"):
        head = served.client.head(path)
        assert head.status_code == 200 and head.content == b""
    assert "<html" in served.client.get("/").text
    assert served.client.head("/api/blobs/sha256:0").status_code == 400
    missing = served.client.get("/api/nothing")
    assert missing.status_code == 404 and list(missing.json()) == ["error"]


def test_embeddings_need_a_second_model(
    served: Served, tiny: Callable[[str], Any], load: Callable[..., Engine]
) -> None:
    refused = served.client.post("/api/embed", json={"input": "x"})
    assert refused.status_code == 501 and "--embedding-model" in refused.json()["error"]
    with Embedder(tiny("chat"), "mean") as embedder, serve(load("chat", n_ctx=64), embedder=embedder) as other:
        both = other.client.post("/api/embed", json={"input": ["One", "Two"]}).json()
        assert len(both["embeddings"]) == 2 and both["prompt_eval_count"] > 0
        one = other.client.post("/api/embeddings", json={"prompt": "One"}).json()["embedding"]
        assert one == both["embeddings"][0] and sum(x * x for x in one) == pytest.approx(1)
