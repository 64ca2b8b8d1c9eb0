"""Many clients at once, some of them hostile: nobody's words change, nothing leaks, nothing stays behind."""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from serving import Client, Served, serve

from edge_stream.engine import Engine
from edge_stream.sampling import Sampling
from edge_stream.server.history.prefix_matching import chat_history
from edge_stream.server.scheduling.events import Done, Failed, Finished
from edge_stream.server.scheduling.tasks import GenerationRequest, Stage, make_task

Load = Callable[..., Engine]
ENDLESS = {"max_tokens": -1, "ignore_eos": True}


def hello(i: Any = 0) -> list[dict[str, str]]:
    """A message of its own."""
    return [{"role": "user", "content": f"Hello, I am {i}"}]


def written(served: Served) -> int:
    """Tokens generated so far."""
    return int(served.scheduler.metrics.written._value.get())


def open_stream(served: Served, **body: Any) -> socket.socket:
    """A raw connection with a streaming request sent."""
    parts = urlsplit(served.url)
    sock = socket.create_connection((parts.hostname, parts.port), timeout=30)
    data = json.dumps({"stream": True, **body}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
    sock.sendall(head.encode() + f"Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return sock


@pytest.mark.parametrize("n_ctx", [96, 512])
def test_conversations_together_say_what_each_says_alone(n_ctx: int, load: Load) -> None:
    def talk(url: str, i: int) -> list[dict[str, Any]]:
        messages: list[dict[str, Any]] = []
        with Client(base_url=url, timeout=60) as client:
            for turn in range(3):
                client.turn(
                    messages, f"I am {i}, turn {turn}. " + "word " * 9 * i, seed=i, max_tokens=30, **{"grammar": None}
                )
        return messages

    with serve(load("chat", n_parallel=4, n_ctx=n_ctx)) as served:
        alone = [talk(served.url, i) for i in range(4)]
    with serve(load("chat", n_parallel=4, n_ctx=n_ctx)) as served, ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda i: talk(served.url, i), range(4)))
        assert served.scheduler.metrics.steps._value.get() < written(served)  # they did share batches
    assert together == alone


def test_a_client_that_goes_stops_its_generation(load: Load) -> None:
    with serve(load("chat", n_ctx=96)) as served:
        sock = open_stream(served, messages=hello(), **ENDLESS)
        while not (at_close := written(served)):
            sock.recv(4096)
        sock.close()
        served.wait_idle()
        n = written(served)
        time.sleep(0.2)
        assert written(served) == n >= at_close > 0
        answer = served.client.chat(hello(1), max_tokens=1)  # the only slot is free
        assert answer["edge_stream"]["slot"] == 0


def test_a_cancelled_job_writes_one_more_token_at_most(load: Load) -> None:
    """At the scheduler: from the moment it is told."""
    from edge_stream.server.scheduling.events import Delta

    with serve(load("chat", n_ctx=96)) as served:
        events: list[Any] = []
        after: list[int] = []

        def emit(event: Any) -> None:
            events.append(event)
            if len(events) == 10:
                task.cancelled = True
                after.append(sum(isinstance(e, Delta) for e in events))

        task = make_task(
            GenerationRequest(chat_history(hello(), {}), Sampling(), ignore_eos=True), served.scheduler.settings, emit
        )
        served.scheduler.submit(task)
        served.wait_idle()
        assert sum(isinstance(e, Delta) for e in events) <= after[0] + 1


def test_a_gone_client_also_stops_a_whole_answer_and_a_queued_one(load: Load) -> None:
    with serve(load("chat", n_ctx=96)) as served:
        one = open_stream(served, messages=hello(1), **(ENDLESS | {"stream": False}))
        while not written(served):
            time.sleep(0.01)
        two = open_stream(served, messages=hello(2), **ENDLESS)
        while not served.scheduler.counts()["waiting"]:
            time.sleep(0.01)
        two.close()
        while served.scheduler.counts()["waiting"]:
            time.sleep(0.01)
        one.close()
        served.wait_idle()


def test_a_full_queue_says_so(load: Load) -> None:
    with serve(load("chat", n_ctx=96), queue=2) as served:
        socks = [open_stream(served, messages=hello(0), **ENDLESS)]
        while not written(served):
            time.sleep(0.01)
        socks += [open_stream(served, messages=hello(i), **ENDLESS) for i in (1, 2)]
        while served.scheduler.counts()["waiting"] < 2:
            time.sleep(0.01)
        answer = served.client.post("/v1/chat/completions", json={"messages": hello(3)})
        assert answer.status_code == 503 and answer.json()["error"]["type"] == "unavailable_error"
        assert int(answer.headers["retry-after"]) >= 1
        for sock in socks:
            sock.close()


