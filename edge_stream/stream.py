"""Stream: one unbounded token sequence over a backend's cache."""

from __future__ import annotations

import ctypes as C
import operator
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_stream.errors import EdgeStreamError
from edge_stream.generation import Token, Writer
from edge_stream.native import bindings
from edge_stream.sampling import Sampling, make_sampler
from edge_stream.session_file import Snapshot
from edge_stream.text import StopMatcher

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edge_stream.backends import Backend
    from edge_stream.recall import Hit, Log, StreamLog


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
    n_drafts: int
    n_drafted: int
    n_accepted: int
    n_recalled: int
    n_recall_max: int
    sink_move: str


class Stream:
    """A token stream of any length. Made by `Engine.stream` or `Engine.restore`; close it before its engine.

    sampler: es_sampler *, for native calls.
    """

    def __init__(self, backend: Backend, params: bindings.StreamParams) -> None:
        self.backend = backend
        self.seq_id = int(params.seq_id)
        self.user = b""
        self.sampler = C.c_void_p()
        self._native = bindings.library()
        self._sampling: tuple[Sampling, bool] | None = None
        self._lines: StreamLog | None = None
        self._handle = backend.init_stream(params)

    @property
    def handle(self) -> C.c_void_p:
        """es_stream *, for native calls. Raises EdgeStreamError if the stream is closed."""
        if not self._handle:
            raise EdgeStreamError(
                f"the stream is closed: by close(), by new adapters, or since the engine began another in "
                f"sequence {self.seq_id}"
            )
        return self._handle

    def call(self, function: Any, *arguments: Any, late: bool = False) -> None:
        """A native call on the stream. Raises its error, or what a callback of the backend raised.

        late: Ctrl-C does not hide that the call succeeded; callbacks.deliver raises it.
        """
        callbacks = self.backend.callbacks
        try:
            bindings.check(callbacks.run(function, *arguments))
        except BaseException:
            callbacks.deliver()
            raise
        if not late:
            callbacks.deliver()

    def use_draft(self, handle: C.c_void_p) -> None:
        """Takes guesses from an es_stream of a draft model, which it owns from now on: see es_stream_set_draft."""
        try:
            self.call(self._native.es_stream_set_draft, self.handle, handle)
        except BaseException:
            self._native.es_stream_free(handle)
            raise

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
        """Feed a text or tokens of any length; returns the number of tokens.

        A text at the stream's start gets BOS if the model expects it. special: see Vocabulary.tokenize.
        on_progress(done, total) is called as tokens are decoded. Raises EdgeStreamError for an empty input.
        """
        before = 0
        if isinstance(text, str):
            before = self.stats.n_past
            add_bos = before == 0 and self.backend.vocabulary.add_bos
            tokens: Sequence[int] = self.backend.vocabulary.tokenize(text, add_bos=add_bos, special=special)
        else:
            tokens = text
        if len(tokens) == 0:
            raise EdgeStreamError("there is no text to feed: the prompt is empty")
        step = len(tokens) if on_progress is None else max(64, self.stats.n_chunk)
        for start in range(0, len(tokens), step):
            self.feed_tokens(tokens[start : start + step])
            if on_progress is not None:
                on_progress(min(start + step, len(tokens)), len(tokens))
        if self._lines and isinstance(text, str):
            self._lines.note(text, tokens, before)
        return len(tokens)

    def feed_tokens(
        self, tokens: Sequence[int], on_logits: Callable[[int, NDArray[np.float32]], None] | None = None
    ) -> None:
        """Feed tokens, one at least. on_logits(i, [n_vocab] float32) gets the logits after each token i."""
        callback = bindings.NO_CALLBACK if on_logits is None else self._logits_callback(on_logits)
        array = token_array(tokens)
        self.call(self._native.es_stream_feed, self.handle, array, len(array), callback, None)

    def _logits_callback(self, on_logits: Callable[[int, NDArray[np.float32]], None]) -> Any:
        import numpy as np

        first, shape = self.stats.n_past, (self.backend.vocabulary.size,)

        def see(_user: object, index: int, logits: Any) -> bool:
            on_logits(index - first, np.ctypeslib.as_array(logits, shape=shape))
            return True

        return self.backend.callbacks.guard(bindings.LogitsCallback, see, failed=False)

    def logits_of(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Feed tokens and return [n_tokens, n_vocab] float32: row i predicts what follows token i."""
        import numpy as np

        out = np.empty((len(tokens), self.backend.vocabulary.size), dtype=np.float32)
        self.feed_tokens(tokens, out.__setitem__)
        return out

    def score(self, tokens: Sequence[int], *, chunk: int | None = None) -> NDArray[np.float64]:
        """Feed tokens and return their negative log-likelihoods in nats, [n_tokens] float64.

        Item i is the NLL of tokens[i] given the stream before it; item 0 is NaN if the stream was empty.
        chunk: most tokens decoded at once (1: eviction token by token, as published); None: the stream's default.
        """
        import numpy as np

        from edge_stream.probabilities import nll

        out = np.full(len(tokens), np.nan)
        last = self.logits
        if last is not None and len(tokens):
            out[0] = nll(last, tokens[0])
        step = chunk or len(tokens) or 1
        for start in range(0, len(tokens), step):

            def keep(i: int, logits: NDArray[np.float32], start: int = start) -> None:
                if start + i + 1 < len(tokens):
                    out[start + i + 1] = nll(logits, tokens[start + i + 1])

            self.feed_tokens(tokens[start : start + step], keep)
        return out

    @property
    def logits(self) -> NDArray[np.float32] | None:
        """A copy of the logits that predict the next token, [n_vocab] float32; None before the first feed."""
        import numpy as np

        pointer = self._native.es_stream_logits(self.handle)
        return np.ctypeslib.as_array(pointer, shape=(self.backend.vocabulary.size,)).copy() if pointer else None

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
        special: bool = False,
        loop_guard: bool = False,
    ) -> Iterator[Token]:
        """Generate max_tokens tokens (-1: no limit), each fed back before its record is yielded.

        Ends at max_tokens, at a stop string (not included in the text), or at an end-of-generation token unless
        ignore_eos; with loop_guard also where the text has become an exact cycle, of which one period stays in the
        stream. Calls with the same Sampling continue its random sequence. special: see `writer`.
        """
        writer = self.writer(
            max_tokens,
            sampling=sampling,
            stop=stop,
            logprobs=logprobs,
            ignore_eos=ignore_eos,
            special=special,
            loop_guard=loop_guard,
        )
        while not writer.finished:
            token = writer.next()
            try:
                yield token
            finally:
                self.backend.callbacks.deliver()  # Ctrl-C while the token was computed, which the stream has seen

    def writer(
        self,
        max_tokens: int = -1,
        *,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        logprobs: bool = False,
        ignore_eos: bool = False,
        special: bool = False,
        stop_pieces: Mapping[int, bytes] | None = None,
        loop_guard: bool = False,
    ) -> Writer:
        """`generate` step by step, for callers that feed the tokens themselves (see Engine.feed_each).

        special: include control tokens that do not end the text (`[TOOL_CALLS]`, say). stop_pieces: the text of control
        tokens that stop strings name.
        """
        self._use_sampling(sampling or Sampling(), ignore_eos)
        return Writer(self, max_tokens, StopMatcher(stop), logprobs, ignore_eos, special, stop_pieces, loop_guard)

    def forget_sampling(self) -> None:
        """Drop the sampler: the next generation restarts from its seed, and a session saved now has no sampler."""
        self._free_sampler()
        self._sampling = None

    def _use_sampling(self, sampling: Sampling, ignore_eos: bool) -> None:
        """Make the sampler, unless the last generation's can continue. A grammar always restarts."""
        wanted = (sampling, ignore_eos)
        has_rules = sampling.grammar or sampling.json_schema or sampling.chat
        if self.sampler and wanted == self._sampling and not has_rules:
            return
        self._free_sampler()
        self.sampler = make_sampler(self.backend.vocabulary, sampling, self.stats.n_ctx, ignore_eos)
        self._sampling = wanted
        bindings.check(self._native.es_sampler_begin(self.sampler, self.handle))

    def _free_sampler(self) -> None:
        self._native.es_sampler_free(self.sampler)
        self.sampler = C.c_void_p()

    #
    # positions
    #

    @property
    def stats(self) -> StreamStats:
        """Positions, counters and times."""
        raw = bindings.StreamStats()
        bindings.check(self._native.es_stream_get_stats(self.handle, C.byref(raw)))
        values = {name: getattr(raw, name) for name, *_ in raw._fields_}
        values["sink_move"] = bindings.SINK_MOVE_NAMES[raw.sink_move]
        return StreamStats(n_cached=raw.n_sinks + raw.n_window, **values)

    def tokens(self) -> list[int]:
        """The tokens in the cache: sinks, then window."""
        n = self._native.es_stream_tokens(self.handle, None, 0)
        buffer = (C.c_int32 * max(1, n))()
        self._native.es_stream_tokens(self.handle, buffer, n)
        return list(buffer[:n])

    def mark(self) -> None:
        """Mark a boundary before the next token: evictions prefer to end there (see Engine.stream, n_boundary)."""
        self.call(self._native.es_stream_mark, self.handle)

    def rewind(self, n: int) -> None:
        """Forget the newest n tokens. Raises EdgeStreamError unless they are all in the window."""
        if n < 0:
            raise EdgeStreamError(f"cannot rewind {n} tokens")
        self.call(self._native.es_stream_rewind, self.handle, n)

    def rebase(self) -> None:
        """Reduce absolute positions if they have grown by n_ctx or more. For idle moments."""
        self.call(self._native.es_stream_rebase, self.handle)

    def place(self, n_past: int) -> None:
        """For benchmarks: pretend that n_past tokens have been read. Cache, positions and logits do not change.

        Raises EdgeStreamError unless the cache is full and n_past is no less than the current value.
        """
        self.call(self._native.es_stream_set_n_past, self.handle, n_past)

    def reset(self) -> None:
        """Forget everything."""
        self.call(self._native.es_stream_reset, self.handle)
        self._lines = None
        self.forget_sampling()

    #
    # what has left the window
    #

    def use_log(self, log: Log | None, n_tokens: int = 64) -> None:
        """Note the lines of the texts that are fed from now on, for `search`. log: an empty one.

        n_tokens: of a line that `search` finds.
        """
        from edge_stream.recall import StreamLog

        self._lines = StreamLog(self, log, n_tokens) if log else None

    def search(self, question: str) -> Hit | None:
        """The line that belongs to a question and has left the window, wholly or in part: see es_log_recall.

        Raises EdgeStreamError without `use_log`.
        """
        if not self._lines:
            raise EdgeStreamError("nothing was noted that could be searched: call use_log before feeding texts")
        return self._lines.find(question)

    def recall(self, text: str | Sequence[int]) -> int:
        """Put earlier text between sinks and window, in place of what was recalled before; returns its tokens' number.

        The window sees it from now on; n_past, tokens() and the logits stay as they are: see es_stream_recall. Raises
        EdgeStreamError if it has more than stats.n_recall_max tokens, UnsupportedModelError if that is 0: the model has
        recurrent layers, or its sinks are moved by redecoding.
        """
        tokens = self.backend.vocabulary.tokenize(text) if isinstance(text, str) else text
        array = token_array(tokens)
        self.call(self._native.es_stream_recall, self.handle, array, len(array))
        return len(array)

    def unrecall(self) -> None:
        """Take out what was recalled."""
        self.call(self._native.es_stream_unrecall, self.handle)

    #
    # sessions
    #

    def save(self, path: str | Path, user: bytes = b"") -> None:
        """Write the session file atomically. user: the caller's bytes, returned as `.user` after a restore."""
        types, name = self._cache_types(), os.fsencode(path)
        self.call(self._native.es_session_save, self.handle, self.sampler, *types, name, user, len(user))

    def snapshot(self, user: bytes = b"") -> Snapshot:
        """A copy of the session in memory, so that the stream can continue while another thread writes it."""
        handle, types = C.c_void_p(), self._cache_types()
        snapshot = Snapshot(handle)
        try:
            arguments = (self.handle, self.sampler, *types, user, len(user), C.byref(handle))
            self.call(self._native.es_snapshot_init, *arguments)
        except BaseException:
            snapshot.close()
            raise
        return snapshot

    def load(self, path: str | Path, user: bytes) -> None:
        """Restore a session file; `user` is what its caller's bytes were. Raises SessionError."""
        self.call(self._native.es_session_load, self.handle, *self._cache_types(), os.fsencode(path))
        self.user = user

    def _cache_types(self) -> tuple[int, int]:
        type_k, type_v = self.backend.options.cache_types
        return type_k.ggml_type, type_v.ggml_type

    def close(self) -> None:
        """Free the stream. The engine can create another."""
        self._native.es_stream_free(self._handle)
        self._handle = C.c_void_p()
        self._free_sampler()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def token_array(tokens: Sequence[int]) -> C.Array[C.c_int32]:
    """Tokens as a C array. Raises EdgeStreamError for values that cannot be tokens."""
    try:
        values = [operator.index(token) for token in tokens]
    except TypeError as error:
        raise EdgeStreamError("tokens must be integers") from error
    if values and not -(2**31) <= min(values) <= max(values) < 2**31:  # ctypes would wrap them silently
        raise EdgeStreamError(f"token {max(values, key=abs)} is not in the vocabulary")
    return (C.c_int32 * len(values))(*values)
