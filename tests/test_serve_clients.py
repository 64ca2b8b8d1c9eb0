"""Clients that people use, unmodified: the openai package, the llm command, schemathesis over the OpenAPI document."""

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


def test_llm_command(served: Served, tmp_path: Path) -> None:
    """A chat of three turns, which llm resends each time."""
    model = {"model_id": "es", "model_name": "tiny", "api_base": served.url + "/v1", "api_key_name": "es"}
    lines = [f"- {json.dumps(model)}\n"]
    (tmp_path / "extra-openai-models.yaml").write_text("".join(lines))
    (tmp_path / "keys.json").write_text(json.dumps({"es": "secret"}))
    env = os.environ | {"LLM_USER_PATH": str(tmp_path), "LLM_LOAD_PLUGINS": ""}
    llm = [sys.executable, "-m", "llm", "-m", "es", "-o", "max_tokens", "8", "-o", "seed", "1"]

    def continued() -> float:
        lines = served.client.get("/metrics").text.splitlines()
        return sum(
            float(line.split()[-1])
            for line in lines
            if line.startswith('edge_stream_requests_total{history="continued"')
        )

    before = continued()
    for i, more in enumerate(([], ["-c"], ["-c", "--no-stream"])):
        done = subprocess.run(
            [*llm, *more, f"Say {i}"], env=env, capture_output=True, timeout=60, stdin=subprocess.DEVNULL
        )
        assert done.returncode == 0, done.stderr
    assert continued() == before + 2


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
                case.body["max_tokens"] = 2
                case.body.pop("max_completion_tokens", None)
            answer = case.call(headers={"Authorization": "Bearer secret"}, timeout=30)
            seen[answer.status_code] = seen.get(answer.status_code, 0) + 1
            case.validate_response(answer, checks=CHECKS)

        from hypothesis import given

        given(case=operation.as_strategy())(check)()
    assert seen[200] > 20 and not any(code >= 500 for code in seen)


def _checks() -> tuple[Any, ...]:
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        response_schema_conformance,
        status_code_conformance,
    )

    return not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance


CHECKS = _checks()
