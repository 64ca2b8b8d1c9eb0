"""llama.cpp's KV cache without a stream, for the baseline modes of measure/modes.py."""

from __future__ import annotations

import ctypes as C
from collections.abc import Sequence
from typing import TYPE_CHECKING

from edge_stream.backends import loading
from edge_stream.errors import EdgeStreamError
from edge_stream.native import bindings, libraries

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class LlamaCache:
    """Sequence 0 of a context that no stream uses: n_cached tokens at positions 0..n_cached-1."""

    def __init__(self, model: int, context: int, n_vocab: int) -> None:
        self._llama = libraries.llama()
        self._model, self._context, self._n_vocab = model, context, n_vocab
        self._memory = self._llama.llama_get_memory(context)
        self.n_batch = int(self._llama.llama_n_batch(context))
        self._batch = self._llama.llama_batch_init(self.n_batch, 0, 1)
        self.n_cached = 0

    def decode(self, tokens: Sequence[int], all_logits: bool) -> None:
        """One llama_decode of at most n_batch tokens after those cached. Raises EdgeStreamError."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i] = token
            batch.pos[i] = self.n_cached + i
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = all_logits or i == len(tokens) - 1
        status = self._llama.llama_decode(self._context, batch)
        if status != 0:
            raise EdgeStreamError(f"llama_decode failed with status {status}")
        self.n_cached += len(tokens)

    def logits(self, row: int) -> NDArray[np.float32]:
        """Logits of a row of the last decode, [n_vocab], valid until the next decode."""
        import numpy as np

        pointer = self._llama.llama_get_logits_ith(self._context, row)
        return np.ctypeslib.as_array(C.cast(pointer, C.POINTER(C.c_float)), shape=(self._n_vocab,))

    def why_no_shift(self) -> str | None:
        """Why `discard` would abort the process, or be wrong, with this model; None if it works."""
        return loading.reason(bindings.library().es_model_can_shift, self._model)

    def discard(self, first: int, n: int) -> None:
        """llama.cpp's context shift: remove n tokens from `first` on and move the rest down."""
        self._llama.llama_memory_seq_rm(self._memory, 0, first, first + n)
        self._llama.llama_memory_seq_add(self._memory, 0, first + n, self.n_cached, -n)
        self.n_cached -= n

    def truncate(self, n_cached: int) -> None:
        """Keep only the first n_cached tokens."""
        self._llama.llama_memory_seq_rm(self._memory, 0, n_cached, -1)
        self.n_cached = n_cached

    def clear(self, *, zero: bool = True) -> None:
        """Empty the cache. zero: zero its memory too."""
        self._llama.llama_memory_clear(self._memory, zero)
        self.n_cached = 0

    def close(self) -> None:
        """Free the batch; the context stays."""
        self._llama.llama_batch_free(self._batch)
