"""OpenAI's other API: /v1/responses.

Nothing is stored: a request brings the whole conversation as `input`, and previous_response_id, conversation and
item_reference are refused. Beyond it, a body may have every field of /v1/chat/completions that does not mean something
else here: seed, grammar, min_p and so on.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import ConfigDict, Discriminator, Field, Tag

from edge_stream.server import errors
from edge_stream.server.apis.blocks import Block, Blocks, Step, whole_blocks
from edge_stream.server.apis.facts import progress
from edge_stream.server.apis.routes import Name, add_route, streamed
from edge_stream.server.errors import ApiError
from edge_stream.server.http.answering import AnswerForm, Answering, Collected, sse
from edge_stream.server.http.schemas import ChatRequest, MaxTokens, Open, translated
from edge_stream.server.scheduling.events import Delta, Done, Finished, Progress, Reading, Started

log = logging.getLogger("edge_stream.server")


class TextPart(Open):
    """A text, by either side."""

    type: Literal["input_text", "output_text", "text", "summary_text", "reasoning_text"]
    text: str


class RefusalPart(Open):
    """A text that declines."""

    type: Literal["refusal"]
    refusal: str


class FilePart(Open):
    """An image or a file, which is refused."""

    type: Literal["input_image", "input_file", "input_audio"]


Part = Annotated[TextPart | RefusalPart | FilePart, Field(discriminator="type")]


class MessageItem(Open):
    """One message. Its type may be left out."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[Part]


class CallItem(Open):
    """A call that the model made."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class CallOutputItem(Open):
    """What a call returned."""

    type: Literal["function_call_output"]
    call_id: str
    output: str | list[Part]


class ReasoningItem(Open):
    """What the model thought before an answer."""

    type: Literal["reasoning"]
    summary: list[TextPart] = Field(default_factory=list)
    content: list[TextPart] | None = None


def _item_type(item: Any) -> str:
    kind = item.get("type") if isinstance(item, Mapping) else getattr(item, "type", None)
    return str(kind or "message")


Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[CallOutputItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")],
    Discriminator(_item_type),
]


class Tool(Open):
    """A function that the model may call. Other types (web_search, custom, ...) are left out, as in llama-server."""

    type: str
    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None


class ToolChoice(Open):
    """The function that must be called."""

    type: str
    name: str | None = None


class TextFormat(Open):
    """What the answer must be."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None


class TextConfig(Open):
    """The form of the answer."""

    format: TextFormat | None = None


class Reasoning(Open):
    """How much to think."""

    effort: str | None = None


class ResponsesRequest(Open):
    """POST /v1/responses."""

    model_config = ConfigDict(extra="allow")

    input: str | list[Item]
    instructions: str | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    max_output_tokens: MaxTokens | None = None
    temperature: float | None = None
    top_p: float | None = None
    metadata: dict[str, Any] | None = None
    stream: bool | None = None


# what would need responses, prompts or files to be stored, or something else that this server has not
_REFUSED = ("previous_response_id", "conversation", "prompt", "background", "top_logprobs")


class Responses:
    """The route."""

    def __init__(self, router: APIRouter, answering: Answering) -> None:
        self.answering, self.alias = answering, answering.settings.alias
        options: dict[str, Any] = {"methods": ["POST"], "response_model": dict[str, Any], "responses": streamed()}
        add_route(router, "/v1/responses", self.respond, "OpenAI", **options)

    async def respond(self, body: ResponsesRequest, request: Request, x_conversation: Name = None) -> Any:
        """Answer a chat in the form of OpenAI's Responses API."""
        return await self.answering.chat(request, ResponseForm(self.alias, body), chat_request(body), x_conversation)


#
# requests
#


def chat_request(body: ResponsesRequest) -> ChatRequest:
    """The same request in the form that is used inside. Raises ApiError 400."""
    extra = body.model_extra or {}
    for name in _REFUSED:
        if extra.get(name):
            raise errors.invalid(f"{name} is not supported by /v1/responses: send the whole conversation as input")
    tools = _functions(body)
    skipped = sorted({tool.type[:64] for tool in body.tools or []} - {"function"})
    if skipped:
        log.info("tools that are no functions are left out of a request: %s", ", ".join(map(repr, skipped[:8])))
    fields: dict[str, Any] = {
        **extra,
        "n": 1,
        "stream": bool(body.stream),
        "messages": _messages(body),
        "tools": [_tool(tool) for tool in tools] or None,
        "tool_choice": _tool_choice(body.tool_choice),
        "parallel_tool_calls": body.parallel_tool_calls,
        "max_tokens": body.max_output_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
    }
    if body.reasoning and body.reasoning.effort:
        fields["reasoning_effort"] = body.reasoning.effort
    if body.text and body.text.format:
        form = body.text.format
        fields["response_format"] = {"type": form.type}
        if form.type == "json_schema":
            fields["response_format"]["json_schema"] = {"name": form.name, "schema": form.schema_}
    return translated(ChatRequest, fields)


