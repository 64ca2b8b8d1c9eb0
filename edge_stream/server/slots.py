"""Conversations, and the slots of the cache that hold those used last; the others are on disk."""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from edge_stream.errors import EdgeStreamError
from edge_stream.server.recognition import History, Log
from edge_stream.server.store import SessionStore, pack

if TYPE_CHECKING:
    from edge_stream.engine import Engine
    from edge_stream.stream import Stream

log = logging.getLogger("edge_stream.server")


@dataclass(eq=False)
class Conversation:
    """One conversation. It is in a slot (`stream` is set), on disk (`n_bytes` > 0), or both.

    n_past, n_window: of the stream at the last entry of the log. saved: the file holds what the slot holds.
    """

    id: str
    log: Log
    name: str | None = None
    stream: Stream | None = None
    slot: int | None = None
    busy: bool = False
    saved: bool = False
    n_past: int = 0
    n_window: int = 0
    n_turns: int = 0
    n_bytes: int = 0
    used: float = field(default_factory=time.time)
    on_disk: dict[str, Any] = field(default_factory=dict)  # the facts and entries that the file holds

    def can_go_back_to(self, index: int) -> bool:
        """Whether the stream can be taken back to an entry."""
        return self.n_past - self.log.entries[index].n_past <= self.n_window


@dataclass(frozen=True)
class Match:
    """Where a history was found: entry `index` of a conversation, after n_known of its units (or bytes)."""

    conversation: Conversation
    index: int
    n_known: int


