"""A chat in the forms of four APIs: requests out of one history, and what their streamed answers say.

Messages are OpenAI's (`reasoning_content`, `tool_calls` and role `tool` among them), and so are the options; each API
of APIS turns them into its own. A conversation may go on in any of them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

Message = dict[str, Any]
Options = dict[str, Any]


@dataclass
class Reply:
    """A streamed answer. finish: stop, length or tool_calls; None if the stream ended without its end.

    known: header X-Edge-Stream-History. info: `edge_stream`, of the APIs that send it. ttft: seconds to the first part.
    """

    status: int
    text: str = ""
    thinking: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    finish: str | None = None
    n_tokens: int = 0
    known: str = ""
    info: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    ttft: float = 0.0

    @property
    def message(self) -> Message:
        """As it is sent back."""
        out: Message = {"role": "assistant", "content": self.text}
        if self.thinking:
            out["reasoning_content"] = self.thinking
        if self.calls:
            out["tool_calls"] = self.calls
        return out

    def add(self, text: str = "", thinking: str = "") -> None:
        """More of it."""
        self.text += text or ""
        self.thinking += thinking or ""

    def add_call(self, call_id: str, name: str, arguments: str) -> None:
        """A call."""
        self.calls.append({"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}})


def _lines(response: httpx.Response) -> Iterator[dict[str, Any] | None]:
    """The objects of a stream; None for [DONE]."""
    for line in response.iter_lines():
        data = line.removeprefix("data: ")
        if data.startswith("{"):
            yield json.loads(data)
        elif data == "[DONE]":
            yield None


#
# OpenAI's chat completions
#


def _openai(messages: Sequence[Message], options: Options) -> dict[str, Any]:
    return {"messages": list(messages), "stream_options": {"include_usage": True}, **options}


def _read_openai(reply: Reply, objects: Iterator[dict[str, Any] | None]) -> None:
    finish = None
    for chunk in objects:
        if chunk is None:
            reply.finish = finish
            return
        if "error" in chunk:
            reply.error = chunk["error"]["message"]
            return
        for choice in chunk["choices"]:
            delta = choice["delta"]
            reply.add(delta.get("content"), delta.get("reasoning_content"))
            for call in delta.get("tool_calls") or ():
                if call["index"] == len(reply.calls):
                    reply.add_call("", "", "")
                whole, more = reply.calls[call["index"]], call.get("function", {})
                whole["id"] = call.get("id") or whole["id"]
                for name in ("name", "arguments"):
                    whole["function"][name] += more.get(name) or ""
            finish = choice.get("finish_reason") or finish
        reply.info = chunk.get("edge_stream") or reply.info
        reply.n_tokens = (chunk.get("usage") or {}).get("completion_tokens", reply.n_tokens)
        note_first(reply)


#
# Anthropic's messages
#


def _anthropic(messages: Sequence[Message], options: Options) -> dict[str, Any]:
    body = dict(options)
    out: list[Message] = []
    for m in messages:
        if m["role"] == "system":
            body["system"] = m["content"]
        elif m["role"] == "tool":
            block = {"type": "tool_result", "tool_use_id": m["tool_call_id"], "content": m["content"]}
            out.append({"role": "user", "content": [block]})
        elif m["role"] == "assistant" and (m.get("tool_calls") or m.get("reasoning_content")):
            blocks: list[dict[str, Any]] = []
            if m.get("reasoning_content"):
                blocks.append({"type": "thinking", "thinking": m["reasoning_content"], "signature": "unsigned"})
            if m["content"]:
                blocks.append({"type": "text", "text": m["content"]})
            for call in m.get("tool_calls") or ():
                made = call["function"]
                one = {"id": call["id"], "name": made["name"], "input": json.loads(made["arguments"])}
                blocks.append({"type": "tool_use", **one})
            out.append({"role": "assistant", "content": blocks})
        else:
            out.append({"role": m["role"], "content": m["content"]})
    if tools := body.pop("tools", None):
        functions = [tool["function"] for tool in tools]
        body["tools"] = [
            {"name": f["name"], "description": f["description"], "input_schema": f["parameters"]} for f in functions
        ]
    if choice := body.pop("tool_choice", None):
        parallel = body.pop("parallel_tool_calls", True)
        body["tool_choice"] = {"type": "any" if choice == "required" else choice}
        body["tool_choice"]["disable_parallel_tool_use"] = not parallel
    if schema := body.pop("json_schema", None):
        body["output_config"] = {"format": {"type": "json_schema", "schema": schema}}
    if "enable_thinking" in body:
        thinks = body.pop("enable_thinking")
        body["thinking"] = {"type": "enabled", "budget_tokens": 1024} if thinks else {"type": "disabled"}
    return {"messages": out, **body}


def _read_anthropic(reply: Reply, objects: Iterator[dict[str, Any] | None]) -> None:
    finish = None
    for event in objects:
        assert event is not None
        kind = event["type"]
        if kind == "error":
            reply.error = event["error"]["message"]
        elif kind == "content_block_start" and event["content_block"]["type"] == "tool_use":
            reply.add_call(event["content_block"]["id"], event["content_block"]["name"], "")
        elif kind == "content_block_delta":
            delta = event["delta"]
            reply.add(delta.get("text"), delta.get("thinking"))
            if "partial_json" in delta:
                reply.calls[-1]["function"]["arguments"] += delta["partial_json"]
        elif kind == "message_delta":
            reasons = {"end_turn": "stop", "max_tokens": "length", "tool_use": "tool_calls"}
            finish = reasons[event["delta"]["stop_reason"]]
            reply.n_tokens = event["usage"]["output_tokens"]
        elif kind == "message_stop":
            reply.finish = finish
        note_first(reply)


#
# OpenAI's responses
#


def _responses(messages: Sequence[Message], options: Options) -> dict[str, Any]:
    body = dict(options)
    items: list[dict[str, Any]] = []
    for m in messages:
        if m["role"] == "system":
            body["instructions"] = m["content"]
        elif m["role"] == "tool":
            items.append({"type": "function_call_output", "call_id": m["tool_call_id"], "output": m["content"]})
        else:
            if m.get("reasoning_content"):
                parts = [{"type": "reasoning_text", "text": m["reasoning_content"]}]
                items.append({"type": "reasoning", "summary": [], "content": parts})
            if m["content"] or not m.get("tool_calls"):
                items.append({"role": m["role"], "content": m["content"]})
            for call in m.get("tool_calls") or ():
                items.append({"type": "function_call", "call_id": call["id"], **call["function"]})
    if tools := body.pop("tools", None):
        body["tools"] = [{"type": "function", **tool["function"]} for tool in tools]
    if schema := body.pop("json_schema", None):
        body["text"] = {"format": {"type": "json_schema", "name": "answer", "schema": schema}}
    if "enable_thinking" in body:
        body["reasoning"] = {"effort": "medium" if body.pop("enable_thinking") else "none"}
    body["max_output_tokens"] = body.pop("max_tokens")
    return {"input": items, **body}


def _read_responses(reply: Reply, objects: Iterator[dict[str, Any] | None]) -> None:
    for event in objects:
        assert event is not None
        kind = event["type"].removeprefix("response.")
        reply.info = event.get("edge_stream") or reply.info
        if kind == "error":
            reply.error = event["message"]
        elif kind == "output_text.delta":
            reply.add(event["delta"])
        elif kind == "reasoning_text.delta":
            reply.add(thinking=event["delta"])
        elif kind == "output_item.done" and event["item"]["type"] == "function_call":
            reply.add_call(event["item"]["call_id"], event["item"]["name"], event["item"]["arguments"])
        elif kind == "completed":
            response = event["response"]
            ended = "length" if response["status"] == "incomplete" else "stop"
            reply.finish = "tool_calls" if reply.calls and ended == "stop" else ended
            reply.n_tokens = response["usage"]["output_tokens"]
        note_first(reply)


#
# Ollama's chat
#


def _ollama(messages: Sequence[Message], options: Options) -> dict[str, Any]:
    body = dict(options)
    out: list[Message] = []
    for m in messages:
        one = {k: v for k, v in m.items() if k not in ("reasoning_content", "tool_calls")}
        if m.get("reasoning_content"):
            one["thinking"] = m["reasoning_content"]
        for call in m.get("tool_calls") or ():
            made = {"name": call["function"]["name"], "arguments": json.loads(call["function"]["arguments"])}
            one.setdefault("tool_calls", []).append({"id": call["id"], "function": made})
        out.append(one)
    asked: dict[str, Any] = {"messages": out, "stream": body.pop("stream", True)}
    if tools := body.pop("tools", None):
        asked["tools"] = tools
    if schema := body.pop("json_schema", None):
        asked["format"] = schema
    if "enable_thinking" in body:
        asked["think"] = body.pop("enable_thinking")
    body["num_predict"] = body.pop("max_tokens")
    return {**asked, "options": body}


def _read_ollama(reply: Reply, objects: Iterator[dict[str, Any] | None]) -> None:
    for line in objects:
        assert line is not None
        if "error" in line:
            reply.error = line["error"]
            return
        said = line["message"]
        reply.add(said["content"], said.get("thinking"))
        for call in said.get("tool_calls") or ():
            made = call["function"]
            reply.add_call(call["id"], made["name"], json.dumps(made["arguments"], ensure_ascii=False))
        if line["done"]:
            ended = line["done_reason"]
            reply.finish = "tool_calls" if reply.calls and ended == "stop" else ended
            reply.n_tokens = line["eval_count"]
        note_first(reply)


@dataclass(frozen=True)
class Api:
    """path; body: of a history and options; read: the objects of a streamed answer."""

    path: str
    body: Callable[[Sequence[Message], Options], dict[str, Any]]
    read: Callable[[Reply, Iterator[dict[str, Any] | None]], None]


APIS = {
    "chat completions": Api("/v1/chat/completions", _openai, _read_openai),
    "Anthropic": Api("/v1/messages", _anthropic, _read_anthropic),
    "Responses": Api("/v1/responses", _responses, _read_responses),
    "Ollama": Api("/api/chat", _ollama, _read_ollama),
}


def note_first(reply: Reply) -> None:
    """Note when the first part of the answer was there: `ttft` is negative until then, the time of sending."""
    if reply.ttft < 0 and (reply.text or reply.thinking or reply.calls):
        reply.ttft += time.perf_counter()


def ask(client: httpx.Client, name: str, messages: Sequence[Message], conversation: str, **options: Any) -> Reply:
    """Send a history in the form of an API, and read the streamed answer."""
    api = APIS[name]
    data = json.dumps({**api.body(messages, options), "stream": True}).encode()
    start = time.perf_counter()
    with client.stream("POST", api.path, content=data, headers={"X-Conversation": conversation}) as response:
        reply = Reply(response.status_code, known=response.headers.get("X-Edge-Stream-History", ""), ttft=-start)
        if response.status_code != 200:
            reply.error = response.read().decode(errors="replace")
        else:
            api.read(reply, _lines(response))
    return reply
