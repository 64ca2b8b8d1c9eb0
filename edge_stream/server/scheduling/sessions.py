"""Conversations, and the slots of the cache that hold those used last; the others are on disk."""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_stream.errors import EdgeStreamError, SessionError
from edge_stream.server.history.prefix_matching import History, Log
from edge_stream.server.history.session_store import SessionStore, is_damage, pack

if TYPE_CHECKING:
    from edge_stream.engine import Engine
    from edge_stream.stream import Stream

log = logging.getLogger("edge_stream.server")


@dataclass(frozen=True)
class Write:
    """A file that is being written: what it will hold, and its bytes."""

    future: Future[None]
    facts: dict[str, Any]
    n_bytes: int


@dataclass(eq=False)
class Conversation:
    """One conversation. It is in a slot (`stream` is set), on disk (`n_bytes` > 0), or both.

    n_past, n_window: of the stream at the last entry of the log. saved: the file holds what the slot holds, or will
    once it is written.
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
    write: Write | None = None

    @property
    def kept(self) -> dict[str, Any]:
        """What is on disk when the write that is going on has ended."""
        return self.write.facts if self.write else self.on_disk

    @property
    def facts(self) -> dict[str, Any]:
        """What a session file says of it, the log aside."""
        return {"name": self.name, "n_past": self.n_past, "n_window": self.n_window, "n_turns": self.n_turns}

    @property
    def is_forkable(self) -> bool:
        """Whether its stream can go to another conversation, since it is whole on disk."""
        return self.write is None and bool(self.on_disk) and (self.stream is None or self.saved)

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
        self._writing: list[Conversation] = []
        self.on_written: Callable[[], None] = lambda: None  # called by another thread
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

        name: look at that conversation only. Without it, a named one may be gone on with, but taken back only as a
        branch. A head alone is nothing in common.
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
                if name is None and conversation.name is not None and not conversation.is_forkable:
                    continue
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
        """Take a conversation out of its slot as it was last saved; one that never was is forgotten."""
        self._leave(conversation)
        self._go_back(conversation)

    def new(self, slot: int, name: str | None) -> Conversation:
        """An empty conversation for a slot, which is vacated. Its stream is made once its head is known."""
        self.vacate(slot)
        self._take_name(name)
        conversation = Conversation(secrets.token_hex(16), Log(), name=name, slot=slot)
        self.slots[slot] = conversation
        self._add(conversation)
        return conversation

    def restore(self, conversation: Conversation, slot: int) -> None:
        """Bring a conversation from disk into a slot, which is vacated. Raises EdgeStreamError.

        A damaged file is then set aside; after any other error the file and what is known of it stay as they are.
        """
        assert self.store is not None
        conversation.busy = True  # its file must not go to make room for the one it displaces
        path = self.store.path(conversation.id)
        try:
            self.vacate(slot)
            if conversation.write:
                wait([conversation.write.future])
                if not self._finish(conversation):
                    raise SessionError("the conversation could not be saved before")
            conversation.stream = self.engine.restore(path, seq_id=slot)
        except EdgeStreamError as error:
            conversation.busy = False
            if is_damage(error):
                self.set_aside(conversation)
            elif not path.exists():
                self._forget(conversation)
            raise
        with suppress(OSError):
            os.utime(path)
        conversation.slot, conversation.saved = slot, True
        self.slots[slot] = conversation

    def branch(self, match: Match, name: str | None) -> Conversation:
        """The conversation to go on with from an entry that is not the last one.

        A saved one stays on disk as it was, so that both branches can go on; one that the request names is changed
        itself.
        """
        old = match.conversation
        if not old.saved or name is not None:
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

    def can_save(self, conversation: Conversation) -> bool:
        """Whether `save` would not wait for the disk."""
        return self.store is None or (conversation.write is None and self.store.can_write)

    def save(self, conversation: Conversation) -> Future[None] | None:
        """Copy a conversation whose stream is at its last entry, and have it written. None if it cannot be (said)."""
        if self.store is None or conversation.stream is None or not conversation.log.entries:
            return None
        if conversation.write:
            wait([conversation.write.future])
            self._finish(conversation)
        facts, entries = conversation.facts, list(conversation.log.entries)
        path = self.store.path(conversation.id)
        try:
            future, n_bytes = self.write(conversation.stream, path, pack(facts, entries))
        except EdgeStreamError as error:
            log.error("a conversation could not be saved: %s", error)
            return None
        conversation.write = Write(future, {**facts, "entries": entries}, n_bytes)
        conversation.saved = True
        self._writing.append(conversation)
        future.add_done_callback(lambda _future: self.on_written())
        return future

    def write(self, stream: Stream, path: Path, user: bytes) -> tuple[Future[None], int]:
        """Copy a stream's session and have it written: (its future, its bytes).

        Waits while there are too many copies. Raises EdgeStreamError, also if there is no room.
        """
        assert self.store is not None
        self.store.wait()
        stream.forget_sampling()  # every request brings its own
        snapshot = stream.snapshot(user)
        n_bytes = snapshot.n_bytes
        if not self._make_room(path, n_bytes):
            snapshot.close()
            raise SessionError(
                f"--session-space ({self.store.max_bytes / 2**30:.3g} GiB) is filled by what is not deleted by itself"
            )
        return self.store.write(snapshot, path), n_bytes

    def collect(self) -> None:
        """Take note of the writes that have ended."""
        for conversation in [c for c in self._writing if c.write and c.write.future.done()]:
            self._finish(conversation)

    def _finish(self, conversation: Conversation) -> bool:
        """The write has ended. If it failed, the file is the one before."""
        write, conversation.write = conversation.write, None
        assert write is not None
        self._writing.remove(conversation)
        if write.future.exception() is None:
            conversation.on_disk, conversation.n_bytes = write.facts, write.n_bytes
            return True
        conversation.saved = False
        if conversation.slot is None:
            self._go_back(conversation)
        return False

    def erase(self, conversation: Conversation) -> None:
        """Forget a conversation, on disk as well."""
        self._leave(conversation)
        self._remove(conversation)

    def set_aside(self, conversation: Conversation) -> None:
        """Forget a conversation whose file is wrong; the file is kept under another name."""
        assert self.store is not None
        self._leave(conversation)
        self.store.set_aside(self.store.path(conversation.id))
        self._forget(conversation)

    def _make_room(self, path: Path, n_bytes: int) -> bool:
        """Delete files until a session of n_bytes fits at a path; False, and nothing is deleted, if it never would.

        First those that were set aside, then those used longest ago, those in slots last. A session that is alone may
        be larger than what is allowed.
        """
        store = self.store
        assert store is not None
        files = store.files()
        files.pop(path, None)
        excess = sum(size for size, _ in files.values()) + n_bytes - store.max_bytes
        if excess <= 0:
            return True

        known = {store.path(c.id): c for c in self.all.values()}

        def in_use(file: Path) -> bool:
            return file in known and (known[file].busy or known[file].write is not None)

        def order(file: Path) -> tuple[bool, bool, float]:
            in_slot = file in known and known[file].slot is not None
            return not store.is_damaged(file), in_slot, known[file].used if file in known else files[file][1]

        deletable = sorted((f for f in files if store.may_delete(f) and not in_use(f)), key=order)
        if len(deletable) < len(files) and excess > sum(files[f][0] for f in deletable):
            return False
        for file in deletable:
            if excess <= 0:
                break
            log.info("%s, last used %s, was deleted to make room", file, time.ctime(order(file)[2]))
            excess -= files[file][0]
            self._delete(file, known.get(file))
        return True

    def _delete(self, file: Path, conversation: Conversation | None) -> None:
        if conversation is None:
            file.unlink(missing_ok=True)
        elif conversation.slot is None:
            self._remove(conversation)
        else:  # the cache still has it
            file.unlink(missing_ok=True)
            conversation.on_disk, conversation.n_bytes, conversation.saved = {}, 0, False

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

    def _forget(self, conversation: Conversation) -> None:
        self._unindex(conversation)
        self.all.pop(conversation.id, None)
        if conversation in self._writing:
            self._writing.remove(conversation)

    def _remove(self, conversation: Conversation) -> None:
        self._forget(conversation)
        if self.store is None or not conversation.kept:
            return
        file = self.store.path(conversation.id)
        if conversation.write:
            conversation.write.future.add_done_callback(lambda _future: file.unlink(missing_ok=True))
        else:
            file.unlink(missing_ok=True)

    def _leave(self, conversation: Conversation) -> None:
        """Close the stream and free the slot."""
        if conversation.stream:
            conversation.stream.close()
        self._release(conversation)

    def _go_back(self, conversation: Conversation) -> None:
        """To what is on disk; what never was is forgotten."""
        if conversation.kept:
            self._revert(conversation)
            self.reindex(conversation)
        else:
            self._forget(conversation)

    def _release(self, conversation: Conversation) -> None:
        if conversation.slot is not None:
            self.slots[conversation.slot] = None
        conversation.stream, conversation.slot, conversation.busy = None, None, False

    def _revert(self, conversation: Conversation) -> None:
        facts = conversation.kept
        conversation.log = Log(facts["entries"])
        conversation.name = facts["name"]
        conversation.n_past, conversation.n_window = facts["n_past"], facts["n_window"]
        conversation.n_turns = facts["n_turns"]

    def _take_name(self, name: str | None) -> None:
        other = self.named(name) if name is not None else None
        if other is not None:
            other.name = None
