"""POST /slots/{id}: save, restore and erase, under names that never become paths."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_stream.errors import EdgeStreamError
from edge_stream.server.errors import NOT_FOUND, ApiError, invalid, sendable
from edge_stream.server.store import pack

if TYPE_CHECKING:
    from edge_stream.server.scheduler import Scheduler
    from edge_stream.server.slots import Conversation

_MAX_SAVED = 64  # files that clients may name


class SlotActions:
    """What a client may do to a slot by hand; runs on the engine's thread."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler

    def act(self, slot: int, action: str, filename: str | None) -> dict[str, Any]:
        """Do it. Raises ApiError."""
        conversations = self.scheduler.conversations
        if not 0 <= slot < len(conversations.slots):
            raise ApiError(404, f"there is no slot {slot}", NOT_FOUND)
        conversation = conversations.slots[slot]
        if conversation and conversation.busy:
            raise ApiError(400, f"slot {slot} is being used: try again when it is idle")
        if action == "erase":
            n = conversation.n_past if conversation else 0
            if conversation:
                conversations.erase(conversation)
            return {"id_slot": slot, "n_erased": n}
        store = self.scheduler.store
        if store is None:
            raise invalid("this server keeps no sessions (--no-sessions)")
        if filename is None:
            raise invalid(f"{action} needs a filename")
        path, filename = store.named_path(filename), sendable(filename)
        if action == "restore":
            return self._restore(slot, path, filename)
        if conversation is None or conversation.stream is None:
            raise invalid(f"slot {slot} holds no conversation")
        if not path.exists() and len(list(store.folder.glob("*.saved"))) >= _MAX_SAVED:
            raise invalid(f"{_MAX_SAVED} states are saved already: save over one of them")
        conversation.stream.forget_sampling()
        facts = {
            "name": conversation.name,
            "n_past": conversation.n_past,
            "n_window": conversation.n_window,
            "n_turns": conversation.n_turns,
        }
        conversation.stream.save(path, pack(facts, conversation.log.entries))
        return {"id_slot": slot, "filename": filename, "n_saved": conversation.n_past}

    def _restore(self, slot: int, path: Path, filename: str) -> dict[str, Any]:
        conversations, store = self.scheduler.conversations, self.scheduler.store
        assert store is not None
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
