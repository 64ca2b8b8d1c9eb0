"""Anthropic's API: /v1/messages and /v1/messages/count_tokens.

Beyond it, a body may have every field of /v1/chat/completions that does not mean something else here: seed, grammar,
min_p and so on. `model`, `metadata`, `cache_control` and the headers anthropic-version and anthropic-beta are accepted
and change nothing.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import ConfigDict, Field

from edge_stream.server import errors
from edge_stream.server.apis.blocks import Block, Blocks, Step, whole_blocks
from edge_stream.server.apis.routes import Name, add_route, error_responses, streamed
from edge_stream.server.errors import ApiError
from edge_stream.server.http.answering import AnswerForm, Answering, Collected, sse
from edge_stream.server.http.schemas import ChatRequest, Open, translated
from edge_stream.server.scheduling.events import Delta, Done, Finished, Progress, Started

# Claude Code begins its system prompt with this; a part of it differs in every request, and no model needs it
_BILLING_HEADER = re.compile(r"\Ax-anthropic-billing-header:(?:\s*\w+=[^;\s]*;)+\s*")

# local thinking is not signed, but clients drop thinking whose signature is empty
_SIGNATURE = "unsigned"

_ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
}


class TextBlock(Open):
    """A text."""

    type: Literal["text"]
    text: str


class ImageBlock(Open):
    """An image, which is refused."""

    type: Literal["image"]


class ThinkingBlock(Open):
    """What the model thought before an answer."""

    type: Literal["thinking"]
    thinking: str


class RedactedThinkingBlock(Open):
    """Thinking that only Anthropic can read; left out."""

    type: Literal["redacted_thinking"]


class ToolUseBlock(Open):
    """A call that the model made."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class ToolResultBlock(Open):
    """What a call returned."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: str | list[Annotated[TextBlock | ImageBlock, Field(discriminator="type")]] | None = None


AnyBlock = Annotated[
    TextBlock | ImageBlock | ThinkingBlock | RedactedThinkingBlock | ToolUseBlock | ToolResultBlock,
    Field(discriminator="type"),
]


class Message(Open):
    """One message."""

    role: Literal["user", "assistant", "system"]
    content: str | list[AnyBlock]


class Tool(Open):
    """A function that the model may call. type: of tools that Anthropic defines; only `custom` is known here."""

    name: str
    type: str | None = None
    description: str | None = None
    input_schema: dict[str, Any] | None = None


class ToolChoice(Open):
    """Whether a tool must be called, and which."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class ThinkingConfig(Open):
    """Whether to think, and for how many tokens at most."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None


class OutputFormat(Open):
    """A JSON schema that the answer must follow."""

    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfig(Open):
    """How much to think, and the form of the answer."""

    effort: str | None = None
    format: OutputFormat | None = None


class CountTokensRequest(Open):
    """POST /v1/messages/count_tokens."""

    model_config = ConfigDict(extra="allow")

    messages: list[Message]
    system: str | list[TextBlock] | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: ThinkingConfig | None = None
    output_config: OutputConfig | None = None


class MessagesRequest(CountTokensRequest):
    """POST /v1/messages. Without max_tokens the server's default holds."""

    max_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    stop_sequences: list[str] | None = None
    stream: bool = False


class AnthropicError(Open):
    """What went wrong."""

    type: str
    message: str


class AnthropicErrorBody(Open):
    """Every answer other than success."""

    type: Literal["error"]
    error: AnthropicError


class Anthropic:
    """The routes."""

    def __init__(self, router: APIRouter, answering: Answering) -> None:
        self.answering, self.alias = answering, answering.settings.alias
        failures = error_responses(AnthropicErrorBody)
        for path, handler, described in (
            ("/v1/messages", self.messages, failures | streamed()),
            ("/v1/messages/count_tokens", self.count_tokens, failures),
        ):
            options: dict[str, Any] = {"methods": ["POST"], "responses": described, "response_model": dict[str, Any]}
            add_route(router, path, handler, "Anthropic", **options)

    async def messages(self, body: MessagesRequest, request: Request, x_conversation: Name = None) -> Any:
        """Answer a chat in the form of Anthropic's API."""
        return await self.answering.chat(request, MessageForm(self.alias), chat_request(body), x_conversation)

    async def count_tokens(self, body: CountTokensRequest) -> dict[str, int]:
        """The number of tokens of a prompt, rendered anew."""
        return await self.answering.count_tokens(chat_request(body))


