"""An answer that repeats itself ends, one period of it stays; what is no loop goes on."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from loop_texts import legitimate
from serving import Served, serve

from edge_stream import Engine, Sampling
from edge_stream.backends import loading
from edge_stream.chat.conversation import Conversation
from edge_stream.generation import Token
from edge_stream.loop_guard import Loop, LoopGuard
from edge_stream.models import names
from edge_stream.native.callbacks import Callbacks
from edge_stream.vocabulary import Vocabulary

MAX_PERIOD = 512
CYCLE = "xyzXYZ"  # a token per letter in the tiny models
GRAMMAR = f'root ::= "abc" ("{CYCLE}")+'
LOOP = Sampling(seed=1, grammar=GRAMMAR)
BOUND = 384 + 4 * len(CYCLE)


def expected(tokens: list[int]) -> tuple[int, int] | None:
    """The shortest period whose cycle at the end of tokens is long enough, by comparing each with the one before."""
    for period in range(1, MAX_PERIOD + 1):
        n = 0
        while n + period < len(tokens) and tokens[-1 - n] == tokens[-1 - n - period]:
            n += 1
        if n and n + period >= 384 + 4 * period:
            return period, n + period
    return None


def first_alarm(tokens: list[int]) -> tuple[int, tuple[int, int]] | None:
    guard = LoopGuard()
    return next(((i, found) for i, t in enumerate(tokens) if (found := guard.find(t))), None)


@pytest.mark.parametrize("period", [1, 2, 3, 17, 64, 100, 255, 511, 512])
def test_a_cycle_is_found_at_the_token_where_it_reaches_the_bound(period: int) -> None:
    r = random.Random(period)
    before = [r.randrange(10) for _ in range(700)]
    cycle = [10 + r.randrange(3) for _ in range(period - 1)] + [99]
    tokens = before + cycle * (384 // period + 5)
    found = first_alarm(tokens + [7] * 400)
    assert found == (len(before) + 384 + 4 * period - 1, (period, 384 + 4 * period))
    assert found[1] == expected(tokens[: found[0] + 1]) and expected(tokens[: found[0]]) is None


def test_a_cycle_of_513_tokens_is_none() -> None:
    assert first_alarm([*range(513)] * 10) is None


def test_nested_repeats_of_two_tokens_agree_with_the_definition() -> None:
    # words of few letters have many near-cycles, which stand in each other's way for a guard that follows one candidate
    r = random.Random(5)
    for _ in range(20):
        word = [0]
        while len(word) < r.randint(20, 120):
            word = word * r.randint(1, 3) + [r.randrange(2) for _ in range(r.randint(1, 4))]
        tokens = [r.randrange(2) for _ in range(50)] + (word[:MAX_PERIOD] * 200)[:3000]
        found = first_alarm(tokens)
        assert found and expected(tokens[: found[0] + 1]) == found[1] and expected(tokens[: found[0]]) is None


def test_200_texts_that_repeat_themselves_legitimately_raise_no_alarm() -> None:
    params = loading.start(False).llama_model_default_params()
    params.vocab_only = True
    vocabulary = Vocabulary(loading.load_model(names.resolve("demo"), params, Callbacks()))
    texts = list(legitimate(200))
    assert len(set(texts)) == 200
    assert [kind for kind, text in texts if first_alarm(vocabulary.tokenize(text))] == []


#
# streams
#


@pytest.fixture(scope="module")
def engine(tiny: Callable[[str], Path]) -> Iterator[Engine]:
    with Engine.load(tiny("chat"), n_ctx=1024, cache_type_k="f32", cache_type_v="f32", n_threads=1) as engine:
        yield engine


def check_loop(tokens: list[Token]) -> Loop:
    last = tokens[-1]
    assert last.finish_reason == "repetition" and last.loop is not None
    assert all(t.finish_reason is None and t.loop is None for t in tokens[:-1])
    assert (last.loop.period, last.loop.repetitions) == (len(CYCLE), BOUND // len(CYCLE))
    assert len(tokens) == 3 + BOUND
    return last.loop


def test_one_period_stays_and_the_stream_goes_on_as_if_no_more_had_been_written(engine: Engine) -> None:
    with engine.stream() as stream:
        n_prompt = stream.feed("Say it: ")
        tokens = list(stream.generate(sampling=LOOP, ignore_eos=True, loop_guard=True))
        assert check_loop(tokens).n_taken == BOUND - len(CYCLE)
        assert "".join(t.text for t in tokens) == "abc" + (CYCLE * 100)[:BOUND]  # all of it was shown
        assert tokens[-1].n_past == stream.stats.n_past == n_prompt + 3 + len(CYCLE)
        held, logits = stream.tokens(), stream.logits
    with engine.stream() as fresh:
        fresh.feed(held)
        assert engine.detokenize(held).decode() == f"Say it: abc{CYCLE}"
        np.testing.assert_allclose(logits, fresh.logits, atol=1e-3)


def test_a_loop_longer_than_the_cache_leaves_a_period(tiny: Callable[[str], Path]) -> None:
    with Engine.load(tiny("chat"), n_ctx=64, n_threads=1) as small, small.stream() as stream:
        stream.feed("Say it: ")
        tokens = list(stream.generate(sampling=LOOP, ignore_eos=True, loop_guard=True))
        assert 0 < check_loop(tokens).n_taken < BOUND - len(CYCLE)
        held = small.detokenize(stream.tokens()[4:]).decode()
        assert len(CYCLE) <= len(held) < 2 * len(CYCLE) and held.endswith(CYCLE)
        assert len(list(stream.generate(5, sampling=Sampling(seed=2), ignore_eos=True))) == 5


def test_a_recurrent_state_goes_back_as_well(made: Callable[[str], Path]) -> None:
    with Engine.load(made("qwen35"), n_ctx=1024, n_threads=1, proof=False) as engine, engine.stream() as stream:
        n_prompt = stream.feed("Say it: ")
        tokens = list(stream.generate(sampling=Sampling(logit_bias={70: 1e4}), ignore_eos=True, loop_guard=True))
        loop = tokens[-1].loop
        assert loop is not None and (loop.period, loop.repetitions, loop.n_taken) == (1, 388, 387)
        held, logits = stream.tokens(), stream.logits
        assert len(held) == n_prompt + 1
        stream.reset()
        stream.feed(held)
        np.testing.assert_allclose(logits, stream.logits, atol=1e-3)


def test_without_the_guard_it_goes_on(engine: Engine) -> None:
    with engine.stream() as stream:
        stream.feed("Say it: ")
        tokens = list(stream.generate(BOUND + 50, sampling=LOOP, ignore_eos=True))
        assert tokens[-1].finish_reason == "length" and stream.stats.n_past > BOUND


def test_the_end_of_a_text_comes_before_its_loop(engine: Engine) -> None:
    with engine.stream() as stream:
        stream.feed("Say it: ")
        stop = "abc" + (CYCLE * 100)[:BOUND]
        tokens = list(stream.generate(sampling=LOOP, ignore_eos=True, loop_guard=True, stop=[stop]))
        assert tokens[-1].finish_reason == "stop" and len(tokens) == 3 + BOUND


def test_a_conversation_keeps_what_its_stream_has(engine: Engine, tmp_path: Path) -> None:
    conversation = Conversation(engine)
    shown = "".join(t.text for t in conversation.reply("Hello", sampling=LOOP, ignore_eos=True))
    assert len(shown) == 3 + BOUND
    assert conversation.messages[-1] == {"role": "assistant", "content": f"abc{CYCLE}"}
    n_past = conversation.stream.stats.n_past
    assert n_past < 100
    conversation.save(tmp_path / "session")
    list(conversation.regenerate(sampling=LOOP, ignore_eos=True))
    assert conversation.stream.stats.n_past == n_past
    conversation.close()
    again = Conversation.resume(engine, tmp_path / "session")
    answer = list(again.reply("And then?", sampling=Sampling(seed=3), max_tokens=20, ignore_eos=True))
    again.close()
    # the same conversation, had the model written one period and no more
    other = Conversation(engine)
    list(other.reply("Hello", sampling=LOOP, max_tokens=3 + len(CYCLE), ignore_eos=True))
    expected = list(other.reply("And then?", sampling=Sampling(seed=3), max_tokens=20, ignore_eos=True))
    other.close()
    assert [t.token for t in answer] == [t.token for t in expected]


#
# the server
#


@pytest.fixture(scope="module")
def served(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    engine = Engine.load(
        tiny("chat"), n_parallel=2, n_ctx=1024, cache_type_k="f32", cache_type_v="f32", flash_attn="off", n_threads=1
    )
    with engine, serve(engine, tmp_path_factory.mktemp("sessions")) as running:
        yield running


OPTIONS: dict[str, Any] = {"grammar": GRAMMAR, "seed": 1, "ignore_eos": True}
INFO = {"loop": {"period": len(CYCLE), "repetitions": BOUND // len(CYCLE)}}
SHOWN = "abc" + (CYCLE * 100)[:BOUND]


def test_served_chats_end_and_are_continued_from_what_was_sent(served: Served) -> None:
    messages = [{"role": "user", "content": "Say it."}]
    whole = served.client.chat(messages, **OPTIONS)
    choice = whole["choices"][0]
    assert (choice["finish_reason"], choice["edge_stream"]) == ("stop", INFO)
    assert choice["message"]["content"] == SHOWN and whole["usage"]["completion_tokens"] == len(SHOWN)
    n_past = whole["edge_stream"]["n_past"]
    assert n_past < 100
    messages += [choice["message"], {"role": "user", "content": "Go on."}]
    then = served.client.chat(messages, seed=2, max_tokens=10, ignore_eos=True)
    assert then["edge_stream"]["history"] == "continued" and then["edge_stream"]["n_reused"] == n_past
    assert "edge_stream" not in then["choices"][0]


def test_served_texts_end_and_are_continued_from_what_was_sent(served: Served) -> None:
    def complete(prompt: Any, **options: Any) -> dict[str, Any]:
        answer = served.client.post("/v1/completions", json={"prompt": prompt, "max_tokens": 1000, **options})
        assert answer.status_code == 200, answer.text
        return answer.json()  # type: ignore[no-any-return]

    first = complete("Say it again: ", **OPTIONS)
    assert first["choices"][0] | {"logprobs": None} == {
        "index": 0, "text": SHOWN, "logprobs": None, "finish_reason": "stop", "edge_stream": INFO,
    }  # fmt: skip
    then = complete("Say it again: " + SHOWN + " and", seed=2, max_tokens=10)
    assert then["edge_stream"]["history"] == "continued" and then["edge_stream"]["n_past"] < 100
    native = served.client.post("/completion", json={"prompt": "Once more: ", "n_predict": 1000, **OPTIONS}).json()
    assert (native["content"], native["stop_type"], native["edge_stream"]["loop"]) == (SHOWN, "limit", INFO["loop"])
    # a prompt of tokens is continued by tokens, of which the client was sent all
    tokens = served.on_engine(lambda: served.engine.tokenize("As tokens: "))
    first = complete(tokens, logprobs=0, **OPTIONS)
    written = served.on_engine(lambda: served.engine.tokenize(SHOWN))
    assert len(written) == first["usage"]["completion_tokens"]
    then = complete([*tokens, *written, 70], seed=2, max_tokens=10)
    assert then["edge_stream"]["history"] == "continued" and then["edge_stream"]["n_past"] < 100


def test_streamed_choices_say_what_was_repeated(served: Served) -> None:
    import json

    body = {"messages": [{"role": "user", "content": "Twice."}], "n": 2, "stream": True, "max_tokens": 1000, **OPTIONS}
    raw = served.client.post("/v1/chat/completions", json=body).text
    chunks = [json.loads(line[6:]) for line in raw.split("\n\n") if line.startswith("data: {")]
    ends = [c for chunk in chunks for c in chunk["choices"] if c["finish_reason"]]
    assert sorted(c["index"] for c in ends) == [0, 1]
    assert all(c["finish_reason"] == "stop" and c["edge_stream"] == INFO for c in ends)
    for i in range(2):
        parts = [c["delta"].get("content") or "" for chunk in chunks for c in chunk["choices"] if c["index"] == i]
        assert "".join(parts) == SHOWN


def test_a_request_may_switch_the_guard_off(served: Served) -> None:
    whole = served.client.chat(
        [{"role": "user", "content": "On and on."}], max_tokens=BOUND + 20, loop_guard=False, **OPTIONS
    )
    assert whole["choices"][0]["finish_reason"] == "length" and "edge_stream" not in whole["choices"][0]
    assert whole["usage"]["completion_tokens"] == BOUND + 20
