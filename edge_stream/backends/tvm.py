"""TVM: an MLC model folder and our own decoder (edge_stream/mlc).

Text still goes through llama.cpp: the folder's tokenizer becomes a vocabulary-only model.
"""

from __future__ import annotations

import ctypes as C
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_stream.backends import Capabilities, LoadOptions, ModelFacts, loading
from edge_stream.errors import EdgeStreamError
from edge_stream.hardware import memory
from edge_stream.mlc.compile import library, require_tvm
from edge_stream.mlc.folder import MlcFolder
from edge_stream.native import bindings
from edge_stream.native.callbacks import Callbacks
from edge_stream.vocabulary import Vocabulary

if TYPE_CHECKING:
    from edge_stream.backends.llama_cache import LlamaCache
    from edge_stream.hardware.devices import Device
    from edge_stream.mlc.ring import RingDecoder, Step

CAPABILITIES = Capabilities(
    name="the MLC engine",
    max_parallel=1,
    cache_types=("f32", "f16"),
    flash_attn=("auto", "off"),  # it has its own attention
    sink_moves=("auto",),
    modes=("stream", "window"),
    offloads=False,
    loads_tensors=False,
    has_eval_callback=False,
)


class TvmBackend:
    """See Backend. One stream, on the CPU."""

    capabilities = CAPABILITIES
    sink_move = "none"
    n_spare = 0
    state_bytes = 0

    def __init__(self, path: Path, options: LoadOptions) -> None:
        require_tvm()
        CAPABILITIES.check(options)
        self.path = path
        self.callbacks = Callbacks()
        self._model = 0
        self._folder = MlcFolder(path)
        self.facts = self._read_facts()
        self.options = o = replace(options, n_ctx=options.n_ctx or self.facts.n_ctx_train)
        loading.check_sizes(o)
        c = self._folder.decoder_config
        row = c.n_head_kv * c.head_dim
        self.kv_bytes_per_token = c.n_layer * sum(t.row_bytes(row) for t in o.cache_types)
        self.n_threads = o.n_threads or loading.default_threads()
        self.devices: list[Device] = []
        self._llama = loading.start(options.verbose)
        try:
            self.vocabulary = self._load_vocabulary()
            memory.check_fits(self.cache_bytes(o.n_ctx)[0], o.n_ctx, 1, self.kv_bytes_per_token)
            self.decoder = self._make_decoder()
        except BaseException:
            self.close()
            raise
        self._functions = _decoder_functions(self.decoder, self.callbacks)

    def _load_vocabulary(self) -> Vocabulary:
        params = self._llama.llama_model_default_params()
        params.vocab_only = True
        with tempfile.TemporaryDirectory(prefix="edge-stream-") as scratch:
            self._model = loading.load_model(self._folder.vocab_file(Path(scratch)), params, self.callbacks)
        if not self._model:
            raise EdgeStreamError(f"llama.cpp cannot use the tokenizer of {self.path}{loading.log_hint()}")
        return Vocabulary(self._model)

    def _make_decoder(self) -> RingDecoder:
        from edge_stream.mlc import ring, runtime

        config, stored = self._folder.decoder_config, self._folder.quantization
        q = replace(stored, dtype="float32", transposed=False)
        dtype = (ring.DTYPES[self.options.cache_type_k], ring.DTYPES[self.options.cache_type_v])
        path, lanes = library(config, q, dtype, lambda line: print(line, file=sys.stderr))
        weights = ring.load_weights(self.path, self._folder.expected_tensors(), stored, lanes)
        functions = runtime.functions(path, self.n_threads)
        return ring.RingDecoder(functions, weights, config, dtype, lanes, self.options.n_ctx)

    def _read_facts(self) -> ModelFacts:
        c, config = self._folder.decoder_config, self._folder.config
        n_q, n_kv = c.n_head * c.head_dim, c.n_head_kv * c.head_dim
        n_ff = c.n_expert * c.n_ff_expert if c.n_expert else c.n_ff
        layer = c.n_embd * (2 * n_q + 2 * n_kv + 3 * n_ff + c.n_expert + 2)
        # before quantisation
        n_params = c.n_layer * layer + c.n_vocab * c.n_embd * (1 if c.tied else 2) + c.n_embd
        return ModelFacts(
            desc=f"{config['model_type']} {n_params / 1e6:,.0f}M {config['quantization']} (MLC)",
            architecture=str(config["model_type"]),
            metadata={key: str(value) for key, value in config.items() if not isinstance(value, (dict, list))},
            n_ctx_train=self._folder.n_ctx_train,
            n_params=n_params,
            n_bytes=sum(file.stat().st_size for file in self.path.glob("params_shard_*.bin")),
            n_layer=c.n_layer,
            n_head=c.n_head,
            is_recurrent=False,
            weights_tag=self._folder.tag(),
        )

    def cache_bytes(self, n_cells: int) -> tuple[int, int]:
        """See Backend."""
        return n_cells * self.kv_bytes_per_token, 0

    def init_stream(self, params: bindings.StreamParams) -> C.c_void_p:
        """See Backend."""
        o, handle = self.options, C.c_void_p()
        decoder = bindings.Decoder(None, o.n_ctx, min(o.n_batch, o.n_ubatch), *self._functions, True)
        bindings.check(bindings.library().es_stream_init_decoder(self._model, decoder, params, C.byref(handle)))
        return handle

    def set_adapters(self, scales: Sequence[float]) -> None:
        """Raises EdgeStreamError: there are none."""
        raise EdgeStreamError(f"{CAPABILITIES.name} has no adapters")

    def cache(self) -> LlamaCache:
        """Raises EdgeStreamError: llama.cpp has no cache here."""
        raise EdgeStreamError(f"{CAPABILITIES.name} has no cache of llama.cpp's")

    def synchronize(self) -> None:
        """Nothing to do: decodes are synchronous."""

    def close(self) -> None:
        """See Backend."""
        for name in ("decoder", "_functions"):
            self.__dict__.pop(name, None)
        if self._model:
            self._llama.llama_model_free(self._model)
            self._model = 0


