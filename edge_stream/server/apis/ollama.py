"""Ollama's API, as its clients use it to chat: /api/chat, /api/generate, and what describes the model.

/api/embed is in embeddings.py.

The model is the one that the server was started with: whatever a request names, it answers, and none is pulled, copied
or deleted. `keep_alive` and the options of loading (num_ctx, num_gpu, ...) change nothing: the cache was made at the
start, and a conversation may be longer than it. Other options mean what they do in /v1/chat/completions.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime, timezone
from hashlib import sha256
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import Field

from edge_stream.server import errors
from edge_stream.server.apis.blocks import Block, Blocks, whole_blocks
from edge_stream.server.apis.routes import Name, add_route, error_responses, streamed
from edge_stream.server.errors import ApiError
from edge_stream.server.http.answering import AnswerForm, Answering, Collected, to_json
from edge_stream.server.http.schemas import ChatRequest, CompletionRequest, Open, translated
from edge_stream.server.scheduling.events import Delta, Done, Finished, Progress

API_VERSION = "0.12.6"  # of Ollama, whose API this is: clients ask for it to know what they can use

_NDJSON = "application/x-ndjson"
_NEVER = "9999-12-31T23:59:59Z"  # when the model is unloaded


class CalledFunction(Open):
    """A function, and its arguments as an object."""

    name: str
    arguments: dict[str, Any] = Field(default_factory=dict)


class ToolCall(Open):
    """A call that the model made."""

    id: str | None = None
    function: CalledFunction


class Message(Open):
    """One message."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    thinking: str | None = None
    images: list[Any] | None = None
    tool_calls: list[ToolCall] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None


class Options(Open, extra="allow"):
    """How to sample. -1 and -2 of num_predict: without end."""

    num_predict: Annotated[int, Field(ge=-2, le=2**31 - 1)] | None = None


class Asked(Open):
    """What chat and generate have in common."""

    model: str | None = None
    stream: bool | None = None
    format: Literal["", "json"] | dict[str, Any] | None = None
    options: Options | None = None
    think: bool | Literal["low", "medium", "high"] | None = None


class OllamaChatRequest(Asked):
    """POST /api/chat. Without messages it answers that the model is loaded."""

    messages: list[Message] | None = None
    tools: list[dict[str, Any]] | None = None


class GenerateRequest(Asked):
    """POST /api/generate. raw: the prompt is read as it is, without the chat template; so it is with a suffix."""

    prompt: str | None = None
    suffix: str | None = None
    system: str | None = None
    template: str | None = None
    context: list[int] | None = None
    raw: bool | None = None
    images: list[Any] | None = None


class ModelName(Open):
    """POST /api/show."""

    model: str | None = None


class OllamaErrorBody(Open):
    """Every answer other than success."""

    error: str


