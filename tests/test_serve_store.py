"""Sessions of a server: written beside the work, bounded in space, and never lost by mistake."""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import WORDS, Served, serve

from edge_stream.engine import Engine
from edge_stream.errors import SessionError
from edge_stream.native import bindings
from edge_stream.server.scheduling import prefill
from edge_stream.server.scheduling.tasks import Stage
from edge_stream.session_file import Snapshot

Load = Callable[..., Engine]
Messages = list[dict[str, Any]]


@pytest.fixture
def one_slot(load: Load, tmp_path: Path) -> Iterator[Served]:
    """One slot of 160 tokens, and a disk."""
    with serve(load("chat", n_parallel=1, n_ctx=160), tmp_path) as running:
        yield running


def sessions(folder: Path, suffix: str = ".session") -> dict[str, bytes]:
    """Files by name."""
    return {file.name: file.read_bytes() for file in folder.rglob("*" + suffix)}


def displaced(served: Served, folder: Path) -> tuple[Messages, Path]:
    """A conversation of one turn that waits on disk: its messages and its file."""
    messages: Messages = []
    served.client.turn(messages, "One.", seed=1)
    (file,) = folder.rglob("*.session")
    served.client.turn([], "Another.", seed=1)
    return messages, file


def words(served: Served, messages: Messages, text: str) -> Iterator[str]:
    """Say something; yields the answer once its text is complete, ends when the turn does. Adds both messages."""
    messages.append({"role": "user", "content": text})
    body = {"messages": messages, "grammar": WORDS, "max_tokens": 40, "seed": 1, "stream": True}
    answer = ""
    with served.client.stream("POST", "/v1/chat/completions", json=body) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                choices = json.loads(line[6:]).get("choices")
                piece = (choices[0]["delta"].get("content") if choices else None) or ""
                answer += piece
                if piece.endswith("."):
                    messages.append({"role": "assistant", "content": answer})
                    yield answer


class Gate:
    """Holds up the first write of a session until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()
        write = Snapshot.write

        def held_up(snapshot: Snapshot, path: Any) -> None:
            if not self.reached.is_set():
                self.reached.set()
                assert self.opened.wait(60)
            write(snapshot, path)

        monkeypatch.setattr(Snapshot, "write", held_up)


def test_others_go_on_while_a_session_is_written(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both answers are complete before the first is on disk; neither turn ends before its own file is there."""
    gate = Gate(monkeypatch)
    with serve(load("chat", n_parallel=1, n_ctx=160), tmp_path) as served:
        one: Messages = []
        two: Messages = []
        first, second = words(served, one, "One."), words(served, two, "Two.")
        assert next(first)
        assert gate.reached.wait(60)
        assert next(second)  # in the slot of the first, which is not on disk yet
        assert not sessions(tmp_path)
        tasks = served.scheduler.loop.tasks
        while served.on_engine(lambda: any(task.stage is Stage.WRITING for task in tasks)):
            pass
        assert [task.stage for task in tasks] == [Stage.SAVING] * 2
        assert not sessions(tmp_path)
        gate.opened.set()
        assert next(first, None) is None and next(second, None) is None
        assert len(sessions(tmp_path)) == 2
        for messages in (one, two):
            facts = served.client.turn(messages, "On.", seed=1)["edge_stream"]
            assert facts["history"] == "continued" and facts["restored"]