#
# requests
#


def chat_request(body: CountTokensRequest) -> ChatRequest:
    """The same request in the form that is used inside. Raises ApiError 400."""
    fields: dict[str, Any] = {**(body.model_extra or {}), "n": 1, "messages": list(_messages(body))}
    if isinstance(body, MessagesRequest):
        fields |= {"stream": body.stream, "max_tokens": body.max_tokens}
        if body.stop_sequences:
            fields["stop"] = body.stop_sequences
    if body.tools:
        fields["tools"] = [_tool(tool) for tool in body.tools]
    if choice := body.tool_choice:
        named = {"type": "function", "function": {"name": choice.name or ""}}
        fields["tool_choice"] = {"any": "required", "tool": named}.get(choice.type, choice.type)
        if choice.disable_parallel_tool_use is not None:
            fields["parallel_tool_calls"] = not choice.disable_parallel_tool_use
    if thinking := body.thinking:
        fields["enable_thinking"] = thinking.type != "disabled"
        if thinking.type == "enabled":
            fields["thinking_budget_tokens"] = thinking.budget_tokens
    if config := body.output_config:
        if config.effort:
            fields["reasoning_effort"] = config.effort
        if config.format:
            fields["response_format"] = {"type": "json_schema", "json_schema": {"schema": config.format.schema_}}
    return translated(ChatRequest, fields)


def _messages(body: CountTokensRequest) -> Iterator[dict[str, Any]]:
    if body.system:
        parts = [body.system] if isinstance(body.system, str) else [block.text for block in body.system]
        parts = [text for text in (_BILLING_HEADER.sub("", part) for part in parts) if text]
        if parts:
            yield {"role": "system", "content": "\n".join(parts)}
    for message in body.messages:
        if isinstance(message.content, str):
            yield {"role": message.role, "content": message.content}
        elif message.role == "assistant":
            yield _assistant(message.content)
        else:
            yield from _inputs(message.role, message.content)


def _assistant(blocks: Sequence[Any]) -> dict[str, Any]:
    """One answer. Its texts are joined without a separator: they were written as one text."""
    message: dict[str, Any] = {"role": "assistant", "content": ""}
    for block in blocks:
        if isinstance(block, TextBlock):
            message["content"] += block.text
        elif isinstance(block, ThinkingBlock):
            message["reasoning_content"] = message.get("reasoning_content", "") + block.thinking
        elif isinstance(block, ToolUseBlock):
            function = {"name": block.name, "arguments": json.dumps(block.input, ensure_ascii=False)}
            message.setdefault("tool_calls", []).append({"id": block.id, "type": "function", "function": function})
        elif not isinstance(block, RedactedThinkingBlock):
            raise errors.invalid(f"an assistant's message cannot hold a block of type {block.type!r}")
    return message


def _inputs(role: str, blocks: Sequence[Any]) -> Iterator[dict[str, Any]]:
    """Messages to the model, in the order of the blocks: each result of a call is a message of its own."""
    texts: list[str] = []
    for block in blocks:
        if isinstance(block, TextBlock):
            texts.append(block.text)
        elif isinstance(block, ToolResultBlock):
            if texts:
                yield {"role": role, "content": "\n".join(texts)}
                texts = []
            content = block.content if isinstance(block.content, str) else _result(block.content or ())
            yield {"role": "tool", "tool_call_id": block.tool_use_id, "content": content}
        elif isinstance(block, ImageBlock):
            raise errors.no_images()
        else:
            raise errors.invalid(f"a message by the {role} cannot hold a block of type {block.type!r}")
    if texts:
        yield {"role": role, "content": "\n".join(texts)}


def _result(blocks: Sequence[TextBlock | ImageBlock]) -> str:
    texts = [block.text for block in blocks if isinstance(block, TextBlock)]
    if len(texts) < len(blocks):
        raise errors.no_images()
    return "\n".join(texts)


def _tool(tool: Tool) -> dict[str, Any]:
    if tool.type not in (None, "custom"):
        raise errors.invalid(f"tools of type {tool.type[:64]!r} are not supported: only those of type 'custom' are")
    function = {"name": tool.name, "description": tool.description, "parameters": tool.input_schema}
    return {"type": "function", "function": function}


