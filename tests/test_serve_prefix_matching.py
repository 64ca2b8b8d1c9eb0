"""The server knows a conversation again, and reads only what is new; what it says is what it would say anyway."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from serving import WORDS, Served, serve

from edge_stream import Sampling
from edge_stream.chat.conversation import Conversation
from edge_stream.chat.options import ChatOptions
from edge_stream.engine import Engine
from edge_stream.server.history.prefix_matching import PrefixLog, canonical, chat_history, flat_content, verify
from edge_stream.server.history.rendering import Held, Renderer, newest_messages

Load = Callable[..., Engine]


@pytest.fixture
def served(load: Load) -> Iterator[Served]:
    """Two slots of 512 tokens, no disk."""
    with serve(load("chat", n_parallel=2, n_ctx=512)) as running:
        yield running


def held(served: Served, slot: int) -> list[int]:
    """Tokens in a slot's cache."""
    return served.on_engine(lambda: served.scheduler.sessions.slots[slot].stream.tokens())  # type: ignore[union-attr]


def test_turns_are_those_of_a_conversation(served: Served, load: Load) -> None:
    """The same seeds and texts as `edge-stream chat` gives, and the same tokens in the cache."""
    reference = Conversation(load("chat", n_ctx=512), system="Be brief.")
    messages: list[dict[str, Any]] = [{"role": "system", "content": "Be brief."}]
    for turn in range(4):
        answer = served.client.turn(messages, f"Question {turn}?", seed=turn)
        sampling = Sampling(seed=turn, grammar=WORDS)
        expected = "".join(t.text for t in reference.reply(f"Question {turn}?", sampling=sampling, max_tokens=40))
        assert answer["choices"][0]["message"]["content"] == expected
        assert answer["edge_stream"]["history"] == ("continued" if turn else "new")
    tokens = held(served, answer["edge_stream"]["slot"])
    both = reference.stream.tokens()  # it closes an answer at once, the server with the next message
    assert both[: len(tokens)] == tokens and len(both) - len(tokens) <= 2


def test_a_message_in_parts_is_the_same_message(served: Served) -> None:
    parts = [{"type": "text", "text": text} for text in ("", "Look at", "", "this.", "")]
    options: dict[str, Any] = {"grammar": WORDS, "max_tokens": 40, "seed": 1}
    first = served.client.chat([{"role": "user", "content": parts}], **options)
    history = [{"role": "user", "content": "Look at\n\nthis.\n"}, first["choices"][0]["message"]]
    more = served.client.chat([*history, {"role": "user", "content": "And?"}], **options)
    assert more["edge_stream"]["history"] == "continued"
    anew = served.client.chat(history[:1], **options, cache_prompt=False)
    assert anew["usage"]["prompt_tokens"] == first["usage"]["prompt_tokens"]
    assert anew["choices"][0]["message"] == first["choices"][0]["message"]


def test_a_growing_history_costs_what_is_new(load: Load) -> None:
    """40 turns, many times the cache: tokens read per turn are the new message's, and log and stream agree."""
    engine = load("chat", n_ctx=160)
    with serve(engine) as served:
        messages: list[dict[str, Any]] = [{"role": "system", "content": "Be brief."}]
        for turn in range(40):
            before = len(messages)
            answer = served.client.turn(messages, f"Number {turn}.", seed=turn)
            facts = answer["edge_stream"]
            assert facts["history"] == ("continued" if turn else "new")
            new = served.client.post("/apply-template", json={"messages": messages[before : before + 1]}).json()[
                "prompt"
            ]
            n_new = len(engine.tokenize(new, special=True))
            assert turn == 0 or n_new <= facts["n_read"] <= n_new + 2  # and the end of the last answer
            assert facts["n_cached"] <= 160
            assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == facts["n_reused"]
        assert facts["n_past"] > 5 * 160
        conversation = served.scheduler.sessions.slots[0]
        assert conversation and conversation.stream
        assert len(conversation.log.entries) < 20  # as bounded as the cache
        index = len(conversation.log.entries) - 1
        assert verify(conversation.log, index, conversation.stream)
        conversation.log.entries[-2] = conversation.log.entries[-2].__class__(
            **{**vars(conversation.log.entries[-2]), "tokens_hash": b"x" * 32}
        )
        assert not verify(conversation.log, index, conversation.stream)


