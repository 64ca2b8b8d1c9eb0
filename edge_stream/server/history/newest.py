"""What was made of the newest histories, so that a request that goes on from one costs what is new of it.

A client sends its whole history with each request. Hashing it, and making the log of it that is searched for what the
window has lost, takes as long as the history is; nothing is left out where an earlier request began with the same
messages. What is kept is bounded, in memory only, and never needed: without it everything is made anew.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from edge_stream.recall import Log
from edge_stream.server.history.prefix_matching import History, Message, canonical, chat_history, flat_content

_MOST = 64  # conversations: each request is compared with all of them
_MOST_BYTES = 4 << 20  # of text; what else belongs to it takes as much again, in Python several times as much


class NewestHistories:
    """Chats up to their last answers, with hashes, those of the newest requests. Thread-safe.

    max_bytes: of their messages, in all.
    """

    def __init__(self, max_bytes: int = _MOST_BYTES) -> None:
        self._max_bytes, self._lock = max_bytes, threading.Lock()
        self._kept: list[tuple[History, int]] = []  # with bytes, the oldest first

    def history(self, messages: Sequence[Message], variables: Mapping[str, Any]) -> History:
        """As chat_history."""
        with self._lock:
            kept = list(self._kept)
        begun: History | None = None
        size = 0
        for known, known_size in kept:
            if known_size > size and (shared := _sharing(messages, known.body["messages"])):
                messages, begun, size = shared, known, known_size
        history = chat_history(messages, variables, begun)
        if not history.whole:  # may still become anything
            return history
        said = history.body["messages"][: history.whole[-1].end]
        is_longer = begun is not None and begun.root == history.root
        begin = len(begun.body["messages"]) if begun and is_longer else 0
        size = (size if is_longer else 0) + sum(len(repr(message)) for message in said[begin:])
        if size <= self._max_bytes:
            whole = replace(history, body={"messages": said}, units=history.whole)
            with self._lock:
                others = [pair for pair in self._kept if not is_longer or pair[0] is not begun]
                self._kept = [*others, (whole, size)][-_MOST:]
                while sum(size for _, size in self._kept) > self._max_bytes:
                    self._kept.pop(0)
        return history

    def forget(self) -> None:
        """Keep none."""
        with self._lock:
            self._kept = []


def _sharing(messages: Sequence[Message], known: Sequence[Message]) -> list[Message] | None:
    """Messages that begin with known ones, with those in the place of what equals them; None if they do not."""
    n = len(known)  # whose last one differs in most chats that do not begin with them
    if n > len(messages) or not (messages[n - 1] == known[-1] or _have_calls(messages[n - 1], known[-1])):
        return None
    if messages[:n] == known:
        return [*known, *messages[n:]]
    if not all(map(_is_same, messages, known)):
        return None
    return [*(old if old == new else new for new, old in zip(messages, known, strict=False)), *messages[n:]]


def _have_calls(one: Message, other: Message) -> bool:
    return bool(one.get("tool_calls") and other.get("tool_calls"))


def _is_same(one: Message, other: Message) -> bool:
    """Each API writes ids and arguments of calls in its own way: those hash alike."""
    return one == other or (_have_calls(one, other) and canonical(one) == canonical(other))


class NewestLogs:
    """Logs of histories that were searched. For one thread at a time. max_bytes: of the logs, in all."""

    def __init__(self, max_bytes: int = 2 * _MOST_BYTES) -> None:
        self._max_bytes = max_bytes
        self._kept: dict[bytes, Log] = {}  # by the running hash up to the last answer in it, the oldest first

    @contextmanager
    def log(self, history: History) -> Iterator[Log]:
        """A log of a chat without its newest message, to be searched. A turn is a message."""
        messages = history.body["messages"]
        known = next((unit for unit in reversed(history.whole) if unit.key in self._kept), None)
        log = self._kept.pop(known.key) if known else Log(max_bytes=1 << 30)
        for i in range(known.end if known else 0, len(messages) - 1):
            if messages[i]["role"] in ("user", "assistant"):
                log.append(flat_content(messages[i].get("content")), i, messages[i]["role"], when=0)
        try:
            yield log
        finally:
            if history.whole:
                last = history.whole[-1]
                log.truncate(last.end)  # what comes after it may be something else next time
                self._kept[last.key] = log
                while len(self._kept) > _MOST or self._n_bytes > self._max_bytes:
                    self._kept.pop(next(iter(self._kept))).close()

    @property
    def _n_bytes(self) -> int:
        return sum(log.stats.n_bytes for log in self._kept.values())

    def forget(self) -> None:
        """Keep none."""
        for log in self._kept.values():
            log.close()
        self._kept = {}
