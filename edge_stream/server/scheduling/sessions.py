"""Sessions, and the slots of the cache that hold those used last; the others are on disk."""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_stream.errors import EdgeStreamError, SessionError
from edge_stream.server.history.prefix_index import PrefixIndex
from edge_stream.server.history.prefix_matching import History, PrefixLog
from edge_stream.server.history.session_store import SessionStore, is_damage, pack

if TYPE_CHECKING:
    from edge_stream.engine import Engine
    from edge_stream.stream import Stream

log = logging.getLogger("edge_stream.server")


@dataclass(frozen=True)
class Write:
    """A file being written: what it will hold, and its bytes."""

    future: Future[None]
    facts: dict[str, Any]
    n_bytes: int


@dataclass(eq=False)
class Session:
    """A conversation that can be continued. It is in a slot (`slot` is set), on disk (`n_bytes` > 0), or both.

    n_past, n_window: of the stream at the last entry of the log. saved: the file holds what the slot holds, or will
    once it is written.
    """

    id: str
    log: PrefixLog = field(default_factory=PrefixLog)
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
    on_disk: dict[str, Any] = field(default_factory=dict)  # the facts that the file holds
    write: Write | None = None

    @property
    def kept(self) -> dict[str, Any]:
        """What is on disk, or will be once the current write has ended."""
        return self.write.facts if self.write else self.on_disk

    @property
    def facts(self) -> dict[str, Any]:
        """What a session file says of it."""
        names = ("name", "n_past", "n_window", "n_turns")
        return {name: getattr(self, name) for name in names} | {"entries": list(self.log.entries)}

    @property
    def is_forkable(self) -> bool:
        """Whether another session can have its stream, since all of it is on disk."""
        return self.write is None and bool(self.on_disk) and (self.stream is None or self.saved)

    def can_rewind_to(self, index: int) -> bool:
        """Whether the stream can be taken back to an entry."""
        return self.n_past - self.log.entries[index].n_past <= self.n_window

    def revert(self) -> None:
        """Back to what is on disk."""
        facts = self.kept
        self.log = PrefixLog(facts["entries"])
        self.name, self.n_turns = facts["name"], facts["n_turns"]
        self.n_past, self.n_window = facts["n_past"], facts["n_window"]


@dataclass(frozen=True)
class PrefixMatch:
    """A prefix of a history, n_known units (or bytes) long, that a session has: its entry `index`."""

    session: Session
    index: int
    n_known: int

    @property
    def is_last(self) -> bool:
        """Whether the session holds nothing after the prefix."""
        return self.index + 1 == len(self.session.log.entries)


