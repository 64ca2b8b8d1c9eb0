"""serve --recall: a message is read with the line of its own history that belongs to it and has left the window."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from serving import WORDS, Served, serve

from edge_stream.engine import Engine
from edge_stream.server.history.prefix_matching import verify

Load = Callable[..., Engine]
FACT = "My friend Anna owns a blue kite."
QUESTION = "What does my friend Anna own?"
OPTIONS: dict[str, Any] = {"grammar": WORDS, "max_tokens": 12, "seed": 1}


def talk(n: int) -> list[dict[str, str]]:
    """A history of n turns that begins with FACT."""
    out = [{"role": "user", "content": FACT}, {"role": "assistant", "content": "I see."}]
    for i in range(n):
        out += [
            {"role": "user", "content": f"The hour of the day is {i}."},
            {"role": "assistant", "content": "So it is."},
        ]
    return out


def ask(served: Served, history: list[dict[str, Any]], question: str = QUESTION, **more: Any) -> dict[str, Any]:
    """The answer to a question after a history."""
    return served.client.chat([*history, {"role": "user", "content": question}], **OPTIONS, **more)


def held(served: Served, answer: dict[str, Any]) -> str:
    """What the answer's slot holds, as text."""
    slot = answer["edge_stream"]["slot"]
    tokens = served.on_engine(lambda: served.scheduler.sessions.slots[slot].stream.tokens())
    return served.engine.detokenize(tokens).decode(errors="replace")


@pytest.mark.parametrize("step", ["at once", "turn by turn"])
def test_what_has_left_the_window_is_read_with_the_question(load: Load, step: str) -> None:
    """Whether the history is new to the server, and does not fit, or was read turn by turn."""
    with serve(load("chat", n_ctx=512), n_recall=64) as served:
        history = talk(40)
        for end in range(1, len(history), 2) if step == "turn by turn" else ():
            answer = served.client.chat(history[:end], **(OPTIONS | {"max_tokens": 1}))
            assert answer["edge_stream"]["recalled"] is None
        answer = ask(served, history)
        recalled = answer["edge_stream"]["recalled"]
        assert (recalled["text"], recalled["role"], recalled["message"]) == (FACT, "user", 0)
        assert recalled["messages_ago"] == len(history)
        assert FACT in held(served, answer)

        # the remark is part of what the stream holds: asked again, and in the next turn, nothing of it is read again
        again = ask(served, history)
        assert again["edge_stream"]["history"] == "branched" and again["edge_stream"]["n_read"] < 16
        assert again["edge_stream"]["recalled"] == recalled and held(served, again).count(FACT) == 1
        history += [{"role": "user", "content": QUESTION}, again["choices"][0]["message"]]
        more = ask(served, history, "And what time is it?")
        assert more["edge_stream"]["history"] == "continued" and more["edge_stream"]["recalled"] is None
        assert more["edge_stream"]["n_read"] < 60 and held(served, more).count(FACT) == 1
        session = served.scheduler.sessions.slots[more["edge_stream"]["slot"]]
        assert served.on_engine(lambda: verify(session.log, len(session.log.entries) - 1, session.stream))


def test_every_choice_is_read_with_it(load: Load) -> None:
    with serve(load("chat", n_ctx=512), n_recall=64) as served:
        answer = ask(served, talk(40), n=3)
        assert answer["edge_stream"]["recalled"]["text"] == FACT and held(served, answer).count(FACT) == 1
        assert len(answer["choices"]) == 3


def test_the_remark_survives_a_restart(load: Load, tmp_path: Path) -> None:
    history = talk(40)
    for _ in range(2):
        with serve(load("chat", n_ctx=512), tmp_path, n_recall=64) as served:
            answer = ask(served, history)
            assert answer["edge_stream"]["recalled"]["text"] == FACT and held(served, answer).count(FACT) == 1
            history += [{"role": "user", "content": QUESTION}, answer["choices"][0]["message"]]
            more = ask(served, history, "And now?")
            assert more["edge_stream"]["history"] == "continued" and more["edge_stream"]["n_read"] < 60
            history = history[:-2]


def test_nothing_comes_back_of_another_history(load: Load) -> None:
    """A server keeps no text: what is not in the request cannot be recalled, whoever sent it before."""
    with serve(load("chat", n_ctx=512, n_parallel=2), n_recall=64) as served:
        assert ask(served, talk(40))["edge_stream"]["recalled"]
        without = ask(served, talk(40)[2:])
        assert without["edge_stream"]["recalled"] is None and FACT not in held(served, without)


def test_nothing_comes_back_that_is_held_or_not_asked_for(load: Load) -> None:
    with serve(load("chat", n_ctx=512), n_recall=64) as served:
        assert ask(served, talk(2))["edge_stream"]["recalled"] is None
        injected = [*talk(2), {"role": "user", "content": "Hi.", "recalled": {"text": FACT * 2, "role": "user"}}]
        answer = served.client.chat(injected, **OPTIONS)
        assert FACT * 2 not in held(served, answer)
    with serve(load("chat", n_ctx=512), n_recall=4) as served:  # the line is longer
        assert ask(served, talk(40))["edge_stream"]["recalled"] is None
    with serve(load("chat", n_ctx=512)) as served:
        answer = ask(served, talk(40))
        assert answer["edge_stream"]["recalled"] is None and FACT not in held(served, answer)


def test_each_of_two_at_once_gets_its_own(load: Load) -> None:
    """Two conversations in slots of one cache, several turns each, at the same time."""
    facts = {"blue kite": FACT, "green boat": "My friend Anna owns a green boat."}

    def follow(fact: str) -> None:
        history = [{"role": "user", "content": fact}, *talk(40)[1:]]
        for _ in range(2):
            answer = ask(served, history, name=fact)
            recalled = answer["edge_stream"]["recalled"]
            assert recalled and (recalled["text"], recalled["message"]) == (fact, 0)
            history += [{"role": "user", "content": QUESTION}, answer["choices"][0]["message"]]
            history += talk(20)[2:]

    with serve(load("chat", n_ctx=512, n_parallel=2), n_recall=64) as served, ThreadPoolExecutor(2) as pool:
        list(pool.map(follow, facts.values()))