class Conversations:
    """All conversations of a server, by id, name and running hash. Belongs to the scheduler's thread."""

    def __init__(self, engine: Engine, store: SessionStore | None) -> None:
        self.engine, self.store = engine, store
        self.slots: list[Conversation | None] = [None] * engine.n_parallel
        self.all: dict[str, Conversation] = {}
        self._by_key: defaultdict[bytes, set[str]] = defaultdict(set)
        self._keys: dict[str, set[bytes]] = {}
        self._text_lengths: Counter[int] = Counter()
        self._lengths: dict[str, list[int]] = {}
        if store:
            for conversation_id, facts, n_bytes, used in store.scan():
                conversation = Conversation(conversation_id, Log(), n_bytes=n_bytes, used=used, on_disk=facts)
                self._revert(conversation)
                self._add(conversation)

    #
    # finding
    #

    def find(self, history: History, name: str | None) -> Match | None:
        """The newest place that a history has in common with a conversation that is not busy.

        name: look at that conversation only. A head alone is nothing in common.
        """
        if history.text is not None:
            places = list(history.keys_at(self._text_lengths))
            places.reverse()
        else:
            units = history.units
            # an answer that is to go on is written anew: its end is in the cache already
            n = len(units) - 1 if units[-1].kind == "assistant" else len(units)
            places = [(i, units[i - 1].key) for i in range(n, 0, -1)]
        for n_known, key in places:
            found = [self.all[c] for c in self._by_key.get(key, ())]
            best: Match | None = None
            for conversation in sorted(found, key=lambda c: c.used, reverse=True):
                if conversation.busy or (name is not None and conversation.name != name):
                    continue
                index = conversation.log.find(key)
                if index is None or not conversation.can_go_back_to(index):
                    continue
                if index + 1 == len(conversation.log.entries):
                    return Match(conversation, index, n_known)  # nothing is lost by going on here
                best = best or Match(conversation, index, n_known)
            if best:
                return best
        return None

    def named(self, name: str) -> Conversation | None:
        """The conversation that a client calls so."""
        named = [c for c in self.all.values() if c.name == name]
        return max(named, key=lambda c: c.used, default=None)

    #
    # slots
    #

    def idle_slot(self) -> int | None:
        """A free slot, else that of the least recently used conversation; None if all are busy."""
        if None in self.slots:
            return self.slots.index(None)
        idle = [c for c in self.slots if c and not c.busy]
        return min(idle, key=lambda c: c.used).slot if idle else None

    def vacate(self, slot: int) -> None:
        """Make a slot free; its conversation goes to disk, if it is not there already and has a finished turn."""
        conversation = self.slots[slot]
        if conversation is None:
            return
        if not conversation.saved and conversation.n_turns:
            self.save(conversation)
        self.drop(conversation)

    def drop(self, conversation: Conversation) -> None:
        """Take a conversation out of its slot as it was last saved; without a file it is forgotten."""
        if conversation.stream:
            conversation.stream.close()
        self._release(conversation)
        if conversation.on_disk:
            self._revert(conversation)
            self.reindex(conversation)
        else:
            self._remove(conversation)

    def new(self, slot: int, name: str | None) -> Conversation:
        """An empty conversation for a slot, which is vacated. Its stream is made once its head is known."""
        self.vacate(slot)
        self._take_name(name)
        conversation = Conversation(secrets.token_hex(16), Log(), name=name, slot=slot)
        self.slots[slot] = conversation
        self._add(conversation)
        return conversation

    def restore(self, conversation: Conversation, slot: int) -> None:
        """Bring a conversation from disk into a slot, which is vacated. Raises SessionError; it is forgotten then."""
        assert self.store is not None
        self.vacate(slot)
        path = self.store.path(conversation.id)
        try:
            conversation.stream = self.engine.restore(path, seq_id=slot)
            os.utime(path)
        except (EdgeStreamError, OSError):
            self._remove(conversation)
            raise
        conversation.slot, conversation.saved = slot, True
        self.slots[slot] = conversation

    def branch(self, match: Match) -> Conversation:
        """The conversation to go on with from an entry that is not the last one.

        A saved one stays on disk as it was, so that both branches can go on; one that has a name is changed itself.
        """
        old = match.conversation
        if not old.saved or old.name is not None:
            return old
        log_ = Log(old.log.entries)
        new = Conversation(
            secrets.token_hex(16),
            log_,
            stream=old.stream,
            slot=old.slot,
            n_past=old.n_past,
            n_window=old.n_window,
            n_turns=old.n_turns,
        )
        assert new.slot is not None
        self._release(old)
        self.slots[new.slot] = new
        self._add(new)
        return new

    def rename(self, conversation: Conversation, name: str | None) -> None:
        """From now on a client calls it so."""
        if name is not None and conversation.name != name:
            self._take_name(name)
            conversation.name = name

    def take_back(self, conversation: Conversation, index: int) -> None:
        """Take the stream back to an entry."""
        stream, entry = conversation.stream, conversation.log.entries[index]
        assert stream is not None
        n = stream.stats.n_past - entry.n_past
        if n:
            stream.rewind(n)
            conversation.saved = False
        conversation.log.cut(index)
        self.settle(conversation)

    def settle(self, conversation: Conversation) -> None:
        """The stream is at the last entry of the log: bring facts and index up to date."""
        assert conversation.stream is not None
        stats = conversation.stream.stats
        conversation.n_past, conversation.n_window = stats.n_past, stats.n_window
        conversation.log.trim(stats.n_past, stats.n_window)
        conversation.used = time.time()
        self.reindex(conversation)

    #
    # disk
    #

    def save(self, conversation: Conversation) -> bool:
        """Write the session of a conversation whose stream is at its last entry. False if that failed (it is said)."""
        if self.store is None or conversation.stream is None or not conversation.log.entries:
            return False
        facts = {
            "name": conversation.name,
            "n_past": conversation.n_past,
            "n_window": conversation.n_window,
            "n_turns": conversation.n_turns,
        }
        path = self.store.path(conversation.id)
        try:
            conversation.stream.forget_sampling()  # every request brings its own
            conversation.stream.save(path, pack(facts, conversation.log.entries))
            conversation.n_bytes = path.stat().st_size
        except (EdgeStreamError, OSError) as error:
            log.error("a conversation could not be saved: %s", error)
            return False
        conversation.on_disk = {**facts, "entries": list(conversation.log.entries)}
        conversation.saved = True
        self._make_room()
        return True

    def erase(self, conversation: Conversation) -> None:
        """Forget a conversation, on disk as well."""
        if conversation.stream:
            conversation.stream.close()
        self._release(conversation)
        self._remove(conversation)

    def _make_room(self) -> None:
        """Delete the files used longest ago while there are more bytes than allowed."""
        assert self.store is not None
        files = [c for c in self.all.values() if c.n_bytes]
        total = sum(c.n_bytes for c in files)
        for conversation in sorted(files, key=lambda c: c.used):
            if total <= self.store.max_bytes or len(files) == 1:
                break
            if conversation.busy or conversation.slot is not None:
                continue
            log.info("a conversation last used %s was deleted to make room", time.ctime(conversation.used))
            total -= conversation.n_bytes
            self._remove(conversation)

    #
    # index
    #

    def reindex(self, conversation: Conversation) -> None:
        """After a change of the log."""
        self._unindex(conversation)
        self._keys[conversation.id] = {e.key for e in conversation.log.entries if e.kind != "head"}
        self._lengths[conversation.id] = [e.n_bytes for e in conversation.log.entries if e.kind == "text"]
        for key in self._keys[conversation.id]:
            self._by_key[key].add(conversation.id)
        self._text_lengths.update(self._lengths[conversation.id])

    def _unindex(self, conversation: Conversation) -> None:
        for key in self._keys.pop(conversation.id, ()):
            self._by_key[key].discard(conversation.id)
            if not self._by_key[key]:
                del self._by_key[key]
        self._text_lengths.subtract(self._lengths.pop(conversation.id, ()))
        self._text_lengths = +self._text_lengths

    def _add(self, conversation: Conversation) -> None:
        self.all[conversation.id] = conversation
        self.reindex(conversation)

    def _remove(self, conversation: Conversation) -> None:
        self._unindex(conversation)
        self.all.pop(conversation.id, None)
        if self.store and conversation.n_bytes:
            self.store.path(conversation.id).unlink(missing_ok=True)

    def _release(self, conversation: Conversation) -> None:
        if conversation.slot is not None:
            self.slots[conversation.slot] = None
        conversation.stream, conversation.slot, conversation.busy = None, None, False

    def _revert(self, conversation: Conversation) -> None:
        facts = conversation.on_disk
        conversation.log = Log(facts["entries"])
        conversation.name = facts["name"]
        conversation.n_past, conversation.n_window = facts["n_past"], facts["n_window"]
        conversation.n_turns = facts["n_turns"]

    def _take_name(self, name: str | None) -> None:
        other = self.named(name) if name is not None else None
        if other is not None:
            other.name = None
