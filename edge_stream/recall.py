"""The log of what was said: kept as text on disk, and found again when it has left the window."""

from __future__ import annotations

import bisect
import ctypes as C
import dataclasses
import itertools
import os
import time
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edge_stream.errors import EdgeStreamError
from edge_stream.native import bindings, recall_bindings
from edge_stream.text import sendable

if TYPE_CHECKING:
    from edge_stream.stream import Stream

ROLES = {"text": recall_bindings.TEXT, "user": recall_bindings.USER, "assistant": recall_bindings.ASSISTANT}
_NAMES = {value: name for name, value in ROLES.items()}
_ALL_TURNS = 2**62
# A model that has seen a line come again goes on with it rather than with one of the window that is worded alike: the
# demo model answered 551 of 560 questions (eval recall, seeds 0 and 2 to 4), and 543 with the line said once.
_MOST_COPIES = 3


@dataclass(frozen=True)
class Hit:
    """An entry that was found.

    turn: number of the message it is of. role: text, user or assistant. when: seconds since 1970. score: BM25.
    coverage: share of the query's words that it and the entry before it have, weighted by rarity, 0 to 1. belongs: it
    may come back for the query, see es_log_search. n_copies: how often `block` says it.
    """

    text: str
    turn: int
    role: str
    when: int
    score: float
    coverage: float
    belongs: bool
    n_copies: int = 1

    @property
    def block(self) -> str:
        """What Stream.recall gets: lines of its own."""
        return "\n" + f"{self.text}\n" * self.n_copies


class Log:
    """A log in a file, or in memory: see edge_stream_recall.h. For one thread at a time.

    path: made if it is not there, readable by its owner only; None: in memory. max_bytes: of the file; the oldest
    entries are dropped beyond it. Raises SessionError for a file that is damaged, in use or no log.
    """

    def __init__(self, path: str | Path | None = None, max_bytes: int = 64 << 20) -> None:
        if max_bytes < 1:
            raise EdgeStreamError(f"max_bytes = {max_bytes} must be positive")
        self._native = recall_bindings.library()
        handle = C.c_void_p()
        bindings.check(self._native.es_log_open(_file(path), max_bytes, C.byref(handle)))
        self._own(handle)

    def _own(self, handle: C.c_void_p) -> None:
        self.handle = handle
        self._free = weakref.finalize(self, self._native.es_log_close, handle)

    def append(self, text: str, turn: int, role: str = "text", when: int | None = None) -> None:
        """Add a turn, line by line. turn: not below the newest entry's. when: seconds since 1970; None: now."""
        data = sendable(text).encode()
        when = int(time.time()) if when is None else when
        bindings.check(self._native.es_log_append(self.handle, turn, ROLES[role], when, data, len(data)))

    def truncate(self, n_turns: int) -> None:
        """Keep the turns before n_turns."""
        bindings.check(self._native.es_log_truncate(self.handle, n_turns))

    def fork(self, path: str | Path | None, n_turns: int = _ALL_TURNS) -> Log:
        """A copy with the turns before n_turns. Raises EdgeStreamError if there is a log with entries at path."""
        copy, handle = Log.__new__(Log), C.c_void_p()
        copy._native = self._native
        bindings.check(self._native.es_log_fork(self.handle, _file(path), n_turns, C.byref(handle)))
        copy._own(handle)
        return copy

    def forget(self, turn: int) -> None:
        """Delete what was said in a turn, from the file too. Raises EdgeStreamError if there is nothing."""
        bindings.check(self._native.es_log_forget(self.handle, turn))

    def search(self, text: str, n: int = 8, n_turns: int = _ALL_TURNS) -> list[Hit]:
        """The best n entries of turns before n_turns, best first."""
        data, hits = sendable(text).encode(), (recall_bindings.LogHit * n)()
        found = self._native.es_log_search(self.handle, data, len(data), n_turns, hits, n)
        return [_hit(h) for h in hits[:found]]

    def recall(self, text: str, first_held: int) -> Hit | None:
        """What is to come back for a text, of turns before first_held: see es_log_recall."""
        data, hit = sendable(text).encode(), recall_bindings.LogHit()
        found = self._native.es_log_recall(self.handle, data, len(data), first_held, C.byref(hit))
        return _hit(hit) if found else None

    @property
    def stats(self) -> recall_bindings.LogStats:
        """n_turns, n_entries, n_dropped, n_bytes: see es_log_stats."""
        stats: recall_bindings.LogStats = self._native.es_log_get_stats(self.handle)
        return stats

    def sync(self) -> None:
        """Make what was added survive a loss of power."""
        bindings.check(self._native.es_log_sync(self.handle))

    def close(self) -> None:
        """Close the file, which another may open then."""
        self._free()
        self.handle = C.c_void_p()

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class StreamLog:
    """The lines that a stream has read, for texts without turns: what has left its window can be found again.

    A line is a turn. log: an empty one. n_tokens: of a line that may come back.
    """

    def __init__(self, stream: Stream, log: Log, n_tokens: int = 64) -> None:
        self._stream, self._log, self._n_tokens = stream, log, n_tokens
        self._held: deque[int] = deque()  # where the lines begin that have not left the window, in tokens
        self._first_held = 0

    def add(self, line: str, start: int) -> None:
        """Note a line that begins with the stream's token number `start`."""
        self._log.append(line, self._first_held + len(self._held))
        self._held.append(start)

    def note(self, text: str, tokens: Sequence[int], start: int) -> None:
        """Note the lines of a text that was fed as tokens, the first of which is the stream's number `start`."""
        vocabulary = self._stream.backend.vocabulary
        ends = list(itertools.accumulate(len(vocabulary.token_to_piece(t)) for t in tokens))
        at = 0
        for line in text.splitlines(keepends=True):
            self.add(line, start + bisect.bisect_right(ends, at))
            at += len(sendable(line).encode())

    def find(self, question: str) -> Hit | None:
        """What belongs to a question and has left the window, wholly or in part."""
        hit = self._log.recall(question, self.first_held)
        return self.fitted(hit) if hit else None

    def fitted(self, hit: Hit) -> Hit | None:
        """The hit, said up to three times in as many tokens as may come back and fit; None if once is too much."""
        n_line = len(self._stream.backend.vocabulary.tokenize(hit.text)) + 1  # with its end
        if n_line > self._n_tokens + 1:
            return None
        room = min(self._n_tokens, self._stream.stats.n_recall_max) - 1
        return dataclasses.replace(hit, n_copies=max(1, min(_MOST_COPIES, room // n_line)))

    @property
    def first_held(self) -> int:
        """The oldest line that is in the window as a whole."""
        stats = self._stream.stats
        first = stats.n_past - stats.n_window if stats.n_evicted else 0
        while self._held and self._held[0] < first:
            self._held.popleft()
            self._first_held += 1
        return self._first_held


def _hit(h: recall_bindings.LogHit) -> Hit:
    text = h.text.decode(errors="replace")
    return Hit(text, h.turn, _NAMES[h.kind], h.when, h.score, h.coverage, bool(h.belongs))


def _file(path: str | Path | None) -> bytes | None:
    return None if path is None else os.fsencode(path)
