"""Backends: llama.cpp for GGUF files and TVM for MLC folders, behind one protocol.

An `Engine` is a backend and its streams. Over either backend, native code (libedge_stream) decides what is evicted and
when, samples, and saves sessions.
"""

from __future__ import annotations

import ctypes as C
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from edge_stream.cache_types import CACHE_TYPES, CacheType
from edge_stream.errors import EdgeStreamError

if TYPE_CHECKING:
    from edge_stream.backends.llama import LlamaBackend
    from edge_stream.backends.llama_cache import LlamaCache
    from edge_stream.backends.tvm import TvmBackend
    from edge_stream.hardware.devices import Device
    from edge_stream.native import bindings
    from edge_stream.native.callbacks import Callbacks
    from edge_stream.vocabulary import Vocabulary


MAX_THREADS = 512  # ggml's GGML_MAX_N_THREADS: it writes out of bounds beyond it
MODES = ("stream", "window", "dense", "recompute", "shift")  # ways of reading a long text: measure/modes.py


@dataclass(frozen=True)
class LoadOptions:
    """How a model is loaded and its cache allocated.

    n_ctx: cache capacity in tokens, sinks + window (0: the model's training length). n_keep: sinks. n_slide: minimum
    tokens per eviction (0: 1, 16 with drafts, or n_window/16 when sinks are moved by redecoding). n_draft: most
    tokens that are guessed from what the stream has seen and verified in one decode (0: none), n_draft_min and
    n_match: see es_stream_params. draft_model: one with the same vocabulary that guesses too, named as in
    Engine.load; n_gpu_layers_draft: its layers on devices. n_gpu_layers: layers to offload to devices (None: all).
    devices: names of the devices to use (`edge-stream info` lists them), ["none"] for none, None for all. split_mode:
    how layers are split over several devices (none, layer, row). rpc: RPC servers as host:port; their devices are
    used too. rebase_at: absolute position that triggers a rebase (0: default). n_parallel: streams in the cache, each
    of n_ctx tokens. proof: have the model prove once that it streams exactly, and refuse it if it does not
    (docs/models.md). load_mode: how the file is read: auto, none, mmap, mlock, mmap+mlock or dio. lora: files of LoRA
    adapters and their scales. tensor_split: proportions of the devices. override_tensor: patterns of tensor names and
    the buffer types that hold these. model_params: other fields of llama_model_params. eval_callback: llama.cpp's
    cb_eval, called for every tensor (a ctypes function, see llama_context_params). on_load: is told the percentage of
    a GGUF file's tensors that have been read; what it raises ends the load.
    """

    n_ctx: int = 4096
    n_keep: int = 4
    n_batch: int = 512
    n_ubatch: int = 512
    cache_type_k: str = "f16"
    cache_type_v: str = "f16"
    flash_attn: str = "auto"
    n_threads: int | None = None
    n_threads_batch: int | None = None
    n_gpu_layers: int | None = None
    devices: Sequence[str] | None = None
    split_mode: str = "layer"
    rpc: Sequence[str] = ()
    sink_move: str = "auto"
    n_slide: int = 0
    n_draft: int = 0
    draft_model: str = ""
    n_gpu_layers_draft: int | None = None
    n_draft_min: int = 0
    n_match: int = 0
    rebase_at: int = 0
    n_parallel: int = 1
    load_mode: str = "auto"
    proof: bool = True
    verbose: bool = False
    lora: Sequence[tuple[str, float]] = ()
    tensor_split: Sequence[float] = ()
    override_tensor: Sequence[tuple[str, str]] = ()
    model_params: Mapping[str, Any] = field(default_factory=dict)
    eval_callback: Any = None
    on_load: Callable[[int], object] | None = None

    @property
    def cache_types(self) -> tuple[CacheType, CacheType]:
        """Of keys and of values."""
        return CACHE_TYPES[self.cache_type_k], CACHE_TYPES[self.cache_type_v]