def test_a_slow_reader_waits_alone(load: Load) -> None:
    """One takes nothing: its generation pauses while another goes on, and memory does not fill with its tokens."""
    with serve(load("chat", n_parallel=2, n_ctx=96), backlog=16) as served:
        slow = open_stream(served, messages=hello(0), logprobs=True, top_logprobs=20, **ENDLESS)
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        n = -1
        while n <= 0 or n != written(served):  # until it pauses
            n = written(served)
            time.sleep(0.5)
        task = served.scheduler.loop.tasks[0]
        assert task.n_behind <= 16
        answer = served.client.chat(hello(1), max_tokens=50, ignore_eos=True)
        assert answer["usage"]["completion_tokens"] == 50 and written(served) == n + 50
        slow.close()
        served.wait_idle()


def test_a_reader_that_takes_nothing_does_not_keep_others_out(load: Load) -> None:
    with serve(load("chat", n_ctx=96), backlog=16, stall_seconds=0.2) as served:
        slow = open_stream(served, messages=hello(0), logprobs=True, top_logprobs=20, **ENDLESS)
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        while not written(served):
            time.sleep(0.01)
        assert served.client.chat(hello(1), max_tokens=5, ignore_eos=True)["usage"]["completion_tokens"] == 5
        slow.close()


@pytest.fixture
def tasks(load: Load) -> Iterator[tuple[Served, Callable[..., tuple[Any, list[Any]]]]]:
    """A server with one slot and no patience, and a way to submit tasks whose events nobody takes."""
    with serve(load("chat", n_ctx=96), backlog=8, stall_seconds=0) as served:

        def submit(i: int, group: object = None, **options: Any) -> tuple[Any, list[Any]]:
            events: list[Any] = []
            history = chat_history(hello(i), {})
            task = make_task(
                GenerationRequest(history, Sampling(), **options), served.scheduler.settings, events.append, group
            )
            served.scheduler.submit(task)
            return task, events

        yield served, submit


def test_a_reader_that_keeps_others_out_gets_an_error(tasks: Any) -> None:
    """It is not told that its answer was complete, nor that it reached its length; its conversation stays usable."""
    served, submit = tasks
    task, events = submit(0, ignore_eos=True)
    while task.n_behind < 8:
        time.sleep(0.01)
    served.client.chat(hello(1), max_tokens=1)
    assert isinstance(events[-1], Failed) and events[-1].error.code == 408
    assert not any(isinstance(event, (Finished, Done)) for event in events)
    served.wait_idle()


def test_a_stalled_job_does_not_end_for_its_own_request(tasks: Any) -> None:
    """The other prompts of a request wait for its reader, as they should."""
    served, submit = tasks
    group = object()
    task, events = submit(0, group, max_tokens=20, ignore_eos=True)
    while task.n_behind < 8:
        time.sleep(0.01)
    other, others = submit(1, group, max_tokens=1, ignore_eos=True)
    served.on_engine(lambda: None)
    served.on_engine(lambda: None)  # a round later
    assert task.stage is Stage.WRITING and other.stage is Stage.QUEUED
    task.n_taken = 10**6  # taken as they come from now on
    served.scheduler.wake()
    served.wait_idle()
    assert [event.reason for event in events + others if isinstance(event, Finished)] == ["length", "length"]


def test_a_time_limit_between_choices_ends_them_all(tasks: Any) -> None:
    served, submit = tasks
    task, events = submit(0, n=3, ignore_eos=True)
    while task.n_behind < 8:
        time.sleep(0.01)
    task.deadline = 0.0
    served.scheduler.wake()
    served.wait_idle()
    assert sorted(event.index for event in events if isinstance(event, Finished)) == [0, 1, 2]
    assert isinstance(events[-1], Done) and events[-1].info["timed_out"]


def test_a_stream_that_never_begins_ends_its_generation(load: Load) -> None:
    """The client goes after its answer was made, and before the first byte of it is sent."""
    from edge_stream.server.http.app import make_app

    with serve(load("chat", n_ctx=96), backlog=8) as served:
        body = json.dumps({"messages": hello(), "stream": True, **ENDLESS}).encode()
        host = urlsplit(served.url).netloc.encode()
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/chat/completions",
            "query_string": b"",
            "headers": [(b"host", host), (b"content-type", b"application/json")],
        }
        gone = False

        async def receive() -> dict[str, Any]:
            nonlocal gone
            if not gone:
                gone = True
                return {"type": "http.request", "body": body}
            return await asyncio.Future()

        async def send(message: dict[str, Any]) -> None:
            raise OSError("the client has gone")

        app = make_app(served.scheduler, served.scheduler.settings)
        with pytest.raises(OSError, match="the client has gone"):
            asyncio.run(app(scope, receive, send))  # type: ignore[arg-type]
        served.wait_idle()


def test_a_call_that_was_given_up_harms_nobody(load: Load) -> None:
    with serve(load("chat", n_ctx=96)) as served:
        began, go_on = threading.Event(), threading.Event()
        served.scheduler.call(lambda: (began.set(), go_on.wait(30)))
        began.wait(30)
        sock = open_stream(served, messages=hello(), max_tokens=3, ignore_eos=True)
        given_up = served.scheduler.call(lambda: 1)
        assert given_up.cancel()
        go_on.set()
        sock.settimeout(30)
        data = b""
        while b"[DONE]" not in data:
            more = sock.recv(4096)
            assert more, data
            data += more
        assert b"error" not in data
        sock.close()


