"""Engine: a model and its llama_context. It makes streams; the eviction policy lives in native code only."""

from __future__ import annotations

import ctypes as C
import hashlib
import itertools
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from edge_stream import _libs, _native, models, proofs
from edge_stream import devices as device_list
from edge_stream.errors import EdgeStreamError, SessionError, UnsupportedModelError
from edge_stream.stream import Stream, token_array

# name: ggml_type, elements and bytes per block (enum ggml_type and the block structs of ggml)
CACHE_TYPES = {
    "f32": (0, 1, 4),
    "f16": (1, 1, 2),
    "bf16": (30, 1, 2),
    "q8_0": (8, 32, 34),
    "q5_1": (7, 32, 24),
    "q5_0": (6, 32, 22),
    "q4_1": (3, 32, 20),
    "q4_0": (2, 32, 18),
    "iq4_nl": (20, 32, 18),
}
FLASH_ATTN = {"auto": -1, "off": 0, "on": 1}

MAX_PARALLEL = 64

_TAG_BLOCKS = 64
_TAG_BLOCK_BYTES = 1 << 16


def default_threads() -> int:
    """The cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def check_sizes(n_ctx: int, n_keep: int, n_batch: int, n_ubatch: int) -> None:
    """Raise EdgeStreamError for what no cache can have."""
    for name, value in (("n_ctx", n_ctx), ("n_batch", n_batch), ("n_ubatch", n_ubatch)):
        if not 1 <= value <= 1 << 28:
            raise EdgeStreamError(f"{name} = {value} must be between 1 and {1 << 28}")
    if not 0 <= n_keep < n_ctx:
        raise EdgeStreamError(f"n_keep = {n_keep} must be between 0 and n_ctx = {n_ctx} (exclusive)")


def weights_tag(path: Path) -> int:
    """64-bit tag of a model file: its size and 64 evenly spaced blocks, so that a fine-tune is not its base."""
    size = path.stat().st_size
    digest = hashlib.sha256(size.to_bytes(8, "little"))
    with path.open("rb") as file:
        for i in range(_TAG_BLOCKS):
            file.seek(max(0, size - _TAG_BLOCK_BYTES) * i // (_TAG_BLOCKS - 1))
            digest.update(file.read(_TAG_BLOCK_BYTES))
    return int.from_bytes(digest.digest()[:8], "little")


class Engine:
    """A loaded model with a KV cache of fixed size, which holds one stream at a time, or n_parallel of them.

    Use `Engine.load`; close with `close()` or a `with` block. Not for several threads at once.
    """

    _model: int | None = None
    _ctx: int | None = None
    _streams: dict[int, Stream]  # sequence -> the stream that holds its cells
    n_parallel = 1
    _n_slide = 0
    _n_spare = 0
    _eval_callback: Any = None
    _rebase_at = 0
    _n_gpu_layers = 0
    proof: proofs.Proof | None = None  # None: nobody asked for one

    @classmethod
    def load(
        cls,
        model: str | Path,
        *,
        n_ctx: int = 4096,
        n_keep: int = 4,
        n_batch: int = 512,
        n_ubatch: int = 512,
        cache_type_k: str = "f16",
        cache_type_v: str = "f16",
        flash_attn: str = "auto",
        n_threads: int | None = None,
        n_threads_batch: int | None = None,
        n_gpu_layers: int | None = None,
        devices: Sequence[str] | None = None,
        split_mode: str = "layer",
        rpc: Sequence[str] = (),
        sink_move: str = "auto",
        n_slide: int = 0,
        rebase_at: int = 0,
        n_parallel: int = 1,
        use_mmap: bool = True,
        proof: bool = True,
        verbose: bool = False,
        eval_callback: Any = None,
    ) -> Engine:
        """Load a model and allocate its cache.

        model: a GGUF path, an MLC folder, `demo`, or `hf:user/repo[:quant]`. n_ctx: cache capacity in tokens, sinks +
        window (0: the model's training length). n_keep: sinks. n_slide: least tokens per eviction (0: 1, or n_window/16
        when sinks are moved by redecoding). n_gpu_layers: layers to hold on devices (None: all). devices: names that
        layers may go to (`edge-stream info` lists them), ["none"] for none, None for all. split_mode: how layers are
        spread over several devices (none, layer, row). rpc: RPC servers as host:port, whose devices are used too.
        rebase_at: absolute position before which positions are brought back
        (0: default). n_parallel: streams that the cache holds, each of n_ctx tokens. proof: let the model show, once,
        that it streams exactly, and refuse it otherwise (docs/models.md). eval_callback: llama.cpp's
        cb_eval, which sees every tensor (a ctypes function, see llama_context_params). Raises UnsupportedModelError if
        the model cannot stream, EdgeStreamError otherwise.
        """
        path = models.resolve(str(model))
        if path.is_dir() and cls is Engine:
            from edge_stream.mlc.engine import MlcEngine as cls
        self = cls()
        if n_slide < 0 or rebase_at < 0:
            raise EdgeStreamError("n_slide and rebase_at must not be negative")
        if not 1 <= n_parallel <= MAX_PARALLEL:
            raise EdgeStreamError(f"n_parallel = {n_parallel} must be between 1 and {MAX_PARALLEL}")
        self._streams = {}
        self.n_parallel = n_parallel
        self._eval_callback = eval_callback  # llama.cpp keeps the pointer as long as the context
        self._n_slide = n_slide
        self._rebase_at = rebase_at
        try:
            self._load_model(path, (n_gpu_layers, devices, split_mode, rpc), use_mmap, verbose)
            self._make_context(
                n_ctx or self.n_ctx_train,
                n_keep,
                n_batch,
                n_ubatch,
                (cache_type_k, cache_type_v),
                flash_attn,
                (n_threads, n_threads_batch),
                sink_move,
            )
        except BaseException:
            self.close()
            raise
        # creating a stream checks everything else: better now than at first use
        try:
            with self.stream() as stream:
                self.sink_move = stream.stats.sink_move
                if proof:
                    try:
                        self.proof = proofs.prove(self, stream)
                        if n_parallel > 1 and self.proof.distance and not self.proof.parallel:
                            raise UnsupportedModelError(
                                "llama.cpp mixes up the sequences of one batch in this model: only one stream at a time"
                            )
                    except UnsupportedModelError as error:
                        raise UnsupportedModelError(f"{path.name} cannot stream: {error}", error.status) from None
        except BaseException:
            self.close()
            raise
        return self

    def _load_model(
        self,
        path: Path,
        placement: tuple[int | None, Sequence[str] | None, str, Sequence[str]],
        use_mmap: bool,
        verbose: bool,
    ) -> None:
        n_gpu_layers, names, split_mode, rpc = placement
        self._llama = _libs.llama()
        self._native = _native.library()
        self._quiet_log(verbose)
        self._llama.llama_backend_init()
        params = self._llama.llama_model_default_params()
        if split_mode not in device_list.SPLIT_MODES:
            raise EdgeStreamError(
                f"split_mode = {split_mode} is unknown: use one of {', '.join(device_list.SPLIT_MODES)}"
            )
        params.split_mode = device_list.SPLIT_MODES[split_mode]
        chosen = device_list.choose(names, rpc)
        if chosen is not None:
            # a list that ends with NULL; llama.cpp copies it
            handles = (C.c_void_p * (len(chosen) + 1))(*(d.handle for d in chosen), None)
            params.devices = C.cast(handles, C.c_void_p)
        if n_gpu_layers is not None:
            params.n_gpu_layers = n_gpu_layers
        if not use_mmap:
            params.load_mode = self._llama.LLAMA_LOAD_MODE_NONE
        self.model_path = path
        reason = C.create_string_buffer(512)
        if not self._native.es_model_file_check(os.fsencode(path), reason, len(reason)):
            raise EdgeStreamError(f"{path} is damaged: {reason.value.decode(errors='replace')}")
        self._model = self._llama.llama_model_load_from_file(os.fsencode(path), params)
        if not self._model:
            raise EdgeStreamError(f"llama.cpp cannot load {path}{self._log_hint()}")
        self._n_gpu_layers = params.n_gpu_layers
        if not self._native.es_model_can_stream(self._model, reason, len(reason)):
            raise UnsupportedModelError(f"{path.name} cannot stream: {reason.value.decode()}")
        self._vocab = self._llama.llama_model_get_vocab(self._model)
        self._weights_tag = weights_tag(path)

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
        if flash_attn not in FLASH_ATTN:
            raise EdgeStreamError(f"flash_attn = {flash_attn} is unknown: use one of {', '.join(FLASH_ATTN)}")
        if sink_move not in _native.SINK_MOVES:
            raise EdgeStreamError(f"sink_move = {sink_move} is unknown: use auto, bank or redecode")
        if sink_move == "bank" and not self._native.es_bank_available():
            raise EdgeStreamError("sink_move = bank needs edge-stream's own libllama; this one is a stock build")
        bank = sink_move != "redecode" and self._native.es_bank_available()
        self.sink_move = "bank" if bank else "redecode"
        self.flash_attn = flash_attn
        self.n_ctx = n_ctx
        self.n_keep = n_keep
        self.cache_type_k, self.cache_type_v = cache_types
        # redecoding needs room for the sinks a second time, and another sequence to decode them in
        self._n_spare = 0 if bank else max(n_keep, 4)
        n_seq_max = self.n_parallel if bank else self.n_parallel + 1

        params = self._llama.llama_context_default_params()
        params.n_ctx = self.n_parallel * n_ctx + self._n_spare
        params.n_batch = n_batch
        params.n_ubatch = min(n_ubatch, n_batch)
        params.n_seq_max = n_seq_max
        # with cells of its own, a stream's attention does not look at the others'; redecoding shares cells
        params.kv_unified = not (bank and self.n_parallel > 1)
        params.swa_full = True
        params.type_k = self._cache_type(self.cache_type_k)
        params.type_v = self._cache_type(self.cache_type_v)
        params.flash_attn_type = FLASH_ATTN[flash_attn]
        params.n_threads = threads[0] or default_threads()
        params.n_threads_batch = threads[1] or params.n_threads
        params.no_perf = True
        if self._eval_callback is not None:
            params.cb_eval = self._eval_callback
        if self.cache_type_v not in ("f32", "f16", "bf16") and flash_attn == "off":
            raise EdgeStreamError(f"a {self.cache_type_v} V cache needs flash attention (llama.cpp)")
        on_devices = self.cache_bytes(params.n_ctx)[1]
        if on_devices > sum(d.free for d in self.devices) > 0:
            raise EdgeStreamError(self._why_no_context(params, n_ctx))
        self._check_memory(n_ctx)
        self._ctx = self._llama.llama_init_from_model(self._model, params)
        if not self._ctx:
            raise EdgeStreamError(self._why_no_context(params, n_ctx))

    def _check_memory(self, n_ctx: int) -> None:
        need = self.cache_bytes(self.n_parallel * n_ctx + self._n_spare)[0]
        available = available_memory()
        if available is not None and need > available:
            times = f" for each of {self.n_parallel} streams" if self.n_parallel > 1 else ""
            fits = int(available * 0.8) // max(1, self.kv_bytes_per_token) // self.n_parallel
            raise EdgeStreamError(
                f"a cache of n_ctx = {n_ctx}{times} needs {need / 2**20:,.0f} MiB but {available / 2**20:,.0f} MiB "
                f"are available; n_ctx = {fits} would fit"
            )

    def _why_no_context(self, params: Any, n_ctx: int) -> str:
        """A sentence for a context that llama.cpp could not create, or that does not fit: then with one that would."""
        used = self.devices
        per_cell = self.cache_bytes(1)[1]
        if not used or not per_cell:
            return f"llama.cpp cannot create a context with n_ctx = {n_ctx}{self._log_hint()}"
        # a fifth is left for the graph's own buffers. Trying sizes out instead ends the process with some drivers
        fits = int(sum(d.free for d in used) * 0.8 / per_cell - self._n_spare) // self.n_parallel
        free = ", ".join(f"{d.name} has {d.free / 2**20:,.0f} MiB free" for d in used)
        need = params.n_ctx * per_cell / 2**20
        if not 0 < fits < n_ctx:
            return f"llama.cpp cannot create a context with n_ctx = {n_ctx} ({free}){self._log_hint()}"
        return (
            f"a cache of n_ctx = {n_ctx} takes {need:,.0f} MiB of devices ({free}); -c {fits} is the largest that fits"
        )

    def _init_stream(self, params: _native.StreamParams, handle: Any) -> None:
        _native.check(self._native.es_stream_init(self._ctx, params, handle))

    def _check(self, status: int) -> None:
        """Raise what a call on a stream ended with."""
        _native.check(status)

    def synchronize(self) -> None:
        """Wait until the device has finished (timing)."""
        self._llama.llama_synchronize(self._ctx)

    def _cache_type(self, name: str) -> int:
        if name not in CACHE_TYPES:
            raise EdgeStreamError(f"cache type {name} is unknown: use one of {', '.join(CACHE_TYPES)}")
        return CACHE_TYPES[name][0]

    def _quiet_log(self, verbose: bool) -> None:
        """Keep llama.cpp's log off the terminal unless asked for; remember its last error for messages."""
        self._last_log = [""]

        def sink(level: int, text: bytes, _user: object) -> None:
            if verbose:
                os.write(2, text)
            if level == 4:  # GGML_LOG_LEVEL_ERROR
                self._last_log[0] = text.decode(errors="replace").strip()

        callback = self._llama.llama_log_callback(sink)
        _LOG_CALLBACKS.append(callback)  # llama.cpp keeps the pointer for the life of the process
        del _LOG_CALLBACKS[:-2]
        self._llama.llama_log_set(callback, None)

    def _log_hint(self) -> str:
        return f": {self._last_log[0]}" if self._last_log[0] else ""

    #
    # facts
    #

    def _meta(self, function: Any, *args: Any) -> str:
        size = function(self._model, *args, None, 0)
        if size < 0:
            return ""
        buffer = C.create_string_buffer(size + 1)
        function(self._model, *args, buffer, size + 1)
        return buffer.value.decode(errors="replace")

    @property
    def metadata(self) -> dict[str, str]:
        """The GGUF metadata as llama.cpp prints it (arrays are left out)."""
        llama = self._llama
        count = llama.llama_model_meta_count(self._model)
        keys = [self._meta(llama.llama_model_meta_key_by_index, i) for i in range(count)]
        return {
            key: self._meta(llama.llama_model_meta_val_str_by_index, i)
            for i, key in enumerate(keys)
            if not key.startswith("tokenizer.ggml.") or not key.endswith(("tokens", "merges", "scores", "token_type"))
        }

    @property
    def desc(self) -> str:
        """llama.cpp's one-line description, e.g. `llama 134M Q4_1`."""
        return self._meta(self._llama.llama_model_desc)

    @property
    def architecture(self) -> str:
        return self._meta(self._llama.llama_model_meta_val_str, b"general.architecture")

    @property
    def chat_template(self) -> str | None:
        """The model's own chat template (Jinja), if it has one."""
        template = self._llama.llama_model_chat_template(self._model, None)
        return template.decode(errors="replace") if template else None

    @property
    def n_vocab(self) -> int:
        return int(self._llama.llama_vocab_n_tokens(self._vocab))

    @property
    def n_ctx_train(self) -> int:
        return int(self._llama.llama_model_n_ctx_train(self._model))

    @property
    def n_params(self) -> int:
        """The model's weights."""
        return int(self._llama.llama_model_n_params(self._model))

    @property
    def n_bytes(self) -> int:
        """Bytes of the weights."""
        return int(self._llama.llama_model_size(self._model))

    @property
    def n_threads(self) -> int:
        """Threads that decode single tokens."""
        return int(self._llama.llama_n_threads(self._ctx))

    @property
    def bos(self) -> int:
        return int(self._llama.llama_vocab_bos(self._vocab))

    @property
    def eos(self) -> int:
        return int(self._llama.llama_vocab_eos(self._vocab))

    @property
    def add_bos(self) -> bool:
        """True if the model wants BOS at the start of a text."""
        return bool(self._llama.llama_vocab_get_add_bos(self._vocab))

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of KV cache per token, over the layers that have one."""
        types = (self._cache_type(self.cache_type_k), self._cache_type(self.cache_type_v))
        known = int(self._native.es_model_bytes_per_token(self._model, *types))
        return known if known or self.is_recurrent else self._estimated_bytes_per_token()

    def _estimated_bytes_per_token(self) -> int:
        """With a stock libllama: as if all layers were alike."""
        arch = self.architecture
        meta = self.metadata
        n_layer = int(self._llama.llama_model_n_layer(self._model))
        n_head_kv = int(self._llama.llama_model_n_head_kv(self._model))
        head = int(self._llama.llama_model_n_embd(self._model)) // max(
            1, int(self._llama.llama_model_n_head(self._model))
        )
        row_k = n_head_kv * int(meta.get(f"{arch}.attention.key_length", head))
        row_v = n_head_kv * int(meta.get(f"{arch}.attention.value_length", head))
        size = self._ggml_row_size
        return n_layer * (size(self.cache_type_k, row_k) + size(self.cache_type_v, row_v))

    @property
    def is_recurrent(self) -> bool:
        """True for a model that keeps a state and no keys: sinks and n_ctx mean nothing to it."""
        return bool(self._llama.llama_model_is_recurrent(self._model))

    @property
    def state_bytes(self) -> int:
        """Bytes of the recurrent layers' states, however long the streams (0: none, or a stock libllama)."""
        cache, state = C.c_uint64(), C.c_uint64()
        self._native.es_context_memory(self._ctx, C.byref(cache), C.byref(state))
        return state.value

    def cache_bytes(self, n_cells: int) -> tuple[int, int]:
        """Bytes of a KV cache of n_cells: (in the host's memory, in the devices')."""
        total = n_cells * self.kv_bytes_per_token
        n_layer = int(self._llama.llama_model_n_layer(self._model))
        # llama.cpp offloads the last layers; their cache goes with them. The output counts as one layer more
        wanted = n_layer + 1 if self._n_gpu_layers < 0 else self._n_gpu_layers
        n_offloaded = min(n_layer, max(0, wanted - 1)) if self.devices else 0
        on_devices = total * n_offloaded // n_layer
        return total - on_devices, on_devices

    @cached_property
    def devices(self) -> list[device_list.Device]:
        """The devices that hold layers of the model, as they were before the cache; empty if all are with the CPU."""
        if self._n_gpu_layers == 0:
            return []
        handles = (self._native.es_model_device(self._model, i) for i in itertools.count())
        return [device_list.device(handle) for handle in itertools.takewhile(bool, handles)]

    @staticmethod
    def _ggml_row_size(name: str, n: int) -> int:
        _, block, size = CACHE_TYPES[name]
        return -(-n // block) * size

    #
    # text
    #

    def tokenize(self, text: str, *, add_bos: bool = False, special: bool = False) -> list[int]:
        """Tokens of a text. special: text like `<|im_end|>` becomes the control token that it spells."""
        data = text.encode("utf-8", errors="surrogatepass")
        size = len(data) + 2
        while True:
            buffer = (C.c_int32 * size)()
            n = self._llama.llama_tokenize(self._vocab, data, len(data), buffer, size, add_bos, special)
            if n >= 0:
                return buffer[:n]
            size = -n

    def token_to_piece(self, token: int, special: bool = False) -> bytes:
        """The bytes of a token; control tokens are empty unless special."""
        size = 64
        while True:
            buffer = C.create_string_buffer(size)
            n = self._llama.llama_token_to_piece(self._vocab, token, buffer, size, 0, special)
            if n >= 0:
                return buffer.raw[:n]
            size = -n

    def detokenize(self, tokens: list[int]) -> bytes:
        """The bytes of several tokens, control tokens left out."""
        return b"".join(self.token_to_piece(token) for token in tokens)

    def is_eog(self, token: int) -> bool:
        """True for tokens that end a generation (EOS, end of turn)."""
        return bool(self._llama.llama_vocab_is_eog(self._vocab, token))

    @cached_property
    def eog_tokens(self) -> tuple[int, ...]:
        """All tokens that end a generation."""
        return tuple(token for token in range(self.n_vocab) if self.is_eog(token))

    #
    # streams
    #

    def stream(
        self, *, n_keep: int | None = None, n_boundary: int = 0, n_ctx: int | None = None, seq_id: int = 0
    ) -> Stream:
        """An empty stream. It takes over its sequence (0..n_parallel-1): the earlier stream there is closed."""
        if not 0 <= seq_id < self.n_parallel:
            raise EdgeStreamError(f"seq_id = {seq_id} must be between 0 and {self.n_parallel - 1}")
        params = self._native.es_stream_default_params()
        params.seq_id = seq_id
        params.scratch_seq_id = self.n_parallel
        params.n_ctx = self.n_ctx if n_ctx is None else n_ctx
        params.n_keep = self.n_keep if n_keep is None else n_keep
        if self.sink_move == "redecode" and params.n_keep > self._n_spare:
            raise EdgeStreamError(
                f"moving {params.n_keep} sinks by redecoding needs room for them in the cache: "
                f"Engine.load(n_keep={params.n_keep})"
            )
        params.n_slide = self._n_slide
        params.rebase_at = self._rebase_at
        params.n_boundary = n_boundary
        params.sink_move = _native.SINK_MOVES.get(self.sink_move, 0)
        params.model_tag = self._weights_tag
        if seq_id in self._streams:
            self._streams.pop(seq_id).close()
        self._streams[seq_id] = Stream(self, params)
        return self._streams[seq_id]

    def feed_each(self, streams: Sequence[Stream], tokens: Sequence[int]) -> None:
        """Feed tokens[i] to streams[i], all in one decode. The streams must hold all their sinks.

        On failure no token was taken.
        """
        if len(streams) != len(tokens):
            raise EdgeStreamError(f"{len(tokens)} tokens were given for {len(streams)} streams")
        # in a cache of separate cells only neighbours are decoded together
        pairs = sorted(zip(streams, tokens, strict=True), key=lambda pair: pair[0].seq_id)
        handles = (C.c_void_p * len(pairs))(*(stream._handle.value for stream, _ in pairs))
        array = token_array([token for _, token in pairs])
        _native.check(self._native.es_streams_feed(handles, array, len(pairs)))

    def restore(self, path: str | Path, *, seq_id: int = 0) -> Stream:
        """The stream that `Stream.save` wrote, in a sequence. Raises SessionError; the file stays as it is."""
        info, user = peek_session(path)
        if info.n_ctx > self.n_ctx:
            raise SessionError(
                f"session {path} needs n_ctx = {info.n_ctx}, this engine has {self.n_ctx} (-c {info.n_ctx})"
            )
        stream = self.stream(n_keep=info.n_keep, n_ctx=info.n_ctx, seq_id=seq_id)
        try:
            stream._restore(os.fsencode(path), user)
        except BaseException:
            stream.close()
            raise
        return stream

    def close(self) -> None:
        """Free the streams, the context and the model."""
        for stream in self._streams.values():
            stream.close()
        self._streams.clear()
        if self._ctx:
            self._llama.llama_free(self._ctx)
            self._ctx = None
        if self._model:
            self._llama.llama_model_free(self._model)
            self._model = None

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def peek_session(path: str | Path) -> tuple[_native.SessionInfo, bytes]:
    """Facts of a session file and its caller's bytes, both verified; the cache in it is not read.

    Raises SessionError.
    """
    native, name, info = _native.library(), os.fsencode(path), _native.SessionInfo()
    _native.check(native.es_session_peek(name, C.byref(info), None, 0))
    user = C.create_string_buffer(max(1, info.n_user))
    _native.check(native.es_session_peek(name, C.byref(info), user, info.n_user))
    return info, user.raw[: info.n_user]


_LOG_CALLBACKS: list[Any] = []


def available_memory() -> int | None:
    """Bytes of memory that can be had now, None where the system does not tell."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None