@dataclass(frozen=True)
class Capabilities:
    """What a backend can do. Anything else is refused here, in one sentence."""

    name: str  # as the subject of a sentence
    max_parallel: int
    cache_types: tuple[str, ...]
    flash_attn: tuple[str, ...]
    sink_moves: tuple[str, ...]
    modes: tuple[str, ...]  # of measure/modes.py
    offloads: bool  # layers can be offloaded to devices and RPC servers
    loads_tensors: bool  # LoRA adapters, and where and how tensors are kept
    has_eval_callback: bool

    def check(self, options: LoadOptions) -> None:
        """Raise EdgeStreamError for an option that the backend does not support."""
        o = options
        elsewhere = o.n_gpu_layers or o.rpc or (o.devices and list(o.devices) != ["none"]) or o.split_mode != "layer"
        if elsewhere and not self.offloads:
            raise EdgeStreamError(f"{self.name} runs on the CPU here: leave -ngl, --device, -sm and --rpc out")
        loading = o.lora or o.tensor_split or o.override_tensor or o.model_params or o.load_mode != "auto"
        if loading and not self.loads_tensors:
            raise EdgeStreamError(
                f"{self.name} has no adapters, and no flags for how tensors are loaded: leave them out"
            )
        if not 1 <= o.n_parallel <= self.max_parallel:
            most = "1" if self.max_parallel == 1 else f"between 1 and {self.max_parallel}"
            why = f"{self.name} holds one stream at a time: " if self.max_parallel == 1 else ""
            raise EdgeStreamError(f"{why}n_parallel = {o.n_parallel} must be {most}")
        if o.eval_callback is not None and not self.has_eval_callback:
            raise EdgeStreamError(f"{self.name} does not show its tensors: give a GGUF file")
        if o.sink_move not in self.sink_moves:
            why = "has no sinks to move; leave it at auto" if len(self.sink_moves) == 1 else "does not know it"
            raise EdgeStreamError(f"sink_move = {o.sink_move}: {self.name} {why}")
        for cache_type in (o.cache_type_k, o.cache_type_v):
            if cache_type not in self.cache_types:
                have = _listed(self.cache_types)
                raise EdgeStreamError(f"cache type {cache_type} is unknown: {self.name} has {have}")
        if o.flash_attn not in self.flash_attn:
            raise EdgeStreamError(f"flash_attn = {o.flash_attn} is unknown: {self.name} has {_listed(self.flash_attn)}")
        for name in ("n_threads", "n_threads_batch"):
            if not 1 <= (getattr(o, name) or 1) <= MAX_THREADS:
                raise EdgeStreamError(f"{name} = {getattr(o, name)} must be between 1 and {MAX_THREADS}")
        if o.draft_model and not o.n_draft:
            raise EdgeStreamError("a draft model needs n_draft, the most tokens that it may guess at once")
        for name in ("n_slide", "rebase_at", "n_draft", "n_draft_min", "n_match"):
            if getattr(o, name) < 0:
                raise EdgeStreamError(f"{name} must not be negative")

    def check_mode(self, mode: str) -> None:
        """Raise EdgeStreamError for a mode (measure/modes.py) that the backend does not support."""
        if mode not in self.modes:
            have = _listed(self.modes)
            raise EdgeStreamError(f"mode {mode} drives llama.cpp's cache: {self.name} has modes {have}")


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]])


@dataclass(frozen=True)
class ModelFacts:
    """Facts about a model.

    desc: one line, e.g. `llama 134M Q4_1`. architecture: llama.cpp's or MLC's name. metadata: of the model's file,
    without arrays. n_ctx_train: training context length in tokens. n_params, n_bytes: number and bytes of the weights.
    n_head: attention heads per layer. is_recurrent: it has a state and no KV cache; sinks and n_ctx do not apply.
    weights_tag: 64 bits that identify the weights.
    """

    desc: str
    architecture: str
    metadata: dict[str, str]
    n_ctx_train: int
    n_params: int
    n_bytes: int
    n_layer: int
    n_head: int
    is_recurrent: bool
    weights_tag: int


class Backend(Protocol):
    """A loaded model with a KV cache of fixed size.

    sink_move: bank, redecode or none. n_spare: cells of the cache beyond those of its streams (redecode). n_threads:
    threads that decode single tokens. state_bytes: size of the recurrent layers' states, constant in stream length (0:
    none, or a stock libllama). kv_bytes_per_token: over the layers that have a KV cache. devices: those that hold
    layers, as they were before the cache was allocated; empty if all layers are on the CPU.
    """

    capabilities: Capabilities
    path: Path
    options: LoadOptions  # with n_ctx resolved
    facts: ModelFacts
    vocabulary: Vocabulary
    callbacks: Callbacks
    sink_move: str
    n_spare: int
    n_threads: int
    state_bytes: int
    kv_bytes_per_token: int
    devices: list[Device]

    def cache_bytes(self, n_cells: int) -> tuple[int, int]:
        """Bytes of a KV cache of n_cells: (in host memory, in device memory)."""

    def init_stream(self, params: bindings.StreamParams) -> C.c_void_p:
        """A new es_stream."""

    def set_adapters(self, scales: Sequence[float]) -> None:
        """Other scales for all of options.lora, while there are no streams: facts.weights_tag changes with them."""

    def cache(self) -> LlamaCache:
        """The cache without a stream, for modes that drive it directly."""

    def synchronize(self) -> None:
        """Wait until the device has finished (for timing)."""

    def close(self) -> None:
        """Free everything but the streams, which must be freed first."""


def _backend_of(path: Path) -> type[LlamaBackend] | type[TvmBackend]:
    # imported only when needed: TVM is an extra
    if path.is_dir():
        from edge_stream.backends.tvm import TvmBackend

        return TvmBackend
    from edge_stream.backends.llama import LlamaBackend

    return LlamaBackend


def capabilities(path: Path) -> Capabilities:
    """What a model's backend can do, known before it is loaded."""
    return _backend_of(path).capabilities


def open_backend(path: Path, options: LoadOptions) -> Backend:
    """Load a GGUF file or an MLC folder. Raises UnsupportedModelError or EdgeStreamError."""
    return _backend_of(path)(path, options)
