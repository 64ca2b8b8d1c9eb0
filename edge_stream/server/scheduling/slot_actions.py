"""POST /slots/{id}: save, restore and erase a slot.

A client's file name becomes part of a path only with --slot-save-path, and then has no character that could lead out of
that folder.
"""

from __future__ import annotations

import re
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_stream.errors import EdgeStreamError, SessionError
from edge_stream.server.errors import NOT_FOUND, ApiError, invalid
from edge_stream.server.history.prefix_matching import PrefixLog
from edge_stream.server.history.rendering import Renderer
from edge_stream.text import sendable

if TYPE_CHECKING:
    from edge_stream.server.history.session_store import SessionStore
    from edge_stream.server.scheduling.scheduler import Scheduler
    from edge_stream.server.scheduling.sessions import Session

_MAX_SAVED = 64  # states saved by name, or files in --slot-save-path
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_+.-]{0,199}")


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
        folder = self.scheduler.settings.slot_save_path
        if folder is None:
            return store, store.named_path(filename), sendable(filename)
        if not _FILE_NAME.fullmatch(filename):
            raise invalid("a filename has at most 200 letters, digits and the signs _ - + . and begins with no sign")
        return store, folder / filename, filename

    def _check_room(self, store: SessionStore, path: Path) -> None:
        """Raise ApiError if a new file would be one too many, or would replace one that is no saved slot."""
        if path.exists():
            try:
                store.read(path)
            except SessionError:
                raise invalid(f"{sendable(path.name)} is not the file of a saved slot: it is left as it is") from None
            return
        n_saved = store.n_saved() if path.parent == store.folder else sum(1 for _ in path.parent.iterdir())
        if n_saved >= _MAX_SAVED:
            raise invalid(f"{_MAX_SAVED} states are saved already: save over one of them")

    def _erase(self, slot: int, answer: Future[dict[str, Any]]) -> None:
        session = self._idle_session(slot)
        if session is None:
            raise invalid(f"slot {slot} holds no conversation")
        facts = {"id_slot": slot, "n_erased": session.n_past}
        self.scheduler.render(Renderer.forget)  # may have its text
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
        self._check_room(store, path)
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
