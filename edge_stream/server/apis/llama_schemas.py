"""llama-server's own requests and answers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from edge_stream.server.http.schemas import Generation, MaxTokens, Open, Prompts, Token


class Native(Generation):
    """What requests of a text have in common. n_probs: how many likely tokens to give with each (also as logprobs)."""

    max_tokens: MaxTokens | None = None
    n_probs: Annotated[int, Field(ge=0, le=1000)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=1000)] | None = None
    post_sampling_probs: bool = False
    return_tokens: bool = False
    response_fields: list[str] | None = None


class NativeRequest(Native):
    """POST /completion. A prompt is text, tokens, or both mixed, or a list of such."""

    prompt: Prompts


class Chunk(Open):
    """A part of another file."""

    text: str
    filename: str = "tmp"


class InfillRequest(Native):
    """POST /infill. prompt: what is written already of the middle."""

    input_prefix: str | list[Token | str]
    input_suffix: str | list[Token | str]
    input_extra: list[Chunk] = Field(default_factory=list)
    prompt: str = ""


class TokenizeRequest(Open):
    """POST /tokenize. vLLM's names of the fields do as well."""

    content: Annotated[str, Field(validation_alias=AliasChoices("content", "prompt"))]
    add_special: Annotated[bool, Field(validation_alias=AliasChoices("add_special", "add_special_tokens"))] = False
    parse_special: bool = True
    with_pieces: bool = False


class DetokenizeRequest(Open):
    """POST /detokenize."""

    tokens: list[Token]


class SlotFile(Open):
    """POST /slots/{id}: the name of a saved state. It is a name, not a path."""

    filename: Annotated[str, Field(min_length=1, max_length=255)] | None = None


class Completion(BaseModel):
    """The answer to POST /completion and /infill; only those that are wanted, if response_fields names some."""

    model_config = ConfigDict(extra="allow")

    index: int = 0
    content: str = ""
    tokens: list[int] = []
    id_slot: int | None = None
    stop: bool = True
    tokens_predicted: int = 0
    tokens_evaluated: int = 0
    generation_settings: dict[str, Any] = {}
    prompt: str = ""
    has_new_line: bool = False
    truncated: bool = False
    stop_type: Literal["eos", "word", "limit", "none"] = "none"
    stopping_word: str = ""
    tokens_cached: int = 0
    timings: dict[str, float] = {}


class Health(BaseModel):
    """GET /health."""

    status: Literal["ok"]


class Tokens(BaseModel):
    """The answer to POST /tokenize. With with_pieces, each token has its text, or its bytes where it is none."""

    tokens: list[int] | list[dict[str, int | str | list[int]]]


class Content(BaseModel):
    """The answer to POST /detokenize; prompt: vLLM's name of it."""

    content: str
    prompt: str


class TokenizerInfo(BaseModel):
    """GET /tokenizer_info."""

    bos_token: str | None
    eos_token: str | None
    chat_template: str


class Prompt(BaseModel):
    """The answer to POST /apply-template."""

    prompt: str


class Adapter(BaseModel):
    """An item of GET /lora-adapters."""

    id: int
    path: str
    scale: float


class Success(BaseModel):
    """That something was done."""

    success: bool


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

    default_generation_settings: dict[str, Any]
    total_slots: int
    model_alias: str
    model_path: str
    modalities: dict[str, bool]
    endpoint_slots: bool
    endpoint_props: bool
    endpoint_metrics: bool
    chat_template: str
    chat_template_caps: dict[str, bool]
    bos_token: str
    eos_token: str
    build_info: str
    is_sleeping: bool
    model_desc: str
    n_ctx: int
    n_keep: int
    n_ctx_train: int
    sink_move: str
    flash_attn: str
    takes_tools: bool
    limits: dict[str, float | int]