def test_a_conversation_comes_back_from_a_file_that_is_still_written(
    one_slot: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    messages: Messages = []
    first, second = words(one_slot, messages, "One."), words(one_slot, [], "Two.")
    assert next(first) and next(second)
    threading.Timer(0.2, gate.opened.set).start()  # whenever it is opened, the result is the same
    facts = one_slot.client.turn(messages, "On.", seed=1)["edge_stream"]
    assert facts["history"] == "continued" and facts["restored"]
    assert next(first, None) is None and next(second, None) is None


def test_a_server_ends_when_everything_is_written(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    with serve(load("chat", n_parallel=1, n_ctx=160), tmp_path) as served:
        messages: Messages = []
        answer = words(served, messages, "One.")
        assert next(answer) and gate.reached.wait(60)
        threading.Timer(0.2, gate.opened.set).start()
    with serve(load("chat", n_parallel=1, n_ctx=160), tmp_path) as served:
        assert served.client.turn(messages, "On.", seed=1)["edge_stream"]["restored"]


def test_a_failed_write_leaves_the_session_before(
    one_slot: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages: Messages = []
    one_slot.client.turn(messages, "One.", seed=1)
    before, write = sessions(tmp_path), Snapshot.write

    def full(snapshot: Snapshot, path: Any) -> None:
        raise SessionError("the disk is full", bindings.NO_SPACE)

    monkeypatch.setattr(Snapshot, "write", full)
    one_slot.client.turn(messages, "Two.", seed=1)
    assert "edge_stream_save_failures_total 1.0" in one_slot.client.get("/metrics").text
    one_slot.client.turn([], "Another.", seed=1)
    assert sessions(tmp_path) == before
    monkeypatch.setattr(Snapshot, "write", write)
    facts = one_slot.client.turn(messages[:2], "Three.", seed=1)["edge_stream"]
    assert facts["history"] == "continued" and facts["restored"]


@pytest.mark.parametrize("status", [bindings.IO, bindings.MEMORY, bindings.INTERNAL])
def test_an_error_that_passes_costs_no_session(
    status: int, one_slot: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages, file = displaced(one_slot, tmp_path)
    content = file.read_bytes()

    def fail(*_: Any, **__: Any) -> None:
        raise SessionError("cannot open session: Too many open files", status)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "restore", fail)
        assert one_slot.client.turn(list(messages), "Two.", seed=1)["edge_stream"]["history"] == "rebuilt"
    assert file.read_bytes() == content
    assert not sessions(tmp_path, ".damaged")
    one_slot.on_engine(lambda: one_slot.scheduler.sessions.erase(one_slot.scheduler.sessions.slots[0]))
    facts = one_slot.client.turn(messages, "Two.", seed=1)["edge_stream"]
    assert facts["history"] == "continued" and facts["restored"]


def test_a_damaged_session_is_set_aside(one_slot: Served, tmp_path: Path) -> None:
    messages, file = displaced(one_slot, tmp_path)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert one_slot.client.turn(messages, "Two.", seed=1)["edge_stream"]["history"] == "rebuilt"
    assert sessions(tmp_path, ".damaged") == {file.name + ".damaged": bytes(content)}
    assert not file.exists()


def test_a_session_that_is_not_what_its_log_says_is_set_aside(
    one_slot: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages, file = displaced(one_slot, tmp_path)
    content = file.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(prefill, "verify", lambda *_: False)
        assert one_slot.client.turn(messages, "Two.", seed=1)["edge_stream"]["history"] == "rebuilt"
    assert sessions(tmp_path, ".damaged") == {file.name + ".damaged": content}
    assert file.name not in sessions(tmp_path)


def test_a_stream_that_is_not_what_its_log_says_costs_no_file(
    one_slot: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages: Messages = []
    one_slot.client.turn(messages, "One.", seed=1)
    before = sessions(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(prefill, "verify", lambda *_: False)
        assert one_slot.client.turn(list(messages), "Two.", seed=1)["edge_stream"]["history"] == "rebuilt"
    assert before.items() <= sessions(tmp_path).items()


def test_a_session_damaged_while_no_server_ran_is_set_aside(load: Load, tmp_path: Path) -> None:
    with serve(load("chat", n_ctx=160), tmp_path) as served:
        messages: Messages = []
        served.client.turn(messages, "One.", seed=1)
    (file,) = tmp_path.rglob("*.session")
    file.write_bytes(b"nothing")
    with serve(load("chat", n_ctx=160), tmp_path) as served:
        assert sessions(tmp_path, ".damaged") == {file.name + ".damaged": b"nothing"}
        assert served.client.turn(messages, "Two.", seed=1)["edge_stream"]["history"] == "rebuilt"


@pytest.mark.parametrize("disk", [False, True])
def test_a_named_conversation_is_taken_back_by_its_name_only(disk: bool, load: Load, tmp_path: Path) -> None:
    """A request without the name branches off if the conversation is on disk, and is read anew if not."""
    with serve(load("chat", n_parallel=2, n_ctx=256), tmp_path if disk else None) as served:
        messages: Messages = []
        for turn in range(2):
            before = served.client.turn(messages, f"Number {turn}.", seed=turn, name="mine")["edge_stream"]
        other = served.client.turn(messages[:2], "Something else.", seed=1)["edge_stream"]
        assert other["history"] == ("branched" if disk else "rebuilt") and other["conversation"] != "mine"
        facts = served.client.turn(messages, "And on.", seed=1, name="mine")["edge_stream"]
        assert facts["history"] == "continued" and facts["conversation"] == "mine"
        assert facts["n_reused"] == before["n_past"]


def test_the_space_is_for_everything_in_the_folder(one_slot: Served, tmp_path: Path) -> None:
    """Set-aside files go first, then conversations used longest ago, of whichever model; a running server's stay."""
    size = 100_000
    files = {}
    x = "0" * 32
    gone_first = (f"damaged/{x}.session.damaged", f"old/{x}.session")
    for i, name in enumerate((*gone_first, f"locked/{x}.session", f"old/slot-{x}.saved")):
        file = files[name] = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        (file.parent / "lock").touch()
        file.write_bytes(bytes(size))
        os.utime(file, (1000 - i, 1000 - i))
    with (tmp_path / "locked" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        store = one_slot.scheduler.store
        assert store
        messages: Messages = []
        one_slot.client.turn(messages, "One.", seed=1)
        (own,) = store.folder.glob("*.session")
        left = [name for name, file in files.items() if file.exists()]
        assert left == list(files)
        for gone in gone_first:
            store.max_bytes = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()) - size // 2
            one_slot.client.turn(messages, "On.", seed=1)
            left.remove(gone)
            assert [name for name, file in files.items() if file.exists()] == left
        content = own.read_bytes()
        store.max_bytes = 2 * size  # what is left of others fills it: this conversation is in the cache only
        assert one_slot.client.turn(messages, "On.", seed=1)["edge_stream"]["history"] == "continued"
        assert own.read_bytes() == content
        assert [name for name, file in files.items() if file.exists()] == left


def test_states_saved_by_name_are_not_deleted(one_slot: Served, tmp_path: Path) -> None:
    client, store = one_slot.client, one_slot.scheduler.store
    assert store
    client.turn([], "One.", seed=1)
    assert client.post("/slots/0?action=save", json={"filename": "a"}).status_code == 200
    before = sessions(tmp_path, ".saved")
    store.max_bytes = int(1.5 * len(next(iter(before.values()))))
    refused = client.post("/slots/0?action=save", json={"filename": "b"})
    assert refused.status_code == 400 and "--session-space" in refused.json()["error"]["message"]
    assert client.post("/slots/0?action=save", json={"filename": "a"}).status_code == 200  # over itself
    client.turn([], "Another.", seed=1)
    assert sessions(tmp_path, ".saved") == before


def test_files_of_others_neither_count_nor_are_deleted(one_slot: Served, tmp_path: Path) -> None:
    store, x = one_slot.scheduler.store, "0" * 32
    assert store
    names = (
        f"{x}.session",
        f"mine/{x}.session",
        f"{store.folder.name}/work.session",
        f"{store.folder.name}/a/{x}.session",
    )
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(bytes(1000))
    assert one_slot.on_engine(store.files) == {}
    store.max_bytes = 1
    one_slot.client.turn([], "One.", seed=1)
    one_slot.client.turn([], "Two.", seed=1)
    assert all((tmp_path / name).exists() for name in names)
    size = sum(size for size, _ in one_slot.on_engine(store.files).values())
    assert one_slot.on_engine(one_slot.scheduler.counts)["disk_bytes"] == size


def test_a_file_that_cannot_be_deleted_costs_no_answer(
    one_slot: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages, file = displaced(one_slot, tmp_path)
    store = one_slot.scheduler.store
    assert store

    def fail(*_: Any, **__: Any) -> None:
        raise PermissionError("not permitted")

    with monkeypatch.context() as patch:
        patch.setattr(store, "delete", fail)
        store.max_bytes = 1
        one_slot.client.turn([], "Third.", seed=1)
    assert file.exists() and len(sessions(tmp_path)) == 3
    assert one_slot.client.turn(messages, "On.", seed=1)["edge_stream"]["restored"]


def test_files_in_use_refuse_no_write(one_slot: Served, tmp_path: Path) -> None:
    store, x = one_slot.scheduler.store, "0" * 32
    assert store
    file = store.path(x)
    file.write_bytes(bytes(1000))
    store.max_bytes = 1000
    assert one_slot.on_engine(lambda: store.excess(store.path("1" * 32), 900, {file}, {})) == []
    assert one_slot.on_engine(lambda: store.excess(store.path("1" * 32), 900, set(), {})) == [file]


def test_an_erased_session_is_gone_when_the_client_is_answered(
    one_slot: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    answer = words(one_slot, [], "One.")
    assert next(answer) and gate.reached.wait(60)
    threading.Timer(0.2, gate.opened.set).start()  # whenever it is opened, the result is the same
    assert one_slot.client.post("/slots/0?action=erase").status_code == 200
    assert not sessions(tmp_path)
    assert next(answer, None) is None


def test_an_error_while_a_session_is_restored_leaves_it_usable(
    one_slot: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages, file = displaced(one_slot, tmp_path)
    session = one_slot.scheduler.sessions.all[file.stem]

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "restore", fail)
        with pytest.raises(OSError, match="input/output"):
            one_slot.on_engine(lambda: one_slot.scheduler.sessions.restore(session, 0))
    assert one_slot.client.turn(messages, "On.", seed=1)["edge_stream"]["restored"]
