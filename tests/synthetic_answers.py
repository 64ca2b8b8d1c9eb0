"""Answers without a model: events as the engine's thread sends them, and what an API's form makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edge_stream.server.http.answering import AnswerForm, Collected
from edge_stream.server.scheduling.events import Delta, Done, Finished, Progress, Started

INFO = {"history": "new", "n_past": 3, "n_to_read": 7, "n_reused": 2}
USAGE = {
    "prompt_tokens": 10,
    "completion_tokens": 9,
    "total_tokens": 19,
    "prompt_tokens_details": {"cached_tokens": 2},
}
TIMINGS = {"queued_ms": 0.5, "prompt_ms": 2.0, "predicted_ms": 3.25}


def call(index: int, arguments: str, **begin: Any) -> Delta:
    """A token of a call. begin: id and name, of its first token."""
    function = {"arguments": arguments} | ({"name": begin.pop("name")} if begin else {})
    return Delta(0, "", 1, tool_calls=[{"index": index, **begin, "function": function}])


def answer(*tokens: Delta, **finished: Any) -> list[Progress]:
    """The events of an answer."""
    finished = {"reason": "stop"} | finished
    return [Started(INFO), *tokens, Finished(0, **finished), Done(USAGE, TIMINGS, INFO)]


def text(content: str, thought: str = "") -> Delta:
    """A token of the content, or of the thinking."""
    return Delta(0, content, 1, reasoning=thought)


# thinks, says something, makes two calls
CALLS = answer(
    text("", "Two "),
    text("", "cities."),
    text("I "),
    text("ask."),
    call(0, "", id="call_1", name="weather"),
    call(0, '{"city":'),
    call(0, ' "Oslo"}'),
    call(1, "", id="call_2", name="weather"),
    call(1, '{"city": "Rome"}'),
    reason="tool_calls",
)


def chunks(form: AnswerForm, events: Sequence[Progress]) -> str:
    """What is sent of a streamed answer."""
    done = [event for event in events if isinstance(event, Done)]
    return b"".join([*(c for event in events for c in form.chunks(0, event)), *form.end(done)]).decode()


def whole(form: AnswerForm, events: Sequence[Progress]) -> Any:
    """The body of an answer that is not streamed."""
    collected = Collected()
    for event in events:
        if isinstance(event, (Delta, Finished)):
            collected.add(event)
    return form.whole([collected], [event for event in events if isinstance(event, Done)])
