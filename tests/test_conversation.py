"""Conversations: what each turn adds to the stream, and that nothing is lost when things go wrong."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

import pytest
from fake_engine import EOS, FakeEngine

from edge_stream.chat import conversation as module
from edge_stream.chat.conversation import Conversation
from edge_stream.chat.templates import ChatTemplate
from edge_stream.errors import EdgeStreamError, SessionError


def say(conversation: Conversation, text: str, answer: str, **options: object) -> str:
    conversation.engine.answers.append(answer)  # type: ignore[attr-defined]
    return "".join(token.text for token in conversation.reply(text, **options))  # type: ignore[arg-type]


def whole(engine: FakeEngine, *contents: str, system: str | None = None) -> str:
    """What the template writes for the finished conversation."""
    messages = [{"role": "system", "content": system}] if system else []
    roles = ("user", "assistant")
    messages += [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]
    return ChatTemplate.of(engine).render(messages, add_generation_prompt=False)  # type: ignore[arg-type]


def fresh(engine: FakeEngine, **settings: object) -> Conversation:
    return Conversation(engine, **settings)  # type: ignore[arg-type]


def test_turns_add_up_to_what_the_template_writes() -> None:
    engine = FakeEngine()
    conversation = fresh(engine, system="Be brief.")
    assert say(conversation, "One?", "1") == "1"
    assert say(conversation, "Two?", "2!") == "2!"
    assert engine.streams[0].text == whole(engine, "One?", "1", "Two?", "2!", system="Be brief.")
    assert [m["content"] for m in conversation.messages] == ["One?", "1", "Two?", "2!"]


def test_only_the_new_turn_is_fed() -> None:
    engine = FakeEngine()
    conversation = fresh(engine)
    say(conversation, "a" * 1000, "b" * 1000)
    before = len(engine.streams[0].all)
    say(conversation, "c", "d")
    assert len(engine.streams[0].all) - before < 30


def test_bos_once_and_only_where_the_model_wants_it() -> None:
    engine = FakeEngine()
    engine.add_bos = True
    conversation = fresh(engine, system="S")
    say(conversation, "One?", "1")
    say(conversation, "Two?", "2")
    assert engine.streams[0].all.count(engine.bos) == 1
    assert engine.streams[0].all[0] == engine.bos


def test_system_prompt_is_pinned_at_least_keep() -> None:
    engine = FakeEngine()
    head = whole(engine, system="Be brief.")
    n_head = len(engine.tokenize(head, special=True))
    assert fresh(engine, system="Be brief.").stream.n_keep == n_head  # type: ignore[attr-defined]
    assert fresh(engine, system="Be brief.", n_keep=200).stream.n_keep == 200  # type: ignore[attr-defined]
    assert fresh(engine, n_keep=4).stream.n_keep == 4  # type: ignore[attr-defined]


def test_system_prompt_too_long_for_the_cache() -> None:
    with pytest.raises(EdgeStreamError, match="less than a quarter of the cache"):
        fresh(FakeEngine(n_ctx=128), system="x" * 90)
    fresh(FakeEngine(n_ctx=256), system="x" * 90)


def test_marks_stand_at_message_starts_and_slides_may_use_them() -> None:
    engine = FakeEngine()
    conversation = fresh(engine, system="S")
    say(conversation, "One?", "1")
    say(conversation, "Two?", "2")
    stream = engine.streams[0]
    start = engine.tokenize("<|im_start|>", special=True)[0]
    starts = [i for i, token in enumerate(stream.all) if token == start and i > 0]
    assert stream.marks == starts
    assert stream.n_boundary > 0


@pytest.mark.parametrize("how", ["closed", "length", "stop", "other eog"])
def test_an_answer_that_ends_early_is_closed_as_the_template_would(how: str) -> None:
    engine = FakeEngine()
    conversation = fresh(engine)
    if how == "closed":
        engine.answers.append("abcdef")
        with closing(conversation.reply("One?")) as answer:
            assert [next(answer).text for _ in range(3)] == ["a", "b", "c"]
    elif how == "length":
        say(conversation, "One?", "abcdef", max_tokens=3)
    elif how == "stop":
        say(conversation, "One?", "abcdef", stop=["cd"])
    else:
        engine.is_eog = lambda token: token in (EOS, ord("d"), engine.tokenize("<|im_end|>", special=True)[0])  # type: ignore[method-assign]
        say(conversation, "One?", "abc")
    said = "ab" if how == "stop" else "abc"
    assert conversation.messages[-1] == {"role": "assistant", "content": said}
    say(conversation, "Two?", "2")
    cached = "abcd" if how == "stop" else "abc"  # the stop string was generated, if not shown
    assert engine.streams[0].text == whole(engine, "One?", cached, "Two?", "2")


def test_a_message_that_cannot_be_read_is_taken_back() -> None:
    engine = FakeEngine()
    conversation = fresh(engine)
    say(conversation, "One?", "1")
    before = engine.streams[0].text

    def stop(done: int, _total: int) -> None:
        if done > 32:
            raise EdgeStreamError("stopped")

    with pytest.raises(EdgeStreamError, match="stopped"):
        say(conversation, "x" * 100, "never", on_progress=stop)
    assert engine.streams[0].text == before
    assert len(conversation.messages) == 2
    engine.answers.clear()
    say(conversation, "Two?", "2")
    assert engine.streams[0].text == whole(engine, "One?", "1", "Two?", "2")


def test_a_first_message_that_cannot_be_read_leaves_nothing() -> None:
    engine = FakeEngine()
    conversation = fresh(engine, system="S")

    def stop(done: int, _total: int) -> None:
        raise EdgeStreamError("stopped")

    with pytest.raises(EdgeStreamError, match="stopped"):
        say(conversation, "x" * 100, "never", on_progress=stop)
    engine.answers.clear()
    say(conversation, "One?", "1")
    assert engine.streams[0].text == whole(engine, "One?", "1", system="S")


def test_regenerate_replaces_the_answer() -> None:
    engine = FakeEngine()
    conversation = fresh(engine, system="S")
    say(conversation, "One?", "1")
    say(conversation, "Two?", "wrong")
    for answer in ("better", "best"):
        engine.answers.append(answer)
        assert "".join(t.text for t in conversation.regenerate()) == answer
    assert engine.streams[0].text == whole(engine, "One?", "1", "Two?", "best", system="S")
    assert [m["content"] for m in conversation.messages] == ["One?", "1", "Two?", "best"]


def test_regenerate_after_the_stream_slid_past_reads_again_what_fits() -> None:
    engine = FakeEngine(n_ctx=200)
    conversation = fresh(engine, system="S")
    say(conversation, "One?", "1" * 150)
    say(conversation, "Two?", "2" * 10)
    say(conversation, "Three?", "3" * 300)
    engine.answers.append("good")
    list(conversation.regenerate())
    # The first turn no longer fits; the second does.
    assert engine.streams[0].text == whole(engine, "Two?", "2" * 10, "Three?", "good", system="S")
    say(conversation, "Four?", "4")
    assert engine.streams[0].text.endswith(whole(engine, "Three?", "good", "Four?", "4"))


LATE_END = (
    "{% for m in messages %}{% if m.role == 'user' %}{% if not loop.first %}<|im_end|>{% endif %}"
    "<|im_start|>U {{ m.content }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>A {% endif %}"
)


def test_a_template_that_ends_an_answer_with_the_next_message(tmp_path: Path) -> None:
    source = LATE_END.replace("{% else %}", "{% else %}<|im_start|>A ")
    engine, path = FakeEngine(chat_template=source), tmp_path / "session"
    conversation = fresh(engine)
    say(conversation, "One?", "1")
    say(conversation, "Two?", "2222", max_tokens=2)
    say(conversation, "Three?", "3")
    assert engine.streams[0].text == whole(engine, "One?", "1", "Two?", "22", "Three?", "3") + "<|im_end|>"
    conversation.save(path)
    again = Conversation.resume(engine, path)  # type: ignore[arg-type]
    say(again, "Four?", "4")
    assert "3<|im_end|><|im_start|>U Four?" in engine.streams[-1].text


def test_regenerate_where_answers_have_no_start_of_their_own() -> None:
    source = (
        "{% for m in messages %}{% if m.role == 'user' %}[I]{{ m.content }}[/I]"
        "{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
    )
    engine = FakeEngine(chat_template=source)
    conversation = fresh(engine)
    say(conversation, "One?", "1")
    say(conversation, "Two?", "2")
    engine.answers.append("two")
    list(conversation.regenerate())
    assert engine.streams[0].text == "[I]One?[/I]1<|im_end|>[I]Two?[/I]two<|im_end|>"


def test_nothing_to_regenerate() -> None:
    with pytest.raises(EdgeStreamError, match="no answer"):
        list(fresh(FakeEngine()).regenerate())


def test_clear_keeps_the_system_prompt() -> None:
    engine = FakeEngine()
    conversation = fresh(engine, system="S")
    say(conversation, "One?", "1")
    conversation.clear()
    say(conversation, "Two?", "2")
    assert engine.streams[0].text == whole(engine, "Two?", "2", system="S")
    assert len(conversation.messages) == 2


def test_save_and_resume(tmp_path: Path) -> None:
    engine, path = FakeEngine(), tmp_path / "session"
    conversation = fresh(engine, system="Sé")
    say(conversation, "One?", "1")
    conversation.save(path)
    again = Conversation.resume(engine, path)  # type: ignore[arg-type]
    assert again.messages == conversation.messages
    assert again.system == "Sé"
    engine.answers.append("one")
    list(again.regenerate())
    say(again, "Two?", "2")
    assert engine.streams[-1].text == whole(engine, "One?", "one", "Two?", "2", system="Sé")


REST = ', "n_dropped": 0, "n_answer": 0, "answer_start": [], "ended": false}'


@pytest.mark.parametrize(
    "user",
    [
        "",
        "{",
        "[]",
        '{"format": 1}',
        '{"format": 1, "system": 5, "messages": []' + REST,
        '{"format": 1, "system": null, "messages": [{}]' + REST,
        '{"format": 1, "system": null, "messages": []' + REST.replace("0", "-1"),
    ],
)
def test_a_session_of_something_else_is_refused(tmp_path: Path, user: str) -> None:
    engine, path = FakeEngine(), tmp_path / "session"
    path.write_text(json.dumps({"all": [1], "cached": 1, "n_keep": 4, "user": user}))
    with pytest.raises(SessionError, match="not of a conversation"):
        Conversation.resume(engine, path)  # type: ignore[arg-type]
    assert engine.streams[-1].closed


def test_a_session_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "session"
    path.write_text(json.dumps({"all": [1], "cached": 1, "n_keep": 4, "user": '{"format": 99}'}))
    with pytest.raises(SessionError, match="newer"):
        Conversation.resume(FakeEngine(), path)  # type: ignore[arg-type]


def test_the_transcript_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TRANSCRIPT_CHARACTERS", 50)
    conversation = fresh(FakeEngine())
    for _ in range(20):
        say(conversation, "u" * 10, "a" * 10)
    assert sum(len(m["content"]) for m in conversation.messages) <= 50
    assert conversation.n_dropped + len(conversation.messages) == 40
