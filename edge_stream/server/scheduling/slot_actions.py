"""POST /slots/{id}: save, restore and erase a slot. A client's file name never becomes a path."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_stream.errors import EdgeStreamError
from edge_stream.server.errors import NOT_FOUND, ApiError, invalid
from edge_stream.server.history.prefix_matching import PrefixLog
from edge_stream.text import sendable

if TYPE_CHECKING:
    from edge_stream.server.history.session_store import SessionStore
    from edge_stream.server.scheduling.scheduler import Scheduler
    from edge_stream.server.scheduling.sessions import Session

_MAX_SAVED = 64  # states saved by name


class SlotActions:
    """What a client may do to a slot. Runs on the engine's thread."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler

    def act(self, slot: int, action: str, filename: str | None) -> Future[dict[str, Any]]:
        """Carry out an action. A state is written by another thread: the future ends when it is. Raises ApiError."""
        answer: Future[dict[str, Any]] = Future()
        answer.set_running_or_notify_cancel()  # a write goes on if the client leaves
        if action == "save":
            self._save(slot, filename, answer)
        elif action == "restore":
            answer.set_result(self._restore(slot, filename))
        else:
            self._erase(slot, answer)
        return answer

    def _idle_session(self, slot: int) -> Session | None:
        """The session in a slot, which must be idle."""
        sessions = self.scheduler.sessions
        if not 0 <= slot < len(sessions.slots):
            raise ApiError(404, f"there is no slot {slot}", NOT_FOUND)
        session = sessions.slots[slot]
        if session and session.busy:
            raise ApiError(400, f"slot {slot} is being used: try again when it is idle")
        return session

    def _file(self, action: str, filename: str | None) -> tuple[SessionStore, Path, str]:
        """The store, the file of a state, and its name as it can be sent back."""
        store = self.scheduler.store
        if store is None:
            raise invalid("this server keeps no sessions (--no-sessions)")
        if filename is None:
            raise invalid(f"{action} needs a filename")
        return store, store.named_path(filename), sendable(filename)

    def _erase(self, slot: int, answer: Future[dict[str, Any]]) -> None:
        session = self._idle_session(slot)
        if session is None:
            raise invalid(f"slot {slot} holds no conversation")
        facts = {"id_slot": slot, "n_erased": session.n_past}
        deletion = self.scheduler.sessions.erase(session)
        if deletion:
            deletion.add_done_callback(lambda _: answer.set_result(facts))
        else:
            answer.set_result(facts)

    def _save(self, slot: int, filename: str | None, answer: Future[dict[str, Any]]) -> None:
        session = self._idle_session(slot)
        store, path, filename = self._file("save", filename)
        if session is None or session.stream is None:
            raise invalid(f"slot {slot} holds no conversation")
        if not path.exists() and store.n_saved() >= _MAX_SAVED:
            raise invalid(f"{_MAX_SAVED} states are saved already: save over one of them")
        facts = {"id_slot": slot, "filename": filename, "n_saved": session.n_past}
        write, _ = self.scheduler.sessions.write(session.stream, path, session.facts)

        def written(write: Future[None]) -> None:
            error = write.exception()
            if error:
                answer.set_exception(error)
            else:
                answer.set_result(facts)

        write.add_done_callback(written)

    def _restore(self, slot: int, filename: str | None) -> dict[str, Any]:
        self._idle_session(slot)
        store, path, filename = self._file("restore", filename)
        sessions = self.scheduler.sessions
        store.flush(path)  # the file may still be being written
        if not path.exists():
            raise ApiError(404, f"nothing was saved as {filename[:64]!r}", NOT_FOUND)
        facts = store.read(path)
        session = sessions.new(slot, None)
        try:
            session.stream = self.scheduler.engine.restore(path, seq_id=slot)
        except EdgeStreamError:
            sessions.erase(session)
            raise
        session.log, session.n_turns = PrefixLog(facts["entries"]), facts["n_turns"]
        sessions.settle(session)
        return {"id_slot": slot, "filename": filename, "n_restored": session.n_past}