def _messages(body: ResponsesRequest) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if body.instructions:
        messages.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        return [*messages, {"role": "user", "content": body.input}]
    for item in body.input:
        if isinstance(item, CallOutputItem):
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": _content(item.output)})
        elif isinstance(item, MessageItem) and item.role != "assistant":
            messages.append({"role": item.role, "content": _content(item.content)})
        else:
            _add_to_answer(messages, item)
    return messages


def _add_to_answer(messages: list[dict[str, Any]], item: MessageItem | CallItem | ReasoningItem) -> None:
    """Thinking, texts and calls that follow each other are one answer, written as one text."""
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": ""})
    answer = messages[-1]
    if isinstance(item, CallItem):
        function = {"name": item.name, "arguments": item.arguments}
        answer.setdefault("tool_calls", []).append({"id": item.call_id, "type": "function", "function": function})
    elif isinstance(item, ReasoningItem):
        text = "".join(part.text for part in item.content or item.summary)
        answer["reasoning_content"] = answer.get("reasoning_content", "") + text
    else:
        answer["content"] += item.content if isinstance(item.content, str) else "".join(_texts(item.content))


def _content(content: str | Sequence[Any]) -> str:
    """A message's content: parts are on lines of their own."""
    return content if isinstance(content, str) else "\n".join(_texts(content))


def _texts(parts: Sequence[Any]) -> list[str]:
    if any(isinstance(part, FilePart) for part in parts):
        raise errors.no_images()
    return [part.text if isinstance(part, TextPart) else part.refusal for part in parts]


def _functions(body: ResponsesRequest) -> list[Tool]:
    return [tool for tool in body.tools or [] if tool.type == "function"]


def _tool(tool: Tool) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    return {"type": "function", "function": function}


def _tool_choice(choice: str | ToolChoice | None) -> Any:
    if not isinstance(choice, ToolChoice):
        return choice
    if choice.type != "function":
        raise errors.invalid(f"a tool_choice of type {choice.type[:64]!r} is not supported: only 'function' is")
    return {"type": "function", "function": {"name": choice.name or ""}}


#
# answers
#


