"""llama.cpp driven by hand, without edge-stream's engine: the oracle of a stream, and how tiny models are made.

The oracle moves no window: the sinks are decoded anew at every slide, in a sequence of their own, and joined to the
stream with seq_cp. Where a model keeps a state besides its cache (hybrids), that state is saved before and restored
after. A purely recurrent model forgets nothing, and its oracle is a plain decode.
"""

from __future__ import annotations

import ctypes as C
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "2")

import numpy as np
from numpy.typing import NDArray

from edge_stream.hardware import devices
from edge_stream.native import libraries

N_CTX, N_KEEP = 48, 4

Array = NDArray[np.float32]


class NoFixtureError(Exception):
    """llama.cpp does not take the metadata; the message is its own."""


class Tensor(C.Structure):
    """The head of ggml_tensor."""

    _fields_ = (("type", C.c_int), ("buffer", C.c_void_p), ("ne", C.c_int64 * 4), ("nb", C.c_size_t * 4))


class GgufInit(C.Structure):
    _fields_ = (("no_alloc", C.c_bool), ("ctx", C.c_void_p))


SetTensor = C.CFUNCTYPE(None, C.c_void_p, C.c_void_p)


_LOG_CALLBACKS: list[Any] = []


class Llama:
    """libllama's and ggml's functions that are called here, and what libllama last complained about."""

    def __init__(self) -> None:
        self.api = libraries.llama()
        self.errors: list[str] = []
        self._log = self.api.llama_log_callback(self._hear)
        _LOG_CALLBACKS.append(self._log)  # libllama keeps the pointer for the life of the process
        self.quiet()
        self.lib = self.api._lib
        suffix = "dylib" if sys.platform == "darwin" else "so"
        self.ggml = ggml = C.CDLL(str(libraries.llama_dir() / f"libggml-base.{suffix}"))
        ggml.ggml_get_name.restype, ggml.ggml_get_name.argtypes = C.c_char_p, [C.c_void_p]
        ggml.ggml_n_dims.argtypes = [C.c_void_p]
        ggml.ggml_backend_tensor_set.argtypes = [C.c_void_p, C.c_void_p, C.c_size_t, C.c_size_t]
        ggml.gguf_init_from_file.restype, ggml.gguf_init_from_file.argtypes = C.c_void_p, [C.c_char_p, GgufInit]
        ggml.gguf_free.argtypes = [C.c_void_p]
        init = self.lib.llama_model_init_from_user
        init.restype = C.c_void_p
        init.argtypes = [C.c_void_p, SetTensor, C.c_void_p, type(self.api.llama_model_default_params())]

    def quiet(self) -> None:
        """Send libllama's messages to `errors` (an Engine sets a callback of its own)."""
        self.api.llama_log_set(self._log, None)

    def _hear(self, level: int, text: bytes, _user: object) -> None:
        if level == 4:  # GGML_LOG_LEVEL_ERROR
            self.errors.append(text.decode(errors="replace").strip())

    def params(self) -> Any:
        """Default parameters of a model that this process loads."""
        params = self.api.llama_model_default_params()
        devices.place(params)
        return params

    def complaint(self) -> str:
        """The reason among the errors since the last call: the one that names it, without the function that said it."""
        heard, self.errors = self.errors, []
        reasons = [text for text in heard if "error loading model" in text] or heard
        if not reasons:
            return "no reason given"
        return re.sub(r"^(error loading model( hyperparameters)?: )*", "", reasons[0].split(": ", 1)[-1])


