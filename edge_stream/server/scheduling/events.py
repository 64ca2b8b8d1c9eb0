"""What a task tells its client, in order: Started, Delta for each token, Finished for each choice, Done; or Failed.

Reading for each portion of the prompt and Scored come after Started, if they are asked for.
"""

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
class Reading:
    """A portion of the prompt was read: n_processed of n_total tokens, n_cached of which were in the cache before.

    timings: if they are asked for with every token.
    """

    n_total: int
    n_cached: int
    n_processed: int
    ms: float
    timings: dict[str, Any] | None = None


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural logs of probabilities before any sampling transform. logprob None: of a text's first token.

    With GenerationRequest.after_sampling, probabilities after all transforms.
    """

    token: int
    logprob: float | None
    top: list[tuple[int, float]]


@dataclass(frozen=True)
class Scored:
    """The prompt's tokens with their probabilities, if asked for (GenerationRequest.score)."""

    tokens: list[TokenLogprobs]


@dataclass(frozen=True)
class Delta:
    """One generated token, or none if what was held back is given out at the end.

    text, reasoning: what it adds to the content and to the thinking; both may be empty.

    tool_calls: what it adds to calls, as OpenAI's chunks have it: `{"index", "id", "type", "function": {"name",
    "arguments"}}` begins a call, `{"index", "function": {"arguments"}}` goes on with its arguments. logprobs: of the
    token and of the likeliest ones, if asked for.
    """

    index: int
    text: str
    token: int | None
    tool_calls: list[dict[str, Any]] | None = None
    logprobs: TokenLogprobs | None = None
    info: dict[str, Any] | None = None
    reasoning: str = ""
    timings: dict[str, Any] | None = None


@dataclass(frozen=True)
class Finished:
    """A choice is complete: `stop`, `length` or `tool_calls`.

    how: `eos`, `stop` (a stop string, which is stop_string), `length`, `line` (see LineLimits), `grammar` (it allows
    nothing more), `repetition` (see loop) or `cut` (by the client or the time limit).
    """

    index: int
    reason: str
    how: str = "eos"
    stop_string: str | None = None
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


Progress = Started | Reading | Scored | Delta | Finished | Done
Event = Progress | Failed