def test_a_log_that_contradicts_the_stream_is_not_believed(served: Served) -> None:
    messages: list[dict[str, Any]] = []
    slot = served.client.turn(messages, "One.", seed=1)["edge_stream"]["slot"]
    conversation = served.scheduler.sessions.slots[slot]
    assert conversation and conversation.stream
    served.on_engine(lambda: (conversation.stream.rewind(3), conversation.stream.feed([70, 71, 72])))  # type: ignore[union-attr]
    answer = served.client.turn(messages, "Two.", seed=1)
    assert answer["edge_stream"]["history"] == "rebuilt"
    assert "edge_stream_log_disagreements_total 1.0" in served.client.get("/metrics").text


def test_an_edited_history_branches_where_it_differs(load: Load, tmp_path: Path) -> None:
    """Both branches go on, and say what a conversation says that never branched."""
    engine = load("chat", n_parallel=2, n_ctx=512)
    with serve(engine, tmp_path) as served:
        messages: list[dict[str, Any]] = []
        for turn in range(3):
            served.client.turn(messages, f"Number {turn}.", seed=turn)
        edited = messages[:2]
        answer = served.client.turn(edited, "Something else.", temperature=0)
        assert answer["edge_stream"]["history"] == "branched"
        assert answer["edge_stream"]["n_reused"] > 0
        more = served.client.turn(messages, "And on.", temperature=0)  # the old branch, from disk
        assert more["edge_stream"]["history"] == "continued" and more["edge_stream"]["restored"]
        assert served.client.turn(edited, "And on.", seed=5)["edge_stream"]["history"] == "continued"
    with serve(load("chat", n_parallel=2, n_ctx=512)) as served:
        direct: list[dict[str, Any]] = []
        served.client.turn(direct, "Number 0.", seed=0)
        alone = served.client.turn(direct, "Something else.", temperature=0)
        assert alone["choices"][0]["message"]["content"] == answer["choices"][0]["message"]["content"]
        direct = []
        for turn in range(3):
            served.client.turn(direct, f"Number {turn}.", seed=turn)
        alone = served.client.turn(direct, "And on.", temperature=0)
        assert alone["choices"][0]["message"]["content"] == more["choices"][0]["message"]["content"]


def test_regenerating_reads_the_start_of_the_answer_only(served: Served) -> None:
    messages: list[dict[str, Any]] = []
    first = served.client.turn(messages, "One.", seed=1)
    again = served.client.chat(messages[:1], seed=1, grammar=WORDS, max_tokens=40)
    other = served.client.chat(messages[:1], seed=2, grammar=WORDS, max_tokens=40)
    assert again["edge_stream"]["history"] == other["edge_stream"]["history"] == "branched"
    assert again["edge_stream"]["n_read"] <= 12
    assert again["choices"][0]["message"] == first["choices"][0]["message"] != other["choices"][0]["message"]


def test_an_unknown_history_is_rebuilt_from_what_fits(load: Load) -> None:
    with serve(load("chat", n_ctx=160)) as served:
        history = [{"role": "system", "content": "Be brief."}]
        for i in range(30):
            history += [{"role": "user", "content": f"Number {i}"}, {"role": "assistant", "content": f"It is {i}."}]
        history.append({"role": "user", "content": "And now?"})
        response = served.client.post(
            "/v1/chat/completions", json={"messages": history, "max_tokens": 5, "ignore_eos": True}
        )
        facts = response.json()["edge_stream"]
        assert facts["history"] == response.headers["x-edge-stream-history"] == "rebuilt"
        assert facts["n_messages_dropped"] > 20 and facts["n_messages_dropped"] % 2 == 0
        assert 80 < facts["n_past"] <= 165
        text = served.engine.detokenize(held(served, 0)).decode(errors="replace")
        assert "Be brief." in text and "Number 29" in text and "Number 3\n" not in text


def test_a_message_longer_than_the_cache_is_read_whole(load: Load) -> None:
    with serve(load("chat", n_ctx=160)) as served:
        text = "word " * 300
        facts = served.client.turn([], text, seed=1)["edge_stream"]
        assert facts["n_read"] > len(served.engine.tokenize(text)) > 5 * 160 and facts["n_cached"] <= 160