class Raw:
    """A llama_context driven by hand: float32 cache, no flash attention, every cell kept until it is removed."""

    def __init__(self, llama: Llama, path: Path, n_cells: int) -> None:
        llama.quiet()
        self.llama, api = llama, llama.api
        self.model = api.llama_model_load_from_file(os.fsencode(path), llama.params())
        if not self.model:
            raise NoFixtureError(llama.complaint())
        params = api.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = n_cells, 64, 64, 2
        params.kv_unified = params.swa_full = True
        params.type_k = params.type_v = 0  # GGML_TYPE_F32
        params.flash_attn_type = 0
        params.n_threads = params.n_threads_batch = 1
        self.ctx = api.llama_init_from_model(self.model, params)
        if not self.ctx:
            raise NoFixtureError(llama.complaint())
        self.memory = api.llama_get_memory(self.ctx)
        check = getattr(llama.lib, "llama_es_bank_check", None)
        if check is not None:  # from here on llama.cpp reuses no cell outside of a sliding window
            check.argtypes = [C.c_void_p, C.POINTER(C.c_char_p)]
            check(self.ctx, C.byref(C.c_char_p()))
        self.n_vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self.model))
        self.batch = api.llama_batch_init(64, 0, 1)

    @property
    def kind(self) -> str:
        """The memory that the model keeps."""
        api = self.llama.api
        if api.llama_model_has_encoder(self.model):
            return "encoder"
        if api.llama_model_is_recurrent(self.model):
            return "state"
        if not self.memory:
            return "none"
        window = "sliding window" if api.llama_model_n_swa(self.model) > 0 else "cache"
        return f"{window} + state" if api.llama_model_is_hybrid(self.model) else window

    def decode(self, tokens: Sequence[int], position: int, sequence: int = 0) -> Array:
        """The logits of every token."""
        batch = self.batch
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position + i, 1, 1
            batch.seq_id[i][0] = sequence
        status = self.llama.api.llama_decode(self.ctx, batch)
        if status != 0:
            raise NoFixtureError(f"llama_decode returned {status}: {self.llama.complaint()}")
        rows = [self.llama.api.llama_get_logits_ith(self.ctx, i) for i in range(len(tokens))]
        return np.array([np.ctypeslib.as_array(row, shape=(self.n_vocab,)) for row in rows], dtype=np.float32)

    def _state(self) -> Any:
        """What the model keeps of the stream besides the cache, as bytes."""
        api = self.llama.api
        size = api.llama_state_seq_get_size_ext(self.ctx, 0, api.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY)
        state = (C.c_uint8 * size)()
        api.llama_state_seq_get_data_ext(self.ctx, state, size, 0, api.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY)
        return state

    def move_sinks(self, sinks: Sequence[int], old: int, new: int) -> None:
        """Put the sinks, which are at `old`, at `new`: decoded there from nothing, as they were in the beginning."""
        api, memory = self.llama.api, self.memory
        hybrid = api.llama_model_is_hybrid(self.model)
        state = self._state() if hybrid else None
        for i, token in enumerate(sinks):
            self.decode([token], new + i, 1)
        api.llama_memory_seq_rm(memory, 0, old, old + len(sinks))
        api.llama_memory_seq_cp(memory, 1, 0, -1, -1)
        api.llama_memory_seq_rm(memory, 1, -1, -1)
        if state is not None:  # seq_cp brought the sinks' state too
            flags = api.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY
            if api.llama_state_seq_set_data_ext(self.ctx, state, len(state), 0, flags) == 0:
                raise RuntimeError("llama_state_seq_set_data_ext took no state")

    def stream(self, tokens: Sequence[int], sinks: str = "move") -> Array:
        """Logits of a stream over N_CTX cells, token by token. sinks: move, or leave or drop them, which is wrong."""
        api = self.llama.api
        logits, first, n_window = [], 0, 0  # positions: sinks from `first`, the window behind them
        for i, token in enumerate(tokens):
            if i < N_KEEP or self.kind == "state":
                logits.append(self.decode([token], i))
                continue
            if N_KEEP + n_window == N_CTX:
                api.llama_memory_seq_rm(self.memory, 0, first + N_KEEP, first + N_KEEP + 1)
                if sinks == "move":
                    self.move_sinks(tokens[:N_KEEP], first, first + 1)
                elif sinks == "drop":
                    api.llama_memory_seq_rm(self.memory, 0, 0, N_KEEP)
                first, n_window = first + 1, n_window - 1
            logits.append(self.decode([token], first + N_KEEP + n_window))
            n_window += 1
        return np.concatenate(logits)

    def clear(self) -> None:
        self.llama.api.llama_memory_clear(self.memory, True)

    def close(self) -> None:
        api = self.llama.api
        api.llama_batch_free(self.batch)
        api.llama_free(self.ctx)
        api.llama_model_free(self.model)
