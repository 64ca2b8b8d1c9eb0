"""llama.cpp: a GGUF file and its llama_context."""

from __future__ import annotations

import ctypes as C
import itertools
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from edge_stream.backends import MODES, Capabilities, LoadOptions, ModelFacts, loading, tensors
from edge_stream.backends.adapters import Adapters
from edge_stream.backends.llama_cache import LlamaCache
from edge_stream.cache_types import CACHE_TYPES, choose_flash_attn
from edge_stream.errors import EdgeStreamError, UnsupportedModelError
from edge_stream.hardware import devices as device_list
from edge_stream.hardware import memory
from edge_stream.native import bindings
from edge_stream.native.callbacks import Callbacks
from edge_stream.vocabulary import Vocabulary

FLASH_ATTN = {"auto": -1, "off": 0, "on": 1}

CAPABILITIES = Capabilities(
    name="llama.cpp",
    max_parallel=64,
    cache_types=tuple(CACHE_TYPES),
    flash_attn=tuple(FLASH_ATTN),
    sink_moves=tuple(bindings.SINK_MOVES),
    modes=MODES,
    offloads=True,
    loads_tensors=True,
    has_eval_callback=True,
)


class LlamaBackend:
    """See Backend."""

    capabilities = CAPABILITIES

    def __init__(self, path: Path, options: LoadOptions) -> None:
        CAPABILITIES.check(options)
        self.path, self.options = path, options
        self.callbacks = Callbacks()
        self.model: int = 0  # llama_model *
        self.context: int = 0  # llama_context *
        self.n_spare = 0
        self._native = bindings.library()
        self._llama = loading.start(options.verbose)
        try:
            self._load_model()
            self._make_context()
        except BaseException:
            self.close()
            raise

    def _load_model(self) -> None:
        o, params = self.options, self._llama.llama_model_default_params()
        if o.split_mode not in device_list.SPLIT_MODES:
            raise EdgeStreamError(
                f"split_mode = {o.split_mode} is unknown: use one of {', '.join(device_list.SPLIT_MODES)}"
            )
        params.split_mode = device_list.SPLIT_MODES[o.split_mode]
        if o.n_gpu_layers is not None:
            params.n_gpu_layers = o.n_gpu_layers
        keep_alive = tensors.place(params, o)
        damage = loading.reason(self._native.es_model_file_check, os.fsencode(self.path))
        if damage is not None:
            raise EdgeStreamError(f"{self.path} is damaged: {damage}")
        self.model = loading.load_model(
            self.path, params, self.callbacks, names=o.devices, rpc=o.rpc, on_load=o.on_load
        )
        if not self.model:
            raise EdgeStreamError(f"llama.cpp cannot load {self.path}{loading.log_hint()}")
        del keep_alive
        self._n_gpu_layers = int(params.n_gpu_layers)
        missing = loading.reason(self._native.es_model_can_stream, self.model)
        if missing is not None:
            raise UnsupportedModelError(f"{self.path.name} cannot stream: {missing}")
        self.vocabulary = Vocabulary(self.model)
        tensors.check_locked(o, int(self._llama.llama_model_size(self.model)))
        self.adapters = Adapters(self.model, self.path, self._architecture(), o.lora)
        self.facts = self._read_facts()
        flash_attn, _ = choose_flash_attn(o.flash_attn, o.cache_type_k, o.cache_type_v)
        self.options = replace(o, n_ctx=o.n_ctx or self.facts.n_ctx_train, flash_attn=flash_attn)
        used = (self._native.es_model_device(self.model, i) for i in itertools.count())
        self.devices = (
            [device_list.device(handle) for handle in itertools.takewhile(bool, used)] if self._n_gpu_layers else []
        )
        self.kv_bytes_per_token = self._bytes_per_token()

    def _make_context(self) -> None:
        o = self.options
        loading.check_sizes(o)
        has_bank = self._native.es_bank_available()
        if o.sink_move == "bank" and not has_bank:
            raise EdgeStreamError("sink_move = bank needs edge-stream's own libllama; this one is a stock build")
        bank = o.sink_move != "redecode" and has_bank
        self.sink_move = "bank" if bank else "redecode"
        # redecoding needs cells for a second copy of the sinks, and a sequence to decode it in
        self.n_spare = 0 if bank else max(o.n_keep, 4)

        params = self._llama.llama_context_default_params()
        params.n_ctx = o.n_parallel * o.n_ctx + self.n_spare
        params.n_batch = o.n_batch
        params.n_ubatch = min(o.n_ubatch, o.n_batch)
        params.n_seq_max = o.n_parallel if bank else o.n_parallel + 1
        # with separate cells a stream's attention does not read the others'; redecoding shares cells
        params.kv_unified = not (bank and o.n_parallel > 1)
        params.swa_full = True
        params.type_k, params.type_v = (t.ggml_type for t in o.cache_types)
        params.flash_attn_type = FLASH_ATTN[o.flash_attn]
        params.n_threads = o.n_threads or loading.default_threads()
        params.n_threads_batch = o.n_threads_batch or params.n_threads
        params.no_perf = True
        if o.eval_callback is not None:
            params.cb_eval = o.eval_callback  # llama.cpp keeps the pointer, and self.options the function
        on_host, on_devices = self.cache_bytes(params.n_ctx)
        if on_devices > sum(d.free for d in self.devices) > 0:
            raise EdgeStreamError(self._why_no_context(params.n_ctx))
        memory.check_fits(on_host, o.n_ctx, o.n_parallel, self.kv_bytes_per_token)
        self.context = self._native.es_context_init(self.model, params) or 0
        if not self.context:
            raise EdgeStreamError(self._why_no_context(params.n_ctx))
        self.adapters.apply(self.context)
        self.n_threads = int(params.n_threads)
        cache, state = C.c_uint64(), C.c_uint64()
        self._native.es_context_memory(self.context, C.byref(cache), C.byref(state))
        self.state_bytes = state.value

    def _why_no_context(self, n_cells: int) -> str:
        """Why llama.cpp cannot create the context; if it does not fit, with the n_ctx that would."""
        used, n_ctx = self.devices, self.options.n_ctx
        per_cell = self.cache_bytes(1)[1]
        if not used or not per_cell:
            return f"llama.cpp cannot create a context with n_ctx = {n_ctx}{loading.log_hint()}"
        # a fifth is left for the graph's buffers. Trying sizes instead would abort the process with some drivers
        fits = int(sum(d.free for d in used) * 0.8 / per_cell - self.n_spare) // self.options.n_parallel
        free = ", ".join(f"{d.name} has {d.free / 2**20:,.0f} MiB free" for d in used)
        need = n_cells * per_cell / 2**20
        if not 0 < fits < n_ctx:
            return f"llama.cpp cannot create a context with n_ctx = {n_ctx} ({free}){loading.log_hint()}"
        return (
            f"a cache of n_ctx = {n_ctx} takes {need:,.0f} MiB of devices ({free}); -c {fits} is the largest that fits"
        )

    def _read_facts(self) -> ModelFacts:
        llama, model = self._llama, self.model
        count = llama.llama_model_meta_count(model)
        keys = [self._text(llama.llama_model_meta_key_by_index, i) for i in range(count)]
        return ModelFacts(
            desc=self._text(llama.llama_model_desc),
            architecture=self._architecture(),
            metadata={key: self._text(llama.llama_model_meta_val_str_by_index, i) for i, key in enumerate(keys)},
            n_ctx_train=int(llama.llama_model_n_ctx_train(model)),
            n_params=int(llama.llama_model_n_params(model)),
            n_bytes=int(llama.llama_model_size(model)),
            n_layer=int(llama.llama_model_n_layer(model)),
            n_head=int(llama.llama_model_n_head(model)),
            is_recurrent=bool(llama.llama_model_is_recurrent(model)),
            weights_tag=self.adapters.tag(loading.weights_tag(self.path)),
        )

    def _architecture(self) -> str:
        return self._text(self._llama.llama_model_meta_val_str, b"general.architecture")

    def _text(self, function: Any, *args: Any) -> str:
        size = function(self.model, *args, None, 0)
        if size < 0:
            return ""
        buffer = C.create_string_buffer(size + 1)
        function(self.model, *args, buffer, size + 1)
        return buffer.value.decode(errors="replace")

    def _bytes_per_token(self) -> int:
        facts, (type_k, type_v) = self.facts, self.options.cache_types
        known = int(self._native.es_model_bytes_per_token(self.model, type_k.ggml_type, type_v.ggml_type))
        if known or facts.is_recurrent:
            return known
        # a stock libllama does not tell: assume that all layers are alike
        n_head_kv = int(self._llama.llama_model_n_head_kv(self.model))
        head = int(self._llama.llama_model_n_embd(self.model)) // max(1, facts.n_head)
        key, value = (
            facts.metadata.get(f"{facts.architecture}.attention.{what}_length", head) for what in ("key", "value")
        )
        return facts.n_layer * (type_k.row_bytes(n_head_kv * int(key)) + type_v.row_bytes(n_head_kv * int(value)))

    def cache_bytes(self, n_cells: int) -> tuple[int, int]:
        """See Backend."""
        total = n_cells * self.kv_bytes_per_token
        n_layer = self.facts.n_layer
        # llama.cpp offloads the last layers, and their cache with them. The output counts as one more layer
        wanted = n_layer + 1 if self._n_gpu_layers < 0 else self._n_gpu_layers
        n_offloaded = min(n_layer, max(0, wanted - 1)) if self.devices else 0
        on_devices = total * n_offloaded // n_layer
        return total - on_devices, on_devices

    def init_stream(self, params: bindings.StreamParams) -> C.c_void_p:
        """See Backend."""
        handle = C.c_void_p()
        bindings.check(self._native.es_stream_init(self.context, params, C.byref(handle)))
        return handle

    def set_adapters(self, scales: Sequence[float]) -> None:
        """See Backend."""
        chosen = [(file, scale) for (file, _), scale in zip(self.options.lora, scales, strict=True)]
        self.options = replace(self.options, lora=chosen)
        self.adapters.scales = list(scales)
        self.adapters.apply(self.context)
        self.facts = replace(self.facts, weights_tag=self.adapters.tag(loading.weights_tag(self.path)))

    def cache(self) -> LlamaCache:
        """See Backend."""
        return LlamaCache(self.model, self.context, self.vocabulary.size)

    def synchronize(self) -> None:
        """See Backend."""
        self._llama.llama_synchronize(self.context)

    def close(self) -> None:
        """See Backend."""
        if self.context:
            self._llama.llama_free(self.context)
            self.context = 0
        if self.model:
            self._llama.llama_model_free(self.model)
            self.model = 0