def test_more_conversations_than_slots(load: Load, tmp_path: Path) -> None:
    """Three take turns on one slot: each goes on from disk, with the words it has with a slot of its own."""

    def talk(served: Served, restored: bool) -> list[list[dict[str, Any]]]:
        chats: list[list[dict[str, Any]]] = [[], [], []]
        for turn in range(4):
            for i, messages in enumerate(chats):
                answer = served.client.turn(messages, f"I am {i}, and this is {turn}.", seed=i)
                assert answer["edge_stream"]["history"] == ("continued" if turn else "new")
                assert answer["edge_stream"]["restored"] == (restored and turn > 0)
        return chats

    with serve(load("chat", n_parallel=1, n_ctx=160), tmp_path) as served:
        few = talk(served, restored=True)
    with serve(load("chat", n_parallel=3, n_ctx=160)) as served:
        many = talk(served, restored=False)
    assert few == many


def test_sessions_beyond_the_space_for_them_are_deleted(load: Load, tmp_path: Path) -> None:
    with serve(load("chat", n_parallel=1, n_ctx=160), tmp_path, session_bytes=1) as served:
        one: list[dict[str, Any]] = []
        served.client.turn(one, "One.", seed=1)
        for i in range(3):
            served.client.turn([], f"Number {i}.", seed=1)
        assert len(list(tmp_path.rglob("*.session"))) == 1
        assert served.client.turn(one, "Two.", seed=1)["edge_stream"]["history"] == "rebuilt"


