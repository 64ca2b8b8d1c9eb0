"""A request on its way through the engine: what it wants, where it is, and the records it gives."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

from edge_stream.sampling import Sampling
from edge_stream.server.errors import ApiError
from edge_stream.server.history.prefix_matching import History

if TYPE_CHECKING:
    from concurrent.futures import Future

    from edge_stream.engine import Engine
    from edge_stream.generation import Writer
    from edge_stream.server.history.rendering import Piece, Rendered
    from edge_stream.server.history.tools import ToolParser
    from edge_stream.server.scheduling.sessions import Conversation


@dataclass(frozen=True)
class Started:
    """The conversation was recognised; reading begins. info: see Job.info."""

    info: dict[str, Any]


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
class TokenLogprobs:
    """Natural logs of probabilities before any sampling transform."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass(frozen=True)
class Finished:
    """A choice is complete: `stop`, `length` or `tool_calls`."""

    index: int
    reason: str


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


Event = Started | Delta | Finished | Done | Failed


class Stage(Enum):
    """Where a job is."""

    QUEUED = 0
    RENDERING = 1
    READING = 2
    WRITING = 3
    SAVING = 4
    ENDED = 5


@dataclass
class Wish:
    """What a request asks for, checked."""

    history: History
    sampling: Sampling
    max_tokens: int = -1
    stop: tuple[str, ...] = ()
    n: int = 1
    logprobs: bool = False
    top_logprobs: int = 0
    ignore_eos: bool = False
    name: str | None = None  # the client's name for the conversation
    tools: ToolParser | None = None
    gauges: bool = False  # info with every token


@dataclass(eq=False)
class Job:
    """A wish with its state. `emit` may be called from any thread; everything else is the scheduler's."""

    wish: Wish
    emit: Callable[[Event], None]
    deadline: float
    request: object = field(default_factory=object)  # the same for all jobs of one request
    cancelled: bool = False  # set by the client's side; a bool needs no lock
    n_taken: int = 0  # records that the client's side has taken
    n_emitted: int = 0
    stage: Stage = Stage.QUEUED
    conversation: Conversation | None = None
    rendering: Future[Rendered] | None = None
    pieces: list[Piece] = field(default_factory=list)
    answer_start: list[int] = field(default_factory=list)
    answer_prefix: str = ""  # what the client wrote of the answer already
    writer: Writer | None = None
    saving: Future[None] | None = None
    done: Done | None = None  # to be sent when it is saved
    parser: ToolParser | None = None
    choice: int = 0
    text: list[str] = field(default_factory=list)  # of this choice, as it was sent
    answer: list[int] = field(default_factory=list)  # its tokens
    n_answer_bytes: int = 0
    close: list[int] = field(default_factory=list)  # what the template writes after the answer
    recognised: str = ""
    restored: bool = False
    timed_out: bool = False
    t_stalled: float | None = None  # since when it waits for its reader
    n_dropped: int = 0
    n_reused: int = 0
    n_prompt: int = 0
    n_read: int = 0
    n_to_read: int = 0
    n_written: int = 0
    t_queued: float = field(default_factory=time.perf_counter)
    t_admitted: float = 0.0
    t_writing: float = 0.0
    t_end: float = 0.0

    def send(self, event: Event) -> None:
        """Hand a record to the client's side."""
        self.n_emitted += 1
        self.emit(event)

    @property
    def n_behind(self) -> int:
        """Records that the client has not taken yet."""
        return self.n_emitted - self.n_taken

    def piece(self, engine: Engine, token: int) -> bytes:
        """What a token adds to the answer."""
        return engine.token_to_piece(token, special=self.wish.tools is not None)

    def info(self) -> dict[str, Any]:
        """The `edge_stream` field of a response, while the job has a conversation in a slot."""
        conversation = self.conversation
        assert conversation is not None and conversation.stream is not None
        stats = conversation.stream.stats
        return {
            "conversation": conversation.name or conversation.id,
            "history": self.recognised,
            "restored": self.restored,
            "slot": conversation.slot,
            "n_past": stats.n_past,
            "n_cached": stats.n_cached,
            "n_ctx": stats.n_ctx,
            "n_pinned": stats.n_keep,
            "n_reused": self.n_reused,
            "n_read": self.n_read,
            "n_to_read": self.n_to_read,
            "n_messages_dropped": self.n_dropped,
            "timed_out": self.timed_out,
        }

    def usage(self) -> dict[str, Any]:
        """Token counts as OpenAI has them. The prompt is everything the conversation has seen before the answer."""
        return {
            "prompt_tokens": self.n_prompt,
            "completion_tokens": self.n_written,
            "total_tokens": self.n_prompt + self.n_written,
            "prompt_tokens_details": {"cached_tokens": self.n_reused},
        }

    def timings(self) -> dict[str, Any]:
        """Counts, milliseconds and speeds as llama-server has them."""
        now = time.perf_counter()
        read_ms = 1000 * ((self.t_writing or now) - self.t_admitted)
        write_ms = 1000 * ((self.t_end or now) - self.t_writing) if self.t_writing else 0.0
        return {
            "cache_n": self.n_reused,
            "prompt_n": self.n_read,
            "prompt_ms": read_ms,
            "prompt_per_token_ms": read_ms / max(self.n_read, 1),
            "prompt_per_second": 1000 * self.n_read / max(read_ms, 1e-6),
            "predicted_n": self.n_written,
            "predicted_ms": write_ms,
            "predicted_per_token_ms": write_ms / max(self.n_written, 1),
            "predicted_per_second": 1000 * self.n_written / write_ms if write_ms else 0.0,
            "queued_ms": 1000 * ((self.t_admitted or now) - self.t_queued),
        }
