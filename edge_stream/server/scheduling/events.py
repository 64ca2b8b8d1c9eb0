"""What a task tells its client, in order: Started, Delta for each token, Finished for each choice, Done; or Failed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from edge_stream.loop_guard import Loop
from edge_stream.server.errors import ApiError


@dataclass(frozen=True)
class Started:
    """The history was matched; the prompt is read next. info: see Task.info."""

    info: dict[str, Any]


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural logs of probabilities before any sampling transform."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass(frozen=True)
class Delta:
    """One generated token. text may be empty. logprobs: of the token and of the likeliest ones, if asked for."""

    index: int
    text: str
    token: int
    tool_calls: list[dict[str, Any]] | None = None
    logprobs: TokenLogprobs | None = None
    info: dict[str, Any] | None = None


@dataclass(frozen=True)
class Finished:
    """A choice is complete: `stop`, `length` or `tool_calls`. loop: it was ended because it repeated itself."""

    index: int
    reason: str
    loop: Loop | None = None


@dataclass(frozen=True)
class Done:
    """The turn is complete, and saved where sessions are kept."""

    usage: dict[str, Any]
    timings: dict[str, Any]
    info: dict[str, Any]


@dataclass(frozen=True)
class Failed:
    """There is no (more) answer."""

    error: ApiError


Progress = Started | Delta | Finished | Done
Event = Progress | Failed
