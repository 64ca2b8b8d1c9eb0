"""An engine on TVM's paged cache with MLC's functions: the reference that the ring cache is tested against.

That cache evicts after attention: with a window of W, a token sees W cached tokens and itself. For one token at a time,
a window of n_ctx - 1 is therefore the same as evicting down to n_ctx before attention, so once the cache slides, tokens
are decoded one by one. It cannot rewind after it has slid (TVM 0.27 mixes up its pages), so that is refused.
"""

from __future__ import annotations

import ctypes as C
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_stream.backends import LoadOptions
from edge_stream.backends.tvm import TvmBackend
from edge_stream.engine import Engine
from edge_stream.errors import EdgeStreamError
from edge_stream.mlc.ring import Step
from edge_stream.native import bindings


class _PagedBackend(TvmBackend):
    """TvmBackend without sessions, rewinds after a slide, or speed."""

    def _make_decoder(self) -> Any:
        return PagedDecoder(self.path, self.options.n_ctx, min(self.options.n_batch, self.options.n_ubatch))

    def init_stream(self, params: bindings.StreamParams) -> C.c_void_p:
        params.n_chunk = 1
        return super().init_stream(params)


def load_paged(folder: Path, **options: Any) -> Engine:
    """See Engine.load."""
    return Engine.over(_PagedBackend(folder, LoadOptions(**options)))


class PagedDecoder:
    """See ring.RingDecoder. Uses the folder's lib.so, or compiles one for this run."""

    def __init__(self, folder: Path, n_ctx: int, n_batch: int) -> None:
        from edge_stream.converters.mlc.compile import compile_library
        from edge_stream.converters.mlc.runtime import MlcLibrary

        with tempfile.TemporaryDirectory(prefix="edge-stream-") as scratch:
            library = folder / "lib.so"
            if not library.exists():
                library = compile_library(folder, "cpu", lambda _line: None, out=Path(scratch))
            self._library = MlcLibrary(folder, library, window=n_ctx - 1, chunk=n_batch)
        self._n_cached, self._slid = 0, False

    def decode(self, tokens: NDArray[np.int32], step: Step, all_logits: bool) -> NDArray[np.float32]:
        """Logits [n or 1, n_vocab]. Raises EdgeStreamError if the cache cannot be brought to the step's state."""
        if step.n_cached == 0:
            self._library.clear(step.n_keep)
            self._n_cached, self._slid = 0, False
        if step.n_cached < self._n_cached:
            if self._slid:
                raise EdgeStreamError("TVM's paged cache cannot rewind after it has slid: reset the stream")
            self._library.rewind(self._n_cached - step.n_cached)
        elif step.n_cached > self._n_cached:
            raise EdgeStreamError(f"TVM's paged cache holds {self._n_cached} tokens, not {step.n_cached}")
        logits = self._library.step("decode" if len(tokens) == 1 else "batch_verify", [int(t) for t in tokens])[0]
        self._n_cached = step.n_cached + len(tokens)
        if self._n_cached == step.n_ctx:  # the cache has already evicted one
            self._n_cached, self._slid = step.n_ctx - 1, True
        return np.ascontiguousarray(logits if all_logits else logits[-1:])

    def rebase(self, _step: Step, _delta: int) -> None:
        """Nothing to do: the cache already uses in-cache positions."""

    def state_size(self, _step: Step) -> int:
        """Raises EdgeStreamError: TVM's cache cannot be written to a file."""
        raise EdgeStreamError("TVM's paged cache has no sessions")

    def state(self, _step: Step) -> bytes:
        """See state_size."""
        raise EdgeStreamError("TVM's paged cache has no sessions")

    def set_state(self, _step: Step, _data: bytes) -> bool:
        """See state_size."""
        raise EdgeStreamError("TVM's paged cache has no sessions")
