"""Model families: all facts about each, in one file named after Hugging Face's `model_type`.

A file here defines FAMILY, a table of how the family differs from Llama, with small functions where a fact needs one.
Converters and engines consult the table and never name a family. New files are discovered: CONTRIBUTING.md has the
recipe. This package imports nothing else of edge_stream, so that everything may import it.

The decoder is: embedding; per layer RMSNorm, rotary attention with grouped queries, RMSNorm, gated MLP; RMSNorm; output
matrix. Sources: transformers (modeling_*.py, configuration_*.py), llama.cpp (src/models, src/llama-*.cpp)
and mlc-llm (python/mlc_llm/model).
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from numpy.typing import NDArray

# model types that are refused, and why
REFUSED = dict.fromkeys(
    ("hunyuan_v1_dense", "hunyuan_v1_moe", "hunyuan", "hunyuan_vl"),
    "Hunyuan normalises keys after rotating them, so that moving them is not exact: edge-stream cannot run it",
)

Shapes = dict[str, tuple[int, ...]]


class Keys(Protocol):
    """config.json, read with checks (converters/config.py): a missing or wrong value is an error of one sentence."""

    def get(self, key: str, default: Any = ...) -> Any:
        """Any value; None in the file counts as missing."""

    def count(self, key: str, default: Any = ..., least: int = 1) -> int:
        """A whole number."""

    def number(self, key: str, default: Any = ..., least: float = 0.0) -> float:
        """A number."""

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""

    def items(self, key: str, kind: type, n: int, default: Any = ...) -> tuple[Any, ...]:
        """A list of n values of a type."""

    def kinds(self, key: str, known: tuple[str, ...], n: int, default: Any = ...) -> tuple[str, ...]:
        """A list of n words out of those known."""

    def refuse(self, why: str) -> Any:
        """Raise the error: `config.json: ` and why."""


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched (transformers, modeling_rope_utils.py).

    kind: linear, llama3, yarn or longrope. magnitude: factor on cosine and sine. short_factor, long_factor: one value
    per pair, head_dim/2 or fewer with partial rotation.
    """

    kind: str
    factor: float
    n_ctx_orig: int  # training length before the stretch
    magnitude: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True  # the ends of yarn's range are rounded to whole pairs
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()


@dataclass(frozen=True)
class ModelConfig:
    """Hyperparameters of one model, named as llama.cpp names them."""

    family: Family
    n_layer: int
    n_embd: int
    n_ff: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_rot: int  # rotated dimensions per head
    n_vocab: int
    n_ctx_train: int
    norm_eps: float
    rope_base: float
    rope_base_swa: float  # of sliding-window layers
    rope_scaling: RopeScaling | None  # of the full-attention layers if the two differ
    tied: bool  # the output matrix is the embedding
    qkv_bias: bool
    o_bias: bool
    sliding_window: int  # 0: none
    swa_layers: tuple[bool, ...]  # which layers use it
    attn_scale: float  # factor on q.k
    attn_softcap: float  # 0: none
    logit_softcap: float
    rope_layers: tuple[bool, ...] = ()  # which layers rotate q and k; (): all
    sink: str = ""  # what it was trained with by `edge-stream train`: token, softmax1
    # what Family.read returned, and `fused`: the experts of a layer are in one tensor
    own: Mapping[str, Any] = field(default_factory=dict)

    @property
    def arch(self) -> str:
        """llama.cpp's name of the architecture."""
        gguf = self.family.gguf
        return gguf.arch_of(self) if gguf.arch_of else gguf.arch


@dataclass(frozen=True)
class Place:
    """Where a checkpoint's tensor goes in GGUF: to the place of `name`, a name that the gguf package maps,
    or one of GGUF itself (`blk.`).

    change: from the checkpoint's values to GGUF's; it must work on any numbers, also on rows of packed bytes if it only
    moves rows. each: it is applied to every item of the first axis. stack: the tensor is one item of a new first axis.
    rows: without a change, rows of zeros are added up to this number.
    """

    name: str
    change: Callable[[NDArray[Any]], NDArray[Any]] | None = None
    each: bool = False
    stack: bool = False
    rows: int = 0


