"""What was made of the newest histories, so that a request that goes on from one costs what is new of it.

A client sends its whole history with each request. Hashing it, and making the log of it that is searched for what the
window has lost, takes as long as the history is; nothing is left out where an earlier request began with the same
messages. What is kept is bounded, in memory only, and never needed: without it everything is made anew.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from edge_stream.recall import Log
from edge_stream.server.history.prefix_matching import History, Message, chat_history, flat_content

_MOST_BYTES = 4 << 20  # of text; what else belongs to it takes as much again, in Python several times as much


class NewestHistories:
    """Chats with their hashes, those of the newest requests. Thread-safe. max_bytes: of their messages, in all."""

    def __init__(self, max_bytes: int = _MOST_BYTES) -> None:
        self._max_bytes, self._lock = max_bytes, threading.Lock()
        self._kept: list[History] = []  # the oldest first

    def history(self, messages: Sequence[Message], variables: Mapping[str, Any]) -> History:
        """As chat_history."""
        with self._lock:
            kept = list(self._kept)
        same = [(known.n_same(messages), known) for known in kept]
        n_same, begun = max(same, key=lambda pair: pair[0], default=(0, None))
        history = chat_history(messages, variables, begun, n_same)
        if history.n_hashed <= self._max_bytes:
            is_longer = n_same and begun and begun.root == history.root
            with self._lock:
                self._kept = [*(known for known in self._kept if not is_longer or known is not begun), history]
                while sum(known.n_hashed for known in self._kept) > self._max_bytes:
                    self._kept.pop(0)
        return history

    def forget(self) -> None:
        """Keep none."""
        with self._lock:
            self._kept = []


class NewestLogs:
    """Logs of histories that were searched. For one thread at a time. max_bytes: of the logs, in all."""

    def __init__(self, max_bytes: int = 2 * _MOST_BYTES) -> None:
        self._max_bytes = max_bytes
        self._kept: dict[bytes, Log] = {}  # by the running hash up to the last answer in it, the oldest first

    @contextmanager
    def log(self, history: History) -> Iterator[Log]:
        """A log of a chat without its newest message, to be searched. A turn is a message."""
        messages, whole = history.body["messages"], history.n_whole
        n, log = 0, None
        for unit in reversed(history.units):
            if unit.end <= whole and (log := self._kept.pop(unit.key, None)):
                n = unit.end
                break
        log = log or Log(max_bytes=1 << 30)
        self._append(log, messages, n, whole)
        self._append(log, messages, whole, len(messages) - 1)
        try:
            yield log
        finally:
            if whole:
                if len(messages) - 1 > whole:  # may be followed by something else next time
                    log.truncate(whole)
                key = next(unit.key for unit in reversed(history.units) if unit.end == whole)
                self._kept[key] = log
                while sum(kept.stats.n_bytes for kept in self._kept.values()) > self._max_bytes:
                    self._kept.pop(next(iter(self._kept))).close()

    @staticmethod
    def _append(log: Log, messages: Sequence[Message], begin: int, end: int) -> None:
        for i in range(begin, end):
            if messages[i]["role"] in ("user", "assistant"):
                log.append(flat_content(messages[i].get("content")), i, messages[i]["role"], when=0)

    def forget(self) -> None:
        """Keep none."""
        for log in self._kept.values():
            log.close()
        self._kept = {}