class Ollama:
    """The routes."""

    def __init__(self, router: APIRouter, answering: Answering) -> None:
        self.answering, self.engine = answering, answering.engine
        self.alias, file = answering.settings.alias, self.engine.model_path
        self.changed = _time(file.stat().st_mtime)
        self.digest = sha256(f"{file}\n{self.changed}\n{self.engine.n_bytes}".encode()).hexdigest()
        any_json: dict[str, Any] = {"response_model": dict[str, Any], "aliases": ()}
        failures, lines = error_responses(OllamaErrorBody), streamed(_NDJSON)
        for path, handler, described in (
            ("/api/chat", self.chat, failures | lines),
            ("/api/generate", self.generate, failures | lines),
            ("/api/show", self.show, failures),
        ):
            add_route(router, path, handler, "Ollama", methods=["POST"], responses=described, **any_json)
        for path, answer in (("/api/tags", self.tags), ("/api/ps", self.running), ("/api/version", self.version)):
            add_route(router, path, answer, "Ollama", responses=failures, **any_json)
            router.add_api_route(path, answer, methods=["HEAD"], include_in_schema=False)
        for name, method in _REFUSED:
            router.add_api_route(f"/api/{name}", self.refuse, methods=[method], include_in_schema=False)

    async def chat(self, body: OllamaChatRequest, request: Request, x_conversation: Name = None) -> Any:
        """Answer a chat in the form of Ollama's API. It is streamed unless `stream` is false."""
        form = OllamaForm(self.alias, is_chat=True)
        if not body.messages:
            return form.loaded()
        return await self.answering.chat(request, form, chat_request(body), x_conversation)

    async def generate(self, body: GenerateRequest, request: Request, x_conversation: Name = None) -> Any:
        """Answer one message, or continue a text, in the form of Ollama's API; streamed unless `stream` is false."""
        form = OllamaForm(self.alias, is_chat=False)
        if not body.prompt:
            return form.loaded()
        asked = generate_request(body)
        if isinstance(asked, ChatRequest):
            return await self.answering.chat(request, form, asked, x_conversation)
        generations = await asyncio.to_thread(self.answering.requests.from_text, asked, x_conversation)
        return await self.answering.answer(request, form, generations, asked.stream)

    async def show(self, body: ModelName) -> dict[str, Any]:
        """The model: metadata of its file, template, and what it can be asked."""
        engine, architecture = self.engine, self.engine.architecture
        about: dict[str, Any] = {
            "general.architecture": architecture,
            "general.parameter_count": engine.backend.facts.n_params,
            f"{architecture}.context_length": engine.n_ctx_train,
        }
        for name, value in engine.metadata.items():
            if not name.startswith("tokenizer."):
                about.setdefault(name, int(value) if value.isascii() and value.isdigit() else value)
        return {
            "modelfile": f"FROM {self.alias}",
            "parameters": "",
            "template": engine.chat_template or "",
            "details": self._details(),
            "model_info": about,
            "capabilities": ["completion", "tools", *(["thinking"] if self._thinks() else [])],
            "modified_at": self.changed,
        }

    async def tags(self) -> dict[str, Any]:
        """The loaded model, as the only one."""
        return {"models": [self._model() | {"modified_at": self.changed}]}

    async def running(self) -> dict[str, Any]:
        """The loaded model, as the only one."""
        more = {"expires_at": _NEVER, "size_vram": 0, "context_length": self.engine.n_ctx}
        return {"models": [self._model() | more]}

    async def version(self) -> dict[str, str]:
        """The version of Ollama whose API this is."""
        return {"version": API_VERSION}

    async def refuse(self) -> None:
        """What would change the models."""
        raise errors.invalid(
            f"this server has one model, {self.alias}, chosen at its start: none can be added or changed"
        )

    def _thinks(self) -> bool:
        """Whether the chat template has thinking."""
        hello = {"messages": [{"role": "user", "content": "Hello"}], "enable_thinking": True}
        return self.answering.requests.core.request(hello).thinks

    def _model(self) -> dict[str, Any]:
        name, engine = self.alias, self.engine
        return {
            "name": name,
            "model": name,
            "size": engine.n_bytes,
            "digest": self.digest,
            "details": self._details(),
        }

    def _details(self) -> dict[str, Any]:
        family, millions = self.engine.architecture, self.engine.backend.facts.n_params / 1e6
        # `llama 134M Q4_1`: name, size, type of the weights
        weights = self.engine.desc.split(" ", 2)[2]
        return {
            "parent_model": "",
            "format": "gguf" if self.engine.model_path.suffix == ".gguf" else "mlc",
            "family": family,
            "families": [family],
            "parameter_size": f"{millions / 1000:.1f}B" if millions >= 1000 else f"{millions:.2f}M",
            "quantization_level": weights,
        }


_REFUSED = (
    ("pull", "POST"),
    ("push", "POST"),
    ("create", "POST"),
    ("copy", "POST"),
    ("delete", "DELETE"),
    ("blobs/{digest}", "POST"),
    ("blobs/{digest}", "HEAD"),
)


#
# requests
#


def chat_request(body: OllamaChatRequest) -> ChatRequest:
    """The same request in the form that is used inside. Raises ApiError 400."""
    fields = {**_common(body), "messages": list(_messages(body.messages or ())), "tools": body.tools or None}
    return translated(ChatRequest, fields)


def generate_request(body: GenerateRequest) -> ChatRequest | CompletionRequest:
    """The same request in the form that is used inside. Raises ApiError 400."""
    if body.images:
        raise errors.no_images()
    if body.template:
        raise errors.invalid("a template is not taken from a request: send raw true and the prompt as it is to be read")
    if body.context:
        raise errors.invalid("context is not supported: send the conversation to /api/chat")
    if body.raw or body.suffix:
        fields = _common(body)
        text = translated(CompletionRequest, {**fields, "prompt": body.prompt, "suffix": body.suffix})
        return text.model_copy(update={"max_tokens": fields["max_tokens"]})  # /v1/completions has a default of its own
    system = [{"role": "system", "content": body.system}] if body.system else []
    return translated(ChatRequest, {**_common(body), "messages": [*system, {"role": "user", "content": body.prompt}]})


def _common(body: Asked) -> dict[str, Any]:
    options = body.options or Options()
    n_predict = options.num_predict
    fields = {
        **(options.model_extra or {}),
        "n": 1,
        "stream": body.stream is not False,
        "max_tokens": n_predict if n_predict is None else max(n_predict, -1),
    }
    if body.format:
        schema = {"type": "json_schema", "json_schema": {"schema": body.format}}
        fields["response_format"] = {"type": "json_object"} if body.format == "json" else schema
    if body.think is not None:
        fields["enable_thinking"] = bool(body.think)
        if isinstance(body.think, str):
            fields["reasoning_effort"] = body.think
    return fields