class ReservedName(NamedTuple):
    """A model name that makes llama.cpp, whatever the architecture, look up tokens of a family's tokenizer."""

    pattern: str  # regular expression, case ignored
    models: str  # the family's name, for messages
    tokens: frozenset[str]


@dataclass(frozen=True)
class Gguf:
    """A family in llama.cpp. Conversion refuses a model that llama.cpp's loader cannot represent."""

    arch: str  # general.architecture
    arch_of: Callable[[ModelConfig], str] | None = None  # where it depends on the model
    read_back: bool = True  # GGUF files of this architecture are read as this family (llama's not as Mistral)
    permuted: bool = False  # rows of q and k are in pair order (2i, 2i + 1); Hugging Face's are in (i, i + d/2)
    rope_scalings: tuple[str, ...] = ("linear", "yarn")
    rounds_yarn: bool = False  # accept checkpoints that do not round yarn's range, which llama.cpp does: a note says so
    partial_rotary: bool = True
    free_head_dim: bool = True  # heads x head_dim need not be hidden_size
    qkv_bias: bool = False
    o_bias: bool = False
    attn_softcap: bool = False
    logit_softcap: bool = False
    masks_window: bool = False  # applies the sliding window; if not, a cache larger than the window differs
    window_key: bool = False  # requires the window's size although it does not mask
    wide_scale_n_layer: int = 0  # a model with this many layers scales q.k by hidden_size / heads, not head_dim
    # keys of config.json that GGUF has too -> llama.cpp's value if the file omits them
    config_keys: Mapping[str, Any] = field(default_factory=dict)
    reserved_name: ReservedName | None = None
    tokenizer: str = ""  # tokenizer.ggml.model of a SentencePiece-like tokenizer.json, if not `llama`
    # further metadata, or other values than usual: key after the architecture's prefix -> value, None to leave it out
    keys: Callable[[ModelConfig], dict[str, Any]] = lambda _model: {}
    # where a tensor goes, by its name in the checkpoint
    places: Callable[[ModelConfig, str], Sequence[Place]] = lambda _model, name: (Place(name),)
    no_adapter: tuple[str, ...] = ()  # endings of matrices that llama.cpp multiplies without a LoRA adapter's parts
    notes: Callable[[ModelConfig], list[str]] = lambda _model: []  # what llama.cpp computes differently
    # any other reason that a model cannot be loaded: `needs ...`, `has no ...`
    lacks: Callable[[ModelConfig], str | None] = lambda _model: None

    def attn_scalar(self, n_layer: int, n_embd: int, n_head: int, head_dim: int) -> int:
        """llama.cpp's query_pre_attn_scalar: q.k is divided by its square root."""
        return n_embd // n_head if n_layer == self.wide_scale_n_layer else head_dim


@dataclass(frozen=True)
class Mlc:
    """A family in MLC folders: what mlc-llm's model definition and loader expect, if it has one."""

    known: bool = True  # False: no folders of it are written
    qkv_name: str = "qkv_proj"  # the matrix that q, k and v are fused into; "": they stay separate
    qkv_bias: bool = False
    rope_scalings: tuple[str, ...] = ()
    lacks: Callable[[ModelConfig], str | None] = lambda _model: None  # as in Gguf
    note: str = ""  # what mlc-llm's own definition computes differently: a folder is for our engine and our libraries
    rename: Callable[[str], str] = lambda name: name  # from Llama's parameter name
    # model_config of mlc-chat-config.json, from the keys that all families have
    config: Callable[[ModelConfig, dict[str, Any]], dict[str, Any]] = lambda _model, config: config


