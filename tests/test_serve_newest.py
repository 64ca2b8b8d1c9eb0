"""What is kept of the newest requests changes the time that a request takes, and nothing else."""

from __future__ import annotations

import copy
import itertools
import json
import random
from typing import Any

import pytest

from edge_stream.recall import Log
from edge_stream.server.errors import ApiError
from edge_stream.server.history import prefix_matching
from edge_stream.server.history.newest import NewestHistories, NewestLogs
from edge_stream.server.history.prefix_matching import History, chat_history
from edge_stream.server.http.schemas import ChatRequest, translated

CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def of_another_api(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same history as another API's client sends it: ids and arguments of calls are written otherwise."""
    other = {**CALL, "id": "call_1", "function": {"name": "f", "arguments": "{ }"}}
    return [{**m, "tool_calls": [other]} if "tool_calls" in m else m for m in messages]


def chats(rng: random.Random, n: int) -> list[tuple[list[dict[str, Any]], dict[str, Any]]]:
    """Requests of a few conversations in turns: they go on, branch, are sent again, and have any roles in any order."""
    talks: list[list[dict[str, Any]]] = [[], [{"role": "system", "content": "Be brief."}]]
    out = []
    for _ in range(n):
        talk = list(rng.choice(talks))
        if rng.random() < 0.2:
            talk = talk[: rng.randrange(len(talk) + 1)]
        for _ in range(rng.randrange(4)):
            role = rng.choice(["user", "assistant", "assistant", "tool"])
            message: dict[str, Any] = {"role": role, "content": f"{rng.randrange(9)} things of {rng.randrange(99)}"}
            if role == "assistant" and rng.random() < 0.2:
                message["tool_calls"] = [CALL]
            talk.append(message)
        if talk and talk[-1]["role"] == "assistant" and rng.random() < 0.7:
            talk.append({"role": "user", "content": f"What of {rng.randrange(99)}?"})
        talks.append(talk)
        if talk:
            sent = of_another_api(talk) if rng.random() < 0.3 else talk
            out.append((sent, {"tools": [1]} if rng.random() < 0.1 else {}))
    return out


@pytest.mark.parametrize("max_bytes", [0, 900, 10**6])
@pytest.mark.parametrize("seed", range(4))
def test_a_history_is_the_same_as_one_hashed_anew(seed: int, max_bytes: int) -> None:
    newest = NewestHistories(max_bytes)
    for messages, variables in chats(random.Random(seed), 300):
        found, anew = newest.history(messages, variables), chat_history(messages, variables)
        assert found == anew
        keys = {anew.root: anew.n_system} | {unit.key: unit.end for unit in anew.units}
        assert found.ends_of({*keys, b"another"}) == keys
        assert all(found.place(n)[0] == key for key, n in keys.items())


def test_only_what_is_new_is_hashed(monkeypatch: pytest.MonkeyPatch) -> None:
    n_hashed, canonical = 0, prefix_matching.canonical

    def counted(message: Any) -> bytes:
        nonlocal n_hashed
        n_hashed += 1
        return canonical(message)

    monkeypatch.setattr(prefix_matching, "canonical", counted)
    newest, messages = NewestHistories(), []
    for i, other in itertools.product(range(50), (False, True)):
        mine = [{"role": "user", "content": f"Other {other}."}, *messages, {"role": "user", "content": f"Part {i}?"}]
        n_hashed = 0
        newest.history(mine, {})
        # those since the last answer of the request before: more could have followed them
        assert n_hashed == (3 if i > 1 else 2 + 2 * i)
        if other:
            messages += [mine[-1], {"role": "assistant", "content": f"Part {i}."}]
    newest.forget()
    n_hashed = 0
    newest.history(messages, {})
    assert n_hashed == len(messages)


def test_a_chat_in_two_apis_by_turns_is_kept_once() -> None:
    newest, messages = NewestHistories(), []
    for i in range(20):
        messages.append({"role": "user", "content": f"Part {i}?"})
        newest.history(of_another_api(messages) if i % 2 else messages, {})
        messages.append({"role": "assistant", "content": f"Part {i}.", "tool_calls": [CALL]})
    (whole, _), *others = newest._kept
    assert not others and len(whole.body["messages"]) == len(messages) - 2
    for variables in ({}, {"tools": [1]}):  # what differs in a setting has other hashes, but the same messages
        newest.history(json.loads(json.dumps(messages)), variables)
    (one, _), (other, _) = newest._kept
    assert one.root != other.root
    assert all(x is y for x, y in zip(one.body["messages"], other.body["messages"], strict=True))
    called = copy.deepcopy(messages)
    called[1]["tool_calls"][0]["function"]["arguments"] = '{"other": 1}'
    assert newest.history(called, {}) == chat_history(called, {}), "other arguments are another call"
    assert len(newest._kept) == 3


def test_what_is_kept_is_bounded() -> None:
    newest = NewestHistories(10_000)
    logs = NewestLogs(10_000)
    for i in range(300):  # one of any size that has no answer yet is never gone on from
        newest.history([{"role": "user", "content": f"{i} {'word ' * 10_000}"}], {})
        newest.history([{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": "Yes."}], {})
        with logs.log(chat_history([{"role": "user", "content": f"{i}"}], {})):
            pass
    assert len(newest._kept) == 64 and not logs._kept
    for i in range(40):
        messages = [{"role": "user", "content": f"{i} {'word ' * 200}"}, {"role": "assistant", "content": "Yes."}]
        history = newest.history([*messages, {"role": "user", "content": "And?"}], {})
        with logs.log(history):
            pass
        kept = [message for history, _ in newest._kept for message in history.body["messages"]]
        assert sum(len(message["content"]) for message in kept) <= 10_000
        assert sum(log.stats.n_bytes for log in logs._kept.values()) <= 10_000
    assert 5 < len(newest._kept) < 12 and 2 < len(logs._kept) < 12
    large = [{"role": "user", "content": "x" * 20_000}, {"role": "assistant", "content": "Yes."}]
    assert newest.history(large, {}) == chat_history(large, {})
    assert 5 < len(newest._kept) < 12, "one that is too large puts no other out"


def entries(log: Log) -> list[Any]:
    """Everything in it."""
    return [(hit.turn, hit.role, hit.text) for hit in log.search("things of what", 10_000)]


@pytest.mark.parametrize("max_bytes", [0, 3000, 10**6])
def test_a_log_is_the_same_as_one_made_anew(max_bytes: int) -> None:
    logs, n_entries = NewestLogs(max_bytes), 0
    for messages, _ in chats(random.Random(5), 300):
        if messages[-1]["role"] != "user":
            continue
        history: History = chat_history(messages, {})
        with logs.log(history) as log, Log() as anew:
            for i, message in enumerate(messages[:-1]):
                if message["role"] in ("user", "assistant"):
                    anew.append(message["content"], i, message["role"], when=0)
            found = entries(log)
            assert sorted(found) == sorted(entries(anew)) and log.stats.n_entries == anew.stats.n_entries
            n_entries += len(found)
    assert n_entries > 700
    logs.forget()
    assert not logs._kept


def test_messages_are_dicts_of_what_was_given() -> None:
    given = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi", "more": 1}], "name": None, "more": 1},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{**CALL, "function": {"name": "f", "arguments": {"a": 1}}}],
        },
        {"content": "Done.", "role": "tool", "tool_call_id": "1"},
        {"role": "user", "content": "And?"},
    ]
    assert translated(ChatRequest, {"messages": given}).messages == [
        given[0],
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
        {"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "f", "arguments": '{"a": 1}'}}]},
        given[3],
        given[4],
    ]


@pytest.mark.parametrize(
    ("message", "named"),
    [
        ({"role": "king", "content": "x"}, "messages.2.role"),
        ({"role": ["user"], "content": "x"}, "messages.2.role"),
        ({"content": "x"}, "messages.2.role"),
        ({"role": "user", "content": 7}, "messages.2.content"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "messages.2.content"),
        ({"role": "assistant", "tool_calls": [{"function": {}}]}, "messages.2.tool_calls.0.function.name"),
        ("user", "messages.2"),
    ],
)
def test_a_wrong_message_is_named_by_its_place(message: Any, named: str) -> None:
    good = {"role": "user", "content": "x"}
    with pytest.raises(ApiError) as error:
        translated(ChatRequest, {"messages": [good, {**good, "name": "me"}, message, good]})
    assert error.value.code == 400 and named in error.value.message


@pytest.mark.parametrize("messages", [[], {}, "x", None, 7])
def test_messages_must_be_a_list_with_some(messages: Any) -> None:
    with pytest.raises(ApiError, match="messages"):
        translated(ChatRequest, {"messages": messages})
