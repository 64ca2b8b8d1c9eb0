"""OpenAI's answers, for the API's description."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

from edge_stream.server.http.schemas import ToolCall


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


class RecalledLine(BaseModel):
    """A line of the history that the newest message was read with. message: the index of the one that it is of.

    coverage: share of the newest message's words that it has, weighted by rarity.
    """

    text: str
    role: Literal["user", "assistant"]
    message: int
    messages_ago: int
    coverage: float


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
    recalled: RecalledLine | None


class ChatAnswer(BaseModel):
    """An assistant's message."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None


class LikelyToken(BaseModel):
    """A token, the natural log of its probability, its bytes."""

    id: int
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


class Response(BaseModel):
    """What answers have in common. With several prompts, edge_stream is the last one's."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    usage: Usage
    timings: Timings
    edge_stream: StreamInfo


class ChatResponse(Response):
    """The answer to POST /v1/chat/completions without `stream`."""

    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]


class TextLogprobs(BaseModel):
    """Items by token. text_offset counts characters of the choice's text."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(BaseModel):
    """One continuation."""

    index: int
    text: str
    logprobs: TextLogprobs | None = None
    finish_reason: Literal["stop", "length"]
    edge_stream: ChoiceInfo | None = None


class TextResponse(Response):
    """The answer to POST /v1/completions without `stream`."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[TextChoice]


class Model(BaseModel):
    """The loaded model."""

    id: str
    object: Literal["model"] = "model"
    aliases: list[str]
    tags: list[str]
    created: int
    owned_by: str
    meta: dict[str, int | str]


class Models(BaseModel):
    """GET /v1/models: one."""

    object: Literal["list"] = "list"
    data: list[Model]


class InputTokens(BaseModel):
    """The answer to POST /v1/chat/completions/input_tokens."""

    object: Literal["response.input_tokens"] = "response.input_tokens"
    input_tokens: int
