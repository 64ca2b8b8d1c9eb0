"""Stream: one unbounded token sequence. The engine is a generator: one small record per generated token."""

from __future__ import annotations

import ctypes as C
import json
import operator
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_stream import _libs, _native
from edge_stream.errors import EdgeStreamError
from edge_stream.text import StopMatcher, Utf8Assembler

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edge_stream.engine import Engine

_RANDOM_SEED = 0xFFFFFFFF  # LLAMA_DEFAULT_SEED


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; names, order and defaults are llama.cpp's. temp <= 0 is greedy; seed -1 draws one."""

    seed: int = -1
    temp: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    grammar: str | None = None
    json_schema: str | Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Token:
    """One generated token.

    text: what can be shown now, whole UTF-8 characters only (may be empty). logprob: natural log of the model's own
    probability, if asked for. finish_reason: None, or on the last record `stop` (a stop string), `eos`, `length`.
    n_past: tokens seen since the stream's start. n_cached: tokens in the cache. tok_per_s: speed since the
    generation began.
    """

    text: str
    token: int
    logprob: float | None
    finish_reason: str | None
    n_past: int
    n_cached: int
    tok_per_s: float


@dataclass(frozen=True)
class StreamStats:
    """Facts about a stream: see es_stream_stats in edge_stream.h. Times are microseconds."""

    n_past: int
    n_cached: int
    n_evicted: int
    n_slides: int
    n_rebases: int
    n_ctx: int
    n_keep: int
    n_sinks: int
    n_window: int
    n_chunk: int
    n_slide: int
    pos_next: int
    pos_sinks: int
    t_slide_us: int
    t_rebase_us: int
    t_decode_us: int
    sink_move: str


