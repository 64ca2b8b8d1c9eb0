"""A generation request, and the task that carries it out: its stage, its counts, and what its client is told."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

from edge_stream.sampling import Sampling
from edge_stream.server.history.answer import Answer
from edge_stream.server.history.prefix_matching import History, Recalled
from edge_stream.server.scheduling.events import Done, Event, TokenLogprobs
from edge_stream.server.scheduling.line_limits import LineLimits

if TYPE_CHECKING:
    from concurrent.futures import Future

    from edge_stream.chat.core import AnswerParser
    from edge_stream.generation import Writer
    from edge_stream.server.history.rendering import Piece, Rendered
    from edge_stream.server.scheduling.sessions import Session
    from edge_stream.server.settings import Settings
    from edge_stream.stream import Stream


class Stage(Enum):
    """What a task waits for, or does."""

    QUEUED = 0
    RENDERING = 1
    READING = 2
    WRITING = 3
    SAVING = 4
    ENDED = 5


@dataclass
class GenerationRequest:
    """What a client asks for, checked."""

    history: History
    sampling: Sampling
    max_tokens: int = -1
    stop: tuple[str, ...] = ()
    n: int = 1
    logprobs: bool = False
    top_logprobs: int = 0
    ignore_eos: bool = False
    loop_guard: bool = True
    name: str | None = None  # the client's name for the conversation
    after_sampling: bool = False  # logprobs are probabilities after all transforms
    gauges: bool = False  # info and timings with every token
    progress: bool = False  # Reading with every portion
    score: int | None = None  # Scored, with so many of the likeliest tokens each
    slot: int | None = None  # the one to use
    reuse: bool = True  # of what a session holds already
    keep: bool = True  # the session, for later requests
    n_indent: int = 0  # see LineLimits
    max_ms: int = 0
    stop_pieces: Mapping[int, bytes] = field(default_factory=dict)  # control tokens that stop strings name: their text

    @property
    def is_parsed(self) -> bool:
        """Whether the answer may hold more than text."""
        return self.history.request is not None and self.history.request.is_parsed

    def parser(self, before: str) -> AnswerParser | None:
        """A new one for an answer. before: what the client wrote of it."""
        return self.history.request.parser(before) if self.is_parsed and self.history.request else None


@dataclass(eq=False)
class Task:
    """A request being carried out. Any thread may call `emit`; everything else belongs to the scheduler's."""

    request: GenerationRequest
    emit: Callable[[Event], None]
    deadline: float  # by time.monotonic
    group: object = field(default_factory=object)  # the same for all tasks of one HTTP request
    cancelled: bool = False  # set by the client's side; a bool needs no lock
    n_taken: int = 0  # events that the client's side has taken
    n_emitted: int = 0
    stage: Stage = Stage.QUEUED
    session: Session | None = None
    rendering: Future[Rendered] | None = None
    pieces: list[Piece] = field(default_factory=list)
    answer_start: list[int] = field(default_factory=list)
    answer: Answer = field(default_factory=Answer)
    writer: Writer | None = None
    lines: LineLimits | None = None
    scored: list[TokenLogprobs] = field(default_factory=list)
    saving: Future[None] | None = None
    done: Done | None = None  # to be sent once the session is saved
    choice: int = 0
    history: str = ""  # new, continued, branched or rebuilt
    restored: bool = False
    timed_out: bool = False
    t_stalled: float | None = None  # since when it waits for its reader
    n_dropped: int = 0
    recalled: Recalled | None = None
    n_reused: int = 0
    n_prompt: int = 0
    n_read: int = 0
    n_to_read: int = 0
    n_written: int = 0
    n_drafted: int = 0
    n_accepted: int = 0
    n_steps: int = 0  # decodes that its tokens took: the first of a choice comes of the prompt's
    t_queued: float = field(default_factory=time.perf_counter)
    t_admitted: float = 0.0
    t_read: float = 0.0  # when the newest portion of the prompt was read
    t_chosen: float = 0.0  # when the newest token was chosen
    t_end: float = 0.0

    def send(self, event: Event) -> None:
        """Hand an event to the client's side."""
        self.n_emitted += 1
        self.emit(event)

    @property
    def n_behind(self) -> int:
        """Events that the client has not taken yet."""
        return self.n_emitted - self.n_taken

    @property
    def index(self) -> int:
        """The choice being written. The first comes last, since it is the one that clients continue."""
        return self.request.n - 1 - self.choice

    @property
    def stream(self) -> Stream:
        """That of its session, which is in a slot."""
        assert self.session is not None and self.session.stream is not None
        return self.session.stream

    def info(self) -> dict[str, Any]:
        """The `edge_stream` field of a response, while the task has a session in a slot."""
        assert self.session is not None
        stats = self.stream.stats
        return {
            "conversation": self.session.name or self.session.id,
            "history": self.history,
            "restored": self.restored,
            "slot": self.session.slot,
            "n_past": stats.n_past,
            "n_cached": stats.n_cached,
            "n_ctx": stats.n_ctx,
            "n_pinned": stats.n_keep,
            "n_reused": self.n_reused,
            "n_read": self.n_read,
            "n_to_read": self.n_to_read,
            "n_messages_dropped": self.n_dropped,
            "timed_out": self.timed_out,
            "recalled": self.recalled,
        }

    def usage(self) -> dict[str, Any]:
        """Token counts as OpenAI has them. The prompt is everything the conversation has seen before the answer."""
        return {
            "prompt_tokens": self.n_prompt,
            "completion_tokens": self.n_written,
            "total_tokens": self.n_prompt + self.n_written,
            "prompt_tokens_details": {"cached_tokens": self.n_reused},
        }

    @property
    def write_seconds(self) -> float:
        """From the end of the prompt to the newest token, whose own decode is not in it."""
        return self.t_chosen - self.t_read if self.t_chosen else 0.0

    def timings(self) -> dict[str, Any]:
        """Counts, milliseconds and speeds as llama-server has them: 0 where there is nothing to measure yet."""
        read_ms = 1000 * (self.t_read - self.t_admitted) if self.t_read else 0.0
        write_ms = 1000 * self.write_seconds
        drafts = {"draft_n": self.n_drafted, "draft_n_accepted": self.n_accepted} if self.n_drafted else {}
        return drafts | {
            "cache_n": self.n_reused,
            "prompt_n": self.n_read,
            "prompt_ms": read_ms,
            "prompt_per_token_ms": read_ms / self.n_read if self.n_read else 0.0,
            "prompt_per_second": 1000 * self.n_read / read_ms if read_ms else 0.0,
            "predicted_n": self.n_written,
            "predicted_ms": write_ms,
            "predicted_per_token_ms": write_ms / self.n_steps if self.n_steps else 0.0,
            "predicted_per_second": 1000 * self.n_steps / write_ms if write_ms else 0.0,
            "queued_ms": 1000 * (self.t_admitted - self.t_queued),
        }


def make_task(
    request: GenerationRequest, settings: Settings, emit: Callable[[Event], None], group: object = None
) -> Task:
    """A task whose time starts now. group: the same for all tasks of one HTTP request."""
    return Task(request, emit, time.monotonic() + settings.limits.request_seconds, group or object())
