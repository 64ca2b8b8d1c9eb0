"""A tiny random model of every architecture that llama.cpp knows.

llama.cpp itself says which tensors a model has: `llama_model_init_from_user` takes metadata without tensors and asks
for each tensor's values. `make` answers with random weights (scaled like those of tiny_models.py, so that a wrong
position shows) and writes what it answered as a GGUF file. Some metadata makes llama.cpp abort, so

    python tests/tiny_architectures.py FOLDER NAME

makes the model in a process of its own.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from architecture_metadata import FIXTURES, Fill, Fixture, generic
from numpy.typing import NDArray
from raw_llama import N_CTX, Array, GgufInit, Llama, NoFixtureError, Raw, SetTensor, Tensor
from tiny_models import BOS, EOS, N_VOCAB, UNK, build_vocab

# Tensors that llama.cpp takes if they are there, and that most checkpoints of most architectures have not: left out
# unless the model does not load without.
_OPTIONAL = re.compile(r"\.(input_)?scale$|^dense_|attn_(q|k|v|qkv|output)\.bias$")


def _writer(path: Path, fixture: Fixture) -> gguf.GGUFWriter:
    w = gguf.GGUFWriter(path, fixture.arch)
    for key, value in fixture.metadata.items():
        key = key[1:] if key.startswith("/") else f"{fixture.arch}.{key}"
        if isinstance(value, bool):
            w.add_bool(key, value)
        elif isinstance(value, float):
            w.add_float32(key, value)
        elif isinstance(value, str):
            w.add_string(key, value)
        elif isinstance(value, list):
            w.add_array(key, value)
        elif value < 0:  # a damaged file
            w.add_int32(key, value)
        else:
            w.add_uint32(key, value)
    n_vocab = fixture.metadata.get("vocab_size", N_VOCAB)
    if "vocab_size" not in fixture.metadata:
        w.add_uint32(f"{fixture.arch}.vocab_size", n_vocab)
    tokens, scores, types = build_vocab(n_vocab)
    w.add_tokenizer_model("llama")
    w.add_token_list(tokens)
    w.add_token_scores(scores)
    w.add_token_types(types)
    w.add_unk_token_id(UNK)
    w.add_bos_token_id(BOS)
    w.add_eos_token_id(EOS)
    w.add_add_bos_token(True)
    w.add_add_space_prefix(False)
    return w


def fill(name: str, shape: tuple[int, ...], rng: np.random.Generator, overrides: Mapping[str, Fill]) -> NDArray[Any]:
    """Values of a tensor [n_out, n_in]: attention scores and logits of standard deviation about 2."""
    for part, override in overrides.items():
        if part in name:
            return override(shape, rng)
    if name.endswith("bias"):
        return rng.normal(0.0, 0.5 if re.search(r"attn_(q|k|v|qkv)\.", name) else 0.1, shape)
    if "rope_freqs" in name:
        return np.broadcast_to(np.geomspace(1.0, 8.0, shape[-1]), shape)
    if "rope_factors_long" in name:
        return np.broadcast_to(np.geomspace(1.0, 12.0, shape[-1]), shape)
    if "rope_factors_short" in name:
        return np.broadcast_to(np.geomspace(1.0, 1.5, shape[-1]), shape)
    if name.endswith("ssm_a"):  # decay: negative
        return -rng.uniform(0.2, 2.0, shape)
    if "norm" in name:
        return (1.5 if "attn_q_norm" in name or "attn_k_norm" in name else 1.0) * rng.uniform(0.7, 1.3, shape)
    if "scale" in name:
        return rng.uniform(0.8, 1.2, shape)
    if len(shape) == 1 or name in ("token_embd.weight", "position_embd.weight"):
        return rng.normal(0.0, 1.0, shape)
    gain = 1.0
    if name == "output.weight":
        gain = 2.0
    elif re.search(r"attn_(q|k|qkv|output|q_b|kv_b|k_b)\.", name):
        gain = 1.5
    return rng.normal(0.0, gain / np.sqrt(shape[-1]), shape)


def _tensors(llama: Llama, fixture: Fixture, seed: int) -> dict[str, Array]:
    """The tensors that llama.cpp asks for."""
    tensors: dict[str, Array] = {}

    def answer(pointer: int, _user: object) -> None:
        name = llama.ggml.ggml_get_name(pointer).decode()
        tensor = Tensor.from_address(pointer)
        shape = tuple(int(tensor.ne[i]) for i in range(llama.ggml.ggml_n_dims(pointer)))[::-1]
        digest = int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "little")
        rng = np.random.default_rng([seed, digest])  # by name: fixtures that differ in metadata only share weights
        values = np.ascontiguousarray(fill(name, shape, rng, fixture.overrides), np.float32)
        if tensor.type == 0:  # GGML_TYPE_F32
            llama.ggml.ggml_backend_tensor_set(pointer, values.ctypes.data, 0, values.nbytes)
        tensors[name] = values

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "metadata.gguf"
        w = _writer(path, fixture)
        w.write_header_to_file()
        w.write_kv_data_to_file()
        w.close()
        metadata = llama.ggml.gguf_init_from_file(os.fsencode(path), GgufInit(True, None))
    callback = SetTensor(answer)
    params = llama.params()
    params.load_mtp = True  # a file holds those layers too, whether they are loaded or not
    model = llama.lib.llama_model_init_from_user(metadata, callback, None, params)
    llama.ggml.gguf_free(metadata)
    if not model:
        raise NoFixtureError(llama.complaint())
    llama.api.llama_model_free(model)
    if "output.weight" not in tensors:  # the embedding is the output matrix too, so it takes the output's scale
        tensors["token_embd.weight"] *= np.float32(2.0 / np.sqrt(tensors["token_embd.weight"].shape[1]))
    return tensors


def _write(llama: Llama, path: Path, fixture: Fixture, seed: int) -> None:
    """The model with as few optional tensors as llama.cpp loads."""
    tensors = _tensors(llama, fixture, seed)
    without = re.compile(fixture.without) if fixture.without else None
    left_out = {name for name in tensors if _OPTIONAL.search(name) or (without and without.search(name))}
    while True:
        w = _writer(path, fixture)
        for name, values in tensors.items():
            if name not in left_out:
                w.add_tensor(name, values)
        w.write_header_to_file()
        w.write_kv_data_to_file()
        w.write_tensors_to_file()
        w.close()
        model = llama.api.llama_model_load_from_file(os.fsencode(path), llama.params())
        if model:
            llama.api.llama_model_free(model)
            return
        reason = llama.complaint()
        missing = re.search(r"tensor '([^']+)'", reason)
        if missing is None or missing[1] not in left_out:
            raise NoFixtureError(reason)
        kind = re.sub(r"\d+", r"\\d+", re.escape(missing[1]))
        left_out = {name for name in left_out if not re.fullmatch(kind, name)}


def draw(n: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(0).integers(10, 256, n)]


def make(path: Path, name: str, seed: int = 0, first: int = 0) -> Path:
    """Write the model `name` (of FIXTURES, or an architecture). Raises NoFixtureError with llama.cpp's reason.

    first: which of several candidates to begin with. Each is announced, because llama.cpp may abort over it.
    """
    llama = Llama()
    reason = "llama.cpp aborts over all metadata tried"
    candidates = [FIXTURES[name]] if name in FIXTURES else list(generic(name))
    for i, fixture in enumerate(candidates[first:], first):
        print(f"candidate {i}", flush=True)
        try:
            _write(llama, path, fixture, seed)
            raw = Raw(llama, path, N_CTX)
            try:
                if raw.memory and not llama.api.llama_model_has_encoder(raw.model):
                    raw.decode(draw(8), 0)
            finally:
                raw.close()
            return path
        except NoFixtureError as error:
            reason = str(error)
    raise NoFixtureError(reason)


def copy_with(good: Path, bad: Path, fixture: Fixture) -> Path:
    """Write the tensors of a model with other metadata."""
    writer = _writer(bad, fixture)
    for tensor in gguf.GGUFReader(good).tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return bad


if __name__ == "__main__":
    make(Path(sys.argv[1]) / f"{sys.argv[2]}.gguf", sys.argv[2])
