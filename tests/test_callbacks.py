"""What is raised in a callback of native code, Ctrl-C above all, is raised by the call, and nothing else is changed."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from edge_stream import Engine
from edge_stream.native.callbacks import Callbacks

Draw = Callable[..., list[int]]


@pytest.fixture(autouse=True)
def python_handles_ctrl_c() -> Iterator[None]:
    """A process that a shell starts in the background ignores SIGINT."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


def interrupt_at(monkeypatch: pytest.MonkeyPatch, engine: Engine, n: int) -> list[int]:
    """Ctrl-C between the n-th callback and the next one. Returns the count of callbacks, which grows."""
    count = [0]
    guard = engine.backend.callbacks.guard

    def counting(kind: Any, function: Callable[..., Any], failed: Any = 0) -> Any:
        def call(*arguments: Any) -> Any:
            count[0] += 1
            result = function(*arguments)
            if count[0] == n:
                os.kill(os.getpid(), signal.SIGINT)
            return result

        return guard(kind, call, failed)

    monkeypatch.setattr(engine.backend.callbacks, "guard", counting)
    return count


@pytest.mark.parametrize("method", ["score", "logits_of"])
def test_interrupted_rows_are_not_shifted(
    method: str, load: Callable[..., Engine], draw: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = draw(40)
    engine = load("gqa", n_ctx=64, n_batch=8)
    with engine.stream() as stream:
        expected = getattr(stream, method)(tokens)
        stream.reset()
        with monkeypatch.context() as patch:
            count = interrupt_at(patch, engine, 5)
            with pytest.raises(KeyboardInterrupt):
                getattr(stream, method)(tokens)
            assert count[0] == 5  # the next callback stopped the reading
        done = stream.stats.n_past
        assert done == 6  # what was reported, the one that stopped the call included
        got = getattr(stream, method)(tokens[done:])
    first = 1 if method == "score" else 0  # the logits before the first of these are gone with the interrupted decode
    assert np.allclose(got[first:], expected[done + first :], atol=1e-4)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_interrupted_decoder(load_mlc: Callable[..., Engine], draw: Draw, monkeypatch: pytest.MonkeyPatch) -> None:
    """TVM's decoder is called back for every chunk."""
    tokens = draw(40)
    engine = load_mlc("gqa", n_ctx=64, n_batch=8)
    with engine.stream() as stream:
        expected = stream.logits_of(tokens)
        stream.reset()
        calls = []
        decode = engine.backend.decoder.decode

        def interrupted(*arguments: Any) -> Any:
            calls.append(arguments)
            if len(calls) == 2:
                os.kill(os.getpid(), signal.SIGINT)
            return decode(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(engine.backend.decoder, "decode", interrupted)
            with pytest.raises(KeyboardInterrupt):
                stream.feed(tokens)
        assert len(calls) == 2
        done = stream.stats.n_past
        assert done == 4 + 8  # the sinks, and one chunk
        assert np.allclose(stream.logits_of(tokens[done:]), expected[done:], atol=1e-4)


def test_interrupt_while_loading(load: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    guard = Callbacks.guard

    def interrupting(self: Callbacks, kind: Any, function: Callable[..., Any], failed: Any = 0) -> Any:
        def call(*arguments: Any) -> Any:
            os.kill(os.getpid(), signal.SIGINT)
            return function(*arguments)

        return guard(self, kind, call, failed)

    with monkeypatch.context() as patch:
        patch.setattr(Callbacks, "guard", interrupting)
        with pytest.raises(KeyboardInterrupt):
            load("gqa", n_ctx=64)
    assert load("gqa", n_ctx=64).n_ctx == 64


def test_a_handler_that_does_not_raise_is_called_at_once(load: Callable[..., Engine], draw: Draw) -> None:
    """The commands' own handler takes a note: the call goes on."""
    pressed: list[int] = []
    engine = load("gqa", n_ctx=64, n_batch=8)
    previous = signal.signal(signal.SIGINT, lambda number, _frame: pressed.append(number))
    try:
        with engine.stream() as stream:
            seen: list[int] = []

            def see(i: int, _logits: object) -> None:
                seen.append(len(pressed))
                if i == 3:
                    os.kill(os.getpid(), signal.SIGINT)

            stream.feed_tokens(draw(20), see)
            assert stream.stats.n_past == 20
    finally:
        signal.signal(signal.SIGINT, previous)
    assert seen == [0] * 4 + [1] * 16


def test_an_error_in_a_callback_is_raised(load: Callable[..., Engine], draw: Draw) -> None:
    def fail(i: int, _logits: object) -> None:
        if i == 10:
            raise ZeroDivisionError("here")

    with load("gqa", n_ctx=64).stream() as stream:
        with pytest.raises(ZeroDivisionError, match="here"):
            stream.feed_tokens(draw(20), fail)
        assert stream.stats.n_past == 11
        stream.feed(draw(3))


def test_one_native_call_per_generated_token(load: Callable[..., Engine], draw: Draw) -> None:
    with load("chat", n_ctx=64).stream() as stream:
        stream.feed(draw(10))
        calls: list[Any] = []
        run = stream.backend.callbacks.run

        def counted(function: Any, *arguments: Any) -> Any:
            calls.append(function.__name__)
            return run(function, *arguments)

        writer = stream.writer(5, ignore_eos=True)
        stream.backend.callbacks.run = counted  # type: ignore[method-assign]
        records = []
        while not writer.finished:
            records.append(writer.next())
        assert calls == ["es_stream_next"] * 5
        assert [r.n_past for r in records] == [11, 12, 13, 14, 15]
        assert records[-1].n_cached == stream.stats.n_cached


def test_a_token_that_was_fed_is_yielded_before_ctrl_c(load: Callable[..., Engine], draw: Draw) -> None:
    """The text is never a token short of the stream."""
    engine = load("chat", n_ctx=64)
    with engine.stream() as stream:
        stream.feed(draw(10))
        run, seen = engine.backend.callbacks.run, []

        def interrupted(function: Any, *arguments: Any) -> Any:
            def call(*arguments: Any) -> Any:
                status = function(*arguments)
                if function.__name__ == "es_stream_next" and len(seen) == 2:
                    os.kill(os.getpid(), signal.SIGINT)
                return status

            return run(call, *arguments)

        engine.backend.callbacks.run = interrupted  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            seen.extend(token.token for token in stream.generate(10, ignore_eos=True))
        assert len(seen) == 3 and stream.tokens()[-3:] == seen and stream.stats.n_past == 13


def test_an_interrupt_goes_to_the_handler_of_its_time() -> None:
    """Also where the call fails: nothing is left for the next call."""
    callbacks, seen = Callbacks(), []

    def fail() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        raise ZeroDivisionError

    first = signal.signal(signal.SIGINT, lambda *_: seen.append("first"))
    with pytest.raises(ZeroDivisionError):
        callbacks.run(fail)
    signal.signal(signal.SIGINT, lambda *_: seen.append("second"))
    callbacks.deliver()
    assert callbacks.run(lambda: 7) == 7
    callbacks.deliver()
    signal.signal(signal.SIGINT, first)
    assert seen == ["first"]
