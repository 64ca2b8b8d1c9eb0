"""LoRA adapters of a model, which are part of what it computes: of its tag, and so of its proofs and sessions."""

from __future__ import annotations

import ctypes as C
import hashlib
import os
import struct
from collections.abc import Sequence
from pathlib import Path

from edge_stream.backends import loading
from edge_stream.errors import EdgeStreamError
from edge_stream.models import names
from edge_stream.native import libraries
from edge_stream.native.gguf_header import GgufHeader
from edge_stream.paths import given_path


def _has_output(path: Path) -> bool:
    with GgufHeader(path) as header:
        return header.has_tensor("output.weight")


class Adapters:
    """Adapters loaded for a model (a llama_model *), which frees them. Raises EdgeStreamError.

    path, architecture: the model's. chosen: files and scales.
    """

    def __init__(self, model: int, path: Path, architecture: str, chosen: Sequence[tuple[str, float]]) -> None:
        llama = libraries.llama()
        self.scales = [scale for _, scale in chosen]
        self._tags = []
        self._handles = []
        for name, _ in chosen:
            file = given_path(name)
            if not file.is_file():
                raise EdgeStreamError(f"LoRA adapter {name} does not exist")
            with GgufHeader(file) as header:
                what, arch = header.text("general.type"), header.text("general.architecture")
                embedding = header.has_tensor("token_embd.weight.lora_a")
            if what == "adapter" and arch != architecture:
                raise EdgeStreamError(
                    f"LoRA adapter {name} is for another architecture, {arch}: the model is {architecture}"
                )
            if embedding and not any(_has_output(part) for part in names.parts(path)):  # llama.cpp would abort
                raise EdgeStreamError(
                    f"LoRA adapter {name} changes the embedding, which is this model's output matrix too: llama.cpp "
                    "cannot apply it, so merge it into its model"
                )
            handle = llama.llama_adapter_lora_init(model, os.fsencode(file))
            if not handle:
                raise EdgeStreamError(f"llama.cpp cannot load LoRA adapter {name} for this model{loading.log_hint()}")
            if llama.llama_adapter_get_alora_n_invocation_tokens(handle):
                raise EdgeStreamError(f"{name} is an activated LoRA, which a stream would switch on and off: merge it")
            self._handles.append(C.cast(handle, C.c_void_p).value)
            self._tags.append(loading.weights_tag(file))

    def tag(self, weights: int) -> int:
        """The 64-bit tag of weights with these adapters on them; that of the weights alone if there are none."""
        if not self._tags:
            return weights
        data = b"".join(struct.pack("<Qd", tag, scale) for tag, scale in zip(self._tags, self.scales, strict=True))
        return int.from_bytes(hashlib.sha256(struct.pack("<Q", weights) + data).digest()[:8], "little")

    def apply(self, context: int) -> None:
        """Have a llama_context * compute with the adapters."""
        if not self._handles:
            return
        n = len(self._handles)
        handles, scales = (C.c_void_p * n)(*self._handles), (C.c_float * n)(*self.scales)
        llama = libraries.llama()
        kind = llama.llama_set_adapters_lora.argtypes[1]
        if llama.llama_set_adapters_lora(context, C.cast(handles, kind), n, scales):
            raise EdgeStreamError("llama.cpp cannot apply the LoRA adapters")
