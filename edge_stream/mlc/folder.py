"""An MLC model folder: its validated configuration, its tokenizer for llama.cpp, and a tag of its weights."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_stream import converters
from edge_stream.errors import EdgeStreamError, UnsupportedModelError
from edge_stream.families import find_family
from edge_stream.models import names
from edge_stream.output.files import replace_file
from edge_stream.text import parse_json

if TYPE_CHECKING:
    from edge_stream.converters.mlc.decoder_config import DecoderConfig
    from edge_stream.converters.mlc.quantization import Quantization

CONFIG = "mlc-chat-config.json"
_MAX_LAYERS = 4096
QUANTIZATIONS = ("q0f32", "q0f16", "q4f32_1", "q4f16_1", "q4f16_0")


class MlcFolder:
    """A folder written by `edge-stream convert --to mlc`. Raises EdgeStreamError in one sentence for anything else."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = self._object(CONFIG)
        kind, quantization = self.config.get("model_type"), self.config.get("quantization")
        family = find_family(kind)
        if family is None or not family.compiles:
            raise UnsupportedModelError(
                f"{path.name} cannot run on the MLC engine: it does not know model_type {kind!r}"
            )
        if quantization not in QUANTIZATIONS:
            raise UnsupportedModelError(
                f"{path.name} is in quantization {quantization!r}; the MLC engine runs {', '.join(QUANTIZATIONS)}"
            )
        self.family = family
        try:
            self._check_sizes()
        except EdgeStreamError as error:  # the converters' checks speak of the file that they usually read
            raise type(error)(re.sub("^config.json", f"{CONFIG} of {path}", str(error))) from error
        except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise EdgeStreamError(f"{CONFIG} of {path} is damaged: {error!r} is missing or not valid") from error

    def _check_sizes(self) -> None:
        from edge_stream.converters.mlc import rope
        from edge_stream.converters.mlc.decoder_config import DecoderConfig

        config = DecoderConfig.read(self.config)
        counts = dataclasses.asdict(config)
        for name in ("n_layer", "n_embd", "n_ff", "n_head", "n_head_kv", "head_dim", "n_vocab"):
            most = _MAX_LAYERS if name == "n_layer" else 1 << 24
            if not isinstance(counts[name], int) or not 1 <= counts[name] <= most:
                raise EdgeStreamError(f"{CONFIG} of {self.path} is damaged: {name} is {counts[name]!r}")
        m = self.config["model_config"]
        sizes = (config.n_expert, config.n_expert_used, config.n_ff_expert)
        if self.family.experts and not (all(isinstance(n, int) for n in sizes) and 1 <= sizes[1] <= sizes[0] <= 4096):
            raise EdgeStreamError(f"{CONFIG} of {self.path} is damaged: {sizes[1]!r} of {sizes[0]!r} experts are used")
        if self.family.experts and not 1 <= sizes[2] <= 1 << 24:
            raise EdgeStreamError(f"{CONFIG} of {self.path} is damaged: moe_intermediate_size is {sizes[2]!r}")
        if self.family.experts and m.get("norm_topk_prob") is not True:
            raise UnsupportedModelError(f"{self.path.name} does not make its experts' weights add up to 1")
        if config.n_head % config.n_head_kv or config.head_dim % 2:
            raise EdgeStreamError(f"{CONFIG} of {self.path} is damaged: {config.n_head} heads share {config.n_head_kv}")
        bases = float(config.rope_base), float(config.rope_base_swa)
        if not (0.0 < min(bases) <= max(bases) <= 1e30 and 0.0 <= float(config.norm_eps) <= 1.0):
            raise EdgeStreamError(f"{CONFIG} of {self.path} is damaged: rope base {bases}, {config.norm_eps!r}")
        if any(len(layers) not in (0, config.n_layer) for layers in (config.rope_layers, config.swa_layers)):
            raise EdgeStreamError(f"{CONFIG} of {self.path} is damaged: it does not describe {config.n_layer} layers")
        if not (config.attn_scale > 0.0 and isinstance(config.n_swa, int) and config.n_swa >= any(config.swa_layers)):
            raise EdgeStreamError(f"{CONFIG} of {self.path} is damaged: n_swa {config.n_swa!r}, {config.attn_scale!r}")
        rope.tables(config)  # refuses what it does not know
        if m.get("attn_logit_softcapping") or m.get("final_logit_softcapping"):
            raise UnsupportedModelError(f"{self.path.name} has soft caps, which the MLC engine does not support")
        if m.get("partial_rotary_factor", 1.0) != 1.0:
            raise UnsupportedModelError(f"{self.path.name} rotates only parts of heads, which the MLC engine cannot")
        if m.get("attention_bias", False) and not self.family.mlc.qkv_bias:
            raise UnsupportedModelError(f"{self.path.name} has attention biases, which the MLC engine does not support")

    def _object(self, name: str) -> dict[str, Any]:
        path = self.path / name
        try:
            value = parse_json(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise EdgeStreamError(f"{path} cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise EdgeStreamError(f"{path} is damaged: it is not JSON") from error
        if not isinstance(value, dict):
            raise EdgeStreamError(f"{path} is damaged: it is not a JSON object")
        return value

    @property
    def decoder_config(self) -> DecoderConfig:
        """The model's sizes."""
        from edge_stream.converters.mlc.decoder_config import DecoderConfig

        return DecoderConfig.read(self.config)

    @property
    def quantization(self) -> Quantization:
        """How the weights are stored."""
        from edge_stream.converters.mlc.quantization import find_quantization

        return find_quantization(self.config["quantization"])

    @property
    def n_ctx_train(self) -> int:
        """The recommended cache size: the folder does not state the training length."""
        m = self.config["model_config"]
        found = [self.config.get("sliding_window_size"), m.get("context_window_size"), 4096]
        return next(int(n) for n in found if isinstance(n, int) and n > 0)

    def tag(self) -> int:
        """64-bit hash of the checksums in tensor-cache.json, which identifies the weights."""
        records = self._object("tensor-cache.json").get("records")
        sums = [r.get("md5sum") for r in records if isinstance(r, Mapping)] if isinstance(records, list) else []
        return int.from_bytes(hashlib.sha256(json.dumps(sums).encode()).digest()[:8], "little")

    def expected_tensors(self) -> list[tuple[str, tuple[int, ...], str]]:
        """(name, shape, dtype) of every stored tensor, in the order of the model's parameters."""
        from edge_stream.converters.mlc.params import Param, stored_tensors

        c, q = self.decoder_config, self.quantization
        heads = {"q_proj": c.n_head, "k_proj": c.n_head_kv, "v_proj": c.n_head_kv}
        if c.qkv_name:
            heads = {c.qkv_name: sum(heads.values())}
        found: list[tuple[str, tuple[int, ...], str]] = []

        def add(name: str, *shape: int, kind_of: str = "") -> None:
            role = kind_of or {1: "plain", 2: "linear", 3: "experts"}[len(shape)]
            param = Param(self.family.mlc.rename(name), (), role, 0.0, shape)
            found.extend((t.name, t.shape, t.dtype) for t in stored_tensors(param, q))

        add("model.embed_tokens.weight", c.n_vocab, c.n_embd, kind_of="embedding")
        for i in range(c.n_layer):
            p = f"model.layers.{i}."
            add(p + "input_layernorm.weight", c.n_embd)
            for part, n in heads.items():
                add(f"{p}self_attn.{part}.weight", n * c.head_dim, c.n_embd)
                if c.qkv_bias:
                    add(f"{p}self_attn.{part}.bias", n * c.head_dim)
            if c.qk_norm:
                add(p + "self_attn.q_norm.weight", c.head_dim)
                add(p + "self_attn.k_norm.weight", c.head_dim)
            add(p + "self_attn.o_proj.weight", c.n_embd, c.n_head * c.head_dim)
            add(p + "post_attention_layernorm.weight", c.n_embd)
            if c.post_norms:
                add(p + "pre_feedforward_layernorm.weight", c.n_embd)
                add(p + "post_feedforward_layernorm.weight", c.n_embd)
            if c.n_expert:
                add(p + "mlp.gate.weight", c.n_expert, c.n_embd, kind_of="plain")
                add(p + "mlp.moe_gate_up_proj.weight", c.n_expert, 2 * c.n_ff_expert, c.n_embd)
                add(p + "mlp.moe_down_proj.weight", c.n_expert, c.n_embd, c.n_ff_expert)
                continue
            add(p + "mlp.gate_up_proj.weight", 2 * c.n_ff, c.n_embd)
            add(p + "mlp.down_proj.weight", c.n_embd, c.n_ff)
        add("model.norm.weight", c.n_embd)
        if not c.tied:
            add("lm_head.weight", c.n_vocab, c.n_embd)
        return found

    def vocab_file(self, scratch: Path) -> Path:
        """What write_vocab writes, kept in the cache folder under a hash of all it is made of, or else in `scratch`."""
        tokenizer = _Tokenizer(self)
        digest = hashlib.sha256(json.dumps([self.path.resolve().name, self.config]).encode())
        sources = Path(converters.__file__).parent.glob("*.py")
        for file in (Path(__file__), *sorted(sources), *sorted(tokenizer.tokenizer_files.values())):
            try:
                digest.update(file.read_bytes())
            except OSError as error:
                raise EdgeStreamError(f"{file} cannot be read: {error.strerror}") from error
        kept = names.cache_folder() / "mlc" / f"vocab-{digest.hexdigest()[:32]}.gguf"
        if kept.exists():
            return kept
        made = scratch / "vocab.gguf"
        self.write_vocab(made)
        with suppress(OSError, EdgeStreamError):  # a folder that cannot be written: made again next time
            kept.parent.mkdir(parents=True, exist_ok=True)
            replace_file(kept, lambda name: shutil.copyfile(made, name))
        return made

    def write_vocab(self, path: Path) -> None:
        """Write the tokenizer as a GGUF file without tensors, for llama.cpp to tokenise with.

        Raises EdgeStreamError if llama.cpp has no equivalent of the tokenizer.
        """
        import gguf

        from edge_stream.converters import chat_templates
        from edge_stream.converters.vocab import read_vocab

        tokenizer = _Tokenizer(self)
        vocab = read_vocab(tokenizer)
        writer = gguf.GGUFWriter(path, "llama")
        try:
            writer.add_name(self.path.resolve().name)
            vocab.write(writer)
            chat_templates.write(writer, chat_templates.of_config(tokenizer.tokenizer_config, "tokenizer_config.json"))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
        finally:
            writer.close()


class _Tokenizer:
    """edge_stream.converters.vocab.TokenizerSource of an MLC folder."""

    def __init__(self, folder: MlcFolder) -> None:
        from edge_stream.converters.hf_source import TOKENIZER_FILES

        config = folder.config
        eos = config.get("eos_token_id")
        self.config: Mapping[str, Any] = {"bos_token_id": config.get("bos_token_id")}
        self.generation_config: Mapping[str, Any] = {"eos_token_id": eos}
        self.tokenizer_files = {n: folder.path / n for n in TOKENIZER_FILES if (folder.path / n).exists()}
        self.tokenizer_config: Mapping[str, Any] = (
            folder._object("tokenizer_config.json") if "tokenizer_config.json" in self.tokenizer_files else {}
        )
        self.n_vocab = folder.decoder_config.n_vocab