def test_a_full_disk_costs_the_session_only(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edge_stream.errors import SessionError
    from edge_stream.session_file import Snapshot

    def full(self: Snapshot, path: Any) -> None:
        raise SessionError("the disk is full")

    monkeypatch.setattr(Snapshot, "write", full)
    with serve(load("chat", n_parallel=1, n_ctx=160), tmp_path) as served:
        messages: list[dict[str, Any]] = []
        served.client.turn(messages, "One.", seed=1)
        assert served.client.turn(messages, "Two.", seed=1)["edge_stream"]["history"] == "continued"
        served.client.turn([], "Another.", seed=1)
        assert served.client.turn(messages, "Three.", seed=1)["edge_stream"]["history"] == "rebuilt"


def test_a_restarted_server_goes_on(load: Load, tmp_path: Path) -> None:
    messages: list[dict[str, Any]] = []
    with serve(load("chat", n_ctx=160), tmp_path) as served:
        for turn in range(8):
            answer = served.client.turn(messages, f"Number {turn}.", seed=turn, name="mine")
    with serve(load("chat", n_ctx=160), tmp_path) as served:
        before = answer["edge_stream"]["n_past"]
        answer = served.client.turn(messages, "Still there?", seed=1)
        facts = answer["edge_stream"]
        assert facts["history"] == "continued" and facts["restored"] and facts["conversation"] == "mine"
        assert facts["n_reused"] >= before - 2 and facts["n_read"] < 60


def test_a_named_conversation_is_that_one(load: Load, tmp_path: Path) -> None:
    """Two clients say the same; each has a conversation of its own."""
    with serve(load("chat", n_parallel=2, n_ctx=256), tmp_path) as served:
        one: list[dict[str, Any]] = []
        two: list[dict[str, Any]] = []
        for turn in range(3):
            for name, messages in (("one", one), ("two", two)):
                answer = served.client.turn(messages, f"Number {turn}.", seed=turn, name=name)
                assert answer["edge_stream"]["conversation"] == name
                assert answer["edge_stream"]["history"] == ("continued" if turn else "new")
        assert one == two


def test_an_answer_cut_by_a_stop_string_is_held_as_it_was_sent(served: Served) -> None:
    """The tokens after the text that the client has are taken back, so that log, text and cache agree."""
    messages = [{"role": "user", "content": "Count."}]
    grammar = 'root ::= "one two three four five"'
    answer = served.client.chat(messages, grammar=grammar, stop=["ree f"], seed=1)
    message = answer["choices"][0]["message"]
    assert message["content"] == "one two th" and answer["choices"][0]["finish_reason"] == "stop"
    messages += [message, {"role": "user", "content": "On."}]
    answer = served.client.chat(messages, grammar=grammar, seed=1)
    assert answer["edge_stream"]["history"] == "continued"
    text = b"".join(served.engine.token_to_piece(t, True) for t in held(served, answer["edge_stream"]["slot"])).decode()
    assert "assistant\none two th<|im_end|>\n<|im_start|>user\nOn.<|im_end|>" in text


def test_completions_go_on_from_their_own_text(served: Served) -> None:
    text, options = "Once upon a time", {"grammar": "root ::= [a-z ]{60}", "max_tokens": 12}
    for i in range(4):
        answer = served.client.post("/v1/completions", json={"prompt": text, "seed": i, **options}).json()
        assert answer["edge_stream"]["history"] == ("continued" if i else "new")
        if i:
            assert answer["edge_stream"]["n_read"] <= 10
        text += answer["choices"][0]["text"] + " and then"
    again = served.client.post("/v1/completions", json={"prompt": text[: -len(" and then")], "max_tokens": 1}).json()
    assert again["edge_stream"]["history"] == "continued" and again["edge_stream"]["n_read"] >= 1


def test_an_answer_that_the_client_began_goes_on(served: Served) -> None:
    messages = [{"role": "user", "content": "Count."}, {"role": "assistant", "content": "one two"}]
    answer = served.client.chat(messages, grammar='root ::= " three"', seed=1)
    assert answer["choices"][0]["message"]["content"] == " three"
    whole = [messages[0], {"role": "assistant", "content": "one two three"}, {"role": "user", "content": "On."}]
    assert served.client.chat(whole, max_tokens=1)["edge_stream"]["history"] == "continued"


@pytest.mark.parametrize(
    "content", ["", " two  words ", 'quotes " and \\ \n\x00\x7f', "\u00e6\u2028\U0001f600\ud800", None]
)
@pytest.mark.parametrize("role", ["user", "assistant"])
def test_plain_messages_are_hashed_as_all_others(role: str, content: str | None) -> None:
    """Hashes are in session files: the short way must give the same bytes."""
    plain = {"role": role, "content": content, "reasoning_content": "Hm."}
    assert canonical(plain) == canonical(plain | {"tool_calls": []})
    text = flat_content(content)
    fields = {"role": role, "content": text.strip() if role == "assistant" else text}
    fields |= {"name": None, "tool_calls": [], "tool_call_id": None}
    whole = json.dumps(fields, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    assert canonical(plain) == whole.encode("utf-8", errors="surrogatepass")


@pytest.mark.parametrize("system", [True, False])
def test_old_messages_are_left_out_and_the_plan_is_the_same(load: Load, system: bool) -> None:
    """Of a long history the core is given the end: what is read, where, and what is recalled do not change."""
    engine = load("chat", n_ctx=96)
    renderer = Renderer(engine, ChatOptions(), n_recall=64)
    messages: list[dict[str, Any]] = [{"role": "system", "content": "Be brief."}] if system else []
    messages += [
        {"role": "user", "content": "My friend Anna owns a blue kite."},
        {"role": "assistant", "content": "Ok"},
    ]
    for i in range(300):
        messages += [
            {"role": "user", "content": f"Number {i} of many."},
            {"role": "assistant", "content": f"{i} it is."},
        ]
    stream = engine.stream()

    def both(history: Any) -> tuple[Any, Any]:
        body, n_skipped = newest_messages(history, engine.n_ctx)
        assert n_skipped > 20 and len(body["messages"]) + n_skipped == len(messages)
        return replace(history, request=renderer.core.request(body), n_skipped=n_skipped), history

    messages.append({"role": "user", "content": "What does my friend Anna own?"})
    short, whole = (renderer.rebuilt(h, engine.n_ctx) for h in both(chat_history(messages, {})))
    assert short == whole and short.recalled and short.n_dropped > 500

    log = PrefixLog()
    for piece in short.pieces:
        stream.feed_tokens(piece.tokens) if piece.tokens else None
        log.fed(piece.tokens)
        log.add(piece.key, stream.stats.n_past, piece.kind, recalled=piece.recalled, n_gone=piece.n_gone)
    held = Held.by(stream, log.entries)
    messages += [{"role": "assistant", "content": "A kite."}, {"role": "user", "content": "Who owns a blue kite?"}]
    short, whole = (renderer.continued(h, 0, held) for h in both(chat_history(messages, {})))
    assert short == whole and 0 < short.n_tokens < 150

    # what the stream holds is older than all that the core is given: it is given everything
    messages += [{"role": role, "content": "word " * 70} for _ in range(8) for role in ("assistant", "user")]
    short, whole = (renderer.continued(h, 0, held) for h in both(chat_history(messages, {})))
    assert short == whole and short.n_tokens > 500
    stream.close()
