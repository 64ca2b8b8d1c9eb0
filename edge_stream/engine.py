"""Engine: a loaded model and its streams. Start here to embed edge-stream in Python."""

from __future__ import annotations

import ctypes as C
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_stream.backends import Backend, LoadOptions, open_backend
from edge_stream.errors import EdgeStreamError, SessionError, UnsupportedModelError
from edge_stream.models import names, proofs
from edge_stream.native import bindings
from edge_stream.session_file import peek_session
from edge_stream.stream import Stream, token_array

if TYPE_CHECKING:
    from edge_stream.hardware.devices import Device


class Engine:
    """A loaded model with a KV cache of fixed size, for one stream, or n_parallel of them.

    Use `Engine.load`; close with `close()` or a `with` block. Not thread-safe.
    """

    def __init__(self, backend: Backend, draft: Backend | None = None) -> None:
        self.backend = backend
        self.draft = draft  # the draft model
        self.proof: proofs.Proof | None = None  # None: loaded without a proof
        self._streams: dict[int, Stream] = {}  # sequence id -> its open stream

    @classmethod
    def load(cls, model: str | Path, **options: Any) -> Engine:
        """Load a model and allocate its cache.

        model: a GGUF path, an MLC folder, `demo`, or `hf:user/repo[:quant]`. options: the fields of
        backends.LoadOptions. Raises UnsupportedModelError if the model cannot stream, EdgeStreamError otherwise.
        """
        wanted = LoadOptions(**options)
        backend = open_backend(names.resolve(str(model)), wanted)
        try:
            draft = open_draft(wanted, backend) if wanted.draft_model else None
        except BaseException:
            backend.close()
            raise
        return cls.over(backend, draft)

    @classmethod
    def over(cls, backend: Backend, draft: Backend | None = None) -> Engine:
        """An engine that owns loaded backends. Raises UnsupportedModelError if the model cannot stream."""
        engine = cls(backend, draft)
        try:
            # creating a stream makes the remaining checks: better now than at first use
            with engine.stream() as stream:
                backend.sink_move = stream.stats.sink_move
                if backend.options.proof:
                    engine._prove(stream)
        except BaseException:
            engine.close()
            raise
        return engine

    def _prove(self, stream: Stream) -> None:
        try:
            self.proof = proofs.prove(stream)
            if self.n_parallel > 1 and self.proof.distance and not self.proof.parallel:
                raise UnsupportedModelError(
                    "llama.cpp mixes up the sequences of one batch in this model: only one stream at a time"
                )
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"{self.model_path.name} cannot stream: {error}", error.status) from None

    #
    # streams
    #

    def stream(
        self, *, n_keep: int | None = None, n_boundary: int = 0, n_ctx: int | None = None, seq_id: int = 0
    ) -> Stream:
        """An empty stream in a sequence (0..n_parallel-1); an earlier stream of that sequence is closed."""
        if not 0 <= seq_id < self.n_parallel:
            raise EdgeStreamError(f"seq_id = {seq_id} must be between 0 and {self.n_parallel - 1}")
        params = bindings.library().es_stream_default_params()
        params.seq_id = seq_id
        params.scratch_seq_id = self.n_parallel
        params.n_ctx = self.n_ctx if n_ctx is None else n_ctx
        params.n_keep = self.n_keep if n_keep is None else n_keep
        if self.sink_move == "redecode" and params.n_keep > self.backend.n_spare:
            raise EdgeStreamError(
                f"moving {params.n_keep} sinks by redecoding needs room for them in the cache: "
                f"Engine.load(n_keep={params.n_keep})"
            )
        params.n_slide = self.backend.options.n_slide
        params.rebase_at = self.backend.options.rebase_at
        params.n_boundary = n_boundary
        params.sink_move = bindings.SINK_MOVES.get(self.sink_move, 0)
        params.model_tag = self.backend.facts.weights_tag
        for name in ("n_draft", "n_draft_min", "n_match"):
            setattr(params, name, getattr(self.backend.options, name))
        if seq_id in self._streams:
            self._streams.pop(seq_id).close()
        stream = self._streams[seq_id] = Stream(self.backend, params)
        if self.draft:
            # its guesses may be of a window of any kind, so that it follows the stream's size and nothing else
            own = bindings.library().es_stream_default_params()
            for name in ("seq_id", "scratch_seq_id", "n_ctx", "n_keep"):
                setattr(own, name, getattr(params, name))
            stream.use_draft(self.draft.init_stream(own))
        return stream

    def feed_each(self, streams: Sequence[Stream], tokens: Sequence[int]) -> None:
        """Feed tokens[i] to streams[i], all in one decode. The streams must hold all their sinks.

        On failure no token has been fed.
        """
        if len(streams) != len(tokens):
            raise EdgeStreamError(f"{len(tokens)} tokens were given for {len(streams)} streams")
        if len(streams) == 1:
            streams[0].feed_tokens(tokens)
            return
        # without unified cells llama.cpp puts only neighbouring sequences into one ubatch
        pairs = sorted(zip(streams, tokens, strict=True), key=lambda pair: pair[0].seq_id)
        handles = (C.c_void_p * len(pairs))(*(stream.handle.value for stream, _ in pairs))
        array = token_array([token for _, token in pairs])
        bindings.check(bindings.library().es_streams_feed(handles, array, len(pairs)))

    def restore(self, path: str | Path, *, seq_id: int = 0) -> Stream:
        """The stream that `Stream.save` wrote, in a sequence. Raises SessionError. The file is only read."""
        info, user = peek_session(path)
        if info.n_ctx > self.n_ctx:
            raise SessionError(
                f"session {path} needs n_ctx = {info.n_ctx}, this engine has {self.n_ctx} (-c {info.n_ctx})"
            )
        stream = self.stream(n_keep=info.n_keep, n_ctx=info.n_ctx, seq_id=seq_id)
        try:
            stream.load(path, user)
        except BaseException:
            stream.close()
            raise
        return stream

    def set_adapters(self, scales: Sequence[float]) -> None:
        """Other scales for all adapters (LoadOptions.lora). Closes every stream: its cache is of the model before."""
        self._close_streams()
        self.backend.set_adapters(scales)

    def close(self) -> None:
        """Free the streams, the cache and the model."""
        self._close_streams()
        self.backend.close()
        if self.draft:
            self.draft.close()

    def _close_streams(self) -> None:
        for stream in self._streams.values():
            stream.close()
        self._streams.clear()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    #
    # text: see Vocabulary
    #

    def tokenize(self, text: str, *, add_bos: bool = False, special: bool = False) -> list[int]:
        """Tokens of a text. special: parse text such as `<|im_end|>` as control tokens."""
        return self.backend.vocabulary.tokenize(text, add_bos=add_bos, special=special)

    def token_to_piece(self, token: int, special: bool = False) -> bytes:
        """The bytes of a token; control tokens are empty unless special."""
        return self.backend.vocabulary.token_to_piece(token, special)

    def detokenize(self, tokens: Sequence[int]) -> bytes:
        """The bytes of several tokens, control tokens left out."""
        return b"".join(self.token_to_piece(token) for token in tokens)

    def is_eog(self, token: int) -> bool:
        """True for tokens that end a generation (EOS, end of turn)."""
        return self.backend.vocabulary.is_eog(token)

    @property
    def n_vocab(self) -> int:
        return self.backend.vocabulary.size

    @property
    def bos(self) -> int:
        return self.backend.vocabulary.bos

    @property
    def eos(self) -> int:
        return self.backend.vocabulary.eos

    @property
    def add_bos(self) -> bool:
        """True if the model expects BOS at the start of a text."""
        return self.backend.vocabulary.add_bos

    @property
    def chat_template(self) -> str | None:
        """The model's own chat template (Jinja), if it has one."""
        return self.backend.vocabulary.chat_template

    #
    # facts: see ModelFacts and Backend
    #

    @property
    def model_path(self) -> Path:
        return self.backend.path

    @property
    def n_ctx(self) -> int:
        """Cache capacity of a stream in tokens."""
        return self.backend.options.n_ctx

    @property
    def n_keep(self) -> int:
        """Sinks."""
        return self.backend.options.n_keep

    @property
    def n_parallel(self) -> int:
        """Streams that the cache holds."""
        return self.backend.options.n_parallel

    @property
    def sink_move(self) -> str:
        """How sinks follow the window: bank, redecode or none."""
        return self.backend.sink_move

    @property
    def desc(self) -> str:
        """One line, e.g. `llama 134M Q4_1`."""
        return self.backend.facts.desc

    @property
    def architecture(self) -> str:
        """llama.cpp's or MLC's name."""
        return self.backend.facts.architecture

    @property
    def metadata(self) -> dict[str, str]:
        """Metadata of the model's file, without arrays."""
        return self.backend.facts.metadata

    @property
    def n_ctx_train(self) -> int:
        """The model's training context length, in tokens."""
        return self.backend.facts.n_ctx_train

    @property
    def n_bytes(self) -> int:
        """Bytes of the weights."""
        return self.backend.facts.n_bytes

    @property
    def is_recurrent(self) -> bool:
        """True for a model with a state and no KV cache; sinks and n_ctx do not apply."""
        return self.backend.facts.is_recurrent

    @property
    def state_bytes(self) -> int:
        """Bytes of the recurrent layers' states, constant in stream length (0: none, or a stock libllama)."""
        return self.backend.state_bytes

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of KV cache per token, over the layers that have one."""
        return self.backend.kv_bytes_per_token

    def cache_bytes(self, n_cells: int) -> tuple[int, int]:
        """Bytes of a KV cache of n_cells: (in host memory, in device memory)."""
        return self.backend.cache_bytes(n_cells)

    @property
    def devices(self) -> list[Device]:
        """The devices that hold layers of the model; empty if all are on the CPU."""
        return self.backend.devices


def open_draft(options: LoadOptions, backend: Backend) -> Backend:
    """The draft model that the options name, with a cache of the backend's size.

    Raises EdgeStreamError, and UnsupportedModelError if the model cannot stream.
    """
    path = names.resolve(options.draft_model)
    if path.is_dir():
        raise EdgeStreamError(f"{path}: a draft model must be a GGUF file")
    o = backend.options
    own = LoadOptions(
        n_ctx=o.n_ctx,
        n_keep=o.n_keep,
        n_parallel=o.n_parallel,
        n_batch=o.n_batch,
        n_ubatch=o.n_ubatch,
        n_threads=o.n_threads,
        n_threads_batch=o.n_threads_batch,
        verbose=o.verbose,
        n_gpu_layers=options.n_gpu_layers_draft,
        devices=o.devices,
    )
    return open_backend(path, own)