def _messages(messages: Sequence[Message]) -> Iterator[dict[str, Any]]:
    """Messages as OpenAI has them. Calls without an id are numbered, since some templates need one."""
    n_calls = 0
    waiting: deque[tuple[str, str]] = deque()  # names and ids of calls without a result
    for message in messages:
        if message.images:
            raise errors.no_images()
        out: dict[str, Any] = {"role": message.role, "content": message.content or ""}
        if message.thinking:
            out["reasoning_content"] = message.thinking
        for call in message.tool_calls or ():
            function = {"name": call.function.name, "arguments": to_json(call.function.arguments)}
            call_id = call.id or f"{n_calls:09d}"  # nine characters, which Mistral's templates insist on
            n_calls += 1
            waiting.append((function["name"], call_id))
            out.setdefault("tool_calls", []).append({"id": call_id, "type": "function", "function": function})
        if message.role == "tool":
            match = next((w for w in waiting if message.tool_name in (None, w[0])), None)
            if match:
                waiting.remove(match)
            out["tool_call_id"] = message.tool_call_id or (match[1] if match else None)
            out["name"] = message.tool_name
        yield out


#
# answers
#


class OllamaForm(AnswerForm):
    """An answer, or the lines of one that is being written. A call is sent once it is whole."""

    media_type = _NDJSON

    def __init__(self, model: str, *, is_chat: bool) -> None:
        super().__init__()
        self.model, self.is_chat = model, is_chat
        self._blocks = Blocks()
        self._finished: Finished | None = None

    def whole(self, choices: Sequence[Collected], done: Sequence[Done]) -> dict[str, Any]:
        """The answer."""
        (answer,) = choices
        calls = [block for block in whole_blocks(answer) if block.kind == "call"]
        return self._line(answer.text, answer.reasoning, calls) | _end(answer.finished, done[0])

    def loaded(self) -> dict[str, Any]:
        """The answer to a request without a prompt, which is sent to load a model."""
        return self._line() | {"done": True, "done_reason": "load"}

    def chunks(self, k: int, event: Progress) -> Iterable[bytes]:
        """The lines; the last one waits for Done, which says that the turn is saved."""
        return ((to_json(line) + "\n").encode() for line in self._lines(event))

    def failure(self, error: ApiError) -> bytes:
        """A line."""
        return (to_json(error_body(error)) + "\n").encode()

    def _lines(self, event: Progress) -> Iterator[dict[str, Any]]:
        if isinstance(event, Done):
            yield self._line() | _end(self._finished, event)
            return
        steps: Iterable[Any] = ()
        if isinstance(event, Delta):
            steps = self._blocks.push(event)
        elif isinstance(event, Finished):
            self._finished, steps = event, self._blocks.end()
        for what, block, text in steps:
            if block.kind == "call" and what == "close":
                yield self._line(calls=[block])
            elif block.kind != "call" and what == "add":
                yield self._line(**{block.kind: text})

    def _line(self, text: str = "", thinking: str = "", calls: Sequence[Block] = ()) -> dict[str, Any]:
        line: dict[str, Any] = {"model": self.model, "created_at": _time()}
        said: dict[str, Any] = {"role": "assistant", "content": text} if self.is_chat else {"response": text}
        if thinking:
            said["thinking"] = thinking
        # a call that was cut is no call: done_reason is `length` then
        whole = [(i, call) for i, call in enumerate(calls) if call.arguments is not None]
        if whole:
            said["tool_calls"] = [
                {"id": call.call_id, "function": {"index": i, "name": call.name, "arguments": call.arguments}}
                for i, call in whole
            ]
        return {**line, **({"message": said} if self.is_chat else said), "done": False}


def _end(finished: Finished | None, done: Done) -> dict[str, Any]:
    """The fields of the last line. Durations are in ns."""
    times = {name: int(1e6 * done.timings[name]) for name in ("queued_ms", "prompt_ms", "predicted_ms")}
    return {
        "done": True,
        "done_reason": "length" if finished and finished.reason == "length" else "stop",
        "total_duration": sum(times.values()),
        "load_duration": times["queued_ms"],
        "prompt_eval_count": done.usage["prompt_tokens"],
        "prompt_eval_duration": times["prompt_ms"],
        "eval_count": done.usage["completion_tokens"],
        "eval_duration": times["predicted_ms"],
    }


def _time(seconds: float | None = None) -> str:
    """A time, or now, as Go's JSON has it."""
    now = datetime.now(timezone.utc) if seconds is None else datetime.fromtimestamp(seconds, timezone.utc)
    return now.isoformat().replace("+00:00", "Z")


def error_body(error: ApiError) -> dict[str, Any]:
    """An error as Ollama's API has it."""
    return {"error": error.body["error"]["message"]}
