"""POST /slots/{id}: save, restore and erase, under names that never become paths."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_stream.errors import EdgeStreamError
from edge_stream.server.errors import NOT_FOUND, ApiError, invalid, sendable
from edge_stream.server.history.session_store import pack

if TYPE_CHECKING:
    from edge_stream.server.history.session_store import SessionStore
    from edge_stream.server.scheduling.scheduler import Scheduler
    from edge_stream.server.scheduling.sessions import Conversation

_MAX_SAVED = 64  # files that clients may name


class SlotActions:
    """What a client may do to a slot by hand; runs on the engine's thread."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler

    def act(self, slot: int, action: str, filename: str | None) -> Future[dict[str, Any]]:
        """Do it. A state is written by another thread: the answer is there when it is. Raises ApiError."""
        answer: Future[dict[str, Any]] = Future()
        answer.set_running_or_notify_cancel()  # the client may go: it is written all the same
        if action == "save":
            self._save(slot, filename, answer)
        elif action == "restore":
            answer.set_result(self._restore(slot, filename))
        else:
            answer.set_result(self._erase(slot))
        return answer

    def _conversation(self, slot: int) -> Conversation | None:
        """What is in an idle slot."""
        conversations = self.scheduler.conversations
        if not 0 <= slot < len(conversations.slots):
            raise ApiError(404, f"there is no slot {slot}", NOT_FOUND)
        conversation = conversations.slots[slot]
        if conversation and conversation.busy:
            raise ApiError(400, f"slot {slot} is being used: try again when it is idle")
        return conversation

    def _file(self, action: str, filename: str | None) -> tuple[SessionStore, Path, str]:
        """The store, the file of a state, and its name as it may be shown."""
        store = self.scheduler.store
        if store is None:
            raise invalid("this server keeps no sessions (--no-sessions)")
        if filename is None:
            raise invalid(f"{action} needs a filename")
        return store, store.named_path(filename), sendable(filename)

    def _erase(self, slot: int) -> dict[str, Any]:
        conversation = self._conversation(slot)
        n = conversation.n_past if conversation else 0
        if conversation:
            self.scheduler.conversations.erase(conversation)
        return {"id_slot": slot, "n_erased": n}

    def _save(self, slot: int, filename: str | None, answer: Future[dict[str, Any]]) -> None:
        conversation = self._conversation(slot)
        store, path, filename = self._file("save", filename)
        if conversation is None or conversation.stream is None:
            raise invalid(f"slot {slot} holds no conversation")
        if not path.exists() and store.n_saved() >= _MAX_SAVED:
            raise invalid(f"{_MAX_SAVED} states are saved already: save over one of them")
        facts = {"id_slot": slot, "filename": filename, "n_saved": conversation.n_past}
        user = pack(conversation.facts, conversation.log.entries)
        write, _ = self.scheduler.conversations.write(conversation.stream, path, user)

        def written(write: Future[None]) -> None:
            error = write.exception()
            if error:
                answer.set_exception(error)
            else:
                answer.set_result(facts)

        write.add_done_callback(written)

    def _restore(self, slot: int, filename: str | None) -> dict[str, Any]:
        self._conversation(slot)
        store, path, filename = self._file("restore", filename)
        conversations = self.scheduler.conversations
        store.flush()  # it may be on its way
        if not path.exists():
            raise ApiError(404, f"nothing was saved as {filename[:64]!r}", NOT_FOUND)
        facts = store.read(path)
        conversation: Conversation = conversations.new(slot, None)
        try:
            conversation.stream = self.scheduler.engine.restore(path, seq_id=slot)
        except EdgeStreamError:
            conversations.erase(conversation)
            raise
        conversation.log.entries[:] = facts["entries"]
        conversation.n_turns = facts["n_turns"]
        conversation.log.cut(len(conversation.log.entries) - 1)
        conversations.settle(conversation)
        return {"id_slot": slot, "filename": filename, "n_restored": conversation.n_past}
