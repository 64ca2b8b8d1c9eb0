"""MlcEngine: an MLC model folder behind the interface of Engine.

llama.cpp is still there for text: the folder's tokenizer becomes a model of nothing but a vocabulary. The native
library decides what is evicted and when, samples, and keeps sessions, as for a GGUF model; decoding is TVM's.
"""

from __future__ import annotations

import ctypes as C
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_stream import _libs, _native
from edge_stream.engine import Engine, check_sizes, default_threads
from edge_stream.errors import EdgeStreamError
from edge_stream.mlc.compile import library, require_tvm
from edge_stream.mlc.folder import MlcFolder

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edge_stream.devices import Device
    from edge_stream.mlc.ring import RingDecoder, Step

_CACHE_TYPES = ("f32", "f16")


class MlcEngine(Engine):
    """See Engine. It holds one stream, and runs on the CPU."""

    def _load_model(
        self,
        path: Path,
        placement: tuple[int | None, Sequence[str] | None, str, Sequence[str]],
        use_mmap: bool,
        verbose: bool,
    ) -> None:
        require_tvm()
        n_gpu_layers, names, _split_mode, rpc = placement
        if n_gpu_layers or rpc or (names and list(names) != ["none"]):
            raise EdgeStreamError("the MLC engine runs on the CPU here: leave -ngl, --device and --rpc out")
        if self.n_parallel != 1:
            raise EdgeStreamError("the MLC engine holds one stream at a time: n_parallel must be 1")
        if self._eval_callback is not None:
            raise EdgeStreamError("the MLC engine has no eval_callback: it is llama.cpp's")
        self._folder = MlcFolder(path)
        self.model_path = path
        self._llama = _libs.llama()
        self._native = _native.library()
        self._verbose = verbose
        self._quiet_log(verbose)
        self._llama.llama_backend_init()
        self._weights_tag = self._folder.tag()
        params = self._llama.llama_model_default_params()
        params.vocab_only = True
        with tempfile.TemporaryDirectory(prefix="edge-stream-") as scratch:
            file = Path(scratch) / "vocab.gguf"
            self._folder.write_vocab(file)
            self._model = self._llama.llama_model_load_from_file(os.fsencode(file), params)
        if not self._model:
            raise EdgeStreamError(f"llama.cpp cannot use the tokenizer of {path}{self._log_hint()}")
        self._vocab = self._llama.llama_model_get_vocab(self._model)

    def _make_context(
        self,
        n_ctx: int,
        n_keep: int,
        n_batch: int,
        n_ubatch: int,
        cache_types: tuple[str, str],
        flash_attn: str,
        threads: tuple[int | None, int | None],
        sink_move: str,
    ) -> None:
        check_sizes(n_ctx, n_keep, n_batch, n_ubatch)
        if sink_move != "auto":
            raise EdgeStreamError(f"sink_move = {sink_move}: the MLC engine has no sinks to move; leave it at auto")
        for name in cache_types:
            if name not in _CACHE_TYPES:
                raise EdgeStreamError(f"cache type {name}: the MLC engine has {' and '.join(_CACHE_TYPES)}")
        self.sink_move = "none"
        self.n_ctx, self.n_keep, self._n_batch = n_ctx, n_keep, min(n_batch, n_ubatch)
        self.cache_type_k, self.cache_type_v = cache_types
        self._n_threads = threads[0] or default_threads()
        self._check_memory(n_ctx)
        self._decoder = _Callbacks(self._make_decoder())
        self._ctx = 1  # there is something to free

    def _make_decoder(self) -> RingDecoder:
        import dataclasses

        # read when TVM starts its threads; a library that is loaded already is told below
        os.environ.setdefault("TVM_NUM_THREADS", str(self._n_threads))
        import tvm

        from edge_stream.mlc import ring

        tvm.get_global_func("runtime.config_threadpool")(1, self._n_threads)
        config, stored = self._folder.decoder_config, self._folder.quantization
        q = dataclasses.replace(stored, dtype="float32", transposed=False)
        dtype = (ring.DTYPES[self.cache_type_k], ring.DTYPES[self.cache_type_v])
        path, lanes = library(config, q, dtype, lambda line: print(line, file=sys.stderr))
        weights = ring.load_weights(self.model_path, self._folder.expected_tensors(), stored, lanes)
        return ring.RingDecoder(path, weights, config, dtype, lanes, self.n_ctx)

    def _init_stream(self, params: _native.StreamParams, handle: Any) -> None:
        decoder = self._decoder.struct(self._n_batch, self.n_ctx)
        _native.check(self._native.es_stream_init_decoder(self._model, decoder, params, handle))

    def _check(self, status: int) -> None:
        self._decoder.raise_error()
        _native.check(status)

    def synchronize(self) -> None:
        """Decodes are complete when they return."""

    @property
    def metadata(self) -> dict[str, str]:
        """mlc-chat-config.json, its plain values."""
        return {key: str(value) for key, value in self._folder.config.items() if not isinstance(value, (dict, list))}

    @property
    def desc(self) -> str:
        """Model type, parameters and quantisation, e.g. `llama 135M q4f16_1 (MLC)`."""
        config = self._folder.config
        return f"{config['model_type']} {self.n_params / 1e6:,.0f}M {config['quantization']} (MLC)"

    @property
    def is_recurrent(self) -> bool:
        return False

    @property
    def state_bytes(self) -> int:
        return 0

    @property
    def architecture(self) -> str:
        return str(self._folder.config["model_type"])

    @property
    def n_ctx_train(self) -> int:
        return self._folder.n_ctx_train

    @property
    def n_threads(self) -> int:
        return self._n_threads

    @property
    def n_params(self) -> int:
        """Weights, as they were before quantisation."""
        c = self._folder.decoder_config
        n_q, n_kv = c.n_head * c.head_dim, c.n_head_kv * c.head_dim
        layer = c.n_embd * (2 * n_q + 2 * n_kv + 3 * c.n_ff + 2)
        return c.n_layer * layer + c.n_vocab * c.n_embd * (1 if c.tied else 2) + c.n_embd

    @property
    def n_bytes(self) -> int:
        """Size of the weights' files."""
        return sum(file.stat().st_size for file in self.model_path.glob("params_shard_*.bin"))

    @property
    def kv_bytes_per_token(self) -> int:
        c = self._folder.decoder_config
        return c.n_layer * c.n_head_kv * c.head_dim * sum(self._cache_size(t) for t in self._cache_type_names())

    @property
    def devices(self) -> list[Device]:
        """None: the engine runs on the CPU."""
        return []

    def cache_bytes(self, n_cells: int) -> tuple[int, int]:
        """See Engine.cache_bytes."""
        return n_cells * self.kv_bytes_per_token, 0

    def _cache_type_names(self) -> tuple[str, str]:
        return self.cache_type_k, self.cache_type_v

    @staticmethod
    def _cache_size(name: str) -> int:
        return 4 if name == "f32" else 2

    def close(self) -> None:
        """Free the streams, the decoder and the vocabulary."""
        for stream in self._streams.values():
            stream.close()
        self._streams.clear()
        self._ctx = None
        if hasattr(self, "_decoder"):
            del self._decoder
        super().close()


