"""Requests and responses as OpenAI's clients send and expect them. Unknown fields are ignored, as other servers do."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from edge_stream.server.http.guard import depth_of
from edge_stream.server.settings import Limits

Finite = Annotated[float, Field(allow_inf_nan=False)]
Int32 = Annotated[int, Field(ge=-(2**31), le=2**31 - 1)]
LastN = Annotated[int, Field(ge=-1, le=2**20)]  # -1: the context
Seed = Annotated[int, Field(ge=-1, le=2**63 - 1)]
Token = Annotated[int, Field(ge=0, le=2**31 - 1)]
MaxTokens = Annotated[int, Field(ge=-1, le=2**31 - 1)]


class _Open(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=False, protected_namespaces=())


#
# requests
#


class TextPart(_Open):
    """A part of a message. Only text can be read."""

    type: Literal["text"]
    text: str


class FunctionCall(_Open):
    """A function and its arguments, as JSON text."""

    name: str
    arguments: str = "{}"

    @field_validator("arguments")
    @classmethod
    def _check_depth(cls, value: str) -> str:
        if depth_of(value.encode(errors="replace"), Limits.json_depth) > Limits.json_depth:
            raise ValueError(f"the JSON is nested deeper than {Limits.json_depth}")
        return value


class ToolCall(_Open):
    """A call that the model made."""

    id: str = ""
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(_Open):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None


class Function(_Open):
    """A function that the model may call."""

    name: Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[a-zA-Z0-9_.-]+$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(_Open):
    """A tool: a function."""

    type: Literal["function"]
    function: Function


class NamedFunction(_Open):
    """A function by its name."""

    name: str


class NamedTool(_Open):
    """The tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


class SchemaOfFormat(_Open):
    """A JSON schema with its name."""

    name: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None


class ResponseFormat(_Open):
    """What the answer must be. `json_object`: any JSON object."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: SchemaOfFormat | None = None


class StreamOptions(_Open):
    """include_usage: a last chunk with usage, and no choices."""

    include_usage: bool = False


class _Generation(_Open):
    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1)] = 1
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
    logit_bias: dict[str, Annotated[Finite, Field(ge=-100, le=100)]] | None = None
    response_format: ResponseFormat | None = None
    grammar: Annotated[str, Field(description="GBNF that the answer must follow")] | None = None
    ignore_eos: bool | None = None
    loop_guard: Annotated[bool | None, Field(description="End an answer that repeats itself")] = None
    timings_per_token: Annotated[bool, Field(description="Gauges in every chunk: n_past, n_cached, tok_per_s")] = False


class ChatRequest(_Generation):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: MaxTokens | None = None
    max_completion_tokens: MaxTokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None


class CompletionRequest(_Generation):
    """POST /v1/completions. A prompt is text, or tokens; a list of prompts gives n choices for each."""

    prompt: str | list[Token] | list[str] | list[list[Token]]
    max_tokens: MaxTokens | None = 16
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool = False
    suffix: str | None = None


class TokenizeRequest(_Open):
    """POST /tokenize."""

    content: str
    add_special: bool = False
    parse_special: bool = True
    with_pieces: bool = False


class DetokenizeRequest(_Open):
    """POST /detokenize."""

    tokens: list[Token]


class TemplateRequest(_Open):
    """POST /apply-template."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    tools: list[Tool] | None = None


class SlotFile(_Open):
    """POST /slots/{id}: the name of a saved state. It is a name, not a path."""

    filename: Annotated[str, Field(min_length=1, max_length=255)] | None = None


#
# responses
#


class Error(BaseModel):
    """What went wrong."""

    code: int
    message: str
    type: str


class ErrorBody(BaseModel):
    """Every answer other than success."""

    error: Error


