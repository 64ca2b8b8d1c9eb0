"""Model families: what is known of each, in one file named after Hugging Face's `model_type`.

A file here holds FAMILY, a table of what sets the family apart from Llama, and small functions where a fact needs one.
Converters and engines ask the table and never name a family. A new file is found by being here: CONTRIBUTING.md has
the recipe. Nothing else of edge_stream is imported, so that everything may import this.

A decoder is: embedding; per layer RMSNorm, rotary attention with grouped queries, RMSNorm, gated MLP; RMSNorm; output
matrix. Facts were read off transformers (modeling_*.py, configuration_*.py), llama.cpp (src/models, src/llama-*.cpp)
and mlc-llm (python/mlc_llm/model).
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched (transformers, modeling_rope_utils.py).

    kind: linear, llama3, yarn or longrope. magnitude: factor on cosine and sine. Factors are per pair, head_dim/2 or
    fewer with partial rotation.
    """

    kind: str
    factor: float
    n_ctx_orig: int  # length that the model was trained on before it was stretched
    magnitude: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
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
    n_rot: int  # dimensions of a head that turn
    n_vocab: int
    n_ctx_train: int
    norm_eps: float
    rope_base: float
    rope_base_swa: float  # of sliding-window layers
    rope_scaling: RopeScaling | None  # of the other layers where the two differ
    tied: bool  # the output matrix is the embedding
    qkv_bias: bool
    o_bias: bool
    sliding_window: int  # 0: none
    swa_layers: tuple[bool, ...]  # which layers attend through it
    attn_scale: float  # factor on q.k
    attn_softcap: float  # 0: none
    logit_softcap: float


class ReservedName(NamedTuple):
    """A name that llama.cpp recognises a model by, whatever its architecture, to look up tokens of whose tokenizer."""

    pattern: str  # regular expression, case ignored
    whose: str
    tokens: frozenset[str]


@dataclass(frozen=True)
class Gguf:
    """A family in llama.cpp. What its loader cannot be told is refused when a model is converted."""

    arch: str  # general.architecture
    read_back: bool = True  # a file of this architecture is read as this family (llama's is not read as Mistral)
    permuted: bool = False  # rows of q and k are in pair order (2i, 2i + 1); Hugging Face's are in (i, i + d/2)
    rope_scalings: tuple[str, ...] = ("linear", "yarn")
    partial_rotary: bool = True
    free_head_dim: bool = True  # heads x head_dim need not be hidden_size
    qkv_bias: bool = False
    o_bias: bool = False
    attn_softcap: bool = False
    logit_softcap: bool = False
    masks_window: bool = False  # computes sliding windows; without it a cache larger than the window differs
    window_key: bool = False  # wants the window's size although it does not mask
    wide_scale_n_layer: int = 0  # a model of so many layers scales q.k by hidden_size / heads instead of head_dim
    # keys of config.json that the file states too -> llama.cpp's value where it does not
    config_keys: Mapping[str, Any] = field(default_factory=dict)
    reserved_name: ReservedName | None = None
    # what else keeps a model from being loaded: `needs ...`, `has no ...`
    lacks: Callable[[ModelConfig], str | None] = lambda _model: None

    def attn_scalar(self, n_layer: int, n_embd: int, n_head: int, head_dim: int) -> int:
        """llama.cpp's query_pre_attn_scalar: q.k is divided by its square root."""
        return n_embd // n_head if n_layer == self.wide_scale_n_layer else head_dim


@dataclass(frozen=True)
class Mlc:
    """A family in mlc-llm: what its model definition and its loader expect."""

    known: bool = True  # False: mlc-llm has no such model
    qkv_name: str = "qkv_proj"  # the matrix that q, k and v make; "": they stay apart
    qkv_bias: bool = False
    rope_scalings: tuple[str, ...] = ()
    lacks: Callable[[ModelConfig], str | None] = lambda _model: None  # as in Gguf
    rename: Callable[[str], str] = lambda name: name  # from a parameter's name in Llama
    # model_config of mlc-chat-config.json, from what all families have in it
    config: Callable[[ModelConfig, dict[str, Any]], dict[str, Any]] = lambda _model, config: config


@dataclass(frozen=True)
class Family:
    """What sets a family apart from Llama. Names as in config.json unless said otherwise."""

    model_type: str
    hf_class: str  # the one in config.json's `architectures`
    models: str  # what people call its members
    gguf: Gguf
    mlc: Mlc = Mlc(known=False)
    aliases: tuple[str, ...] = ()  # other model_types that mean the same
    activations: tuple[str, ...] = ("silu", "swish")  # names of the one of the MLP's gate; the first is usual
    fused: bool = False  # one qkv_proj and one gate_up_proj matrix
    qkv_bias: bool = False  # q, k, v have biases whatever the config says, the output matrix has none
    qk_norm: bool = False  # RMSNorm over each head of q and k
    post_norms: bool = False  # norms after attention and MLP as well as before
    norm_offset: float = 0.0  # the weight of a norm is stored less this
    scaled_embedding: bool = False  # embeddings are multiplied by sqrt(hidden_size)
    own_swa_rope: bool = False  # layers with a sliding window have a rope base of their own, and no scaling
    window_flag: str = ""  # a key that must be true for sliding_window to count
    # whether a layer has the sliding window, where layer_types is silent; count(key, least=1) reads a number of the
    # config. None: sliding_window is ignored
    windowed: Callable[[int, Callable[..., int]], bool] | None = None
    # what transformers' config class assumes where config.json is silent
    defaults: Mapping[str, Any] = field(default_factory=dict)

    @property
    def activation(self) -> str:
        """silu or gelu_pytorch_tanh."""
        return self.activations[0]

    @property
    def compiles(self) -> bool:
        """Whether the decoder that is compiled with TVM (converters/mlc/model.py) computes it."""
        return self.mlc.known and self.activation == "silu" and not (self.post_norms or self.scaled_embedding)


@lru_cache(maxsize=1)
def families() -> dict[str, Family]:
    """Every family, by model_type."""
    names = [name for _, name, _ in pkgutil.iter_modules(__path__)]
    found = [importlib.import_module(f"{__name__}.{name}").FAMILY for name in sorted(names)]
    return {family.model_type: family for family in found}


def find_family(model_type: object) -> Family | None:
    """The family of a config.json's model_type, None if it is not known."""
    return next((f for f in families().values() if model_type in (f.model_type, *f.aliases)), None)


def gguf_families() -> dict[str, Family]:
    """By general.architecture: the family that a GGUF file is read as."""
    return {f.gguf.arch: f for f in families().values() if f.gguf.read_back}
