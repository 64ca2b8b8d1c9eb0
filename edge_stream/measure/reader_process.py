"""Readers in processes of their own: memory is that of one mode alone, and modes can take turns."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_stream.errors import EdgeStreamError
from edge_stream.measure.metrics import resident_mib

BLOCK = 16  # tokens that a process decodes before it is the next one's turn
FILL = 2048  # tokens between two calls of progress


class _Service:
    """The methods that the process offers. Tokens are random, of a fixed seed, where none are given."""

    def __init__(self, model: str, mode: str, n_ctx: int, n_keep: int, settings: dict[str, Any]) -> None:
        from edge_stream.measure.modes import open_reader

        start = time.perf_counter_ns()
        self.reader = open_reader(model, mode, n_ctx, n_keep, **settings)
        self._load_ms = (time.perf_counter_ns() - start) / 1e6
        self._random = np.random.default_rng(0)

    def facts(self) -> dict[str, Any]:
        """Facts of the model, and the time its load took."""
        engine = self.reader.engine
        return {
            "load_ms": self._load_ms,
            "model_filename": str(engine.model_path),
            "model_type": engine.desc,
            "model_size": engine.n_bytes,
            "kv_bytes_per_token": engine.kv_bytes_per_token,
            "model_n_params": engine.backend.facts.n_params,
            "n_ctx_train": engine.n_ctx_train,
            "n_threads": engine.backend.n_threads,
            "sink_move": engine.sink_move,
            "bos": engine.bos if engine.add_bos else -1,
            "n_vocab": engine.n_vocab,
        }

    def reset(self) -> None:
        """Begin a new text."""
        self.reader.reset()

    def fill(self, n: int) -> int:
        """Read n tokens; the tokens read so far."""
        self.reader.feed(self._draw(n))
        return self.reader.n_past

    def place(self, depth: int) -> None:
        """See Reader.place."""
        self.reader.place(depth)

    def prompt(self, n: int) -> int:
        """Read n tokens; the nanoseconds it took."""
        tokens = self._draw(n)
        start = time.perf_counter_ns()
        self.reader.feed(tokens)
        self.reader.synchronize()
        return time.perf_counter_ns() - start

    def generate(self, n: int, repeat: bool = False) -> tuple[list[int], float]:
        """Decode n tokens one by one: nanoseconds of each, and the mean number of tokens in the cache.

        repeat: take each token back, so that the cache is equally full for all.
        """
        times: list[int] = []
        fill = 0
        reader = self.reader
        for token in self._draw(n):
            start = time.perf_counter_ns()
            reader.feed((token,))
            reader.synchronize()
            times.append(time.perf_counter_ns() - start)
            fill += reader.n_cached
            if repeat:
                reader.forget(1)
        return times, fill / n

    def forget(self, n: int) -> None:
        """Take n tokens back."""
        self.reader.forget(n)

    def score(self, tokens: list[int], chunk: int) -> Any:
        """Read tokens; their NLL in nats, [n] float64."""
        return self.reader.score(tokens, chunk)

    def feed(self, tokens: list[int]) -> None:
        """Read tokens."""
        self.reader.feed(tokens)

    def score_next(self, token: int) -> float:
        """NLL of the token that would come next; it is not read."""
        return self.reader.score_next(token)

    def answer(self, tokens: list[int], answer: list[int]) -> bool:
        """Read tokens and the answer; whether greedy decoding would have given that answer."""
        self.reader.feed(tokens)
        right = True
        for token in answer:
            logits = self.reader.logits
            assert logits is not None
            right = right and int(logits.argmax()) == token
            self.reader.feed((token,))
        return right

    def reply(self, text: str, n_max: int) -> str:
        """Read a text and generate a line of at most n_max tokens greedily, which stays in the stream."""
        reader, engine = self.reader, self.reader.engine
        reader.feed(engine.tokenize(text, add_bos=reader.n_past == 0 and engine.add_bos))
        reply = b""
        for _ in range(n_max):
            logits = reader.logits
            assert logits is not None
            token = int(logits.argmax())
            piece = engine.token_to_piece(token)
            if engine.is_eog(token) or b"\n" in piece:
                reply += piece.split(b"\n")[0]
                break
            reply += piece
            reader.feed((token,))
        reader.feed(engine.tokenize("\n\n"))
        return reply.decode(errors="replace")

    def depth(self) -> int:
        """Tokens read so far."""
        return self.reader.n_past

    def rss(self) -> float | None:
        """Resident memory in MiB."""
        return resident_mib()

    def counters(self) -> dict[str, int]:
        """See Reader.counters."""
        return self.reader.counters

    def _draw(self, n: int) -> list[int]:
        return [int(t) for t in self._random.integers(0, self.reader.engine.n_vocab, n)]


def _serve(connection: Any, args: tuple[Any, ...]) -> None:
    """The process's loop: answers (method, arguments) with (True, result) or (False, sentence)."""
    try:
        service = _Service(*args)
    except Exception as error:
        with suppress(OSError):
            connection.send((False, _sentence(error)))
        return
    with suppress(OSError):
        connection.send((True, service.facts()))
    with suppress(EOFError, OSError):  # the parent has gone
        while True:
            method, values = connection.recv()
            try:
                answer = (True, getattr(service, method)(*values))
            except Exception as error:
                answer = (False, _sentence(error))
            connection.send(answer)
    service.reader.close()


def _sentence(error: Exception) -> str:
    return str(error) if isinstance(error, EdgeStreamError) else f"{type(error).__name__}: {error}"


class ReaderProcess:
    """A reader in a process of its own. facts: see _Service.facts. Raises EdgeStreamError for what fails there."""

    def __init__(self, model: str, mode: str, n_ctx: int, n_keep: int, settings: dict[str, Any]) -> None:
        self.mode, self.n_ctx = mode, n_ctx
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        args = (model, mode, n_ctx, n_keep, settings)
        self._process = context.Process(target=_serve, args=(theirs, args), daemon=True)
        # Ctrl-C is the parent's: the child, which inherits this, never sees it, not even while it starts
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
        try:
            self.facts: dict[str, Any] = self._receive()
        except BaseException:
            self.close()
            raise

    def call(self, method: str, *values: Any) -> Any:
        """Call a method of _Service in the process."""
        self._connection.send((method, values))
        return self._receive()

    def read(self, depth: int, progress: Callable[[int], None] = lambda _at: None) -> None:
        """Read random tokens up to a depth, from an empty cache."""
        at = 0
        while at < depth:
            at = self.call("fill", min(FILL, depth - at))
            progress(at)

    def _receive(self) -> Any:
        try:
            good, answer = self._connection.recv()
        except EOFError:
            self._process.join(5)
            raise EdgeStreamError(
                f"the process that measured mode {self.mode} ended (status {self._process.exitcode}): out of memory?"
            ) from None
        if not good:
            raise EdgeStreamError(str(answer))
        return answer

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.join(2)
        if self._process.is_alive():
            self._process.kill()

    def __enter__(self) -> ReaderProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def close_all(processes: Iterable[ReaderProcess]) -> None:
    """End all of them."""
    for process in processes:
        process.close()


def in_turns(processes: Sequence[ReaderProcess], n: int) -> list[NDArray[np.float64]]:
    """Milliseconds of n tokens that each process decodes one by one, [n], in turns of BLOCK tokens."""
    times: list[list[int]] = [[] for _ in processes]
    for left in range(n, 0, -BLOCK):
        for process, own in zip(processes, times, strict=True):
            own += process.call("generate", min(BLOCK, left))[0]
    return [np.array(own) / 1e6 for own in times]
