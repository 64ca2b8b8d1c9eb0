"""Conversations: what each turn adds to the stream, and that nothing is lost when things go wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from fake_engine import CHATML, THINKING, FakeEngine

from edge_stream.chat.conversation import Conversation, count_pinned
from edge_stream.chat.core import ChatCore
from edge_stream.chat.options import ChatOptions
from edge_stream.errors import EdgeStreamError, SessionError
from edge_stream.sampling import Sampling


def say(conversation: Conversation, text: str, answer: str, **options: Any) -> str:
    conversation.engine.answers.append(answer)  # type: ignore[attr-defined]
    return "".join(token.text for token in conversation.reply(text, **options))


def render(engine: FakeEngine, messages: list[dict[str, Any]], **body: Any) -> str:
    """What the template writes for a conversation that is answered."""
    body = {"messages": messages, "add_generation_prompt": False, "continue_final_message": False, **body}
    return ChatCore(engine.backend.vocabulary).request(body).prompt


def whole(engine: FakeEngine, *contents: str, system: str | None = None) -> str:
    """The same for questions and answers."""
    messages = [{"role": "system", "content": system}] if system else []
    roles = ("user", "assistant")
    messages += [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]
    return render(engine, messages)


def fresh(engine: FakeEngine, **settings: Any) -> Conversation:
    return Conversation(engine, **settings)


def stop_at(n: int) -> Callable[[int, int], None]:
    def stop(done: int, _total: int) -> None:
        if done > n:
            raise EdgeStreamError("stopped")

    return stop


def test_turns_add_up_to_what_the_template_writes() -> None:
    engine = FakeEngine()
    conversation = fresh(engine, system="Be brief.")
    assert say(conversation, "One?", "1") == "1"
    assert say(conversation, "Two?", "2!") == "2!"
    # what the template writes after the model's end of turn comes with the next message
    assert engine.streams[0].text + "\n" == whole(engine, "One?", "1", "Two?", "2!", system="Be brief.")
    assert [m["content"] for m in conversation.messages] == ["One?", "1", "Two?", "2!"]


MISTRAL = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set turns = messages[1:] %}{% else %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}{% if m.role == 'user' %}[INST] {% if system and loop.first %}{{ system + '\n\n' }}"
    "{% endif %}{{ m.content }}[/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
# The system prompt moves into the last user message: earlier turns change with every turn.
MISTRAL_LAST = MISTRAL.replace("loop.first", "loop.last")
# Phi ends the text where no answer is asked for.
PHI = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}</s>{% endif %}"
)
NO_ANSWERS = "{% for m in messages if m.role == 'user' %}[{{ m.content }}]{% endfor %}"


@pytest.mark.parametrize("source", [MISTRAL, MISTRAL_LAST, PHI, NO_ANSWERS, THINKING])
def test_turns_add_up_whatever_the_template_writes(source: str) -> None:
    engine = FakeEngine(chat_template=source)
    conversation = fresh(engine, system="Be brief.")
    for question, answer in (("One?", "1"), ("Two?", "2"), ("Three?", "3"), ("Four?", "4")):
        said = " " + answer if source.startswith(MISTRAL[:20]) else answer
        assert say(conversation, question, said).strip() == answer
        messages = [{"role": "system", "content": "Be brief."}, *conversation.messages[:-1]]
        prompt = ChatCore(engine.backend.vocabulary).request({"messages": messages}).prompt
        assert engine.streams[-1].text == prompt + said + "<|im_end|>"
    assert conversation.note is None


def test_without_a_template_it_says_what_is_used() -> None:
    assert "no chat template" in (fresh(FakeEngine(chat_template=None)).note or "")


def test_only_the_new_turn_is_fed() -> None:
    engine = FakeEngine()
    conversation = fresh(engine)
    say(conversation, "a" * 1000, "b" * 1000, loop_guard=False)
    before = conversation.stream.stats.n_past
    say(conversation, "c", "d")
    assert conversation.stream.stats.n_past - before == len(engine.tokenize("\nuser\nc\nassistant\nd")) + 4
    assert conversation.n_read == len(engine.tokenize("\nuser\nc\nassistant\n")) + 3


def test_bos_once_and_only_where_the_model_wants_it() -> None:
    engine = FakeEngine()
    engine.wants_bos = True
    conversation = fresh(engine, system="S")
    say(conversation, "One?", "1")
    say(conversation, "Two?", "2")
    assert engine.streams[0].all.count(engine.bos) == 1
    assert engine.streams[0].all[0] == engine.bos


def test_system_prompt_is_pinned_at_least_keep() -> None:
    engine = FakeEngine()
    n_head = len(engine.tokenize("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n", special=True))
    assert fresh(engine, system="Be brief.").stream.stats.n_keep == n_head == count_pinned(engine, "Be brief.")
    assert fresh(engine, system="Be brief.", n_keep=200).stream.stats.n_keep == 200
    assert fresh(engine, n_keep=4).stream.stats.n_keep == 4
    assert fresh(engine, n_keep=-1).stream.stats.n_keep == len(engine.tokenize("<|im_start|>user\n", special=True))


def test_system_prompt_too_long_for_the_cache() -> None:
    with pytest.raises(EdgeStreamError, match="less than a quarter of the cache"):
        fresh(FakeEngine(n_ctx=128), system="x" * 90)
    fresh(FakeEngine(n_ctx=256), system="x" * 90)


def test_slides_may_end_where_messages_begin() -> None:
    engine = FakeEngine(n_ctx=160)
    conversation = fresh(engine, system="S")
    start, firsts = engine.tokenize("<|im_start|>", special=True)[0], []
    for _ in range(30):
        engine.answers.append("Answer.")
        for _ in conversation.reply("Question?"):
            stats = conversation.stream.stats
            if stats.n_evicted:
                firsts.append(conversation.stream.tokens()[stats.n_sinks])
    # tokens are evicted up to n_boundary further than they must be, so that a window often begins with a message
    assert conversation.stream.stats.n_evicted > 3 * 160
    assert firsts.count(start) > len(firsts) / 3
    assert conversation.n_read < 50  # nothing was read again


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
        assert say(conversation, "One?", "abcdef", stop=["cd", "xyz"]) == "ab"
    else:
        say(conversation, "One?", "abc</s>")
    said = "ab" if how == "stop" else "abc"
    assert conversation.messages[-1] == {"role": "assistant", "content": said}
    say(conversation, "Two?", "2")
    # neither the stop text nor another end of turn stays
    assert engine.streams[0].text + "\n" == whole(engine, "One?", said, "Two?", "2")


def test_text_that_may_begin_a_stop_text_is_held_back_but_not_lost() -> None:
    engine = FakeEngine()
    conversation = fresh(engine)
    engine.answers += ["a##b##", "a##b##"]
    assert [t.text for t in conversation.reply("One?", stop=["###"])] == ["a", "", "", "##b", "", "", "##"]
    assert [t.text for t in conversation.reply("Two?", stop=["###"], max_tokens=3)] == ["a", "", "##"]
    assert [m["content"] for m in conversation.messages[1::2]] == ["a##b##", "a##"]


def test_of_an_answer_that_repeats_itself_one_period_stays() -> None:
    engine = FakeEngine()
    conversation = fresh(engine)
    engine.answers.append("so: " + "abc" * 500)
    tokens = list(conversation.reply("One?"))
    assert tokens[-1].finish_reason == "repetition"
    assert len(tokens) > 384
    assert conversation.messages[-1]["content"] == "so: abc"
    assert engine.streams[0].text.endswith("assistant\nso: abc")
    say(conversation, "Two?", "2")
    assert engine.streams[0].text + "\n" == whole(engine, "One?", "so: abc", "Two?", "2")


def test_characters_are_whole_and_a_cut_one_is_dropped() -> None:
    engine = FakeEngine()
    conversation = fresh(engine)
    assert say(conversation, "One?", "é😀") == "é😀"
    assert say(conversation, "Two?", "é😀", max_tokens=4) == "é"
    assert engine.streams[0].text.endswith("assistant\né")
    engine.answers.append("😀!")
    assert "".join(t.text for t in conversation.continue_answer()) == "😀!"
    assert conversation.messages[-1]["content"] == "é😀!"


def test_a_message_that_cannot_be_read_is_taken_back() -> None:
    engine = FakeEngine()
    conversation = fresh(engine)
    say(conversation, "One?", "1")
    before = engine.streams[0].text
    with pytest.raises(EdgeStreamError, match="stopped"):
        say(conversation, "x" * 200, "never", on_progress=stop_at(64))
    assert engine.streams[0].text == before
    assert len(conversation.messages) == 2
    engine.answers.clear()
    say(conversation, "Two?", "2")
    assert engine.streams[0].text + "\n" == whole(engine, "One?", "1", "Two?", "2")


def test_a_first_message_that_cannot_be_read_leaves_nothing() -> None:
    engine = FakeEngine()
    conversation = fresh(engine, system="S")
    with pytest.raises(EdgeStreamError, match="stopped"):
        say(conversation, "x" * 100, "never", on_progress=stop_at(0))
    assert conversation.messages == []
    engine.answers.clear()
    say(conversation, "One?", "1")
    assert engine.streams[0].text + "\n" == whole(engine, "One?", "1", system="S")


def test_settings_that_cannot_be_used_leave_the_conversation_as_it_was() -> None:
    engine = FakeEngine()
    conversation = fresh(engine, system="S")
    say(conversation, "One?", "1")
    before = engine.streams[0].text
    for attempt in (conversation.reply("Two?", sampling=Sampling(grammar="root ::= (")), conversation.regenerate(
        sampling=Sampling(grammar="root ::= (")
    )):  # fmt: skip
        with pytest.raises(EdgeStreamError, match="grammar"):
            list(attempt)
        assert [m["content"] for m in conversation.messages] == ["One?", "1"]
    assert before.startswith(engine.streams[0].text)
    say(conversation, "Two?", "2")
    assert engine.streams[0].text + "\n" == whole(engine, "One?", "1", "Two?", "2", system="S")


def test_regenerate_replaces_the_answer() -> None:
    engine = FakeEngine()
    conversation = fresh(engine, system="S")
    say(conversation, "One?", "1")
    say(conversation, "Two?", "wrong")
    for answer in ("better", "best"):
        engine.answers.append(answer)
        assert "".join(t.text for t in conversation.regenerate()) == answer
        assert conversation.n_read == len(engine.tokenize("<|im_start|>assistant\n", special=True))
    assert engine.streams[0].text + "\n" == whole(engine, "One?", "1", "Two?", "best", system="S")
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
    assert engine.streams[0].text + "\n" == whole(engine, "Two?", "2" * 10, "Three?", "good", system="S")
    say(conversation, "Four?", "4")
    assert engine.streams[0].text.endswith(whole(engine, "Three?", "good", "Four?", "4").removesuffix("\n"))


def test_after_an_answer_longer_than_the_window_nothing_is_read_again() -> None:
    engine = FakeEngine(n_ctx=200)
    conversation = fresh(engine, system="S")
    for end in ("", "</s>"):
        say(conversation, "One?", "1" * 300 + end)
        say(conversation, "Two?", "2")
        assert conversation.n_read < 50
        assert conversation.note is None
        ends = "<|im_end|>" if not end else "</s><|im_end|>"  # as first read
        said = f"{ends}\n" + whole(engine, "Two?", "2").removesuffix("\n")
        assert engine.streams[0].text.endswith("1" + said)


LATE_END = (
    "{% for m in messages %}{% if m.role == 'user' %}{% if not loop.first %}<|im_end|>{% endif %}"
    "<|im_start|>U {{ m.content }}{% else %}<|im_start|>A {{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>A {% endif %}"
)


def test_a_template_that_ends_an_answer_with_the_next_message(tmp_path: Path) -> None:
    engine, path = FakeEngine(chat_template=LATE_END), tmp_path / "session"
    conversation = fresh(engine)
    say(conversation, "One?", "1")
    say(conversation, "Two?", "2222", max_tokens=2)
    say(conversation, "Three?", "3")
    assert engine.streams[0].text == whole(engine, "One?", "1", "Two?", "22", "Three?", "3") + "<|im_end|>"
    conversation.save(path)
    again = Conversation.resume(engine, path)
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
    # the template's end of turn, not the one that the model wrote, once it has been read on
    assert engine.streams[0].text == "[I]One?[/I]1</s>[I]Two?[/I]two<|im_end|>"


def test_nothing_to_regenerate_or_to_continue() -> None:
    conversation = fresh(FakeEngine())
    with pytest.raises(EdgeStreamError, match="no answer"):
        list(conversation.regenerate())
    with pytest.raises(EdgeStreamError, match="no answer"):
        list(conversation.continue_answer())
    say(conversation, "One?", "1")
    with pytest.raises(EdgeStreamError, match="it was not cut"):
        list(conversation.continue_answer())
    assert len(conversation.messages) == 2


@pytest.mark.parametrize("resumed", [False, True])
def test_continue_goes_on_where_an_answer_was_cut(tmp_path: Path, resumed: bool) -> None:
    engine = FakeEngine()
    conversation = fresh(engine)
    assert say(conversation, "One?", "abcdef", max_tokens=2) == "ab"
    if resumed:
        conversation.save(tmp_path / "session")
        conversation = Conversation.resume(engine, tmp_path / "session")
    engine.answers.append("cd")
    assert "".join(t.text for t in conversation.continue_answer(max_tokens=1)) == "c"
    assert conversation.n_read == 0
    engine.answers.append("yz")  # not what the logits were for: the last token is read again
    assert "".join(t.text for t in conversation.continue_answer()) == "yz"
    assert [m["content"] for m in conversation.messages] == ["One?", "abcyz"]
    say(conversation, "Two?", "2")
    assert engine.streams[-1].text + "\n" == whole(engine, "One?", "abcyz", "Two?", "2")


def test_continue_after_another_message_failed() -> None:
    engine = FakeEngine()
    conversation = fresh(engine)
    say(conversation, "One?", "abcdef", max_tokens=2)
    with pytest.raises(EdgeStreamError, match="stopped"):
        say(conversation, "x" * 200, "never", on_progress=stop_at(64))
    engine.answers[:] = ["cd"]
    assert "".join(t.text for t in conversation.continue_answer()) == "cd"
    assert engine.streams[0].text + "\n" == whole(engine, "One?", "abcd")


def test_clear_keeps_the_system_prompt() -> None:
    engine = FakeEngine()
    conversation = fresh(engine, system="S")
    say(conversation, "One?", "1")
    conversation.clear()
    say(conversation, "Two?", "2")
    assert engine.streams[0].text + "\n" == whole(engine, "Two?", "2", system="S")
    assert len(conversation.messages) == 2


#
# thinking and tools
#

LOOK = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}


def test_thinking_is_told_from_text_and_dropped_as_the_template_drops_it() -> None:
    engine = FakeEngine(chat_template=THINKING)
    conversation = fresh(engine)
    engine.answers += ["<think>\nhm\n</think>\n\nyes", "<think>\nso\n</think>\n\nno"]
    tokens = list(conversation.reply("One?"))
    assert "".join(t.text for t in tokens if t.reasoning) == "hm\n"
    assert "".join(t.text for t in tokens if not t.reasoning) == "yes"
    assert conversation.messages[-1] == {"role": "assistant", "content": "yes", "reasoning_content": "hm\n"}
    assert "hm" in engine.streams[0].text
    list(conversation.reply("Two?"))
    assert "hm" not in engine.streams[0].text
    assert engine.streams[0].text + "\n" == render(engine, conversation.messages)
    assert conversation.note is None


def test_a_day_of_thinking_does_not_fill_the_window() -> None:
    engine = FakeEngine(n_ctx=600, chat_template=THINKING)
    conversation = fresh(engine)
    for i in range(50):
        engine.answers.append(f"<think>\n{'hm ' * 60}\n</think>\n\nyes {i}")
        list(conversation.reply(f"{i}?"))
    kept = engine.streams[0].text
    assert kept.count("hm ") == 60  # the newest answer's
    assert [f"yes {i}" in kept for i in range(44, 50)] == [True] * 6  # 9 KB of thoughts later
    assert "rewrites" not in (conversation.note or "")


def test_thoughts_may_be_cut_and_continued() -> None:
    engine = FakeEngine(chat_template=THINKING)
    conversation = fresh(engine)
    engine.answers.append("<think>\nabc\n</think>\n\nyes")
    assert "".join(t.text for t in conversation.reply("One?", max_tokens=10)) == "ab"
    assert conversation.messages[-1]["reasoning_content"] == "ab"
    engine.answers.append("c\n</think>\n\nyes")
    tokens = list(conversation.continue_answer())
    assert "".join(t.text for t in tokens if t.reasoning) == "c\n"
    assert "".join(t.text for t in tokens if not t.reasoning) == "yes"
    assert conversation.messages[-1] == {"role": "assistant", "content": "yes", "reasoning_content": "abc\n"}


def test_thinking_can_be_switched_off() -> None:
    engine = FakeEngine(chat_template=THINKING)
    conversation = fresh(engine, chat=ChatOptions(enable_thinking=False))
    say(conversation, "One?", "yes")
    assert engine.streams[0].text.endswith("assistant\n<think>\n\n</think>\n\nyes<|im_end|>")


#
# sessions
#


def test_save_and_resume(tmp_path: Path) -> None:
    engine, path = FakeEngine(), tmp_path / "session"
    conversation = fresh(engine, system="Sé")
    say(conversation, "One?", "1")
    conversation.save(path)
    again = Conversation.resume(engine, path)
    assert again.messages == conversation.messages
    assert again.system == "Sé"
    engine.answers.append("one")
    list(again.regenerate())
    assert again.n_read == len(engine.tokenize("<|im_start|>assistant\n", special=True))
    say(again, "Two?", "2")
    assert engine.streams[-1].text + "\n" == whole(engine, "One?", "one", "Two?", "2", system="Sé")


def old_session(engine: FakeEngine, path: Path, text: str, **user: Any) -> None:
    """A session as edge-stream wrote it before: format 1."""
    with engine.stream(n_keep=4) as stream:
        stream.feed(text, special=True)
        stream.save(path, user=json.dumps({"format": 1, "system": None, "n_dropped": 0, **user}).encode())


@pytest.mark.parametrize("regenerated", [False, True])
def test_a_session_of_format_1_goes_on(tmp_path: Path, regenerated: bool) -> None:
    engine, path = FakeEngine(), tmp_path / "session"
    messages = [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "1"}]
    n_answer = len(engine.tokenize("<|im_start|>assistant\n1<|im_end|>\n", special=True))
    rest: dict[str, Any] = {"n_answer": n_answer, "answer_start": [259], "ended": False}
    old_session(engine, path, whole(engine, "One?", "1"), messages=messages, **rest)
    conversation = Conversation.resume(engine, path)
    assert conversation.messages == messages
    if regenerated:
        engine.answers.append("one")
        list(conversation.regenerate())
    say(conversation, "Two?", "2")
    answer = "one" if regenerated else "1"
    assert engine.streams[-1].text + "\n" == whole(engine, "One?", answer, "Two?", "2")
    assert conversation.n_read == len(engine.tokenize("user\nTwo?\nassistant\n")) + 3 + regenerated


def test_a_session_of_format_1_whose_answer_was_longer_than_the_window_goes_on(tmp_path: Path) -> None:
    engine, path = FakeEngine(n_ctx=128), tmp_path / "session"
    messages = [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "1" * 300}]
    rest: dict[str, Any] = {"n_answer": 315, "answer_start": [259], "ended": False}
    old_session(engine, path, whole(engine, "One?", "1" * 300), messages=messages, **rest)
    conversation = Conversation.resume(engine, path)
    say(conversation, "Two?", "2")
    assert engine.streams[-1].text.endswith("1<|im_end|>\n" + whole(engine, "Two?", "2").removesuffix("\n"))


REST = ', "n_dropped": 0, "n_answer": 0, "answer_start": [], "ended": false}'
PLACES = ', "n_dropped": 0, "places": [[1, 0]], "cut": null}'


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
        '{"format": 2, "system": null, "messages": []' + PLACES,
        '{"format": 2, "system": null, "messages": [{"role": "user", "content": 7}]' + PLACES,
        '{"format": 2, "system": null, "messages": [{"role": "user", "content": "a"}]' + PLACES.replace("0]]", "9]]"),
    ],
)
def test_a_session_of_something_else_is_refused(tmp_path: Path, user: str) -> None:
    engine, path = FakeEngine(), tmp_path / "session"
    with engine.stream() as stream:
        stream.feed("text")
        stream.save(path, user=user.encode())
    with pytest.raises(SessionError, match="not of a conversation"):
        Conversation.resume(engine, path)
    assert engine.streams[-1].closed


def test_a_session_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    engine, path = FakeEngine(), tmp_path / "session"
    with engine.stream() as stream:
        stream.feed("text")
        stream.save(path, user=b'{"format": 99}')
    with pytest.raises(SessionError, match="newer"):
        Conversation.resume(engine, path)


def test_the_transcript_is_bounded() -> None:
    engine = FakeEngine(n_ctx=128, chat_template=CHATML)
    conversation = fresh(engine)
    for _ in range(6):
        say(conversation, "some words " * 20_000, "a" * 10)
    messages = conversation.messages
    assert sum(len(m["content"]) for m in messages) <= 1_000_000
    assert len(messages) == 8
    assert conversation.n_dropped == 4
    assert messages[0]["role"] == "user"