class Sessions:
    """All sessions of a server. Belongs to the scheduler's thread."""

    def __init__(self, engine: Engine, store: SessionStore | None) -> None:
        self.engine = engine
        self.on_written: Callable[[], None] = lambda: None  # called by another thread
        self.reset(store)

    def reset(self, store: SessionStore | None) -> None:
        """Know the sessions of a store and no others. The slots have been vacated, and an earlier store is closed."""
        self.store = store
        self.slots: list[Session | None] = [None] * self.engine.n_parallel
        self.all: dict[str, Session] = {}
        self._index = PrefixIndex()
        self._writing: list[Session] = []
        if store:
            for session_id, facts, n_bytes, used in store.scan():
                session = Session(session_id, n_bytes=n_bytes, used=used, on_disk=facts)
                session.revert()
                self._add(session)

    #
    # finding
    #

    def find(self, history: History, name: str | None) -> PrefixMatch | None:
        """The longest prefix of a history that a session has which is not busy; of several sessions the newest.

        name: look at that session only. A request without a name may continue a named session at its end, and
        elsewhere only as a branch.
        """
        for n_known, key, ids in self._index.find(history):
            best: PrefixMatch | None = None
            for session in sorted((self.all[i] for i in ids), key=lambda s: s.used, reverse=True):
                if session.busy or (name is not None and session.name != name):
                    continue
                index = session.log.find(key)
                if index is None or not session.can_rewind_to(index):
                    continue
                match = PrefixMatch(session, index, n_known)
                if match.is_last:
                    return match  # nothing is lost by continuing it
                if name is not None or session.name is None or session.is_forkable:
                    best = best or match
            if best:
                return best
        return None

    def named(self, name: str) -> Session | None:
        """The session that a client calls so."""
        named = [s for s in self.all.values() if s.name == name]
        return max(named, key=lambda s: s.used, default=None)

    #
    # slots
    #

    def idle_slot(self) -> int | None:
        """A free slot, else that of the least recently used session; None if all are busy."""
        if None in self.slots:
            return self.slots.index(None)
        idle = [s for s in self.slots if s and not s.busy]
        return min(idle, key=lambda s: s.used).slot if idle else None

    def is_busy(self, slot: int) -> bool:
        """Whether a slot's session is being read or written."""
        session = self.slots[slot]
        return session is not None and session.busy

    def vacate(self, slot: int) -> None:
        """Free a slot; its session is saved first, if that is due and it has a finished turn."""
        session = self.slots[slot]
        if session is None:
            return
        if not session.saved and session.n_turns:
            self.save(session)
        self.drop(session)

    def drop(self, session: Session) -> None:
        """Take a session out of its slot, as it was last saved; one that never was is forgotten."""
        self._leave(session)
        self._revert(session)

    def new(self, slot: int, name: str | None) -> Session:
        """An empty session in a slot, which is vacated. Its stream is made once its head is known."""
        self.vacate(slot)
        other = self.named(name) if name is not None else None
        if other is not None:
            other.name = None
        session = Session(secrets.token_hex(16), name=name, slot=slot)
        self.slots[slot] = session
        self._add(session)
        return session

    def restore(self, session: Session, slot: int) -> None:
        """Load a session from disk into a slot, which is vacated. Raises EdgeStreamError.

        A damaged file is then set aside; after any other error the file and what is known of it stay as they are.
        """
        assert self.store is not None
        session.busy = True  # its file must not be deleted to make room for the one it displaces
        path = self.store.path(session.id)
        try:
            self.vacate(slot)
            if session.write and not self._await_write(session):
                raise SessionError("the conversation could not be saved before")
            session.stream = self.engine.restore(path, seq_id=slot)
        except BaseException as error:
            session.busy = False
            if isinstance(error, EdgeStreamError) and is_damage(error):
                self.set_aside(session)
            elif not session.write and not path.exists():
                self._forget(session)
            raise
        with suppress(OSError):
            os.utime(path)
        session.slot, session.saved = slot, True
        self.slots[slot] = session

    def branch(self, match: PrefixMatch, name: str | None) -> Session:
        """The session to continue from an entry that is not its last.

        A saved one stays on disk as it was, so that both branches can be continued; one that the request names is
        itself changed.
        """
        old = match.session
        if not old.saved or name is not None:
            return old
        new = Session(
            secrets.token_hex(16),
            PrefixLog(old.log.entries),
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

    def rewind(self, session: Session, index: int) -> None:
        """Take the stream back to an entry. Raises EdgeStreamError if it cannot go there."""
        assert session.stream is not None
        n = session.stream.stats.n_past - session.log.entries[index].n_past
        if n:
            session.stream.rewind(n)
            session.saved = False
        session.log.cut(index)
        self.settle(session)

    def undo(self, session: Session) -> bool:
        """Take the stream back to the last entry; False if it cannot go there."""
        assert session.stream is not None
        entry, stats = session.log.last, session.stream.stats
        if entry is None or stats.n_past - entry.n_past > stats.n_window:
            return False
        try:
            self.rewind(session, len(session.log.entries) - 1)
        except EdgeStreamError:
            return False
        return True

    def settle(self, session: Session) -> None:
        """The stream is at the last entry of the log: bring facts and index up to date."""
        assert session.stream is not None
        stats = session.stream.stats
        session.n_past, session.n_window = stats.n_past, stats.n_window
        session.log.trim(stats.n_past, stats.n_window)
        session.used = time.time()
        self._index.update(session.id, session.log.entries)

    #
    # disk
    #

    def can_save(self, session: Session) -> bool:
        """Whether `save` would not wait for the disk."""
        return self.store is None or (session.write is None and self.store.can_write)

    def must_wait(self, match: PrefixMatch | None, slot: int) -> bool:
        """Whether giving the slot to a match would wait for the disk."""
        if match and match.session.slot is None and match.session.write:
            return True
        old = self.slots[slot]
        due = old and old is not (match and match.session) and not old.saved and old.n_turns
        return bool(old and due and not self.can_save(old))

    def save(self, session: Session) -> Future[None] | None:
        """Copy a session whose stream is at its last entry, and have it written. None if it cannot be (logged)."""
        if self.store is None or session.stream is None or not session.log.entries:
            return None
        if session.write:
            self._await_write(session)
        facts = session.facts
        try:
            future, n_bytes = self.write(session.stream, self.store.path(session.id), facts)
        except (EdgeStreamError, MemoryError) as error:
            log.error("a conversation could not be saved: %s", str(error) or "there is not enough memory")
            return None
        session.write = Write(future, facts, n_bytes)
        session.saved = True
        self._writing.append(session)
        return future

    def write(self, stream: Stream, path: Path, facts: dict[str, Any]) -> tuple[Future[None], int]:
        """Copy a stream and have it written with facts: (future, bytes).

        Waits while there are too many copies. Raises EdgeStreamError, also if there is no room.
        """
        assert self.store is not None
        self.store.wait()
        stream.forget_sampling()  # every request brings its own
        snapshot = stream.snapshot(pack(facts))
        try:
            n_bytes = snapshot.n_bytes
            if not self._make_room(path, n_bytes):
                raise SessionError(
                    f"--session-space ({self.store.max_bytes / 2**30:.3g} GiB) is full of files that are not deleted "
                    "automatically"
                )
            future = self.store.write(snapshot, path)
        except OSError as error:
            snapshot.close()
            raise SessionError(f"cannot look into {self.store.root}: {error.strerror}") from error
        except BaseException:
            snapshot.close()
            raise
        future.add_done_callback(lambda _future: self.on_written())
        return future, n_bytes

    def collect(self) -> None:
        """Take note of the writes that have ended."""
        for session in [s for s in self._writing if s.write and s.write.future.done()]:
            self._end_write(session)

    def _await_write(self, session: Session) -> bool:
        assert session.write is not None
        wait([session.write.future])
        return self._end_write(session)

    def _end_write(self, session: Session) -> bool:
        """The write has ended. If it failed, the file is the one before, and False is returned."""
        write, session.write = session.write, None
        assert write is not None
        self._writing.remove(session)
        if write.future.exception() is None:
            session.on_disk, session.n_bytes = write.facts, write.n_bytes
            return True
        session.saved = False
        if session.slot is None:
            self._revert(session)
        return False

    def erase(self, session: Session) -> Future[None] | None:
        """Forget a session, on disk as well; a future if its file can only be deleted later."""
        self._leave(session)
        self._forget(session)
        if self.store is None or not session.kept:
            return None
        return self.store.delete_after_writes(self.store.path(session.id))

    def set_aside(self, session: Session) -> None:
        """Forget a session whose file is wrong; the file is kept under another name."""
        assert self.store is not None
        self._leave(session)
        self.store.set_aside(self.store.path(session.id))
        self._forget(session)

    def _make_room(self, path: Path, n_bytes: int) -> bool:
        """Delete files until n_bytes fit at a path; False, and nothing is deleted, if they never would."""
        assert self.store is not None
        if self.store.root not in path.parents:
            return True  # a slot that a client saves elsewhere
        known = {self.store.path(s.id): s for s in self.all.values()}
        in_use = {file for file, s in known.items() if s.busy or s.write}
        order = {file: (s.slot is not None, s.used) for file, s in known.items()}
        files = self.store.excess(path, n_bytes, in_use, order)
        for file in files or ():
            session = known.get(file)
            try:
                self.store.delete(file)
            except OSError as error:
                log.error("%s could not be deleted to make room: %s", file, error)
                continue
            log.info("%s was deleted to make room", file)
            if session and session.slot is None:
                self._forget(session)
            elif session:  # the cache still has it
                session.on_disk, session.n_bytes, session.saved = {}, 0, False
        return files is not None

    #
    # one session
    #

    def _add(self, session: Session) -> None:
        self.all[session.id] = session
        self._index.update(session.id, session.log.entries)

    def _forget(self, session: Session) -> None:
        self._index.remove(session.id)
        self.all.pop(session.id, None)
        if session in self._writing:
            self._writing.remove(session)

    def _revert(self, session: Session) -> None:
        """Back to what is on disk; a session that never was there is forgotten."""
        if session.kept:
            session.revert()
            self._index.update(session.id, session.log.entries)
        else:
            self._forget(session)

    def _leave(self, session: Session) -> None:
        """Close the stream and free the slot."""
        if session.stream:
            session.stream.close()
        self._release(session)

    def _release(self, session: Session) -> None:
        if session.slot is not None:
            self.slots[session.slot] = None
        session.stream, session.slot, session.busy = None, None, False