class Usage(BaseModel):
    """Tokens. prompt_tokens: everything that the conversation has seen before this answer."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int]


class Timings(BaseModel):
    """Counts, milliseconds and speeds, as llama-server gives them. prompt_n: tokens read for this request."""

    cache_n: int
    prompt_n: int
    prompt_ms: float
    prompt_per_token_ms: float
    prompt_per_second: float
    predicted_n: int
    predicted_ms: float
    predicted_per_token_ms: float
    predicted_per_second: float
    queued_ms: float


class StreamInfo(BaseModel):
    """The conversation's stream. history: how the request's history was matched.

    `new`, `continued` (only what is new was read), `branched` (taken back to the last common message) or `rebuilt`
    (unknown: read again, without the oldest n_messages_dropped messages if the cache cannot hold them).
    """

    conversation: str
    history: Literal["new", "continued", "branched", "rebuilt"]
    restored: bool
    slot: int | None
    n_past: int
    n_cached: int
    n_ctx: int
    n_pinned: int
    n_reused: int
    n_read: int
    n_to_read: int
    n_messages_dropped: int
    timed_out: bool


class ChatAnswer(BaseModel):
    """An assistant's message."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    tool_calls: list[ToolCall] | None = None


class LikelyToken(BaseModel):
    """A token, the natural log of its probability, its bytes."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(LikelyToken):
    """A generated token, beside the likeliest ones."""

    top_logprobs: list[LikelyToken]


class ChatLogprobs(BaseModel):
    """One item per generated token."""

    content: list[TokenLogprob]


class Loop(BaseModel):
    """Why the loop guard ended an answer: its last `period` tokens were repeated, and are kept once."""

    period: int
    repetitions: int


class ChoiceInfo(BaseModel):
    """What there is to say of one choice."""

    loop: Loop


class ChatChoice(BaseModel):
    """One answer. edge_stream: if the loop guard ended it."""

    index: int
    message: ChatAnswer
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length", "tool_calls"]
    edge_stream: ChoiceInfo | None = None


class ChatResponse(BaseModel):
    """The answer to POST /v1/chat/completions without `stream`."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    timings: Timings
    edge_stream: StreamInfo


class TextLogprobs(BaseModel):
    """Items by token. text_offset counts characters of the choice's text."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(BaseModel):
    """One continuation. edge_stream: if the loop guard ended it."""

    index: int
    text: str
    logprobs: TextLogprobs | None = None
    finish_reason: Literal["stop", "length"]
    edge_stream: ChoiceInfo | None = None


class TextResponse(BaseModel):
    """The answer to POST /v1/completions without `stream`. With several prompts, edge_stream is the last one's."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage
    timings: Timings
    edge_stream: StreamInfo


class Health(BaseModel):
    """GET /health."""

    status: Literal["ok"]


class Model(BaseModel):
    """The loaded model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    meta: dict[str, int | str]


class Models(BaseModel):
    """GET /v1/models: one."""

    object: Literal["list"] = "list"
    data: list[Model]


class Tokens(BaseModel):
    """The answer to POST /tokenize. With with_pieces, each token has its text, or its bytes where it is none."""

    tokens: list[int] | list[dict[str, int | str | list[int]]]


class Content(BaseModel):
    """The answer to POST /detokenize."""

    content: str


class Prompt(BaseModel):
    """The answer to POST /apply-template."""

    prompt: str


class SlotAnswer(BaseModel):
    """The answer to POST /slots/{id}."""

    id_slot: int
    filename: str | None = None
    n_saved: int | None = None
    n_restored: int | None = None
    n_erased: int | None = None


class Slot(BaseModel):
    """One slot of GET /slots."""

    id: int
    n_ctx: int
    is_processing: bool
    conversation: str | None = None
    n_turns: int | None = None
    n_past: int | None = None
    n_cached: int | None = None
    stage: str | None = None


class Props(BaseModel):
    """GET /props."""

    model_alias: str
    model_desc: str
    total_slots: int
    n_ctx: int
    n_keep: int
    n_ctx_train: int
    sink_move: str
    flash_attn: str
    chat_template: str
    takes_tools: bool
    default_generation_settings: dict[str, float | int]
    limits: dict[str, float | int]
    build_info: str
