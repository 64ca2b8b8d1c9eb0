"""An engine without a model: one token per character, scripted answers, and the cache rules of a stream."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from edge_stream.chat.templates import CHATML
from edge_stream.errors import EdgeStreamError, SessionError
from edge_stream.generation import Token
from edge_stream.sampling import Sampling
from edge_stream.text import StopMatcher

SPECIAL = {"<s>": 0x200000, "<|im_start|>": 0x200001, "<|im_end|>": 0x200002, "</s>": 0x200003}
BOS, END, EOS = SPECIAL["<s>"], SPECIAL["<|im_end|>"], SPECIAL["</s>"]


class FakeStream:
    """Tokens in a list; keeps the first n_keep and the newest that fit."""

    def __init__(self, engine: FakeEngine, n_keep: int, n_boundary: int) -> None:
        self.engine, self.n_keep, self.n_boundary = engine, n_keep, n_boundary
        self.user = b""
        self.closed = False
        self.reset()

    def reset(self) -> None:
        self.all: list[int] = []
        self.has_logits = False
        self.cached = 0
        self.n_slides = 0
        self.marks: list[int] = []

    def feed(
        self,
        text: str | Sequence[int],
        *,
        special: bool = False,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> int:
        assert not self.closed
        if isinstance(text, str):
            text = self.engine.tokenize(text, add_bos=not self.all and self.engine.add_bos, special=special)
        if not text:
            raise EdgeStreamError("there is no text to feed: the prompt is empty")
        self.has_logits = True
        step = len(text) if on_progress is None else 16
        for start in range(0, len(text), step):
            part = list(text[start : start + step])
            self.all += part
            self.cached += len(part)
            if self.cached > self.engine.n_ctx:
                self.cached = self.engine.n_ctx
                self.n_slides += 1
            if on_progress is not None:
                on_progress(min(start + step, len(text)), len(text))
        return len(text)

    def generate(
        self,
        max_tokens: int = -1,
        *,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        logprobs: bool = False,
        ignore_eos: bool = False,
        special: bool = False,
        loop_guard: bool = False,
    ) -> Iterator[Token]:
        self.engine.samplings.append(sampling)
        answer = self.engine.answers.pop(0)
        script = [ord(c) for c in answer] + [END]
        matcher = StopMatcher(stop)
        n = 0
        while max_tokens < 0 or n < max_tokens:
            assert self.has_logits, "nothing was fed since a rewind or reset"
            token = script[n % len(script)] if ignore_eos else script[n]
            if ignore_eos and token == END:
                token = ord(" ")
            self.feed([token])
            n += 1
            if self.engine.on_token:
                self.engine.on_token(n)
            eos = token == END
            shown, stopped = matcher.push("" if eos else chr(token))
            finish = "stop" if stopped else "eos" if eos else "length" if n == max_tokens else None
            yield Token(
                shown, token, None, finish, len(self.all), self.cached, 100.0, reasoning=n <= self.engine.n_thinking
            )
            if finish:
                return

    def score(self, tokens: Sequence[int], *, chunk: int | None = None) -> Any:
        self.feed(tokens)
        return np.full(len(tokens), math.log(2.0 if self.n_keep else 4.0))

    def mark(self) -> None:
        self.marks.append(len(self.all))

    def rewind(self, n: int) -> None:
        if n > self.cached - min(self.n_keep, self.cached):
            raise EdgeStreamError("cannot rewind past the window")
        self.has_logits = False
        del self.all[len(self.all) - n :]
        self.cached -= n

    def rebase(self) -> None:
        """Positions here are only counted."""

    @property
    def logits(self) -> list[float] | None:
        """What generate goes by."""
        return [0.0] if self.has_logits else None

    def tokens(self) -> list[int]:
        sinks = min(self.n_keep, self.cached)
        return self.all[:sinks] + self.all[len(self.all) - (self.cached - sinks) :]

    def save(self, path: str, user: bytes = b"") -> None:
        state = {"all": self.all, "cached": self.cached, "n_keep": self.n_keep, "user": user.decode()}
        Path(path).write_text(json.dumps(state))

    @property
    def stats(self) -> SimpleNamespace:
        sinks = min(self.n_keep, self.cached)
        return SimpleNamespace(
            n_past=len(self.all), n_cached=self.cached, n_evicted=len(self.all) - self.cached,
            n_slides=self.n_slides, n_rebases=0, n_ctx=self.engine.n_ctx, n_keep=self.n_keep, n_sinks=sinks,
            n_window=self.cached - sinks, t_slide_us=0, t_decode_us=0, sink_move=self.engine.sink_move,
        )  # fmt: skip

    def close(self) -> None:
        self.closed = True

    def __enter__(self) -> FakeStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def text(self) -> str:
        """Everything it was fed, control tokens spelled out."""
        return "".join(self.engine.token_to_piece(t, special=True).decode() for t in self.all)


class FakeEngine:
    """What the layers above need of an Engine."""

    loads: list[dict[str, Any]]

    def __init__(self, n_ctx: int = 4096, chat_template: str | None = CHATML) -> None:
        self.n_ctx, self.chat_template = n_ctx, chat_template
        self.n_keep, self.sink_move, self.desc, self.architecture = 4, "bank", "fake", "llama"
        self.is_recurrent, self.state_bytes, self.proof = False, 0, None
        self.bos, self.eos, self.add_bos, self.n_ctx_train = BOS, EOS, False, 8192
        self.n_vocab, self.kv_bytes_per_token, self.model_path = 0x200004, 1024, Path(__file__)
        self.n_bytes = self.model_path.stat().st_size
        self.metadata: dict[str, str] = {}
        self.devices: list[Any] = []
        self.answers: list[str] = []
        self.samplings: list[Any] = []
        self.streams: list[FakeStream] = []
        self.on_token: Callable[[int], None] | None = None
        self.closed = False
        self.n_thinking = 0  # tokens of every answer that are thoughts

    def cache_bytes(self, n_cells: int) -> tuple[int, int]:
        return n_cells * self.kv_bytes_per_token, 0

    def tokenize(self, text: str, *, add_bos: bool = False, special: bool = False) -> list[int]:
        tokens = [BOS] if add_bos else []
        while text:
            name = next((s for s in SPECIAL if special and text.startswith(s)), None)
            tokens.append(SPECIAL[name] if name else ord(text[0]))
            text = text[len(name) if name else 1 :]
        return tokens

    def token_to_piece(self, token: int, special: bool = False) -> bytes:
        for name, number in SPECIAL.items():
            if token == number:
                return name.encode() if special else b""
        return chr(token).encode()

    def is_eog(self, token: int) -> bool:
        return token in (END, EOS)

    def stream(self, *, n_keep: int | None = None, n_boundary: int = 0) -> FakeStream:
        self.streams.append(FakeStream(self, self.n_keep if n_keep is None else n_keep, n_boundary))
        return self.streams[-1]

    def restore(self, path: str) -> FakeStream:
        try:
            state = json.loads(Path(path).read_text())
        except (ValueError, OSError) as error:
            raise SessionError(f"{path} is not a session file") from error
        stream = self.stream(n_keep=state["n_keep"])
        stream.all, stream.cached, stream.user = state["all"], state["cached"], state["user"].encode()
        stream.has_logits = bool(stream.all)  # a session holds them
        return stream

    def close(self) -> None:
        self.closed = True

    def __enter__(self) -> FakeEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
