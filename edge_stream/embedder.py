"""Embeddings of texts: a second model, by llama.cpp as it is. Nothing streams here; a text must fit the model."""

from __future__ import annotations

import ctypes as C
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edge_stream.backends import loading
from edge_stream.errors import EdgeStreamError, no_numbers
from edge_stream.models import names
from edge_stream.native import bindings
from edge_stream.native.callbacks import Callbacks
from edge_stream.vocabulary import Vocabulary

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MAX_TOKENS = 2048  # of a text: the buffers grow with its square


class Embedder:
    """A loaded model. For one thread at a time.

    model: as for Engine.load. pooling: none, mean, cls or last; None: the model's own. n_threads, n_gpu_layers,
    devices: as in LoadOptions. Raises EdgeStreamError.
    """

    def __init__(
        self,
        model: str | Path,
        pooling: str | None = None,
        n_threads: int | None = None,
        n_gpu_layers: int | None = None,
        devices: Sequence[str] | None = None,
    ) -> None:
        self.path = names.resolve(str(model))
        self._llama = loading.start(False)
        self._callbacks = Callbacks()
        damage = loading.reason(bindings.library().es_model_file_check, os.fsencode(self.path))
        if damage is not None:
            raise EdgeStreamError(f"{self.path} is damaged: {damage}")
        self._context = 0
        params = self._llama.llama_model_default_params()
        if n_gpu_layers is not None:
            params.n_gpu_layers = n_gpu_layers
        self._model = loading.load_model(self.path, params, self._callbacks, names=devices)
        if not self._model:
            raise EdgeStreamError(f"llama.cpp cannot load {self.path}{loading.log_hint()}")
        self.vocabulary = Vocabulary(self._model)
        self.n_embd = int(self._llama.llama_model_n_embd_out(self._model))
        self.n_tokens = min(int(self._llama.llama_model_n_ctx_train(self._model)), _MAX_TOKENS)
        params = self._llama.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = self.n_tokens
        params.n_seq_max = 1
        params.embeddings = True
        if pooling is not None:
            params.pooling_type = getattr(self._llama, f"LLAMA_POOLING_TYPE_{pooling.upper()}")
        params.n_threads = params.n_threads_batch = n_threads or loading.default_threads()
        self._context = bindings.library().es_context_init(self._model, params) or 0
        if not self._context:
            self.close()
            raise EdgeStreamError(f"llama.cpp cannot make a context for embeddings from {self.path}")
        kind = self._llama.llama_pooling_type(self._context)
        self.is_pooled = kind != self._llama.LLAMA_POOLING_TYPE_NONE
        if kind == self._llama.LLAMA_POOLING_TYPE_RANK:
            self.close()
            raise EdgeStreamError(f"{self.path.name} ranks texts and does not embed them")

    def embed(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """[n, n_embd]: one row of length 1 if pooled, else a row as computed for each token. Raises EdgeStreamError."""
        if not tokens:
            raise EdgeStreamError("there is nothing to embed: the text is empty")
        if len(tokens) > self.n_tokens:
            raise EdgeStreamError(
                f"the input is too large: it has {len(tokens)} tokens, and the embedding model takes {self.n_tokens}"
            )
        memory = self._llama.llama_get_memory(self._context)
        if memory:
            self._llama.llama_memory_clear(memory, True)
        array = (C.c_int32 * len(tokens))(*tokens)
        # llama_decode encodes if the model only has an encoder
        if self._llama.llama_decode(self._context, self._llama.llama_batch_get_one(array, len(tokens))) != 0:
            raise EdgeStreamError("the text could not be embedded: the decode failed")
        if not self.is_pooled:
            return np.stack(
                [self._row(self._llama.llama_get_embeddings_ith(self._context, i)) for i in range(len(tokens))]
            )
        row = self._row(self._llama.llama_get_embeddings_seq(self._context, 0))
        return np.asarray([row / max(float(np.linalg.norm(row)), 1e-12)], dtype=np.float32)

    def _row(self, pointer: C.Array[C.c_float]) -> NDArray[np.float32]:
        row = np.array(np.ctypeslib.as_array(pointer, shape=(self.n_embd,)), dtype=np.float32)
        if not np.isfinite(row).all():
            raise no_numbers("the embedding model")
        return row

    def close(self) -> None:
        """Free the model."""
        if self._context:
            self._llama.llama_free(self._context)
        if self._model:
            self._llama.llama_model_free(self._model)
        self._context = self._model = 0

    def __enter__(self) -> Embedder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