@dataclass(frozen=True)
class Family:
    """How a family differs from Llama. Names as in config.json unless stated otherwise."""

    model_type: str
    hf_class: str  # in config.json's `architectures`
    models: str  # the models' usual names
    gguf: Gguf
    mlc: Mlc = Mlc(known=False)
    aliases: tuple[str, ...] = ()  # other model_types for the same family
    activations: tuple[str, ...] = ("silu", "swish")  # accepted names of the MLP's activation; the first is standard
    fused: bool = False  # one qkv_proj and one gate_up_proj matrix
    qkv_bias: bool = False  # q, k, v have biases whatever the config says; the output projection has none
    qkv_only_bias: bool = False  # attention_bias covers q, k and v only
    qk_norm: bool = False  # RMSNorm over each head of q and k
    post_norms: bool = False  # norms after attention and MLP too
    norm_offset: float = 0.0  # norm weights are stored minus this
    scaled_embedding: bool = False  # embeddings are multiplied by sqrt(hidden_size)
    own_swa_rope: bool = False  # sliding-window layers have a separate rope base, and no scaling
    window_flag: str = ""  # a key that must be true for sliding_window to count
    # whether a layer has the sliding window, if layer_types is missing; count(key, least=1) reads an integer from the
    # config. None: sliding_window is ignored
    windowed: Callable[[int, Callable[..., int]], bool] | None = None
    # defaults of transformers' config class
    defaults: Mapping[str, Any] = field(default_factory=dict)
    # config.json with Llama's names for what Llama has too
    normal: Callable[[dict[str, Any]], dict[str, Any]] = lambda config: config
    # values that only this family has: ModelConfig.own
    read: Callable[[Keys, int], dict[str, Any]] = lambda _keys, _n_layer: {}
    rotated: Callable[[Keys, int], Sequence[bool]] = lambda _keys, _n_layer: ()  # ModelConfig.rope_layers
    experts: bool = False  # Llama's layers but for experts in place of every MLP, as in Qwen3: `layer` names them
    # the tensors of a layer after `model.layers.N.`, name -> shape; None: Llama's, see converters/tensor_names.py
    layer: Callable[[ModelConfig, int], Shapes] | None = None
    outside: Callable[[ModelConfig], Shapes] = lambda _model: {}  # tensors outside of layers that Llama does not have
    prefixes: Mapping[str, str] = field(default_factory=dict)  # of a checkpoint's tensor names -> Llama's
    unused: Callable[[ModelConfig, str], bool] = lambda _model, _name: False  # a tensor that need not be there
    left_out: tuple[str, ...] = ()  # prefixes of tensors that text generation does not need

    @property
    def activation(self) -> str:
        """silu or gelu_pytorch_tanh."""
        return self.activations[0]

    @property
    def plain(self) -> bool:
        """Whether a layer's tensors are Llama's but for the fields above."""
        return self.layer is None

    @property
    def computed(self) -> bool:
        """Whether converters/reference.py can compute it."""
        return self.plain or self.experts

    @property
    def compiles(self) -> bool:
        """Whether the decoder compiled with TVM (converters/mlc/model.py) supports it."""
        return self.mlc.known and self.computed


@lru_cache(maxsize=1)
def families() -> dict[str, Family]:
    """Every family, by model_type."""
    names = [name for _, name, _ in pkgutil.iter_modules(__path__) if not name.startswith("_")]
    found = [importlib.import_module(f"{__name__}.{name}").FAMILY for name in sorted(names)]
    return {family.model_type: family for family in found}


def find_family(model_type: object) -> Family | None:
    """The family of a config.json's model_type; None if it is unknown."""
    return next((f for f in families().values() if model_type in (f.model_type, *f.aliases)), None)


def gguf_families() -> dict[str, Family]:
    """The families that GGUF files are read as, by general.architecture."""
    return {f.gguf.arch: f for f in families().values() if f.gguf.read_back}
