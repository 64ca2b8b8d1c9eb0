"""The native chat core, edge_stream_chat.h: templates, what a turn adds to a stream, thinking, tool calls, grammars."""

from __future__ import annotations

import ctypes as C
import json
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from edge_stream.native import bindings, chat_bindings
from edge_stream.text import sendable
from edge_stream.vocabulary import Vocabulary

Message = dict[str, Any]


@dataclass
class Piece:
    """Tokens to feed, after which the stream has seen the first n_messages messages."""

    tokens: list[int]
    n_messages: int


@dataclass
class Plan:
    """What a stream must do to hold a conversation.

    keep: how many of the tokens given to `ChatRequest.plan` stay. start: the beginning of the answer, at least a token.
    n_head: tokens of the beginning to be pinned. n_dropped: messages left out, the oldest. note: what could not be made
    as the template has it.
    """

    keep: int
    pieces: list[Piece]
    start: list[int]
    n_head: int = 0
    n_dropped: int = 0
    note: str | None = None

    @property
    def n_tokens(self) -> int:
        """Tokens to feed in all."""
        return sum(len(piece.tokens) for piece in self.pieces) + len(self.start)


@dataclass(frozen=True)
class Addition:
    """What a piece of an answer adds. tool_calls: as in OpenAI's chunks."""

    content: str = ""
    reasoning: str = ""
    tool_calls: list[dict[str, Any]] = field(default_factory=list)


class ChatCore:
    """A model's chat template with its tokenizer. Thread-safe.

    template: Jinja, or the name of one of llama.cpp's, instead of the model's own. Raises EdgeStreamError if it is not
    valid.
    """

    def __init__(self, vocabulary: Vocabulary, template: str | None = None) -> None:
        self._vocabulary = vocabulary  # its model must live as long
        handle = C.c_void_p()
        lib = chat_bindings.library()
        source = template.encode(errors="replace") if template else None
        bindings.check(lib.es_chat_init(vocabulary.model, source, C.byref(handle)))
        self.handle = handle
        weakref.finalize(self, lib.es_chat_free, handle)

    @cached_property
    def info(self) -> dict[str, Any]:
        """`template`, `is_fallback` (the model has none: ChatML) and `caps`, by llama.cpp's names."""
        return dict(json.loads(chat_bindings.library().es_chat_info(self.handle)))

    def request(self, body: Mapping[str, Any]) -> ChatRequest:
        """A conversation and how to answer it: see edge_stream_chat.h. Raises EdgeStreamError if it is refused."""
        return ChatRequest(self, body)

    def n_keep(self, options: bytes, n_ctx: int, n_keep: int) -> int:
        """The sinks of a stream for a conversation with these options: see es_conversation_n_keep."""
        out = C.c_uint32()
        lib = chat_bindings.library()
        bindings.check(lib.es_conversation_n_keep(self.handle, options, n_ctx, n_keep, C.byref(out)))
        return out.value


class ChatRequest:
    """A conversation, and how it shall be answered. For one thread at a time."""

    def __init__(self, core: ChatCore, body: Mapping[str, Any]) -> None:
        self._core = core
        handle = C.c_void_p()
        lib = chat_bindings.library()
        data = sendable(json.dumps(body, ensure_ascii=False)).encode()
        bindings.check(lib.es_chat_request_init(core.handle, data, C.byref(handle)))
        self.handle = handle
        weakref.finalize(self, lib.es_chat_request_free, handle)
        info = json.loads(self._call("info"))
        #: For Sampling.chat: grammar, triggers, thinking budget.
        self.sampling: str | None = info["sampling"]
        self.stop: tuple[str, ...] = tuple(info["stop"])
        self.is_parsed: bool = info["is_parsed"]
        self.thinks: bool = info["thinks"]

    @property
    def prompt(self) -> str:
        """The whole conversation as the template renders it."""
        return self._call("prompt")

    @property
    def head(self) -> list[int]:
        """The tokens that the conversation begins with whatever is said."""
        return list(json.loads(self._call("head")))

    def plan(self, places: Sequence[tuple[int, int]] = (), tokens: Sequence[int] = (), n_ctx: int = 0) -> Plan:
        """What a stream must do to hold the conversation.

        places, oldest first: (messages read, number of `tokens` up to there); tokens: those of its window. Without
        places: from the beginning, without the oldest messages, so that it has at most n_ctx tokens.
        """
        lib = chat_bindings.library()
        at = (chat_bindings.Place * len(places))(*(chat_bindings.Place(*place) for place in places))
        held = (C.c_int32 * len(tokens))(*tokens)
        out = C.c_char_p()
        bindings.check(lib.es_chat_plan(self.handle, at, len(at), held, len(held), n_ctx, C.byref(out)))
        found = json.loads(out.value or b"{}")
        pieces = [Piece(piece["tokens"], piece["n_messages"]) for piece in found["pieces"]]
        return Plan(found["keep"], pieces, found["start"], found["head"], found["dropped"], found.get("note"))

    def parser(self, before: str = "") -> AnswerParser:
        """One for an answer. before: what of it was written earlier."""
        return AnswerParser(self, before)

    def _call(self, name: str) -> str:
        out = C.c_char_p()
        function = getattr(chat_bindings.library(), f"es_chat_request_{name}")
        bindings.check(function(self.handle, C.byref(out)))
        return (out.value or b"").decode()


class AnswerParser:
    """Splits an answer into content, thinking and tool calls while it is written."""

    def __init__(self, request: ChatRequest, before: str = "") -> None:
        handle = C.c_void_p()
        lib = chat_bindings.library()
        bindings.check(lib.es_chat_parser_init(request.handle, sendable(before).encode(), C.byref(handle)))
        self._handle = handle
        weakref.finalize(self, lib.es_chat_parser_free, handle)

    def push(self, text: str, *, last: bool = False) -> Addition:
        """Add generated text. last: the answer ends here."""
        data = sendable(text).encode()
        out = C.c_char_p()
        lib = chat_bindings.library()
        bindings.check(lib.es_chat_parser_push(self._handle, data, len(data), last, C.byref(out)))
        found = json.loads(out.value or b"{}")
        return Addition(found.get("content", ""), found.get("reasoning_content", ""), found.get("tool_calls", []))

    @property
    def message(self) -> Message:
        """The whole message so far, as it should come back in the next request."""
        out = C.c_char_p()
        bindings.check(chat_bindings.library().es_chat_parser_message(self._handle, C.byref(out)))
        return dict(json.loads(out.value or b"{}"))