class Stream:
    """A token stream of any length over an engine's cache. Made by `Engine.stream` or `Engine.restore`."""

    def __init__(self, engine: Engine, params: _native.StreamParams) -> None:
        self.engine = engine
        self.seq_id = int(params.seq_id)
        self.user = b""
        self._native = _native.library()
        self._handle = C.c_void_p()
        self._sampler = C.c_void_p()
        self._sampling: tuple[Sampling, bool] | None = None
        engine._init_stream(params, C.byref(self._handle))

    #
    # reading
    #

    def feed(
        self,
        text: str | Sequence[int],
        *,
        special: bool = False,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> int:
        """Read a text or tokens of any length; returns the number of tokens.

        A text at the stream's start gets BOS where the model wants it. special: see Engine.tokenize.
        on_progress(done, total) is called as tokens are decoded. Raises EdgeStreamError if there is nothing to feed.
        """
        if isinstance(text, str):
            add_bos = self.stats.n_past == 0 and self.engine.add_bos
            tokens: Sequence[int] = self.engine.tokenize(text, add_bos=add_bos, special=special)
        else:
            tokens = text
        if len(tokens) == 0:
            raise EdgeStreamError("there is no text to feed: the prompt is empty")
        step = len(tokens) if on_progress is None else max(64, self.stats.n_chunk)
        for start in range(0, len(tokens), step):
            self._feed(tokens[start : start + step])
            if on_progress is not None:
                on_progress(min(start + step, len(tokens)), len(tokens))
        return len(tokens)

    def _feed(self, tokens: Sequence[int], callback: Any = None) -> None:
        array = token_array(tokens)
        function = _native.NO_CALLBACK if callback is None else callback
        self.engine._check(self._native.es_stream_feed(self._handle, array, len(array), function, None))

    def logits_of(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Feed tokens and return [n_tokens, n_vocab] float32: row i predicts what follows token i."""
        import numpy as np

        n_vocab = self.engine.n_vocab
        out = np.empty((len(tokens), n_vocab), dtype=np.float32)
        row = iter(range(len(tokens)))

        def keep(_user: object, _index: int, logits: Any) -> bool:
            out[next(row)] = np.ctypeslib.as_array(logits, shape=(n_vocab,))
            return True

        self._feed(tokens, _native.LogitsCallback(keep))
        return out

    def score(self, tokens: Sequence[int], *, chunk: int | None = None) -> NDArray[np.float64]:
        """Feed tokens and return their negative log-likelihoods in nats, [n_tokens] float64.

        Item i is the NLL of tokens[i] given the stream before it; item 0 is NaN if the stream was empty.
        chunk: most tokens decoded at once (1: eviction token by token, as published); None: the stream's own.
        """
        import numpy as np

        n_vocab = self.engine.n_vocab
        out = np.full(len(tokens), np.nan)
        last = self.logits
        if last is not None and len(tokens):
            out[0] = _nll(last.astype(np.float64), tokens[0])
        done = 0

        def keep(_user: object, _index: int, logits: Any) -> bool:
            nonlocal done
            done += 1
            if done < len(tokens):
                out[done] = _nll(np.ctypeslib.as_array(logits, shape=(n_vocab,)).astype(np.float64), tokens[done])
            return True

        callback = _native.LogitsCallback(keep)
        step = chunk or len(tokens) or 1
        for start in range(0, len(tokens), step):
            self._feed(tokens[start : start + step], callback)
        return out

    @property
    def logits(self) -> NDArray[np.float32] | None:
        """A copy of the logits that predict the next token, [n_vocab] float32; None before the first feed."""
        import numpy as np

        pointer = self._native.es_stream_logits(self._handle)
        return np.ctypeslib.as_array(pointer, shape=(self.engine.n_vocab,)).copy() if pointer else None

    #
    # writing
    #

    def generate(
        self,
        max_tokens: int = -1,
        *,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        logprobs: bool = False,
        ignore_eos: bool = False,
    ) -> Iterator[Token]:
        """Generate tokens (-1: for ever), each fed back before its record is yielded.

        Ends at max_tokens, at a stop string (which is not part of the text), or at an end-of-generation token
        unless ignore_eos. The same Sampling object continues its random sequence from call to call.
        """
        writer = self.writer(max_tokens, sampling=sampling, stop=stop, logprobs=logprobs, ignore_eos=ignore_eos)
        while not writer.finished:
            token = writer.choose()
            self._feed((token,))
            yield writer.record()

    def writer(
        self,
        max_tokens: int = -1,
        *,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        logprobs: bool = False,
        ignore_eos: bool = False,
        special: bool = False,
    ) -> Writer:
        """The steps of `generate` one by one, for whoever feeds the tokens (see Engine.feed_each).

        special: control tokens that do not end the text are part of it (`[TOOL_CALLS]`, say).
        """
        self._use_sampling(sampling or Sampling(), ignore_eos)
        return Writer(self, max_tokens, StopMatcher(stop), logprobs, ignore_eos, special)

    def forget_sampling(self) -> None:
        """The next generation draws from the start of its seed, and a session saved now holds no sampler."""
        self._free_sampler()
        self._sampling = None

    def _use_sampling(self, sampling: Sampling, ignore_eos: bool) -> None:
        """Make the sampler, unless the last generation's goes on. A grammar always starts anew."""
        wanted = (sampling, ignore_eos)
        if self._sampler and wanted == self._sampling and not (sampling.grammar or sampling.json_schema):
            return
        self._free_sampler()
        self._sampler = _make_sampler(self.engine, sampling, ignore_eos)
        self._sampling = wanted
        if not self._native.es_sampler_restore(self._sampler, self._handle):
            for token in self.tokens()[-sampling.repeat_last_n :] if sampling.repeat_last_n > 0 else ():
                _native.check(self._native.es_sampler_accept(self._sampler, token))

    def _free_sampler(self) -> None:
        self._native.es_sampler_free(self._sampler)
        self._sampler = C.c_void_p()

    #
    # positions
    #

    @property
    def stats(self) -> StreamStats:
        """Positions, counters and times."""
        raw = _native.StreamStats()
        _native.check(self._native.es_stream_get_stats(self._handle, C.byref(raw)))
        values = {name: getattr(raw, name) for name, *_ in raw._fields_}
        values["sink_move"] = _native.SINK_MOVE_NAMES[raw.sink_move]
        return StreamStats(n_cached=raw.n_sinks + raw.n_window, **values)

    def tokens(self) -> list[int]:
        """The tokens in the cache: sinks, then window."""
        n = self._native.es_stream_tokens(self._handle, None, 0)
        buffer = (C.c_int32 * max(1, n))()
        self._native.es_stream_tokens(self._handle, buffer, n)
        return list(buffer[:n])

    def mark(self) -> None:
        """Mark a boundary before the next token: evictions prefer to end there (see Engine.stream, n_boundary)."""
        _native.check(self._native.es_stream_mark(self._handle))

    def rewind(self, n: int) -> None:
        """Forget the newest n tokens. Raises EdgeStreamError unless they are all in the window."""
        if n < 0:
            raise EdgeStreamError(f"cannot rewind {n} tokens")
        _native.check(self._native.es_stream_rewind(self._handle, n))

    def rebase(self) -> None:
        """At an idle moment: bring absolute positions back if they have grown by n_ctx or more."""
        _native.check(self._native.es_stream_rebase(self._handle))

    def place(self, n_past: int) -> None:
        """For benchmarks: count as if n_past tokens had been read. The cache, its positions and the logits remain.

        Raises EdgeStreamError unless the cache is full and n_past is not less than now.
        """
        _native.check(self._native.es_stream_set_n_past(self._handle, n_past))

    def reset(self) -> None:
        """Forget everything."""
        _native.check(self._native.es_stream_reset(self._handle))
        self.forget_sampling()

    #
    # sessions
    #

    def save(self, path: str | Path, user: bytes = b"") -> None:
        """Write the session file: all or nothing. user: bytes of the caller's, given back as `.user`."""
        types = self._cache_types()
        self.engine._check(
            self._native.es_session_save(self._handle, self._sampler, *types, os.fsencode(path), user, len(user))
        )

    def _restore(self, path: bytes, user: bytes) -> None:
        self.engine._check(self._native.es_session_load(self._handle, *self._cache_types(), path))
        self.user = user

    def _cache_types(self) -> tuple[int, int]:
        return self.engine._cache_type(self.engine.cache_type_k), self.engine._cache_type(self.engine.cache_type_v)

    def close(self) -> None:
        """Free the stream; the engine can make another."""
        if self._handle and self.engine._ctx:
            self._native.es_stream_free(self._handle)
        self._free_sampler()
        self._handle = C.c_void_p()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Writer:
    """A generation step by step: `choose` a token, feed it to the stream, take its `record`. Made by Stream.writer."""

    def __init__(
        self,
        stream: Stream,
        max_tokens: int,
        matcher: StopMatcher,
        logprobs: bool,
        ignore_eos: bool,
        special: bool = False,
    ) -> None:
        self.stream = stream
        self.finished = max_tokens == 0
        self._max_tokens, self._ignore_eos, self._special = max_tokens, ignore_eos, special
        self._text, self._matcher = Utf8Assembler(), matcher
        self._token, self._logprob = C.c_int32(), C.c_float()
        self._logprob_p = C.byref(self._logprob) if logprobs else None
        self._start = time.perf_counter()
        self._n = 0

    def choose(self) -> int:
        """The next token, by the stream's logits."""
        stream = self.stream
        _native.check(
            stream._native.es_sampler_sample(stream._sampler, stream._handle, C.byref(self._token), self._logprob_p)
        )
        return self._token.value

    def record(self) -> Token:
        """What the chosen token gives, once it was fed."""
        engine, token = self.stream.engine, self._token.value
        self._n += 1
        eos = not self._ignore_eos and engine.is_eog(token)
        shown, stopped = self._matcher.push(
            self._text.push(b"" if eos else engine.token_to_piece(token, self._special))
        )
        finish = "stop" if stopped else "eos" if eos else "length" if self._n == self._max_tokens else None
        if finish in ("eos", "length"):
            shown += self._matcher.push(self._text.flush())[0] + self._matcher.flush()
        self.finished = finish is not None
        stats = self.stream.stats
        return Token(
            text=shown,
            token=token,
            logprob=self._logprob.value if self._logprob_p else None,
            finish_reason=finish,
            n_past=stats.n_past,
            n_cached=stats.n_cached,
            tok_per_s=self._n / max(time.perf_counter() - self._start, 1e-9),
        )


def token_array(tokens: Sequence[int]) -> C.Array[C.c_int32]:
    """Tokens as the C API takes them. Raises EdgeStreamError for what cannot be a token."""
    try:
        values = [operator.index(token) for token in tokens]
    except TypeError as error:
        raise EdgeStreamError("tokens must be integers") from error
    if values and not -(2**31) <= min(values) <= max(values) < 2**31:  # ctypes would wrap them silently
        raise EdgeStreamError(f"token {max(values, key=abs)} is not in the vocabulary")
    return (C.c_int32 * len(values))(*values)


def _nll(logits: NDArray[np.float64], token: int) -> float:
    peak = logits.max()
    return float(peak - logits[token]) + float(_log_sum_exp(logits - peak))


def _log_sum_exp(shifted: NDArray[np.float64]) -> float:
    import numpy as np

    return float(np.log(np.exp(shifted).sum()))


def check_sampling(engine: Engine, sampling: Sampling) -> None:
    """Raise EdgeStreamError if no sampler can be made so. Any thread may call it."""
    _native.library().es_sampler_free(_make_sampler(engine, sampling, False))


def _make_sampler(engine: Engine, sampling: Sampling, ignore_eos: bool) -> C.c_void_p:
    lib = _native.library()
    params = lib.es_sampler_default_params()
    params.seed = sampling.seed & 0xFFFFFFFF if sampling.seed >= 0 else _RANDOM_SEED
    for name in (
        "temp",
        "top_k",
        "top_p",
        "min_p",
        "repeat_penalty",
        "frequency_penalty",
        "presence_penalty",
    ):
        setattr(params, name, getattr(sampling, name))
    params.repeat_last_n = sampling.repeat_last_n
    bias = dict(sampling.logit_bias)
    if ignore_eos:
        bias |= dict.fromkeys(engine.eog_tokens, float("-inf"))
    if bias:
        array = (_native.LogitBias * len(bias))(*(_native.LogitBias(*item) for item in bias.items()))
        params.logit_bias, params.n_logit_bias = array, len(bias)
    if sampling.grammar and sampling.json_schema:
        raise EdgeStreamError("give a grammar or a JSON schema, not both")
    grammar = sampling.grammar or (schema_grammar(sampling.json_schema) if sampling.json_schema else None)
    if grammar:
        params.grammar = grammar.encode()
    handle = C.c_void_p()
    _native.check(lib.es_sampler_init(engine._model, params, C.byref(handle)))
    return handle


def schema_grammar(schema: str | Mapping[str, Any]) -> str:
    """GBNF of a JSON schema, by llama-cpp-python's converter."""
    _libs.llama()
    from llama_cpp.llama_grammar import json_schema_to_gbnf

    try:
        text = schema if isinstance(schema, str) else json.dumps(schema)
        return str(json_schema_to_gbnf(json.dumps(json.loads(text))))
    except Exception as error:  # the converter raises assertion and key errors on schemas it does not know
        raise EdgeStreamError(f"the JSON schema cannot be used: {error or type(error).__name__}") from error