def _decoder_functions(decoder: RingDecoder, callbacks: Callbacks) -> tuple[Any, ...]:
    """es_decoder's functions over a decoder. The caller must keep them alive while native code uses them."""
    from edge_stream.mlc.ring import Step

    kept: list[Any] = []  # keeps alive what native code reads until the next decode

    def convert(step: Any) -> Step:
        s = step.contents
        return Step(s.n_ctx, s.n_keep, s.n_sinks, s.n_window, s.pos_sinks, s.n_recalled, s.recalls)

    def decode(_user: object, step: Any) -> int:
        s = step.contents
        tokens = np.ctypeslib.as_array(s.tokens, shape=(s.n_tokens,))
        kept[:] = [decoder.decode(tokens, convert(step), s.all_logits)]
        return int(kept[0].ctypes.data)

    def rebase(_user: object, step: Any, delta: int) -> bool:
        decoder.rebase(convert(step), delta)
        return True

    def state_size(_user: object, step: Any) -> int:
        return decoder.state_size(convert(step))

    def state_get(_user: object, step: Any, out: int, size: int) -> bool:
        data = decoder.state(convert(step))
        if len(data) != size:
            return False
        C.memmove(out, data, size)
        return True

    def state_set(_user: object, step: Any, data: int, size: int) -> bool:
        return decoder.set_state(convert(step), C.string_at(data, size))

    functions: list[tuple[Any, Callable[..., Any]]] = [
        (bindings.DecodeFunction, decode),
        (bindings.RebaseFunction, rebase),
        (bindings.StateSizeFunction, state_size),
        (bindings.StateGetFunction, state_get),
        (bindings.StateSetFunction, state_set),
    ]
    return tuple(callbacks.guard(kind, function) for kind, function in functions)
