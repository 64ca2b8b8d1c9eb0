"""llama-server's own requests and answers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from edge_stream.server.http.schemas import ChatMessage, Open, Token, Tool


class TokenizeRequest(Open):
    """POST /tokenize."""

    content: str
    add_special: bool = False
    parse_special: bool = True
    with_pieces: bool = False


class DetokenizeRequest(Open):
    """POST /detokenize."""

    tokens: list[Token]


class TemplateRequest(Open):
    """POST /apply-template."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    tools: list[Tool] | None = None


class SlotFile(Open):
    """POST /slots/{id}: the name of a saved state. It is a name, not a path."""

    filename: Annotated[str, Field(min_length=1, max_length=255)] | None = None


class Health(BaseModel):
    """GET /health."""

    status: Literal["ok"]


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
