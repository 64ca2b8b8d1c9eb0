"""A GGUF file as a Source: Hugging Face's names, layout and config, rebuilt from llama.cpp's."""

from __future__ import annotations

import ctypes as C
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np

from edge_stream.converters import chat_templates, gguf_tensors, vocab_bpe
from edge_stream.converters.config import read_config
from edge_stream.converters.gguf_reader import GgufReader
from edge_stream.converters.safetensors_files import check_finite
from edge_stream.converters.source import TensorInfo
from edge_stream.converters.tensor_names import expected_tensors
from edge_stream.converters.text import quoted
from edge_stream.errors import EdgeStreamError
from edge_stream.families import Gguf, RopeScaling, gguf_families
from edge_stream.hardware import devices
from edge_stream.native import libraries

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edge_stream.converters.vocab import Vocab

_KEYS = {  # config.json -> GGUF, after the architecture's prefix; only some families have them
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "sliding_window": "attention.sliding_window",
    "sliding_window_pattern": "attention.sliding_window_pattern",
    "rope_local_base_freq": "rope.freq_base_swa",
}
_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


class GgufSource:
    """See source.Source. gguf_fields: the file's metadata, which a GGUF writer copies verbatim."""

    def __init__(self, path: Path) -> None:
        """Open a GGUF file, with all parts of a split one. Raises EdgeStreamError for an unsupported architecture."""
        self.path = path
        with _valid_metadata(path):
            self._read()

    def _read(self) -> None:
        path = self.path
        readers = open_parts(path)
        self.gguf_fields: dict[str, gguf.ReaderField] = dict(readers[0][1].fields)
        self._meta = {
            key: field.contents()
            for key, field in self.gguf_fields.items()
            if not key.startswith(("GGUF.", "tokenizer.ggml.tokens", "tokenizer.ggml.merges", "tokenizer.ggml.scores"))
        }
        self.name = str(self._meta.get("general.name") or path.stem)
        self._stored = {t.name: (part, t) for part, reader in readers for t in reader.tensors}
        self.config = self._config()
        self.model = read_config(self.config)
        self.chat_templates = chat_templates.of_gguf(self._meta)
        self.left_out: list[str] = []
        self._gguf_names = self._map_names()
        self.tensors = {
            name: TensorInfo(name, _shape(self._stored[stored][1]), self._stored[stored][1].tensor_type.name.lower())
            for name, stored in self._gguf_names.items()
        }
        self._check_shapes()
        self._tokenizer_files: dict[str, Path | bytes] | None = None

    @cached_property
    def generation_config(self) -> Mapping[str, Any]:
        """The sampling settings, and as eos_token_id every token that ends an answer."""
        return self._sampling() | {"eos_token_id": end_tokens(self.path, self._meta.get("tokenizer.ggml.eom_token_id"))}

    @property
    def tokenizer_files(self) -> Mapping[str, Path | bytes]:
        """tokenizer.json and tokenizer_config.json, rebuilt from the metadata on first use."""
        if self._tokenizer_files is None:
            from edge_stream.converters.tokenizer_files import rebuild

            self._tokenizer_files = dict(rebuild(self.vocab(), self.chat_templates, self.config))
        return self._tokenizer_files

    def load(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[np.floating[Any]]:
        """See Source.load."""
        info = self.tensors[name]
        rows = info.shape[0]
        stop = rows if stop is None else min(stop, rows)
        if gguf_tensors.in_pairs(self.model, name):  # needs whole heads
            head = self.model.head_dim
            first, last = start // head * head, -(-stop // head) * head
            values = gguf_tensors.to_halves(self._rows(name, first, last), head)[start - first : stop - first]
            return np.ascontiguousarray(values)
        values = self._rows(name, start, stop)
        if self.model.family.norm_offset and name.endswith("norm.weight"):
            values = values.astype(np.float32) - np.float32(self.model.family.norm_offset)
        return values

    def _rows(self, name: str, start: int, stop: int) -> NDArray[np.floating[Any]]:
        """Rows in llama.cpp's layout, dequantised."""
        path, tensor = self._stored[self._gguf_names[name]]
        shape = _shape(tensor)
        row_bytes = int(tensor.n_bytes) // shape[0]
        # read, not mapped: mapped pages would count as this process's memory
        offset = int(tensor.data_offset) + start * row_bytes
        try:
            raw = np.fromfile(path, np.uint8, (stop - start) * row_bytes, offset=offset)
        except OSError as error:
            raise EdgeStreamError(f"cannot read {path.name}: {error.strerror or error}") from error
        if raw.size != (stop - start) * row_bytes:
            raise EdgeStreamError(f"{path.name} ends inside tensor {tensor.name}")
        part_shape = (stop - start, *shape[1:])
        kind = tensor.tensor_type
        if kind == gguf.GGMLQuantizationType.F16:
            values: NDArray[np.floating[Any]] = raw.view("<f2").reshape(part_shape)
        elif kind == gguf.GGMLQuantizationType.F32:
            values = raw.view("<f4").reshape(part_shape)
        else:
            values = np.empty(part_shape, dtype=np.float32)
            blocks = raw.reshape(stop - start, row_bytes)
            step = max(1, (1 << 22) // max(1, values[:1].size))
            for i in range(0, stop - start, step):  # the dequantiser makes several copies
                try:
                    values[i : i + step] = gguf.quants.dequantize(blocks[i : i + step], kind)
                except NotImplementedError as error:
                    raise EdgeStreamError(
                        f"{path.name}: tensor {tensor.name} is of type {kind.name}, which no weights have"
                    ) from error
        check_finite(values, tensor.name)
        return values

    def load_mxfp4(self, name: str, item: int) -> NDArray[np.uint8]:
        """See Source.load_mxfp4: no architecture that is read has such tensors."""
        raise EdgeStreamError(f"{self.path.name}: item {item} of {name} cannot be read as MXFP4")

    def vocab(self) -> Vocab:
        """See Source.vocab."""
        with _valid_metadata(self.path):
            return self._vocab()

    def _vocab(self) -> Vocab:
        from edge_stream.converters.vocab import Vocab

        def array(name: str) -> list[Any]:
            field = self.gguf_fields.get(f"tokenizer.ggml.{name}")
            return list(field.contents()) if field is not None else []

        meta = self._meta
        kind = meta.get("tokenizer.ggml.model")
        tokens = array("tokens")
        if kind not in ("llama", "gpt2") or not tokens:
            raise EdgeStreamError(f"{self.path.name} has a {quoted(kind)} tokenizer; llama and gpt2 are supported")
        special = {"unk": "unknown", "pad": "padding"}
        ids = {
            n: meta.get(f"tokenizer.ggml.{special.get(n, n)}_token_id")
            for n in ("bos", "eos", "unk", "pad", "eot", "eom")
        }
        pre = str(meta.get("tokenizer.ggml.pre", "default"))
        # llama.cpp's default if the key is missing (llama-vocab.cpp)
        add_bos = meta.get("tokenizer.ggml.add_bos_token", kind == "llama" or vocab_bpe.adds_bos(pre))
        prefix = meta.get("tokenizer.ggml.add_space_prefix", True) if kind == "llama" else None
        return Vocab(
            kind,
            pre,
            tokens,
            array("token_type") or [1] * len(tokens),
            array("scores"),
            array("merges"),
            {name: int(i) for name, i in ids.items() if i is not None},
            bool(add_bos),
            bool(meta.get("tokenizer.ggml.add_eos_token", False)),
            prefix,
        )

    def close(self) -> None:
        """See Source.close."""

    #
    # metadata
    #

    def _key(self, name: str, default: Any = None) -> Any:
        return self._meta.get(f"{self._meta['general.architecture']}.{name}", default)

    def _config(self) -> dict[str, Any]:
        """config.json, reconstructed from the metadata."""
        arch = self._meta.get("general.architecture")
        known = gguf_families()
        if arch not in known:
            raise EdgeStreamError(f"{self.path.name} has architecture {quoted(arch)}; supported are {', '.join(known)}")
        family = known[arch]
        key = self._key
        n_embd, n_head = key("embedding_length"), key("attention.head_count")
        for name, value in (("embedding_length", n_embd), ("attention.head_count", n_head)):
            if not isinstance(value, int) or value < 1:
                raise EdgeStreamError(f"{self.path.name}: {arch}.{name} is missing, or differs between layers")
        head_dim = key("attention.key_length", n_embd // n_head)
        n_layer = key("block_count")
        embedding = self._stored.get("token_embd.weight")
        if embedding is None:
            raise EdgeStreamError(f"{self.path.name} has no tensor token_embd.weight")
        config: dict[str, Any] = {
            "architectures": [family.hf_class],
            "model_type": family.model_type,
            "hidden_size": n_embd,
            "intermediate_size": key("feed_forward_length"),
            "num_hidden_layers": n_layer,
            "num_attention_heads": n_head,
            "num_key_value_heads": key("attention.head_count_kv", n_head),
            "head_dim": head_dim,
            "vocab_size": _shape(embedding[1])[0],
            "max_position_embeddings": key("context_length"),
            "rms_norm_eps": round_float32(key("attention.layer_norm_rms_epsilon")),
            "rope_theta": round_float32(key("rope.freq_base", 10000.0)),
            "tie_word_embeddings": "output.weight" not in self._stored,
        }
        if key("rope.dimension_count", head_dim) != head_dim:
            config["partial_rotary_factor"] = key("rope.dimension_count") / head_dim
        if family.gguf.qkv_bias and not family.qkv_bias and "blk.0.attn_q.bias" in self._stored:
            config["attention_bias"] = True
        scaling = self._rope_scaling(head_dim)
        if scaling:
            config["rope_scaling"] = scaling
        for name in ("bos", "eos"):
            token = self._meta.get(f"tokenizer.ggml.{name}_token_id")
            if token is not None:
                config[f"{name}_token_id"] = token
        if "edge_stream.sink" in self._meta:
            config["attention_sink"] = self._meta["edge_stream.sink"]
        if family.activation != "silu":
            config["hidden_activation"] = family.activation
        if "query_pre_attn_scalar" in family.defaults:
            config["query_pre_attn_scalar"] = family.gguf.attn_scalar(n_layer, n_embd, n_head, head_dim)
        return config | self._family_keys(family.gguf, n_layer)

    def _family_keys(self, family: Gguf, n_layer: int) -> dict[str, Any]:
        """Keys of config.json that only some families have."""
        config: dict[str, Any] = {}
        for name, default in family.config_keys.items():
            value = self._key(_KEYS[name], default)
            if name == "sliding_window_pattern" and isinstance(value, list):
                kinds = {True: "sliding_attention", False: "full_attention"}
                config["layer_types"] = [kinds[bool(x)] for x in value[:n_layer]]
            else:
                config[name] = round_float32(value) if isinstance(value, float) else value
        return config

    def _rope_scaling(self, head_dim: int) -> dict[str, Any] | None:
        key = self._key
        kind = key("rope.scaling.type", "linear")
        factor = key("rope.scaling.factor", 0.0) or key("rope.scale_linear", 0.0)
        original = key("rope.scaling.original_context_length", key("context_length"))
        if "rope_freqs.weight" in self._stored:
            return self._llama3_scaling(head_dim)
        if "rope_factors_long.weight" in self._stored:
            return {
                "rope_type": "longrope",
                "original_max_position_embeddings": original,
                "attention_factor": round_float32(key("rope.scaling.attn_factor", 1.0)),
                "long_factor": [round_float32(x) for x in self._vector("rope_factors_long.weight")],
                "short_factor": [round_float32(x) for x in self._vector("rope_factors_short.weight")],
            }
        if kind == "none" or not factor or (kind == "linear" and factor == 1.0):
            return None
        scaling: dict[str, Any] = {"rope_type": kind, "factor": round_float32(factor)}
        if kind == "yarn":
            usual = 0.1 * float(np.log(factor)) + 1.0 if factor > 1.0 else 1.0
            scaling["original_max_position_embeddings"] = original
            scaling["attention_factor"] = usual * round_float32(key("rope.scaling.attn_factor", 1.0))
            scaling["beta_fast"] = round_float32(key("rope.scaling.yarn_beta_fast", 32.0))
            scaling["beta_slow"] = round_float32(key("rope.scaling.yarn_beta_slow", 1.0))
        return scaling

    def _vector(self, name: str) -> NDArray[np.float32]:
        path, tensor = self._stored[name]
        return np.fromfile(path, "<f4", int(tensor.n_elements), offset=int(tensor.data_offset))

    def _llama3_scaling(self, head_dim: int) -> dict[str, Any]:
        """The parameters behind rope_freqs, which has only the divisors. Published models use 1, 4 and 8192."""
        divisors = self._vector("rope_freqs.weight")
        base = float(self._key("rope.freq_base", 10000.0))
        factor = float(divisors.max(initial=1.0))
        for original in (8192, *(1 << n for n in range(5, 21))):
            guess = RopeScaling("llama3", factor, original)
            found = gguf_tensors.llama3_divisors(guess, base, head_dim)
            if len(found) == divisors.size and np.allclose(found, divisors, rtol=1e-4):
                break
        else:
            raise EdgeStreamError(
                f"{self.path.name} has rope_freqs that are not Llama 3's: its config cannot be rebuilt"
            )
        return {
            "rope_type": "llama3",
            "factor": round_float32(factor),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": original,
        }

    def _sampling(self) -> dict[str, Any]:
        names = {"temp": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p"}
        found = {n: self._meta.get(f"general.sampling.{key}") for key, n in names.items()}
        return {n: round_float32(v) if isinstance(v, float) else v for n, v in found.items() if v is not None}

    #
    # tensors
    #

    def _map_names(self) -> dict[str, str]:
        by_name = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
        names = gguf.get_tensor_name_map(by_name[self.model.family.gguf.arch], self.model.n_layer)
        mapped: dict[str, str] = {}
        for name in expected_tensors(self.model):
            stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
            if stored is None or stored not in self._stored:
                raise EdgeStreamError(f"{self.path.name} has no tensor {stored} (for {name})")
            mapped[name] = stored
        extra = (
            set(self._stored) - set(mapped.values()) - {f"{n}.weight" for n in gguf_tensors.rope_tensors(self.model)}
        )
        if extra:
            raise EdgeStreamError(
                f"{self.path.name} has a tensor that {self.model.family.model_type} does not: {quoted(min(extra), 80)}"
            )
        return mapped

    def _check_shapes(self) -> None:
        for name, stored in self._gguf_names.items():
            kind, shape = self._stored[stored][1].tensor_type, self.tensors[name].shape
            n_block = gguf.GGML_QUANT_SIZES[kind][0]
            if 0 in shape or shape[-1] % n_block or (len(shape) == 1 and n_block > 1):  # a vector's rows are numbers
                raise EdgeStreamError(f"{self.path.name}: rows of tensor {stored} are no whole blocks of {kind.name}")
        for name, shape in expected_tensors(self.model).items():
            if self.tensors[name].shape != shape:
                raise EdgeStreamError(
                    f"tensor {self._gguf_names[name]} is {list(self.tensors[name].shape)}; "
                    f"by the metadata it must be {list(shape)}"
                )


@contextmanager
def _valid_metadata(path: Path) -> Iterator[None]:
    """Turn errors from metadata of unexpected types or lengths, or not in UTF-8, into one EdgeStreamError."""
    try:
        yield
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, ArithmeticError) as error:
        raise EdgeStreamError(f"{path.name} has invalid metadata") from error


def round_float32(value: Any) -> float:
    """The shortest decimal that rounds to this float32: 9.999999747378752e-06 becomes 1e-05."""
    if not isinstance(value, (int, float, np.floating)):
        raise EdgeStreamError(f"the GGUF metadata has {quoted(value)} where a number is needed")
    return float(str(np.float32(value)))


def _shape(tensor: gguf.ReaderTensor) -> tuple[int, ...]:
    return tuple(int(n) for n in reversed(tensor.shape))


def _parts(path: Path) -> list[Path]:
    """All parts of a split model, in order; of another, the file itself."""
    match = _PART.search(path.name)
    if match is None:
        return [path]
    count = int(match[2])
    parts = [path.with_name(f"{path.name[: match.start()]}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1)]
    for part in parts:
        if not part.exists():
            raise EdgeStreamError(f"{path.name} is split and its part {part.name} is missing")
    return parts


def open_parts(path: Path) -> list[tuple[Path, GgufReader]]:
    """All files of a model. Raises EdgeStreamError for a damaged or a missing one."""
    return [(part, _open(part)) for part in _parts(path)]


def _open(path: Path) -> GgufReader:
    try:
        return GgufReader(path)
    except OSError as error:
        raise EdgeStreamError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # the reader fails in many ways on a damaged file
        raise EdgeStreamError(f"{path.name} is a damaged GGUF file{_damage(path)}") from error


def end_tokens(path: Path, eom: int | None = None) -> list[int]:
    """The tokens at which llama.cpp ends an answer: eos, end of turn, eom, then others, which it knows by their text.

    Only the vocabulary is loaded. Raises EdgeStreamError if llama.cpp refuses it.
    """
    llama, native = libraries.llama(), libraries.edge_stream_library()
    llama.llama_backend_init()
    native.es_log_set(C.c_bool(False))
    params = llama.llama_model_default_params()
    params.vocab_only = True
    devices.place(params)
    model = llama.llama_model_load_from_file(os.fsencode(path), params)
    if not model:
        raise EdgeStreamError(f"llama.cpp cannot read the vocabulary of {path.name}{_logged(native)}")
    try:
        vocab = llama.llama_model_get_vocab(model)
        ends = [t for t in range(llama.llama_vocab_n_tokens(vocab)) if llama.llama_vocab_is_eog(vocab, t)]
        first = [t for t in (llama.llama_vocab_eos(vocab), llama.llama_vocab_eot(vocab), eom) if t in ends]
    finally:
        llama.llama_model_free(model)
    return list(dict.fromkeys([*first, *ends]))


def _logged(native: C.CDLL) -> str:
    """The last error that llama.cpp logged, as the end of a sentence, or ""."""
    native.es_log_last_error.restype = C.c_char_p
    why = native.es_log_last_error().decode(errors="replace")
    return f": {why}" if why else ""


def _damage(path: Path) -> str:
    """What llama.cpp's reader, or the check of its loader, finds wrong with a file, as the end of a sentence, or ""."""
    native, reason = libraries.edge_stream_library(), C.create_string_buffer(512)
    native.es_model_file_check.restype = C.c_bool
    native.es_log_set(C.c_bool(False))
    passed = native.es_model_file_check(os.fsencode(path), reason, C.c_size_t(len(reason)))
    return _logged(native) if passed else f": {reason.value.decode(errors='replace')}"
