"""One chat through every API of the server: the same messages and settings, in each API's form."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from serving import Served

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Api:
    """path, body: of a chat and its options (OpenAI's names). text: of the whole answer's JSON.

    part: what an object of a streamed answer adds to the text.
    """

    path: str
    body: Callable[[Messages, dict[str, Any]], dict[str, Any]]
    text: Callable[[Any], str]
    part: Callable[[Any], str]


def _split(messages: Messages) -> tuple[str | None, list[Mapping[str, Any]]]:
    system = messages[0]["content"] if messages[0]["role"] == "system" else None
    return system, [m for m in messages if m.get("role") != "system"]


def _anthropic(messages: Messages, options: dict[str, Any]) -> dict[str, Any]:
    system, others = _split(messages)
    return {"system": system, "messages": others, **options}


def _responses(messages: Messages, options: dict[str, Any]) -> dict[str, Any]:
    system, others = _split(messages)
    named = dict(options)
    return {"instructions": system, "input": others, "max_output_tokens": named.pop("max_tokens"), **named}


def _options(options: dict[str, Any]) -> dict[str, Any]:
    named = dict(options)
    return {"options": {"num_predict": named.pop("max_tokens"), **named}}


APIS: dict[str, Api] = {
    "chat": Api(
        "/v1/chat/completions",
        lambda messages, options: {"messages": messages, **options},
        lambda answer: answer["choices"][0]["message"]["content"],  # type: ignore[no-any-return]
        lambda chunk: chunk["choices"][0]["delta"].get("content") or "",
    ),
    "messages": Api(
        "/v1/messages",
        _anthropic,
        lambda answer: "".join(block["text"] for block in answer["content"]),
        lambda event: event.get("delta", {}).get("text", ""),  # type: ignore[no-any-return]
    ),
    "responses": Api(
        "/v1/responses",
        _responses,
        lambda answer: "".join(part["text"] for item in answer["output"] for part in item["content"]),
        lambda event: event.get("delta", ""),  # type: ignore[no-any-return]
    ),
    "ollama": Api(
        "/api/chat",
        lambda messages, options: {"messages": messages, **_options(options)},
        lambda answer: answer["message"]["content"],  # type: ignore[no-any-return]
        lambda line: line["message"]["content"],  # type: ignore[no-any-return]
    ),
}
TEXT_APIS: dict[str, Api] = {
    "completion": Api(
        "/v1/completions",
        lambda messages, options: options,
        lambda answer: answer["choices"][0]["text"],  # type: ignore[no-any-return]
        lambda chunk: chunk["choices"][0]["text"],  # type: ignore[no-any-return]
    ),
    "generate": Api(
        "/api/generate",
        lambda messages, options: {"raw": True, "prompt": options.pop("prompt"), **_options(options)},
        lambda answer: answer["response"],  # type: ignore[no-any-return]
        lambda line: line["response"],  # type: ignore[no-any-return]
    ),
}


@dataclass(frozen=True)
class Said:
    """An answer. history: how the request's conversation was matched."""

    text: str
    history: str


def ask(served: Served, name: str, messages: Messages, *, stream: bool = False, **options: Any) -> Said:
    """An answer through an API of APIS, or of TEXT_APIS, which are given the rendered prompt."""
    if name in TEXT_APIS:
        rendered = served.client.post("/apply-template", json={"messages": messages})
        options["prompt"] = rendered.json()["prompt"]
    api = (APIS | TEXT_APIS)[name]
    body = api.body(messages, options) | {"stream": stream}
    answer = served.client.post(api.path, json=body)
    assert answer.status_code == 200, answer.text
    history = answer.headers["X-Edge-Stream-History"]
    if not stream:
        return Said(api.text(answer.json()), history)
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines()]
    objects = [json.loads(line) for line in lines if line.startswith("{")]
    return Said("".join(api.part(one) for one in objects), history)
