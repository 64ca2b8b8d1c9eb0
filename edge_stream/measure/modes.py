"""The ways of reading a long text with a cache of fixed size, behind one interface: ours and those to compare with.

stream     sinks and a sliding window (this project)
window     the same without sinks
dense      nothing is evicted: ends where the cache or the training length ends
recompute  sliding window with re-computation (Xiao et al. 2023, the strong baseline): once the cache is full, every
           token costs a decode of the last n_ctx tokens into an empty cache
shift      llama.cpp's context shift (tools/completion and server): the cache keeps n_keep tokens, drops half of the
           rest at once and re-rotates all keys that stay
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_stream.backends import MODES
from edge_stream.engine import Engine
from edge_stream.errors import EdgeStreamError
from edge_stream.probabilities import nll

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edge_stream.stream import Stream

SINKLESS = ("window", "dense", "recompute")  # n_keep means nothing to them


class Reader(ABC):
    """One endless text read in one mode. Made by `open_reader`; owns its engine."""

    def __init__(self, engine: Engine, mode: str) -> None:
        self.engine, self.mode = engine, mode
        self.n_ctx, self.n_keep = engine.n_ctx, engine.n_keep
        self.n_past = 0

    @abstractmethod
    def feed(self, tokens: Sequence[int]) -> None:
        """Read tokens; afterwards the logits of the last one are there. Chunks are the mode's own."""

    @abstractmethod
    def score(self, tokens: Sequence[int], chunk: int = 1) -> NDArray[np.float64]:
        """Read tokens; item i is the NLL in nats of tokens[i] given what was read before it.

        Item 0 is NaN if nothing was read before. chunk: most tokens per decode.
        """

    @abstractmethod
    def forget(self, n: int) -> None:
        """Take the newest n tokens back. They must still be cached."""

    @abstractmethod
    def reset(self) -> None:
        """Begin a new text."""

    def place(self, depth: int) -> None:
        """Count as if depth tokens had been read; the cache is full. Only mode stream can, and window."""
        raise EdgeStreamError(f"mode {self.mode} cannot be placed at a depth: it has to read its way there")

    @property
    @abstractmethod
    def n_cached(self) -> int:
        """Tokens that the next one can attend to."""

    @property
    @abstractmethod
    def logits(self) -> NDArray[np.float32] | None:
        """A copy of the logits that predict the next token, [n_vocab]; None before the first."""

    def score_next(self, token: int) -> float:
        """NLL of a token that is not read; NaN before the first."""
        logits = self.logits
        return float("nan") if logits is None else nll(logits, token)

    @property
    def counters(self) -> dict[str, int]:
        """Evictions and repairs of positions since the text began."""
        return {}

    def synchronize(self) -> None:
        """Wait until the device has finished (timing)."""
        self.engine.backend.synchronize()

    def close(self) -> None:
        """Free the engine."""
        self.engine.close()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class StreamReader(Reader):
    """Modes stream and window: the engine as everybody uses it."""

    def __init__(self, engine: Engine, mode: str, stream: Stream | None = None) -> None:
        super().__init__(engine, mode)
        self.stream = stream or engine.stream()
        self.n_past = self.stream.stats.n_past

    def feed(self, tokens: Sequence[int]) -> None:
        """See Reader."""
        self.stream.feed_tokens(tokens)
        self.n_past += len(tokens)

    def score(self, tokens: Sequence[int], chunk: int = 1) -> NDArray[np.float64]:
        """See Reader."""
        self.n_past += len(tokens)
        return self.stream.score(tokens, chunk=chunk)

    def forget(self, n: int) -> None:
        """See Reader."""
        self.stream.rewind(n)
        self.n_past -= n

    def reset(self) -> None:
        """See Reader."""
        self.stream.reset()
        self.n_past = 0

    def place(self, depth: int) -> None:
        """See Reader."""
        self.stream.place(depth)
        self.n_past = depth

    @property
    def n_cached(self) -> int:
        """See Reader."""
        return self.stream.stats.n_cached

    @property
    def logits(self) -> NDArray[np.float32] | None:
        """See Reader."""
        return self.stream.logits

    @property
    def counters(self) -> dict[str, int]:
        """Slides and rebases."""
        stats = self.stream.stats
        return {"slides": stats.n_slides, "rebases": stats.n_rebases}


