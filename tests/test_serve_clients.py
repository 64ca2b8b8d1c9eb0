"""Clients that people use, unmodified: of OpenAI, Anthropic and Ollama, LangChain, the llm command, schemathesis."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import WORDS, Served, serve

from edge_stream.engine import Engine


@pytest.fixture(scope="module")
def served(tiny: Callable[[str], Any]) -> Iterator[Served]:
    """A server that asks for a key."""
    with Engine.load(tiny("chat"), n_parallel=2, n_ctx=256, flash_attn="off", n_threads=1) as engine:
        with serve(engine, api_keys=("secret",)) as running:
            running.client.headers["Authorization"] = "Bearer secret"
            yield running


def test_openai_client(served: Served) -> None:
    import openai

    client = openai.OpenAI(base_url=served.url + "/v1", api_key="secret", max_retries=0)
    assert [model.id for model in client.models.list()] == ["tiny"]
    messages: list[Any] = [{"role": "system", "content": "Be brief."}]
    for turn in range(3):
        messages.append({"role": "user", "content": f"Question {turn}"})
        options: dict[str, Any] = {"seed": turn, "max_tokens": 40, "extra_body": {"grammar": WORDS}}
        chunks = list(
            client.chat.completions.create(
                model="tiny", messages=messages, stream=True, stream_options={"include_usage": True}, **options
            )
        )
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert chunks[-1].usage and chunks[-1].usage.completion_tokens > 0
        whole = client.chat.completions.create(model="tiny", messages=messages, **options)
        assert whole.choices[0].message.content == text
        assert whole.model_extra and whole.model_extra["edge_stream"]["history"] == "branched"
        messages.append({"role": "assistant", "content": text})
    completion = client.completions.create(model="tiny", prompt="Once", max_tokens=5)
    assert completion.usage and completion.usage.completion_tokens <= 5
    tool: Any = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}
    call = client.chat.completions.create(
        model="tiny", messages=messages[:2], tools=[tool], tool_choice="required", max_tokens=100
    )
    assert call.choices[0].message.tool_calls and call.choices[0].message.tool_calls[0].function.name == "now"
    with pytest.raises(openai.BadRequestError, match="n = 99"):
        client.chat.completions.create(model="tiny", messages=messages[:2], n=99)
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=served.url + "/v1", api_key="wrong").models.list()


def continued(served: Served) -> float:
    """Requests whose conversation was in the cache."""
    lines = served.client.get("/metrics").text.splitlines()
    return sum(
        float(line.split()[-1]) for line in lines if line.startswith('edge_stream_requests_total{history="continued"')
    )


def talk_past_the_cache(served: Served, say: Callable[[list[Any]], str], count: int = 12) -> None:
    """A dialogue longer than the cache, sent whole in every turn: each turn reads what is new only."""
    before, messages = continued(served), list[Any]()
    for turn in range(count):
        messages.append({"role": "user", "content": f"Question {turn} of {say.__name__}: what comes next, and why?"})
        messages.append({"role": "assistant", "content": say(messages)})
    assert all(m["content"].endswith(".") for m in messages[1::2])
    assert continued(served) == before + count - 1
    text = "".join(m["content"] for m in messages)
    n_tokens = len(served.client.post("/tokenize", json={"content": text}).json()["tokens"])
    assert n_tokens > served.engine.n_ctx


def test_openai_responses(served: Served) -> None:
    import openai
    from pydantic import BaseModel

    client = openai.OpenAI(base_url=served.url + "/v1", api_key="secret", max_retries=0)
    options: dict[str, Any] = {"model": "tiny", "max_output_tokens": 40, "extra_body": {"grammar": WORDS, "seed": 3}}
    response = client.responses.create(input="Hello", instructions="Be brief.", **options)
    assert response.status == "completed" and response.output_text.endswith(".") and response.usage
    with client.responses.stream(input="Hello", instructions="Be brief.", **options) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        final = stream.get_final_response()
    assert text == final.output_text == response.output_text
    assert final.usage and final.usage.output_tokens == response.usage.output_tokens

    def responses(messages: list[Any]) -> str:
        return client.responses.create(input=messages, **options).output_text

    talk_past_the_cache(served, responses)

    class Reply(BaseModel):
        yes: bool

    parsed = client.responses.parse(model="tiny", input="Well?", text_format=Reply, max_output_tokens=60)
    assert parsed.output_parsed is not None and parsed.output_parsed.yes in (True, False)
    tool: Any = {"type": "function", "name": "now", "parameters": {"type": "object", "properties": {}}, "strict": False}
    asked: list[Any] = [{"role": "user", "content": "What time is it?"}]
    with client.responses.stream(
        model="tiny",
        input=asked,
        tools=[tool],
        tool_choice="required",
        parallel_tool_calls=False,
        max_output_tokens=100,
        extra_body={"seed": 1},
    ) as stream:
        called = stream.get_final_response()
    (call,) = called.output
    assert call.type == "function_call" and call.name == "now"
    asked += [*called.output, {"type": "function_call_output", "call_id": call.call_id, "output": "noon"}]
    after = client.responses.create(model="tiny", input=asked, tools=[tool], max_output_tokens=3)
    assert after.output and after.model_extra and after.model_extra["edge_stream"]["history"] == "continued"
    with pytest.raises(openai.BadRequestError, match="previous_response_id"):
        client.responses.create(model="tiny", input="Hello", previous_response_id=response.id)


def test_anthropic_client(served: Served) -> None:
    anthropic = pytest.importorskip("anthropic", reason="the anthropic package is not installed")
    client = anthropic.Anthropic(base_url=served.url, api_key="secret", max_retries=0)
    options: dict[str, Any] = {"model": "tiny", "max_tokens": 40, "extra_body": {"grammar": WORDS, "seed": 3}}
    hello = [{"role": "user", "content": "Hello"}]
    message = client.messages.create(messages=hello, system="Be brief.", **options)
    assert message.stop_reason == "end_turn" and message.content[0].text.endswith(".")
    with client.messages.stream(messages=hello, system="Be brief.", **options) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == final.content[0].text == message.content[0].text
    assert final.usage.output_tokens == message.usage.output_tokens
    counted = client.messages.count_tokens(model="tiny", messages=hello, system="Be brief.")
    assert counted.input_tokens == message.usage.input_tokens + message.usage.cache_read_input_tokens

    def messages(messages: list[Any]) -> str:
        with client.messages.stream(messages=messages, **options) as stream:
            return str(stream.get_final_text())

    talk_past_the_cache(served, messages)
    tool = {"name": "now", "input_schema": {"type": "object", "properties": {}}}
    asked: list[Any] = [{"role": "user", "content": "What time is it?"}]
    with client.messages.stream(
        model="tiny",
        messages=asked,
        tools=[tool],
        tool_choice={"type": "any", "disable_parallel_tool_use": True},
        max_tokens=100,
        extra_body={"seed": 1},
    ) as stream:
        called = stream.get_final_message()
    (call,) = called.content
    assert called.stop_reason == "tool_use" and call.name == "now" and isinstance(call.input, dict)
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "noon"}
    asked += [called.to_param(), {"role": "user", "content": [result]}]
    after = client.messages.with_raw_response.create(model="tiny", messages=asked, tools=[tool], max_tokens=3)
    assert after.headers["X-Edge-Stream-History"] == "continued" and after.parse().usage.output_tokens
    with pytest.raises(anthropic.BadRequestError, match="17 stop strings"):
        client.messages.create(model="tiny", max_tokens=1, messages=hello, stop_sequences=["x"] * 17)
    with pytest.raises(anthropic.AuthenticationError):
        anthropic.Anthropic(base_url=served.url, api_key="wrong").messages.create(messages=hello, **options)


def test_ollama_client(served: Served) -> None:
    ollama = pytest.importorskip("ollama", reason="the ollama package is not installed")
    client = ollama.Client(host=served.url, headers={"Authorization": "Bearer secret"})
    assert [model.model for model in client.list().models] == ["tiny"]
    assert [model.context_length for model in client.ps().models] == [256]
    shown = client.show("tiny")
    assert shown.modelinfo["llama.context_length"] == served.engine.n_ctx_train
    assert "tools" in shown.capabilities
    options = {"grammar": WORDS, "seed": 3, "num_predict": 40}
    hello = [{"role": "user", "content": "Hello"}]
    whole = client.chat("tiny", hello, options=options)
    text = "".join(part.message.content for part in client.chat("tiny", hello, options=options, stream=True))
    assert text == whole.message.content and text.endswith(".") and whole.done_reason == "stop"
    assert client.generate("tiny", "Hello", options=options).response == text
    parts = list(client.generate("tiny", "Hello", options=options, stream=True))
    assert "".join(part.response for part in parts) == text and parts[-1].eval_count == whole.eval_count
    assert client.generate("tiny").done_reason == "load"

    def chat(messages: list[Any]) -> str:
        return str(client.chat("tiny", messages, options=options).message.content)

    talk_past_the_cache(served, chat)
    reply = {"type": "object", "properties": {"yes": {"type": "boolean"}}, "required": ["yes"]}
    formed = client.chat("tiny", hello, format=reply, options={"temperature": 0, "num_predict": 60})
    assert json.loads(formed.message.content)["yes"] in (True, False)

    zone = {"type": "string", "enum": ["UTC", "CET"]}
    parameters = {"type": "object", "properties": {"zone": zone}, "required": ["zone"]}
    now = {"type": "function", "function": {"name": "now", "description": "The time.", "parameters": parameters}}
    asked: list[Any] = [{"role": "user", "content": "What time is it?"}]
    forced = {"tool_choice": "required", "parallel_tool_calls": False, "num_predict": 400, "seed": 1, "temperature": 0}
    called = client.chat("tiny", asked, tools=[now], options=forced).message
    (call,) = called.tool_calls
    assert call.function.name == "now" and list(call.function.arguments) == ["zone"]
    before = continued(served)
    asked += [called, {"role": "tool", "tool_name": "now", "content": "noon"}]
    assert client.chat("tiny", asked, tools=[now], options={"num_predict": 3}).eval_count
    assert continued(served) == before + 1
    with pytest.raises(ollama.ResponseError, match="this server has one model"):
        client.pull("other")
    with pytest.raises(ollama.ResponseError, match="API key"):
        ollama.Client(host=served.url).list()


@pytest.mark.parametrize("responses", [False, True])
def test_langchain(served: Served, responses: bool) -> None:
    module = pytest.importorskip("langchain_openai", reason="the langchain-openai package is not installed")
    from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
    from pydantic import BaseModel

    def model(**extra: Any) -> Any:
        return module.ChatOpenAI(
            model="tiny",
            base_url=served.url + "/v1",
            api_key="secret",
            max_retries=0,
            max_tokens=60,
            use_responses_api=responses,
            extra_body=extra,
        )

    words = model(grammar=WORDS, seed=3)
    whole = words.invoke([("system", "Be brief."), ("user", "Hello")])
    parts = list(words.stream([("system", "Be brief."), ("user", "Hello")]))
    assert "".join(part.text for part in parts) == whole.text and whole.text.endswith(".")

    def said(messages: list[Any]) -> str:
        kinds = {"user": HumanMessage, "assistant": AIMessage}
        return str(words.invoke([kinds[m["role"]](m["content"]) for m in messages]).text)

    said.__name__ = f"langchain {responses}"
    talk_past_the_cache(served, said)

    class Reply(BaseModel):
        """Whether it is so."""

        yes: bool

    formed = model(seed=1).with_structured_output(Reply, method="json_schema").invoke("Well?")
    assert formed.yes in (True, False)

    def now() -> str:
        """The time."""
        return "noon"

    question = HumanMessage(f"What time is it? {responses}")
    called = model(seed=1).bind_tools([now], tool_choice="any", parallel_tool_calls=False).invoke([question])
    (call,) = called.tool_calls
    assert call["name"] == "now"
    before = continued(served)
    result = ToolMessage(now(), tool_call_id=call["id"])
    assert model(seed=1).bind_tools([now]).invoke([question, called, result]).usage_metadata["output_tokens"]
    assert continued(served) == before + 1


def test_llm_command(served: Served, tmp_path: Path) -> None:
    """A chat of three turns, which llm resends each time."""
    model = {"model_id": "es", "model_name": "tiny", "api_base": served.url + "/v1", "api_key_name": "es"}
    lines = [f"- {json.dumps(model)}\n"]
    (tmp_path / "extra-openai-models.yaml").write_text("".join(lines))
    (tmp_path / "keys.json").write_text(json.dumps({"es": "secret"}))
    env = os.environ | {"LLM_USER_PATH": str(tmp_path), "LLM_LOAD_PLUGINS": ""}
    llm = [sys.executable, "-m", "llm", "-m", "es", "-o", "max_tokens", "8", "-o", "seed", "1"]

    before = continued(served)
    for i, more in enumerate(([], ["-c"], ["-c", "--no-stream"])):
        done = subprocess.run(
            [*llm, *more, f"Say {i}"], env=env, capture_output=True, timeout=60, stdin=subprocess.DEVNULL
        )
        assert done.returncode == 0, done.stderr
    assert continued(served) == before + 2


def test_the_openapi_document_is_true_and_nothing_breaks(served: Served) -> None:
    """Hundreds of made-up requests: no 5xx, and answers are of the status and form that the document gives."""
    import schemathesis
    from hypothesis import HealthCheck, Phase, settings

    schema = schemathesis.openapi.from_url(served.url + "/openapi.json", headers={"Authorization": "Bearer secret"})
    seen: dict[int, int] = {}
    for result in schema.get_all_operations():
        operation = result.ok()
        if operation.path in ("/infill", "/embedding", "/v1/embeddings"):
            continue  # 501 with this model

        @settings(
            max_examples=12,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        def check(case: Any) -> None:
            if isinstance(case.body, dict):  # short answers
                case.body |= {"max_tokens": 2, "max_output_tokens": 2}
                case.body.pop("max_completion_tokens", None)
                if case.path.startswith("/api/"):
                    case.body["options"] = {"num_predict": 2}
            answer = case.call(headers={"Authorization": "Bearer secret"}, timeout=30)
            seen[answer.status_code] = seen.get(answer.status_code, 0) + 1
            if answer.status_code != 501:  # this model cannot do that, and says so
                case.validate_response(answer, checks=CHECKS)

        from hypothesis import given

        given(case=operation.as_strategy())(check)()
    assert seen[200] > 20 and not any(code >= 500 for code in seen if code != 501)


def _checks() -> tuple[Any, ...]:
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        response_schema_conformance,
        status_code_conformance,
    )

    return not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance


CHECKS = _checks()
