"""A Hugging Face checkpoint folder as a Source: config.json, safetensors, tokenizer files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_stream.converters import chat_templates, mistral_params, safetensors_files
from edge_stream.converters.config import read_config, text_config
from edge_stream.converters.packed import Packed, Tensors, unpack
from edge_stream.converters.source import TensorInfo
from edge_stream.converters.tensor_names import expected_tensors
from edge_stream.converters.text import quoted
from edge_stream.errors import EdgeStreamError
from edge_stream.families import Family
from edge_stream.paths import possible
from edge_stream.text import parse_json

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edge_stream.converters.vocab import Vocab

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tekken.json",
    "vocab.json",
    "merges.txt",
)
_INDEX = "model.safetensors.index.json"
_USABLE = ("f32", "f16", "bf16", "mxfp4")
_MAX_JSON = 256 << 20
# multimodal checkpoints hold the language model under one of these prefixes, beside other towers
_TEXT_PREFIXES = ("model.language_model.", "language_model.")
OTHER_TOWERS = (
    *("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector."),
    *mistral_params.LEFT_OUT,
)
# buffers that old versions of transformers saved; they follow from the config
_DERIVED = (".rotary_emb.inv_freq", ".self_attn.masked_bias")


class HfSource:
    """See source.Source. left_out: tensors that are not part of the language model."""

    def __init__(self, folder: Path, name: str | None = None) -> None:
        """Open and check a folder, which must hold exactly the tensors that config.json implies, in those shapes."""
        self.folder = folder
        self._root = _root(folder)
        self.name = name or folder.resolve().name
        raw_config = self._raw_config()
        self.config = text_config(raw_config)
        self._tied = raw_config.get("tie_word_embeddings") is True
        self._quantization = self.config.get("quantization_config", raw_config.get("quantization_config"))
        self.model = read_config(self.config)
        self.generation_config: dict[str, Any] = self._object("generation_config.json")
        self.tokenizer_files = {file: path for file in TOKENIZER_FILES if (path := self._find(file)) is not None}
        self._find("README.md")  # the gguf package reads the model card
        self.tokenizer_config: dict[str, Any] = self._object("tokenizer_config.json")
        self.chat_templates = chat_templates.of_folder(folder, self._text, self.tokenizer_config)
        self.left_out: list[str] = []
        self._vocab: Vocab | None = None
        self._reader = safetensors_files.Reader()
        self._entries = self._select(self._all_entries())
        self.tensors = {n: TensorInfo(n, e.shape, e.dtype) for n, e in self._entries.items()}

    def load(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[np.floating[Any]]:
        """See Source.load."""
        entry = self._entries[name]
        stop = entry.shape[0] if stop is None and entry.shape else stop
        if self._mistral:
            from edge_stream.converters.gguf_tensors import is_qk, to_halves

            if is_qk(name):
                head, end = self.model.head_dim, stop or 0
                first, last = start // head * head, -(-end // head) * head  # whole heads
                return to_halves(self._rows(name, first, last), head)[start - first : end - first]
        return self._rows(name, start, stop)

    def _rows(self, name: str, start: int, stop: int | None) -> NDArray[np.floating[Any]]:
        entry = self._entries[name]
        if isinstance(entry, safetensors_files.Entry):
            return self._reader.read(name, entry, start, stop)
        values = entry.rows(start, entry.shape[0] if stop is None else min(stop, entry.shape[0]))
        safetensors_files.check_finite(values, name)
        return values

    def load_mxfp4(self, name: str, item: int) -> NDArray[np.uint8]:
        """See Source.load_mxfp4."""
        entry = self._entries[name]
        assert isinstance(entry, Packed) and entry.blocks is not None
        return entry.blocks(item)

    def close(self) -> None:
        """See Source.close."""
        self._reader.close()

    @property
    def n_vocab(self) -> int:
        """Rows of the embedding."""
        return self.model.n_vocab

    def vocab(self) -> Vocab:
        """The vocabulary. Raises EdgeStreamError if llama.cpp has no equivalent."""
        from edge_stream.converters.vocab import read_vocab

        if self._vocab is None:
            self._vocab = read_vocab(self)
        return self._vocab

    #
    # files
    #

    def _find(self, file: str) -> Path | None:
        """The file's path if it exists. Raises EdgeStreamError if it resolves to outside the folder."""
        path = possible(self.folder / file)
        if not path.exists():
            return None
        if not path.resolve().is_relative_to(self._root):
            raise EdgeStreamError(f"{file} is a link out of the folder {self.folder.name}: it is not followed")
        if not path.is_file():
            raise EdgeStreamError(f"{file} is not a file")
        return path

    def _json(self, file: str, required: bool = False) -> Any:
        path = self._find(file)
        if path is None:
            if required:
                raise EdgeStreamError(f"{self.folder} has no {file}: it is not a Hugging Face checkpoint")
            return None
        return read_json(path)

    def _raw_config(self) -> dict[str, Any]:
        """config.json; or params.json in Mistral's form of a checkpoint, if the weights are in that form only."""
        standard = any(self._find(file) is not None for file in (_INDEX, "model.safetensors"))
        self._mistral = self._find(mistral_params.FILE) is not None and not (standard and self._find("config.json"))
        if self._mistral:
            return mistral_params.as_config(self._json(mistral_params.FILE))
        raw = self._json("config.json", required=True)
        return raw if isinstance(raw, dict) else text_config(raw)

    def _object(self, file: str) -> dict[str, Any]:
        value = self._json(file)
        if value is not None and not isinstance(value, dict):
            raise EdgeStreamError(f"{file} is not a JSON object")
        return value or {}

    def _text(self, file: str) -> str | None:
        path = self._find(file)
        return None if path is None else read_text(path)

    #
    # tensors
    #

    def _all_entries(self) -> dict[str, safetensors_files.Entry]:
        index = f"{mistral_params.WEIGHTS}.index.json" if self._mistral else _INDEX
        if self._find(index) is not None:
            return self._sharded(index)
        single = self._find(mistral_params.WEIGHTS if self._mistral else "model.safetensors")
        if single is not None:
            return safetensors_files.read_header(single)
        others = sorted(p.name for p in self.folder.glob("*.safetensors"))
        if others:
            raise EdgeStreamError(f"{self.folder} has {others[0]} but neither model.safetensors nor {_INDEX}")
        pickles = [p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in sorted(self.folder.glob(pattern))]
        if pickles:
            raise EdgeStreamError(
                f"{self.folder} holds its weights as pickle ({pickles[0]}), which can run code when read and is never "
                "loaded: use a version in safetensors"
            )
        raise EdgeStreamError(f"{self.folder} has no safetensors files")

    def _sharded(self, index: str) -> dict[str, safetensors_files.Entry]:
        weight_map = self._object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise EdgeStreamError(f"{index} has no weight_map")
        shards: dict[str, dict[str, safetensors_files.Entry]] = {}
        for file in weight_map.values():
            if not isinstance(file, str) or Path(file).name != file or file in ("", ".", ".."):
                raise EdgeStreamError(f"{index} points to {quoted(file, 80)}, which is not a file of this folder")
            if file not in shards:
                path = self._find(file)
                if path is None:
                    raise EdgeStreamError(f"{index} names {file}, which is missing")
                shards[file] = safetensors_files.read_header(path)
        entries: dict[str, safetensors_files.Entry] = {}
        for file, held in shards.items():
            for name, entry in held.items():
                if name in entries:
                    raise EdgeStreamError(f"tensor {quoted(name, 80)} is in {entries[name].path.name} and in {file}")
                entries[name] = entry
        for name, file in weight_map.items():
            if name not in shards[file]:
                raise EdgeStreamError(f"{index} says that {quoted(name, 80)} is in {file}, but it is not")
        return entries

    def _select(self, entries: dict[str, safetensors_files.Entry]) -> Tensors:
        """The language model's tensors by standard name; checks that all are there in the right shapes."""
        plain: dict[str, safetensors_files.Entry] = {}
        elsewhere = (*OTHER_TOWERS, *self.model.family.left_out)
        for stored, entry in entries.items():
            name = mistral_params.name_of(stored) if self._mistral else text_name(stored, self.model.family)
            if stored.startswith(elsewhere) or name.startswith(elsewhere) or name.endswith(_DERIVED):
                self.left_out.append(stored)
            elif name in plain:
                raise EdgeStreamError(f"the checkpoint has {quoted(name, 80)} twice, under two prefixes")
            else:
                plain[name] = entry
        found = unpack(plain, self._quantization, self._reader.read)
        if any(entry.dtype == "mxfp4" for entry in found.values()):
            self.model = replace(self.model, own={**self.model.own, "mxfp4": True})
        fused = next((entry for name, entry in found.items() if name.endswith(".mlp.experts.down_proj")), None)
        if fused is not None:  # Qwen3-VL's are transposed, except where transformers 5 wrote them
            turned = self.model.own.get("transposed", False) and fused.shape[1:2] != (self.model.n_embd,)
            self.model = replace(self.model, own={**self.model.own, "fused": True, "transposed": turned})
        if self._tied and "lm_head.weight" not in found:  # a multimodal checkpoint may say so at the top level only
            self.model = replace(self.model, tied=True)
        expected = expected_tensors(self.model)
        if self.model.tied and "lm_head.weight" in found:  # a copy of the embedding
            self._check_tied_copy(found)
            self.left_out.append("lm_head.weight")
        missing = [name for name in expected if name not in found]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise EdgeStreamError(f"the checkpoint has no tensor {missing[0]}{more}")
        unused = [name for name in found if name not in expected and self.model.family.unused(self.model, name)]
        self.left_out += unused
        extra = [name for name in found if name not in expected and name not in unused]
        if extra:
            more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
            raise EdgeStreamError(
                f"the checkpoint has a tensor that {self.model.family.model_type} does not: "
                f"{quoted(extra[0], 80)}{more}"
            )
        for name, shape in expected.items():
            if found[name].shape != shape:
                raise EdgeStreamError(
                    f"tensor {name} is {quoted(list(found[name].shape))}; by config.json it must be {list(shape)}"
                )
            if found[name].dtype not in _USABLE:
                kind = found[name].dtype.upper()
                raise EdgeStreamError(f"tensor {name} has dtype {kind!r}; supported are F32, F16 and BF16")
        return {name: found[name] for name in expected}

    def _check_tied_copy(self, found: Tensors) -> None:
        """With tied embeddings, a stored lm_head must equal the embedding, or dropping it would change the model."""
        head, embedding = found.pop("lm_head.weight"), found.get("model.embed_tokens.weight")
        if embedding is None:
            return  # reported as missing
        if not isinstance(head, safetensors_files.Entry) or not isinstance(embedding, safetensors_files.Entry):
            raise EdgeStreamError("config.json ties lm_head to the embedding, and one of them is quantised")
        same = head.shape == embedding.shape and head.dtype == embedding.dtype
        rows = head.shape[0] if same and head.shape else 0
        for start in range(0, rows, 4096):
            a = self._reader.read("lm_head.weight", head, start, start + 4096)
            b = self._reader.read("model.embed_tokens.weight", embedding, start, start + 4096)
            if not (a == b).all():
                same = False
                break
        if not same:
            raise EdgeStreamError(
                "config.json ties lm_head to the embedding, but the checkpoint has another lm_head.weight"
            )