class ResponseForm(AnswerForm):
    """A response, or the events of one that is being written. An answer that was cut has the status `incomplete`.

    Its last event is response.completed all the same, as llama-server's: many clients wait for that one only.
    """

    def __init__(self, model: str, body: ResponsesRequest) -> None:
        super().__init__()
        self.id, self.model, self.body = "resp_" + secrets.token_hex(12), model, body
        self.created = int(time.time())
        self._blocks = Blocks()
        self._finished: Finished | None = None
        self._n_events = 0

    def whole(self, choices: Sequence[Collected], done: Sequence[Done]) -> dict[str, Any]:
        """The response."""
        (answer,) = choices
        response = self._completed(whole_blocks(answer), answer.finished, done[0])
        return {**response, "timings": done[0].timings, "edge_stream": done[0].info}

    def chunks(self, k: int, event: Progress) -> Iterable[bytes]:
        """The events; the last one waits for Done, which says that the turn is saved."""
        for kind, data in self._events(event):
            yield sse({"type": kind, "sequence_number": self._n_events, **data}, kind)
            self._n_events += 1

    def failure(self, error: ApiError) -> bytes:
        """An event."""
        data = {"sequence_number": self._n_events, "code": str(error.code), "message": error.body["error"]["message"]}
        return sse({"type": "error", "param": None, **data}, "error")

    def _events(self, event: Progress) -> Iterator[tuple[str, dict[str, Any]]]:
        if isinstance(event, Started):
            response = self._response("in_progress", [])
            yield "response.created", {"response": response}
            yield "response.in_progress", {"response": response, "edge_stream": event.info}
        elif isinstance(event, Reading):
            yield "response.in_progress", {"response": self._response("in_progress", []), **progress(event)}
        elif isinstance(event, Delta):
            steps = list(self._block_events(self._blocks.push(event)))
            if steps and event.timings:
                steps[-1][1]["timings"] = event.timings
            yield from steps
        elif isinstance(event, Finished):
            self._finished = event
            yield from self._block_events(self._blocks.end())
        elif isinstance(event, Done):
            facts = {"timings": event.timings, "edge_stream": event.info}
            yield "response.completed", {"response": self._completed(self._blocks.all, self._finished, event), **facts}

    def _block_events(self, steps: Iterable[Step]) -> Iterator[tuple[str, dict[str, Any]]]:
        for what, block, text in steps:
            at = {"output_index": block.number, "item_id": _item_id(block)}
            name = _EVENTS[block.kind]
            part: dict[str, Any] = {} if block.kind == "call" else {"content_index": 0}
            logprobs: dict[str, Any] = {"logprobs": []} if block.kind == "text" else {}
            if what == "open":
                item = _item(block, "in_progress")
                yield "response.output_item.added", {"output_index": block.number, "item": item}
                if part:
                    yield "response.content_part.added", {**at, **part, "part": _part(block)}
            elif what == "add":
                yield f"response.{name}.delta", {**at, **part, "delta": text, **logprobs}
            else:
                whole = {"arguments": block.text, "name": block.name} if block.kind == "call" else {"text": block.text}
                yield f"response.{name}.done", {**at, **part, **whole, **logprobs}
                if part:
                    yield "response.content_part.done", {**at, **part, "part": _part(block)}
                item = _item(block, self._status)
                yield "response.output_item.done", {"output_index": block.number, "item": item}

    @property
    def _status(self) -> str:
        return _status(self._finished)

    def _completed(self, blocks: Sequence[Block], finished: Finished | None, done: Done) -> dict[str, Any]:
        status = _status(finished)
        output = [_item(block, status if block is blocks[-1] else "completed") for block in blocks]
        usage = {
            "input_tokens": done.usage["prompt_tokens"],
            "input_tokens_details": {**done.usage["prompt_tokens_details"], "cache_write_tokens": 0},
            "output_tokens": done.usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": done.usage["total_tokens"],
        }
        return self._response(status, output, usage)

    def _response(self, status: str, output: list[Any], usage: dict[str, Any] | None = None) -> dict[str, Any]:
        body = self.body
        cut = {"reason": "max_output_tokens"} if status == "incomplete" else None
        said = body.model_dump(include={"tool_choice", "text", "reasoning"}, exclude_none=True, by_alias=True)
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "completed_at": int(time.time()) if usage else None,
            "status": status,
            "error": None,
            "incomplete_details": cut,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": self.model,
            "output": output,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": said.get("reasoning", {}),
            "store": False,
            "temperature": body.temperature,
            "text": said.get("text", {"format": {"type": "text"}}),
            "tool_choice": said.get("tool_choice", "auto"),
            "tools": [tool.model_dump(exclude_none=True) for tool in _functions(body)],
            "top_p": body.top_p,
            "truncation": "disabled",
            "usage": usage,
        }


_EVENTS = {"thinking": "reasoning_text", "text": "output_text", "call": "function_call_arguments"}


def _status(finished: Finished | None) -> str:
    return "incomplete" if finished and finished.reason == "length" else "completed"


def _item_id(block: Block) -> str:
    return {"thinking": "rs_", "text": "msg_", "call": "fc_"}[block.kind] + block.id


def _part(block: Block) -> dict[str, Any]:
    if block.kind == "thinking":
        return {"type": "reasoning_text", "text": block.text}
    return {"type": "output_text", "text": block.text, "annotations": [], "logprobs": []}


def _item(block: Block, status: str) -> dict[str, Any]:
    """A block as an item; with nothing in it while it is in progress."""
    item = {"id": _item_id(block), "status": status}
    parts = [] if status == "in_progress" else [_part(block)]
    if block.kind == "thinking":
        return {**item, "type": "reasoning", "summary": [], "content": parts}
    if block.kind == "text":
        return {**item, "type": "message", "role": "assistant", "content": parts}
    return {**item, "type": "function_call", "call_id": block.call_id, "name": block.name, "arguments": block.text}
