"""The one shape of a chat request and of a text request: OpenAI's, extended. Unknown fields are ignored."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
    model_validator,
)
from typing_extensions import Required, TypedDict  # typing's, which pydantic cannot take before Python 3.12

from edge_stream.server import errors
from edge_stream.server.http.guard import depth_of
from edge_stream.server.settings import Limits

Finite = Annotated[float, Field(allow_inf_nan=False)]
Int32 = Annotated[int, Field(ge=-(2**31), le=2**31 - 1)]
LastN = Annotated[int, Field(ge=-1, le=2**20)]  # -1: the context
Seed = Annotated[int, Field(ge=-1, le=2**63 - 1)]
Count = Annotated[int, Field(ge=0, le=2**31 - 1)]
Token = Annotated[int, Field(ge=0, le=2**31 - 1, strict=True)]
MaxTokens = Annotated[int, Field(ge=-1, le=2**31 - 1)]
Bias = Annotated[float, Field(ge=-100, le=100, strict=True)] | Literal[False]


class Open(BaseModel):
    """Null stands for a field that is not given."""

    model_config = ConfigDict(extra="ignore", strict=False, protected_namespaces=(), populate_by_name=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        return {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value


class TextPart(TypedDict):
    """A part of a message. Only text can be read."""

    type: Literal["text"]
    text: str


class FunctionCall(Open):
    """A function and its arguments, as JSON text."""

    name: str
    arguments: str = "{}"

    @field_validator("arguments", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else value  # some clients parse it

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


Role = Literal["system", "developer", "user", "assistant", "tool", "function"]
_ROLES = frozenset(get_args(Role))


def _as_dicts(calls: list[ToolCall] | None) -> Any:
    return None if calls is None else [call.model_dump(exclude_none=True) for call in calls]


class ChatMessage(TypedDict, total=False):
    """One message of a chat. Null stands for a field that is not given."""

    role: Required[Role]
    content: str | list[TextPart] | None
    reasoning_content: str | None
    name: str | None
    tool_calls: Annotated[list[ToolCall] | None, AfterValidator(_as_dicts), SerializeAsAny()]
    tool_call_id: str | None


def _more_than_text(messages: list[Any]) -> list[int]:
    """Which messages are not a text with a role and nothing else, and so need more looking at."""
    others = []
    for i, message in enumerate(messages):
        try:
            if type(message["content"]) is str and len(message) == 2 and message["role"] in _ROLES:
                continue
        except (KeyError, TypeError):
            pass
        others.append(i)
    return others


def _check_messages(messages: Any, check: ValidatorFunctionWrapHandler) -> Any:
    """A long history has thousands of messages, most of them texts: only the others are looked at and copied."""
    if not isinstance(messages, list) or not messages:
        return check(messages)
    others = _more_than_text(messages)
    try:
        checked = check([messages[i] for i in others]) if others else ()
    except ValidationError:
        return check(messages)  # which names the places in the request
    out = list(messages)
    for i, message in zip(others, checked, strict=True):
        out[i] = {name: value for name, value in message.items() if value is not None}
    return out


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
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None


class StreamOptions(Open):
    """include_usage: a last chunk with usage, and no choices."""

    include_usage: bool = False


# What clients may send that nothing can come of: the values that ask for nothing, and what to say of others.
_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "best_of": ((1,), "choices are not ranked: ask for n of them"),
    "functions": (([],), "it is obsolete: send tools"),
    "function_call": (("none", "auto"), "it is obsolete: send tool_choice"),
    "modalities": (([], ["text"]), "only text is written"),
    "audio": ((), "only text is written"),
    "web_search_options": ((), "this server does not search"),
    "image_data": (([],), "only text can be read"),
    "grammar_lazy": ((False,), "send tools instead"),
    "grammar_triggers": (([],), "send tools instead"),
}


class AdapterScale(Open):
    """How much of an adapter is added to the weights."""

    id: Annotated[int, Field(ge=0)]
    scale: Finite = 0.0


class Generation(Open):
    """What chats and texts have in common: OpenAI's fields, and llama-server's."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, validation_alias=AliasChoices("n", "n_cmpl"))] = 1
    n_predict: MaxTokens | None = None
    stop: str | list[str] | None = None
    seed: Seed | None = None
    # llama-server's names and ranges; what has no range is limited to what C's numbers hold
    temperature: Finite | None = None
    top_p: Finite | None = None
    top_k: Int32 | None = None
    min_p: Finite | None = None
    typical_p: Finite | None = None
    top_n_sigma: Finite | None = None
    min_keep: Annotated[Int32, Field(ge=0)] | None = None
    xtc_probability: Finite | None = None
    xtc_threshold: Finite | None = None
    dynatemp_range: Finite | None = None
    dynatemp_exponent: Finite | None = None
    repeat_penalty: Annotated[Finite, Field(gt=0)] | None = None
    repeat_last_n: LastN | None = None
    frequency_penalty: Finite | None = None
    presence_penalty: Finite | None = None
    dry_multiplier: Finite | None = None
    dry_base: Finite | None = None
    dry_allowed_length: Annotated[Int32, Field(ge=0)] | None = None
    dry_penalty_last_n: LastN | None = None
    dry_sequence_breakers: Annotated[list[str], Field(min_length=1, max_length=64)] | None = None
    mirostat: Int32 | None = None
    mirostat_tau: Finite | None = None
    mirostat_eta: Finite | None = None
    adaptive_target: Finite | None = None
    adaptive_decay: Annotated[Finite, Field(ge=0, le=0.99)] | None = None
    samplers: Annotated[list[str] | str, Field(max_length=64)] | None = None
    logit_bias: Annotated[
        dict[str, Bias] | list[tuple[Token | str, Bias]] | None,
        Field(description="By token or by text, of which every token is meant. false: never"),
    ] = None
    response_format: ResponseFormat | None = None
    json_schema: dict[str, Any] | None = None
    grammar: Annotated[str, Field(description="GBNF that the answer must follow")] | None = None
    ignore_eos: bool = False
    loop_guard: Annotated[bool | None, Field(description="End an answer that repeats itself")] = None
    timings_per_token: Annotated[bool, Field(description="timings, and gauges of the stream, in every chunk")] = False
    return_progress: Annotated[bool, Field(description="Chunks while the prompt is read")] = False
    cache_prompt: Annotated[bool, Field(description="false: read everything again")] = True
    id_slot: Annotated[int, Field(ge=-1, description="The slot to use; -1: any")] = -1
    n_indent: Annotated[Count, Field(description="End at a line that is indented by less")] = 0
    t_max_predict_ms: Annotated[int, Field(description="End at the first line end after this time")] = -1
    lora: list[AdapterScale] | None = None
    verbose: bool = False

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, value: Any) -> Any:
        for name, (harmless, why) in _REFUSED.items():
            if isinstance(value, dict) and value.get(name) is not None and value[name] not in harmless:
                raise ValueError(f"{name} is not supported: {why}")
        return value


class ChatRequest(Generation):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1), WrapValidator(_check_messages)]
    max_tokens: MaxTokens | None = None
    max_completion_tokens: MaxTokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    reasoning_format: str | None = None
    reasoning_effort: str | None = None
    enable_thinking: bool | None = None
    thinking_budget_tokens: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | str | None = None

    @field_validator("continue_final_message")
    @classmethod
    def _either(cls, value: bool | str | None, info: ValidationInfo) -> bool | str | None:
        if value is True and info.data.get("add_generation_prompt"):
            raise ValueError("it excludes add_generation_prompt")
        return value


class PromptObject(Open):
    """llama-server's form of a prompt that could have images."""

    prompt_string: str | list[Token | str]
    multimodal_data: list[Any] | None = None


Prompts = str | PromptObject | list[Token | str | PromptObject | list[Token | str]]


class CompletionRequest(Generation):
    """POST /v1/completions. A prompt is text, tokens, or both mixed; a list of prompts gives n choices for each."""

    prompt: Prompts
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