def text_name(stored: str, family: Family) -> str:
    """The usual name of a tensor, which multimodal checkpoints keep under a prefix."""
    for old, new in family.prefixes.items():
        if stored.startswith(old):
            return new + stored.removeprefix(old)
    for prefix in _TEXT_PREFIXES:
        if stored.startswith(prefix):
            rest = stored.removeprefix(prefix)
            return rest if rest.startswith(("model.", "lm_head.")) else f"model.{rest}"
    return stored


def _root(folder: Path) -> Path:
    """Where files may resolve to: inside the folder or, in huggingface_hub's cache, inside the repository's folder."""
    resolved = folder.resolve()
    if resolved.parent.name == "snapshots" and resolved.parent.parent.name.startswith("models--"):
        return resolved.parent.parent
    return resolved


def read_text(path: Path) -> str:
    """A UTF-8 text file. Raises EdgeStreamError if it is not one."""
    try:
        if path.stat().st_size > _MAX_JSON:
            raise EdgeStreamError(f"{path.name} is too large ({path.stat().st_size:,} bytes)")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise EdgeStreamError(f"cannot read {path.name}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise EdgeStreamError(f"{path.name} is not UTF-8 text") from error


def read_json(path: Path) -> Any:
    """A JSON file. Raises EdgeStreamError if it is not valid."""
    text = read_text(path)
    try:
        return parse_json(text)
    except ValueError as error:
        raise EdgeStreamError(f"{path.name} is not valid JSON") from error
