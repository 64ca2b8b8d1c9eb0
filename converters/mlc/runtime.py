"""Run a compiled MLC model library on TVM's runtime, for --verify and tests: one sequence, no sampler.

Order of cache calls (mlc-llm, cpp/serve/model.cc): add_sequence, enable_sliding_window_for_seq, then for each step
begin_forward, embed, prefill or decode, end_forward.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from numpy.typing import NDArray
from tvm import relax
from tvm.runtime import ShapeTuple

from edge_stream.errors import EdgeStreamError

PAGE_SIZE = 16


class MlcLibrary:
    """A converted model on the CPU, lib.so and weights, with one sequence that slides as in mlc-chat-config.json."""

    def __init__(
        self, folder: Path, library: Path | None = None, *, window: int | None = None, chunk: int | None = None
    ) -> None:
        """window: tokens that the cache keeps after a step, sinks included; chunk: most tokens per step.

        Raises EdgeStreamError if something is missing or the parameters do not match the library.
        """
        library = library or folder / "lib.so"
        if not library.exists():
            raise EdgeStreamError(f"{folder} has no library for this machine: convert with --device cpu")
        self.config: dict[str, Any] = json.loads((folder / "mlc-chat-config.json").read_text(encoding="utf-8"))
        device = tvm.cpu()
        self._vm = relax.VirtualMachine(tvm.runtime.load_module(str(library)), device)
        self.metadata: dict[str, Any] = json.loads(str(self._vm["_metadata"]()))
        self._params = load_params(folder, [p["name"] for p in self.metadata["params"]])
        for want, got in zip(self.metadata["params"], self._params, strict=True):
            if list(got.shape) != want["shape"] or str(got.dtype) != want["dtype"]:
                raise EdgeStreamError(f"parameter {want['name']} is {got.dtype} {list(got.shape)}, not as compiled")
        self._window = window or self.config["sliding_window_size"]
        chunk = chunk or self.config["prefill_chunk_size"]
        sizes = (1, self._window + chunk + 2 * PAGE_SIZE, chunk, PAGE_SIZE, 1)
        self._cache = self._vm["create_tir_paged_kv_cache"](*(ShapeTuple([n]) for n in sizes))
        self.clear(self.config["attention_sink_size"])

    def clear(self, n_keep: int) -> None:
        """Start a new sequence with n_keep sinks."""
        _function("kv_state_clear")(self._cache)
        _function("kv_state_add_sequence")(self._cache, 0)
        _function("attention_kv_cache_enable_sliding_window_for_seq")(self._cache, 0, self._window, n_keep)

    def rewind(self, n: int) -> None:
        """Forget the newest n tokens. Only before the window has slid: after that TVM would corrupt the cache."""
        _function("kv_state_popn")(self._cache, 0, n)

    def feed(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Feed tokens in chunks of the prefill's size; logits [n_tokens, n_vocab]."""
        chunk = self.config["prefill_chunk_size"]
        parts = [tokens[start : start + chunk] for start in range(0, len(tokens), chunk)]
        return np.concatenate([self.step("decode" if len(p) == 1 else "batch_verify", p)[0] for p in parts])

    def step(self, function: str, tokens: Sequence[int], positions: Sequence[int] = ()) -> NDArray[np.float32]:
        """Call prefill, decode, batch_verify or (with positions) batch_prefill on the next tokens.

        Logits [1, n, n_vocab]: of the last token, of every one, or of those at the positions.
        """
        _function("kv_state_begin_forward")(self._cache, ShapeTuple([0]), ShapeTuple([len(tokens)]))
        embeds = self._vm["embed"](tvm.runtime.tensor(np.array(tokens, np.int32)), self._params)
        arguments = [_function("reshape")(embeds, ShapeTuple([1, *embeds.shape]))]
        if function == "batch_prefill":
            arguments.append(tvm.runtime.tensor(np.array(positions, np.int32)))
        logits = self._vm[function](*arguments, self._cache, self._params)[0]
        _function("kv_state_end_forward")(self._cache)
        return np.asarray(logits.numpy())

    def total_length(self) -> int:
        """Tokens in the cache."""
        return int(_function("attention_kv_cache_get_total_sequence_length")(self._cache))


def load_params(folder: Path, names: Sequence[str]) -> list[Any]:
    """Tensors of a tensor cache in the order of names, read by TVM's loader."""
    _function("tensor_cache.load")(str(folder), tvm.cpu().dlpack_device_type(), 0)
    try:
        return list(_function("param_array_from_cache_by_name")(list(names)))
    finally:
        _function("tensor_cache.clear")()


def _function(name: str) -> Any:
    return tvm.get_global_func(f"vm.builtin.{name}")
