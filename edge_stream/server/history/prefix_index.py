"""Which sessions hold a prefix of a history: hashes of their logs to their ids."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence

from edge_stream.server.history.prefix_matching import Entry, History


class PrefixIndex:
    """From the running hash of a prefix to the ids of the sessions that have an entry for it."""

    def __init__(self) -> None:
        self._ids: defaultdict[bytes, set[str]] = defaultdict(set)
        self._known: dict[str, tuple[set[bytes], list[int]]] = {}  # by id: hashes, lengths of texts in bytes
        self._lengths: Counter[int] = Counter()

    def update(self, session_id: str, entries: Sequence[Entry]) -> None:
        """The entries of a session are these now. A head alone is no prefix."""
        self.remove(session_id)
        keys = {e.key for e in entries if e.kind != "head"}
        lengths = [e.n_bytes for e in entries if e.kind == "text"]
        self._known[session_id] = keys, lengths
        for key in keys:
            self._ids[key].add(session_id)
        self._lengths.update(lengths)

    def remove(self, session_id: str) -> None:
        """Forget a session, if it is known."""
        keys, lengths = self._known.pop(session_id, (set[bytes](), list[int]()))
        for key in keys:
            self._ids[key].discard(session_id)
            if not self._ids[key]:
                del self._ids[key]
        self._lengths.subtract(lengths)
        self._lengths = +self._lengths

    def find(self, history: History) -> Iterator[tuple[int, bytes, list[str]]]:
        """(units or bytes of it, hash, ids) of every prefix that some session has, the longest first."""
        if history.text is not None:
            prefixes: Iterable[tuple[int, bytes]] = list(history.keys_at(self._lengths))[::-1]
        else:
            units = history.units
            # an answer to be continued is written anew: its end is in the cache already
            n = len(units) - 1 if history.is_continued else len(units)
            prefixes = ((i, units[i - 1].key) for i in range(n, 0, -1))
        for n_known, key in prefixes:
            if key in self._ids:
                yield n_known, key, list(self._ids[key])
