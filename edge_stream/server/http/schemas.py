"""The one shape of a chat request and of a text request: OpenAI's, extended. Unknown fields are ignored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from edge_stream.server import errors
from edge_stream.server.http.guard import depth_of
from edge_stream.server.settings import Limits

Finite = Annotated[float, Field(allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=-1, le=2**63 - 1)]
Token = Annotated[int, Field(ge=0, le=2**31 - 1)]
MaxTokens = Annotated[int, Field(ge=-1, le=2**31 - 1)]


class Open(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=False, protected_namespaces=())


class TextPart(Open):
    """A part of a message. Only text can be read."""

    type: Literal["text"]
    text: str


class FunctionCall(Open):
    """A function and its arguments, as JSON text."""

    name: str
    arguments: str = "{}"

    @field_validator("arguments")
    @classmethod
    def _check_depth(cls, value: str) -> str:
        if depth_of(value.encode(errors="replace"), Limits.json_depth) > Limits.json_depth:
            raise ValueError(f"the JSON is nested deeper than {Limits.json_depth}")
        return value


class ToolCall(Open):
    """A call that the model made."""

    id: str = ""
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(Open):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None


class Function(Open):
    """A function that the model may call."""

    name: Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[a-zA-Z0-9_.-]+$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(Open):
    """A tool: a function."""

    type: Literal["function"]
    function: Function


class NamedFunction(Open):
    """A function by its name."""

    name: str


class NamedTool(Open):
    """The tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


class SchemaOfFormat(Open):
    """A JSON schema with its name."""

    name: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None


class ResponseFormat(Open):
    """What the answer must be. `json_object`: any JSON object."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: SchemaOfFormat | None = None


class StreamOptions(Open):
    """include_usage: a last chunk with usage, and no choices."""

    include_usage: bool = False


class Generation(Open):
    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1)] = 1
    stop: str | list[str] | None = None
    seed: Seed | None = None
    temperature: Annotated[Finite, Field(ge=0, le=100)] | None = None
    top_p: Annotated[Finite, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    min_p: Annotated[Finite, Field(ge=0, le=1)] | None = None
    repeat_penalty: Annotated[Finite, Field(gt=0, le=100)] | None = None
    repeat_last_n: Annotated[int, Field(ge=0, le=4096)] | None = None
    frequency_penalty: Annotated[Finite, Field(ge=-100, le=100)] | None = None
    presence_penalty: Annotated[Finite, Field(ge=-100, le=100)] | None = None
    logit_bias: dict[str, Annotated[Finite, Field(ge=-100, le=100)]] | None = None
    response_format: ResponseFormat | None = None
    grammar: Annotated[str, Field(description="GBNF that the answer must follow")] | None = None
    ignore_eos: bool = False
    timings_per_token: Annotated[bool, Field(description="Gauges in every chunk: n_past, n_cached, tok_per_s")] = False


class ChatRequest(Generation):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: MaxTokens | None = None
    max_completion_tokens: MaxTokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None


class CompletionRequest(Generation):
    """POST /v1/completions. A prompt is text, or tokens; a list of prompts gives n choices for each."""

    prompt: str | list[Token] | list[str] | list[list[Token]]
    max_tokens: MaxTokens | None = 16
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool = False
    suffix: str | None = None


Request = TypeVar("Request", ChatRequest, CompletionRequest)


def translated(kind: type[Request], fields: Mapping[str, Any]) -> Request:
    """A request out of another API's. Raises ApiError 400."""
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise errors.first_problem(error.errors()) from None


class Error(BaseModel):
    """What went wrong."""

    code: int
    message: str
    type: str


class ErrorBody(BaseModel):
    """Every answer other than success."""

    error: Error
