"""One reader per process, so that memory is that of one mode alone, and modes can take turns."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_stream.errors import EdgeStreamError
from edge_stream.metrics import resident_mib

BLOCK = 16  # tokens that a worker decodes before the next one has its turn
FILL = 2048  # tokens between two signs of life while a depth is reached


class ReaderHost:
    """What the process can be asked to do. Tokens are random, drawn from a fixed seed, as llama-bench's are."""

    def __init__(self, model: str, mode: str, n_ctx: int, n_keep: int, settings: dict[str, Any]) -> None:
        from edge_stream.measure.modes import open_reader

        start = time.perf_counter_ns()
        self.reader = open_reader(model, mode, n_ctx, n_keep, **settings)
        self._load_ms = (time.perf_counter_ns() - start) / 1e6
        self._random = np.random.default_rng(0)

    def facts(self) -> dict[str, Any]:
        """About the model, and how long it took to load."""
        engine = self.reader.engine
        return {
            "load_ms": self._load_ms,
            "model_filename": str(engine.model_path),
            "model_type": engine.desc,
            "model_size": engine.n_bytes,
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
        """Read n tokens, timed by nobody. Returns the depth."""
        self.reader.feed(self._draw(n))
        return self.reader.n_past

    def place(self, depth: int) -> None:
        """Count as if depth tokens had been read (Reader.place)."""
        self.reader.place(depth)

    def prompt(self, n: int) -> int:
        """Read n tokens; nanoseconds."""
        tokens = self._draw(n)
        start = time.perf_counter_ns()
        self.reader.feed(tokens)
        self.reader.synchronize()
        return time.perf_counter_ns() - start

    def generate(self, n: int, hold: bool = False) -> tuple[list[int], float]:
        """Decode n tokens one by one: nanoseconds of each, and the mean number of tokens in the cache.

        hold: each token is taken back after it was timed, so that the cache is as full for the last as for the first.
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
            if hold:
                reader.forget(1)
        return times, fill / n

    def forget(self, n: int) -> None:
        """Take n tokens back."""
        self.reader.forget(n)

    def score(self, tokens: list[int], chunk: int) -> Any:
        """NLL of tokens, [n] float64."""
        return self.reader.score(tokens, chunk)

    def feed(self, tokens: list[int]) -> None:
        """Read given tokens."""
        self.reader.feed(tokens)

    def score_next(self, token: int) -> float:
        """NLL of a token that is not read, after feed."""
        return self.reader.score_next(token)

    def answer(self, tokens: list[int], answer: list[int]) -> bool:
        """Read tokens, then the answer: whether greedy decoding would have given exactly it."""
        self.reader.feed(tokens)
        right = True
        for token in answer:
            logits = self.reader.logits
            assert logits is not None
            right = right and int(logits.argmax()) == token
            self.reader.feed((token,))
        return right

    def reply(self, text: str, most: int) -> str:
        """Read a text and answer greedily with one line of at most `most` tokens, which stays in the stream."""
        reader, engine = self.reader, self.reader.engine
        reader.feed(engine.tokenize(text, add_bos=reader.n_past == 0 and engine.add_bos))
        said = b""
        for _ in range(most):
            logits = reader.logits
            assert logits is not None
            token = int(logits.argmax())
            piece = engine.token_to_piece(token)
            if engine.is_eog(token) or b"\n" in piece:
                said += piece.split(b"\n")[0]
                break
            said += piece
            reader.feed((token,))
        reader.feed(engine.tokenize("\n\n"))
        return said.decode(errors="replace")

    def depth(self) -> int:
        """Tokens read since the text began."""
        return self.reader.n_past

    def rss(self) -> float | None:
        """Resident memory of this process in MiB."""
        return resident_mib()

    def counters(self) -> dict[str, int]:
        """See Reader.counters."""
        return self.reader.counters

    def _draw(self, n: int) -> list[int]:
        return [int(t) for t in self._random.integers(0, self.reader.engine.n_vocab, n)]


def _serve(connection: Any, args: tuple[Any, ...]) -> None:
    """The process: answers (True, result) or (False, sentence)."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    try:
        host = ReaderHost(*args)
        connection.send((True, host.facts()))
    except Exception as error:
        connection.send((False, _sentence(error)))
        return
    while True:
        try:
            method, values = connection.recv()
        except EOFError:
            break
        try:
            connection.send((True, getattr(host, method)(*values)))
        except Exception as error:
            connection.send((False, _sentence(error)))
    host.reader.close()


def _sentence(error: Exception) -> str:
    return str(error) if isinstance(error, EdgeStreamError) else f"{type(error).__name__}: {error}"


class Worker:
    """A ReaderHost in a process of its own. Raises EdgeStreamError for what went wrong there."""

    def __init__(self, model: str, mode: str, n_ctx: int, n_keep: int, settings: dict[str, Any]) -> None:
        self.mode, self.n_ctx = mode, n_ctx
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        args = (model, mode, n_ctx, n_keep, settings)
        self._process = context.Process(target=_serve, args=(theirs, args), daemon=True)
        self._process.start()
        theirs.close()
        try:
            self.facts: dict[str, Any] = self._receive()
        except BaseException:
            self.close()
            raise

    def call(self, method: str, *values: Any) -> Any:
        """Ask, and wait for the answer."""
        self._connection.send((method, values))
        return self._receive()

    def read(self, depth: int, progress: Callable[[int], None] = lambda _at: None) -> None:
        """Read random tokens up to a depth of a text that was just begun."""
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
                f"the process that measured mode {self.mode} ended (status {self._process.exitcode}): "
                "perhaps memory ran out"
            ) from None
        if not good:
            raise EdgeStreamError(str(answer))
        return answer

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def close_all(workers: Iterable[Worker]) -> None:
    """End all of them."""
    for worker in workers:
        worker.close()


def in_turns(workers: Sequence[Worker], n: int) -> list[NDArray[np.float64]]:
    """Milliseconds of n tokens decoded one by one by each worker, [n], in turns of BLOCK tokens."""
    times: list[list[int]] = [[] for _ in workers]
    for left in range(n, 0, -BLOCK):
        for worker, own in zip(workers, times, strict=True):
            own += worker.call("generate", min(BLOCK, left))[0]
    return [np.array(own) / 1e6 for own in times]
