"""An engine whose model is a script: real streams and a real vocabulary, of a byte per token, over a decoder that
predicts the answers that a test wrote down."""

from __future__ import annotations

import atexit
import ctypes as C
import itertools
import math
import shutil
import tempfile
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from tiny_models import write_tiny_llama

from edge_stream.backends import Capabilities, LoadOptions, ModelFacts, loading
from edge_stream.engine import Engine
from edge_stream.generation import Token, Writer
from edge_stream.native import bindings
from edge_stream.native.callbacks import Callbacks
from edge_stream.stream import Stream
from edge_stream.vocabulary import Vocabulary

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
#: ChatML with thoughts, which only the answers after the last question keep.
THINKING = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and m.reasoning_content and loop.index0 > ns.last %}"
    "{{ '<think>\n' + m.reasoning_content|trim + '\n</think>\n\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
SPECIAL = ("<|im_start|>", "<|im_end|>")
_N_VOCAB = 259 + len(SPECIAL) + 1  # and a space


@lru_cache
def _folder() -> Path:
    path = Path(tempfile.mkdtemp(prefix="edge-stream-fake-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


@lru_cache
def vocabulary(chat_template: str | None, add_bos: bool) -> Vocabulary:
    """A byte per token, and ChatML's tokens. The model behind it is kept for other tests."""
    import gguf

    llama = loading.start(False)
    path = _folder() / f"{abs(hash((chat_template, add_bos)))}.gguf"
    options = {"n_vocab": _N_VOCAB, "special_tokens": SPECIAL, "chat_template": chat_template}
    write_tiny_llama(path, n_layer=1, n_head=1, n_head_kv=1, head_dim=16, **options)  # type: ignore[arg-type]
    if not add_bos:
        reader = gguf.GGUFReader(path, "r+")
        reader.fields["tokenizer.ggml.add_bos_token"].parts[-1][0] = False
        del reader
    params = llama.llama_model_default_params()
    params.vocab_only = True
    model = loading.load_model(path, params, Callbacks())
    assert model
    return Vocabulary(model)


class FakeBackend:
    """See backends.Backend. The decoder keeps nothing: what it predicts is the engine's script."""

    capabilities = Capabilities("the fake", 1, ("f16",), ("auto",), ("auto",), ("stream",), False, False, False)
    sink_move, n_spare, n_threads, state_bytes, kv_bytes_per_token = "none", 0, 1, 0, 1024
    devices: list[Any] = []  # noqa: RUF012

    def __init__(self, engine: FakeEngine) -> None:
        self.path, self.callbacks, self._engine = Path(__file__), Callbacks(), engine
        self.options = LoadOptions(n_batch=64, n_ubatch=64)
        self.facts = ModelFacts("fake", "llama", {}, 8192, 1, self.path.stat().st_size, 1, 1, False, 1)

    @property
    def vocabulary(self) -> Vocabulary:
        """Of the engine's template."""
        return vocabulary(THINKING if self._engine.n_thinking else self._engine.chat_template, self._engine.wants_bos)

    def init_stream(self, params: bindings.StreamParams) -> C.c_void_p:
        """See Backend."""
        handle, kept = C.c_void_p(), np.zeros(0, np.float32)

        def decode(_user: object, step: Any) -> int:
            nonlocal kept
            s = step.contents
            kept = self._engine.predict(s.n_tokens, s.all_logits)
            return int(kept.ctypes.data)

        def state_set(_user: object, _step: Any, _data: int, size: int) -> bool:
            return size == 8

        self._functions = tuple(
            self.callbacks.guard(kind, function)
            for kind, function in (
                (bindings.DecodeFunction, decode),
                (bindings.RebaseFunction, lambda *_: True),
                (bindings.StateSizeFunction, lambda *_: 8),
                (bindings.StateGetFunction, lambda *_: True),
                (bindings.StateSetFunction, state_set),
            )
        )
        decoder = bindings.Decoder(None, self._engine.n_ctx, 64, *self._functions)
        lib = bindings.library()
        bindings.check(lib.es_stream_init_decoder(self.vocabulary.model, decoder, params, C.byref(handle)))
        return handle

    def cache_bytes(self, n_cells: int) -> tuple[int, int]:
        """See Backend."""
        return n_cells * self.kv_bytes_per_token, 0

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def close(self) -> None:
        """The vocabulary stays."""


class FakeStream(Stream):
    """A stream that remembers how it was made, and what it held when it was closed."""

    engine: FakeEngine
    n_keep: int
    n_boundary: int
    _left: tuple[list[int], Any] | None = None

    @property
    def closed(self) -> bool:
        return self._left is not None

    @property
    def all(self) -> list[int]:
        """The tokens of the cache."""
        return self._left[0] if self._left else self.tokens()

    @property
    def n_past(self) -> int:
        return int((self._left[1] if self._left else self.stats).n_past)

    @property
    def text(self) -> str:
        """The same, control tokens spelled out."""
        return b"".join(self.engine.token_to_piece(t, special=True) for t in self.all).decode(errors="replace")

    def writer(self, *arguments: Any, **options: Any) -> Writer:
        made = super().writer(*arguments, **options)
        if not made.finished:
            self.engine.samplings.append(options.get("sampling"))
            self.engine.begin(self, options.get("ignore_eos", False))
        counts, step = itertools.count(1), made.next

        def following() -> Token:
            token = step()
            if self.engine.on_token:
                self.engine.on_token(next(counts))
            return token

        made.next = following  # type: ignore[method-assign]
        return made

    def score(self, tokens: Sequence[int], *, chunk: int | None = None) -> Any:
        self.feed(tokens)
        return np.full(len(tokens), math.log(2.0 if self.n_keep else 4.0))

    def close(self) -> None:
        if not self.closed:
            self._left = self.tokens(), self.stats
            super().close()


class FakeEngine(Engine):
    """What the layers above need of an Engine.

    answers: what the model is to say, an answer each; <|im_end|> follows. n_thinking: characters of every answer that
    are thoughts. on_token(n) is called after the n-th token of an answer. streams: all that were made.
    """

    n_ctx, n_keep, n_ctx_train, sink_move = 4096, 4, 8192, "none"  # type: ignore[assignment]
    desc, architecture, is_recurrent, state_bytes = "fake", "llama", False, 0  # type: ignore[assignment]
    chat_template: str | None = CHATML  # type: ignore[assignment]

    def __init__(self, n_ctx: int = 4096, chat_template: str | None = CHATML) -> None:
        super().__init__(FakeBackend(self))  # type: ignore[arg-type]
        self.n_ctx, self.chat_template = n_ctx, chat_template
        self.wants_bos, self.n_thinking = False, 0
        self.answers: list[str] = []
        self.samplings: list[Any] = []
        self.streams: list[FakeStream] = []
        self.on_token: Callable[[int], None] | None = None
        self.closed = False
        self._script: list[int] = []
        self._at: int | None = None  # in the script; None: reading
        self._ignore_eos = False
        self._predicted = -1

    def stream(self, **options: Any) -> FakeStream:
        made = super().stream(**options)
        made.__class__ = FakeStream
        assert isinstance(made, FakeStream)
        made.engine, made.n_boundary = self, options.get("n_boundary", 0)
        made.n_keep = made.stats.n_keep
        self.streams.append(made)
        return made

    def script_of(self, answer: str) -> list[int]:
        if self.n_thinking:
            answer = f"<think>\n{answer[: self.n_thinking]}\n</think>\n\n{answer[self.n_thinking :]}"
        return [*self.tokenize(answer, special=True), *self.tokenize("<|im_end|>", special=True)]

    def begin(self, stream: FakeStream, ignore_eos: bool) -> None:
        """The next answer begins: its first token must be what is predicted now."""
        self._script, self._at, self._ignore_eos = self.script_of(self.answers.pop(0)), 0, ignore_eos
        if self._predicted != self._script[0]:
            self._at = -1
            last = stream.tokens()[-1:]
            stream.rewind(1)
            stream.feed_tokens(last)

    def predict(self, n_tokens: int, all_logits: bool) -> np.ndarray[Any, np.dtype[np.float32]]:
        """The logits after a step."""
        if self._at is not None and n_tokens == 1 and (self._ignore_eos or self._at < len(self._script) - 1):
            self._at += 1
            token = self._script[self._at % len(self._script)]
        else:
            self._at = None
            token = self.script_of(self.answers[0])[0] if self.answers else self.eos
        self._predicted = token
        logits = np.zeros((n_tokens if all_logits else 1, _N_VOCAB), np.float32)
        logits[:, ord(" ") + 3] = 50.0
        logits[:, token] = 100.0
        return logits

    def close(self) -> None:
        for stream in self.streams:
            stream.close()
        self.closed = True

    def __exit__(self, *_: object) -> None:
        self.close()