class _Callbacks:
    """es_decoder's functions over a decoder. An exception is kept for `raise_error`: none may cross native code."""

    def __init__(self, decoder: RingDecoder) -> None:
        from edge_stream.mlc.ring import Step

        self.decoder, self._step = decoder, Step
        self._error: BaseException | None = None
        self._logits: Any = None  # the memory that native code reads until the next call
        self._functions = (
            _native.DecodeFunction(self._guard(self._decode)),
            _native.RebaseFunction(self._guard(self._rebase)),
            _native.StateSizeFunction(self._guard(self._state_size)),
            _native.StateGetFunction(self._guard(self._state_get)),
            _native.StateSetFunction(self._guard(self._state_set)),
        )

    def _guard(self, function: Any) -> Any:
        """The function without its user pointer; 0, and the exception kept, if it raises."""

        def call(_user: object, *arguments: Any) -> Any:
            try:
                return function(*arguments)
            except BaseException as error:  # KeyboardInterrupt too: it is raised again once native code has returned
                self._error = error
                return 0

        return call

    def struct(self, n_batch: int, n_cells: int) -> _native.Decoder:
        """es_decoder. It refers to this object, which must outlive it."""
        return _native.Decoder(None, n_cells, n_batch, *self._functions)

    def _convert(self, step: Any) -> Step:
        s = step.contents
        return self._step(s.n_ctx, s.n_keep, s.n_sinks, s.n_window, s.pos_sinks)

    def raise_error(self) -> None:
        """Raise what the last call raised, if it did."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _decode(self, step: Any) -> int:
        s = step.contents
        tokens = np.ctypeslib.as_array(s.tokens, shape=(s.n_tokens,))
        self._logits = self.decoder.decode(tokens, self._convert(step), s.all_logits)
        return int(self._logits.ctypes.data)

    def _rebase(self, step: Any, delta: int) -> bool:
        self.decoder.rebase(self._convert(step), delta)
        return True

    def _state_size(self, step: Any) -> int:
        return self.decoder.state_size(self._convert(step))

    def _state_get(self, step: Any, out: int, size: int) -> bool:
        data = self.decoder.state(self._convert(step))
        if len(data) != size:
            return False
        C.memmove(out, data, size)
        return True

    def _state_set(self, step: Any, data: int, size: int) -> bool:
        return self.decoder.set_state(self._convert(step), C.string_at(data, size))