#
# answers
#


class MessageForm(AnswerForm):
    """A message, or the events of one that is being written."""

    def __init__(self, model: str) -> None:
        super().__init__()
        self.id, self.model = "msg_" + secrets.token_hex(12), model
        self._blocks = Blocks()
        self._finished: Finished | None = None

    def whole(self, choices: Sequence[Collected], done: Sequence[Done]) -> dict[str, Any]:
        """The message."""
        (answer,) = choices
        content = [_block(block, whole=True) for block in whole_blocks(answer)]
        usage = {**_input_usage(done[0].usage), "output_tokens": done[0].usage["completion_tokens"]}
        return {**self._message(content), **_stop(answer.finished), "usage": usage}

    def chunks(self, k: int, event: Progress) -> Iterable[bytes]:
        """The events; the last ones wait for Done, which says that the turn is saved."""
        return (sse(data, data["type"]) for data in self._events(event))

    def failure(self, error: ApiError) -> bytes:
        """An event."""
        return sse(error_body(error), "error")

    def _events(self, event: Progress) -> Iterator[dict[str, Any]]:
        if isinstance(event, Started):
            info = event.info
            prompt = {
                "prompt_tokens": info["n_past"] + info["n_to_read"],
                "prompt_tokens_details": {"cached_tokens": info["n_reused"]},
            }
            usage = {**_input_usage(prompt), "output_tokens": 0}
            yield {"type": "message_start", "message": {**self._message([]), **_stop(None), "usage": usage}}
            yield {"type": "ping"}
        elif isinstance(event, Delta):
            yield from self._block_events(self._blocks.push(event))
        elif isinstance(event, Finished):
            self._finished = event
            yield from self._block_events(self._blocks.end())
        elif isinstance(event, Done):
            usage = {**_input_usage(event.usage), "output_tokens": event.usage["completion_tokens"]}
            yield {"type": "message_delta", "delta": _stop(self._finished), "usage": usage}
            yield {"type": "message_stop"}

    def _block_events(self, steps: Iterable[Step]) -> Iterator[dict[str, Any]]:
        for what, block, text in steps:
            at = {"index": block.number}
            if what == "open":
                yield {"type": "content_block_start", **at, "content_block": _block(block, whole=False)}
            elif what == "add":
                kind, name = _DELTAS[block.kind]
                yield {"type": "content_block_delta", **at, "delta": {"type": kind, name: text}}
            else:
                if block.kind == "thinking":
                    signature = {"type": "signature_delta", "signature": _SIGNATURE}
                    yield {"type": "content_block_delta", **at, "delta": signature}
                yield {"type": "content_block_stop", **at}

    def _message(self, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "type": "message", "role": "assistant", "model": self.model, "content": content}


_DELTAS = {
    "thinking": ("thinking_delta", "thinking"),
    "text": ("text_delta", "text"),
    "call": ("input_json_delta", "partial_json"),
}


def _block(block: Block, *, whole: bool) -> dict[str, Any]:
    """A block; with nothing in it while it is being written."""
    text = block.text if whole else ""
    if block.kind == "thinking":
        return {"type": "thinking", "thinking": text, "signature": _SIGNATURE if whole else ""}
    if block.kind == "text":
        return {"type": "text", "text": text}
    arguments = (whole and block.arguments) or {}
    return {"type": "tool_use", "id": block.call_id, "name": block.name, "input": arguments}


def _stop(finished: Finished | None) -> dict[str, Any]:
    if finished is None:
        return {"stop_reason": None, "stop_sequence": None}
    if finished.how == "stop" and finished.stop_string is not None and finished.reason == "stop":
        return {"stop_reason": "stop_sequence", "stop_sequence": finished.stop_string}
    reasons = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
    return {"stop_reason": reasons[finished.reason], "stop_sequence": None}


def _input_usage(usage: dict[str, Any]) -> dict[str, int]:
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return {
        "input_tokens": usage["prompt_tokens"] - cached,
        "cache_read_input_tokens": cached,
        "cache_creation_input_tokens": 0,
    }


def error_body(error: ApiError) -> dict[str, Any]:
    """An error as Anthropic's API has it."""
    kind = _ERROR_TYPES.get(error.code, "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": error.body["error"]["message"]}}
