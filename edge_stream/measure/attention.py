"""The attention weights of every layer, read through llama.cpp's eval callback."""

from __future__ import annotations

import ctypes as C
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_stream.engine import Engine
from edge_stream.errors import EdgeStreamError
from edge_stream.measure.table import rounded
from edge_stream.native import libraries

if TYPE_CHECKING:
    from numpy.typing import NDArray

FIRST = (1, 2, 4, 8)
_NAME = "kq_soft_max-"  # llama.cpp, src/llama-graph.cpp: build_attn_mha, without flash attention


class _Recorder:
    """llama.cpp's eval callback, and what it found: each layer's weights, mean over heads, [n_tokens, n_tokens]."""

    def __init__(self, n_tokens: int) -> None:
        self.n_tokens = n_tokens
        self.n_head: dict[int, int] = {}
        self.layers: dict[int, NDArray[np.float32]] = {}
        self.failure: str | None = None
        self._ggml = _ggml()
        self.callback = libraries.llama().ggml_backend_sched_eval_callback(self._see)

    def _see(self, tensor: int, ask: bool, _user: object) -> bool:
        try:
            name = str(self._ggml.ggml_get_name(tensor).decode())
            if not name.startswith(_NAME):
                return not ask  # asked: not wanted; else: continue
            if not ask:
                self._keep(int(name[len(_NAME) :]), tensor)
        except Exception as error:  # an exception must not cross into C
            self.failure = str(error)
        return True

    def _keep(self, layer: int, tensor: int) -> None:
        """ne = [n_kv, n_tokens, n_head, 1], float32; cells are the tokens in order, then unused ones."""
        nbytes = self._ggml.ggml_nbytes(tensor)
        if self._ggml.ggml_nelements(tensor) * 4 != nbytes:
            raise EdgeStreamError(f"attention weights of layer {layer} are not float32")
        values = np.empty(nbytes // 4, dtype=np.float32)
        self._ggml.ggml_backend_tensor_get(tensor, values.ctypes.data, 0, nbytes)
        n_kv = len(values) // (self.n_tokens * self.n_head[layer])
        if n_kv * self.n_tokens * self.n_head[layer] != len(values) or n_kv < self.n_tokens:
            raise EdgeStreamError(f"attention weights of layer {layer} have an unexpected shape")
        whole = values.reshape(self.n_head[layer], self.n_tokens, n_kv)
        self.layers[layer] = whole[:, :, : self.n_tokens].mean(axis=0, dtype=np.float64).astype(np.float32)


def _ggml() -> Any:
    """libggml-base, which libllama has loaded, with the signatures that are used here."""
    library = C.CDLL(str(libraries.llama_dir() / libraries._lib_name("ggml-base")))
    library.ggml_get_name.argtypes, library.ggml_get_name.restype = [C.c_void_p], C.c_char_p
    library.ggml_nbytes.argtypes, library.ggml_nbytes.restype = [C.c_void_p], C.c_size_t
    library.ggml_nelements.argtypes, library.ggml_nelements.restype = [C.c_void_p], C.c_int64
    library.ggml_backend_tensor_get.argtypes = [C.c_void_p, C.c_void_p, C.c_size_t, C.c_size_t]
    library.ggml_backend_tensor_get.restype = None
    return library


def maps(model: str, tokens: Sequence[int], settings: dict[str, Any]) -> NDArray[np.float32]:
    """Attention weights of a text, mean over heads: [n_layer, n_tokens, n_tokens]; rows are queries and sum to 1.

    settings: other arguments of Engine.load; flash attention, which never stores these weights, is off. With learned
    sinks rows sum to less. Raises EdgeStreamError if a layer's weights are not seen.
    """
    n = len(tokens)
    libraries.llama()
    recorder = _Recorder(n)
    settings = settings | {"flash_attn": "off", "n_batch": n, "n_ubatch": n, "n_slide": 0}
    with Engine.load(model, n_ctx=n + 1, n_keep=0, eval_callback=recorder.callback, **settings) as engine:
        n_head, n_layer = engine.backend.facts.n_head, engine.backend.facts.n_layer
        recorder.n_head = dict.fromkeys(range(n_layer), n_head)
        recorder.layers.clear()
        with engine.stream() as stream:
            stream.feed(list(tokens))
    missing = [layer for layer in range(n_layer) if layer not in recorder.layers]
    if recorder.failure or missing:
        raise EdgeStreamError(recorder.failure or f"llama.cpp showed no attention weights of layers {missing}")
    return np.stack([recorder.layers[layer] for layer in range(n_layer)])


def mass(found: NDArray[np.float32], first: Sequence[int] = FIRST) -> list[dict[str, Any]]:
    """A row per layer: the share of attention on the first 1, 2, 4 and 8 tokens. Then their mean, and uniform ones.

    Means over the queries of the text's second half. found: [n_layer, n_tokens, n_tokens].
    """
    n = found.shape[1]
    late = found[:, n // 2 :].astype(np.float64)
    queries = np.arange(n // 2, n) + 1  # keys that each can see
    rows: list[dict[str, Any]] = []
    for layer, weights in enumerate(late):
        row: dict[str, Any] = {"layer": layer}
        for k in first:
            row[f"first {k}"] = rounded(float(weights[:, :k].sum(axis=1).mean()), 4)
        rows.append(row)
    average: dict[str, Any] = {"layer": "mean"}
    uniform: dict[str, Any] = {"layer": "uniform"}
    for k in first:
        average[f"first {k}"] = rounded(float(late[:, :, :k].sum(axis=2).mean()), 4)
        uniform[f"first {k}"] = rounded(float((np.minimum(k, queries) / queries).mean()), 4)
    return [*rows, average, uniform]
