"""The server's settings: address, limits, request defaults."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from edge_stream.chat.options import ChatOptions
from edge_stream.sampling import Sampling

if TYPE_CHECKING:
    from edge_stream.embedder import Embedder

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Limits:
    """What one client can ask for. Anything beyond a limit is refused with a message, never truncated silently."""

    body_bytes: int = 16 << 20
    body_seconds: float = 30.0  # a request must have arrived by then
    json_depth: int = 64
    n: int = 8
    stop_count: int = 16
    stop_characters: int = 256
    grammar_bytes: int = 64 << 10
    schema_bytes: int = 32 << 10
    schema_repeats: int = 200
    tools: int = 128
    logit_bias: int = 1024
    embeddings: int = 1024  # texts of one request
    queue: int = 64  # requests waiting for a slot
    connections: int = 1024
    request_seconds: float = 3600.0  # from arrival to the end of the answer
    backlog: int = 256  # events that a client may be behind before its generation waits
    stall_seconds: float = 20.0  # after which a generation that waits for its client ends, if others need the slot


@dataclass(frozen=True)
class Settings:
    """Settings.

    aliases: the model's names, its own first. tags: of the model, for clients to read.
    api_keys: empty: no key is needed. session_dir: None: nothing is written to disk. slot_save_path: where clients save
    slots by name; None: in session_dir. stop: strings that end every answer, beside a request's own. ssl_files: the
    PEM files of the key and of the certificate, for https. n_http_threads: for work beside the engine's; None: Python's
    default.
    """

    aliases: tuple[str, ...]
    tags: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    port: int = 8080
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    cors: tuple[str, ...] = ()
    session_dir: Path | None = None
    session_bytes: int = 4 << 30
    slot_save_path: Path | None = None
    n_prefill: int = 64  # tokens of a prompt read between two steps of the other conversations
    n_predict: int = -1
    loop_guard: bool = True
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    chat: ChatOptions = field(default_factory=ChatOptions)
    n_recall: int = 0  # tokens of a line of a history that may come back
    ping_seconds: float = 15.0
    embedder: Embedder | None = None
    verbose: bool = False  # every chat's answer shows its prompt and settings
    ssl_files: tuple[str, str] | None = None
    has_page: bool = True
    has_slots: bool = True
    n_http_threads: int | None = None
    limits: Limits = field(default_factory=Limits)

    @property
    def alias(self) -> str:
        """The name that answers carry."""
        return self.aliases[0]

    @property
    def is_loopback(self) -> bool:
        """True if only this machine can connect."""
        return self.host in LOOPBACK