def test_a_time_limit_ends_the_answer(load: Load) -> None:
    with serve(load("chat", n_ctx=96), request_seconds=0.3) as served:
        answer = served.client.chat(hello(), **ENDLESS)
        assert answer["choices"][0]["finish_reason"] == "length" and answer["edge_stream"]["timed_out"]


def test_a_shutdown_tells_the_requests_that_wait(load: Load) -> None:
    events: list[Any] = []
    with serve(load("chat", n_ctx=96), backlog=8) as served:
        for i, emit in enumerate((lambda _: None, events.append)):
            request = GenerationRequest(chat_history(hello(i), {}), Sampling(), ignore_eos=True)
            served.scheduler.submit(make_task(request, served.scheduler.settings, emit))
        served.on_engine(lambda: None)
    assert isinstance(events[-1], Failed) and events[-1].error.code == 503
    assert events[-1].error.message == "the server is shutting down"


def test_a_shutdown_ends_answers_and_saves_them(load: Load, tmp_path: Path) -> None:
    with serve(load("chat", n_ctx=96), tmp_path) as served:
        with served.client.stream(
            "POST",
            "/v1/chat/completions",
            json={"messages": hello(), "stream": True, "grammar": "root ::= [a-z]+"} | ENDLESS,
        ) as answer:
            lines = answer.iter_lines()
            text = [json.loads(next(line for line in lines if line)[6:]) for _ in range(20)]
            served.scheduler.drain()
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        text += [json.loads(line[6:]) for line in rest[:-1]]
        said = "".join(c["choices"][0]["delta"].get("content") or "" for c in text)
    with serve(load("chat", n_ctx=96), tmp_path) as served:
        history = [*hello(), {"role": "assistant", "content": said}, *hello("back")]
        assert served.client.chat(history, max_tokens=1)["edge_stream"]["history"] == "continued"


def rubbish(url: str, seed: int) -> None:
    """One hostile client."""
    rng = random.Random(seed)
    parts = urlsplit(url)
    body = json.dumps({"messages": hello(seed), "stream": True, **ENDLESS}).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode()
    with socket.create_connection((parts.hostname, parts.port), timeout=30) as sock:
        kind = seed % 6
        try:
            if kind == 0:
                sock.sendall(rng.randbytes(rng.randrange(1, 3000)))
            elif kind == 1:
                sock.sendall((head + body)[: rng.randrange(len(head + body))])
            elif kind == 2:
                sock.sendall(head + rng.randbytes(len(body)))
            elif kind == 3:
                sock.sendall(head + body)  # and hang up
            elif kind == 4:
                sock.sendall(head + body)
                for _ in range(5):
                    sock.recv(1)
            else:
                sock.sendall(head.replace(b"POST", b"BREW") + body)
                sock.recv(100)
            if rng.random() < 0.5:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # reset, not close
        except OSError:
            pass


def test_hostile_clients_leave_nothing_behind(load: Load) -> None:
    with serve(load("chat", n_parallel=2, n_ctx=96), queue=1000) as served:
        reference = served.client.chat(hello("good"), seed=1, max_tokens=30)["choices"]

        def wait_closed() -> int:
            served.wait_idle()
            n = -1
            while n != (n := len(os.listdir("/proc/self/fd"))):
                time.sleep(0.2)
            return n

        before = wait_closed()
        with ThreadPoolExecutor(16) as pool:
            futures = [pool.submit(rubbish, served.url, i) for i in range(120)]
            for _ in range(3):
                answer = served.client.chat(hello("good"), seed=1, max_tokens=30)
                assert answer["choices"] == reference
            for future in futures:
                future.result()
        assert wait_closed() <= before + 2
        counts = served.scheduler.counts()
        assert counts["busy"] == counts["waiting"] == 0
        assert served.client.chat(hello("good"), seed=1, max_tokens=30)["choices"] == reference


@pytest.fixture
def impatient() -> Iterator[None]:
    """Half a second for headers."""
    from edge_stream.server.http.header_timeout import HeaderTimeoutProtocol

    before, HeaderTimeoutProtocol.header_seconds = HeaderTimeoutProtocol.header_seconds, 0.5
    yield
    HeaderTimeoutProtocol.header_seconds = before


def test_slow_senders_are_let_go(load: Load, impatient: None) -> None:
    with serve(load("chat", n_ctx=96), body_seconds=0.5) as served:
        parts = urlsplit(served.url)
        with socket.create_connection((parts.hostname, parts.port), timeout=10) as silent:
            assert silent.recv(10) == b""
        with socket.create_connection((parts.hostname, parts.port), timeout=10) as half:
            half.sendall(f"POST /tokenize HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Length: 50\r\n\r\n{{".encode())
            assert b"408" in half.recv(100)