class StockReader(Reader):
    """Modes that use llama.cpp's cache as it is, without a stream."""

    def __init__(self, engine: Engine, mode: str) -> None:
        super().__init__(engine, mode)
        if engine.is_recurrent:
            raise EdgeStreamError(f"mode {mode} needs a cache; a recurrent model has none, and streams as it is")
        engine.stream().close()  # the cache is free, and empty
        self.cache = engine.backend.cache()
        self._last = -1  # row of the newest logits in the last decode

    def close(self) -> None:
        """See Reader."""
        self.cache.close()
        super().close()

    def _make_room(self, m: int) -> None:
        """Called before m tokens are decoded."""
        if self.n_cached + m > self.n_ctx:
            raise EdgeStreamError(f"the dense cache is full: {self.n_ctx} tokens (-c makes it larger)")

    def _most(self) -> int:
        """Most tokens per decode."""
        return self.cache.n_batch

    def _decode(self, tokens: Sequence[int], all_logits: bool) -> None:
        """One decode at the end of the cache; room was made."""
        self.cache.decode(tokens, all_logits)
        self._last = len(tokens) - 1

    def feed(self, tokens: Sequence[int]) -> None:
        """See Reader."""
        step = self._most()
        for start in range(0, len(tokens), step):
            piece = tokens[start : start + step]
            self._make_room(len(piece))
            self._decode(piece, all_logits=False)
        self.n_past += len(tokens)

    def score(self, tokens: Sequence[int], chunk: int = 1) -> NDArray[np.float64]:
        """See Reader."""
        out = np.full(len(tokens), np.nan)
        if len(tokens) and self._last >= 0:
            out[0] = nll(self.cache.logits(self._last), tokens[0])
        step = min(chunk, self._most())
        for start in range(0, len(tokens), step):
            piece = tokens[start : start + step]
            self._make_room(len(piece))
            self._decode(piece, all_logits=True)
            for i in range(len(piece)):
                if start + i + 1 < len(tokens):
                    out[start + i + 1] = nll(self.cache.logits(i), tokens[start + i + 1])
        self.n_past += len(tokens)
        return out

    def forget(self, n: int) -> None:
        """See Reader."""
        if not 0 <= n <= self.n_cached:
            raise EdgeStreamError(f"cannot take {n} tokens back: {self.n_cached} are cached")
        self.cache.truncate(self.n_cached - n)
        self.n_past -= n

    def reset(self) -> None:
        """See Reader."""
        self.cache.clear()
        self.n_past, self._last = 0, -1

    @property
    def n_cached(self) -> int:
        """See Reader."""
        return self.cache.n_cached

    @property
    def logits(self) -> NDArray[np.float32] | None:
        """See Reader."""
        return None if self._last < 0 else self.cache.logits(self._last).copy()


class ShiftReader(StockReader):
    """llama.cpp's context shift: when n_past + m >= n_ctx, half of what is not kept goes at once."""

    def __init__(self, engine: Engine, mode: str) -> None:
        super().__init__(engine, mode)
        reason = self.cache.why_no_shift()
        if reason is not None:
            raise EdgeStreamError(f"mode shift is not for this model: {reason}")
        self.n_shifts = 0
        if self._most() < 1:
            raise EdgeStreamError(f"mode shift needs n_ctx of at least n_keep + 4, not {self.n_ctx} with {self.n_keep}")

    def _most(self) -> int:
        return min(self.cache.n_batch, (self.n_ctx - self.n_keep) // 4)

    def _make_room(self, m: int) -> None:
        while self.n_cached + m >= self.n_ctx:
            n_discard = (self.n_cached - self.n_keep) // 2
            if n_discard < 1:
                raise EdgeStreamError(f"n_ctx = {self.n_ctx} is too small for {m} tokens at once in mode shift")
            self.cache.discard(self.n_keep, n_discard)
            self.n_shifts += 1

    def reset(self) -> None:
        """See Reader."""
        super().reset()
        self.n_shifts = 0

    @property
    def counters(self) -> dict[str, int]:
        """Shifts."""
        return {"shifts": self.n_shifts}


class RecomputeReader(StockReader):
    """Sliding window with re-computation. Until the cache is full it is dense."""

    def __init__(self, engine: Engine, mode: str) -> None:
        super().__init__(engine, mode)
        self._history: deque[int] = deque(maxlen=self.n_ctx)
        self.n_recomputed = 0

    def feed(self, tokens: Sequence[int]) -> None:
        """See Reader. Only the last token's logits are wanted, so however many tokens, one re-computation serves."""
        self.n_past += len(tokens)
        self._history.extend(tokens)
        if self.n_cached + len(tokens) <= self.n_ctx:
            self._append(tokens)
        else:
            self._recompute()

    def score(self, tokens: Sequence[int], chunk: int = 1) -> NDArray[np.float64]:
        """See Reader. Beyond the cache chunk means nothing: every token is predicted from a cache made anew."""
        out = np.full(len(tokens), np.nan)
        for i, token in enumerate(tokens):
            if self._last >= 0:
                out[i] = nll(self.cache.logits(self._last), token)
            self.feed((token,))
        return out

    def _append(self, tokens: Sequence[int]) -> None:
        for start in range(0, len(tokens), self.cache.n_batch):
            self._decode(tokens[start : start + self.cache.n_batch], all_logits=False)

    def _recompute(self) -> None:
        self.cache.clear(zero=False)
        self._append(list(self._history))
        self.n_recomputed += 1

    def forget(self, n: int) -> None:
        """See Reader."""
        super().forget(n)
        for _ in range(n):
            self._history.pop()

    def reset(self) -> None:
        """See Reader."""
        super().reset()
        self._history.clear()
        self.n_recomputed = 0

    @property
    def counters(self) -> dict[str, int]:
        """Times that the whole cache was computed anew."""
        return {"recomputed": self.n_recomputed}


_READERS: dict[str, type[StreamReader] | type[StockReader]] = {
    "stream": StreamReader,
    "window": StreamReader,
    "dense": StockReader,
    "recompute": RecomputeReader,
    "shift": ShiftReader,
}


def open_reader(model: str, mode: str, n_ctx: int, n_keep: int, **settings: Any) -> Reader:
    """Load a model for one mode. settings: the further arguments of Engine.load.

    Raises EdgeStreamError for an unknown mode and for what Engine.load refuses.
    """
    if mode not in MODES:
        raise EdgeStreamError(f"mode {mode} is unknown: use {', '.join(MODES)}")
    engine = Engine.load(model, n_ctx=n_ctx, n_keep=keep_of(mode, n_keep), **settings)
    try:
        engine.backend.capabilities.check_mode(mode)
        return _READERS[mode](engine, mode)
    except BaseException:
        engine.close()
        raise


def keep_of(mode: str, n_keep: int) -> int:
    """The n_keep that a mode uses."""
    return 0 if mode in SINKLESS else n_keep
