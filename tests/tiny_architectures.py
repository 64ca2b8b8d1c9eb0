"""A tiny random model of every architecture that llama.cpp knows, and the proof that edge-stream streams it exactly.

llama.cpp itself says which tensors a model has: `llama_model_init_from_user` takes metadata without tensors and asks
for each tensor's values. `make` answers with random weights (scaled like those of tiny_models.py, so that a wrong
position shows) and writes what it answered as a GGUF file. FIXTURES names the models that need metadata of their own,
because real checkpoints of that architecture have a property that matters here; every other architecture gets `generic`
metadata, so that one which a newer llama.cpp brings is examined without a change here.

`examine` compares a stream with an oracle that moves no window: a llama_context driven by hand, in which the sinks are
decoded anew at every slide, in a sequence of their own, and joined to the stream with seq_cp. Where a model keeps a
state besides its cache (hybrids), that state is saved before and restored after. A purely recurrent model forgets
nothing, and its oracle is a plain decode.

Some metadata makes llama.cpp abort, so `run` examines each model in a process of its own:

    python tests/tiny_architectures.py FOLDER NAME

writes the model into FOLDER and prints a Result as a line of JSON.
"""

from __future__ import annotations

import ctypes as C
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "2")

import gguf
import numpy as np
from numpy.typing import NDArray
from tiny_models import BOS, EOS, N_VOCAB, UNK, build_vocab

from edge_stream import EdgeStreamError, Engine, UnsupportedModelError
from edge_stream.hardware import devices
from edge_stream.native import libraries

ROOT = Path(__file__).resolve().parents[1]
LLAMA_SOURCE = ROOT / "build" / "llama.cpp" / "llama.cpp" / "src" / "llama-arch.cpp"

N_CTX, N_KEEP = 48, 4
N_TOKENS = 4 * N_CTX  # three cache lengths past the end
REBASE_AT = N_CTX + 20  # every 24 slides or so
TOLERANCE = 1e-3
NOISE_FACTOR = 10.0
MAX_NOISE = 0.1  # more, and the weights are unfit for a comparison
TIMEOUT = 300.0

Array = NDArray[np.float32]
Fill = Callable[[tuple[int, ...], np.random.Generator], NDArray[Any]]
Metadata = dict[str, Any]


# ---------------------------------------------------------------------------------------------------------
# metadata
# ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fixture:
    """What makes a tiny model: metadata below the architecture's prefix ("/key": the whole key).

    overrides: values of the tensors whose name contains the key. without: tensors that the file leaves out although
    llama.cpp asks for them, as a regular expression.
    """

    arch: str
    metadata: Metadata
    overrides: Mapping[str, Fill] = field(default_factory=dict)
    without: str = ""


def decoder(
    more: Metadata | None = None,
    *,
    n_layer: int = 4,
    n_embd: int = 64,
    n_head: int = 4,
    n_head_kv: int = 2,
    head_dim: int = 16,
    n_ff: int = 96,
    rope_base: float = 10000.0,
) -> Metadata:
    """The keys that most decoders share, and more (which win)."""
    return {
        "context_length": 4096,
        "embedding_length": n_embd,
        "block_count": n_layer,
        "feed_forward_length": n_ff,
        "attention.head_count": n_head,
        "attention.head_count_kv": n_head_kv,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.dimension_count": head_dim,
        "rope.freq_base": rope_base,
    } | (more or {})


def sliding(n: int, pattern: Sequence[bool] | int | None = None) -> Metadata:
    """Sliding-window layers; pattern: True for each of them, or a period."""
    window: Metadata = {"attention.sliding_window": n}
    if pattern is not None:
        window["attention.sliding_window_pattern"] = pattern if isinstance(pattern, int) else list(pattern)
    return window


def mamba(**more: Any) -> Metadata:
    """State-space layers of Mamba 2's shape."""
    shared = {"conv_kernel": 4, "state_size": 16, "group_count": 1, "inner_size": 128, "time_step_rank": 4}
    return {f"ssm.{key}": value for key, value in (shared | more).items()}


def latent(n_rot: int = 8, q_lora: bool = True) -> Metadata:
    """Multi-head latent attention: what is cached is a compressed row of 32 and a rotated part of n_rot."""
    ranks: Metadata = {"attention.kv_lora_rank": 32} | ({"attention.q_lora_rank": 32} if q_lora else {})
    return ranks | {
        "attention.head_count_kv": 1,
        "attention.key_length": 32 + n_rot,
        "attention.value_length": 32,
        "attention.key_length_mla": 16 + n_rot,
        "attention.value_length_mla": 16,
        "rope.dimension_count": n_rot,
    }


def yarn(factor: float, n_ctx_orig: int = 64) -> Metadata:
    return {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": factor,
        "rope.scaling.original_context_length": n_ctx_orig,
    }


def longrope(n_ctx_orig: int) -> Metadata:
    return {
        "rope.scaling.type": "longrope",
        "rope.scaling.attn_factor": 1.19,
        "rope.scaling.original_context_length": n_ctx_orig,
    }


def _proportional(shape: tuple[int, ...], _rng: np.random.Generator) -> NDArray[Any]:
    """Frequency factors that rotate a quarter of the pairs and leave the others where they are (Gemma 4)."""
    return np.where(np.arange(shape[-1]) < shape[-1] // 4, 1.0, 1e30)


MOE: Metadata = {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 32}
SHARED: Metadata = {"expert_shared_count": 1, "expert_shared_feed_forward_length": 32}
SIGMOID: Metadata = {"expert_gating_func": 2}
DENSE_FIRST: Metadata = {"leading_dense_block_count": 1}
SCALED: Metadata = {"expert_weights_scale": 1.0, "expert_weights_norm": True}
EXPERTS: Metadata = MOE | SHARED | SIGMOID | DENSE_FIRST | SCALED
LAYER_NORM: Metadata = {"attention.layer_norm_epsilon": 1e-5}
MULTIPLIERS: Metadata = {"logit_scale": 1.0, "residual_scale": 1.0, "embedding_scale": 1.0}
GRANITE: Metadata = MULTIPLIERS | {"attention.scale": 0.25}
EVERY_4TH = [True, True, True, False]  # the fourth layer attends to everything
EVERY_2ND: Metadata = {"attention.head_count_kv": [0, 2, 0, 2]}  # the others keep a state
DELTA_NET: Metadata = mamba(group_count=2, inner_size=64) | {"full_attention_interval": 2}
KDA: Metadata = {"kda.head_dim": 16, "ssm.conv_kernel": 4, "kda.safe_gate": True, "kda.gate_lower_bound": -5.0}
GEMMA4: Metadata = sliding(24, EVERY_4TH * 2) | {
    "rope.freq_base_swa": 10000.0,
    "attention.key_length_swa": 16,
    "attention.value_length_swa": 16,
    "rope.dimension_count_swa": 16,
    "embedding_length_per_layer_input": 16,
    "final_logit_softcapping": 30.0,
}
RWKV: Metadata = LAYER_NORM | {
    "wkv.head_size": 64,
    "time_mix_extra_dim": 32,
    "time_decay_extra_dim": 64,
    "attention.decay_lora_rank": 32,
    "attention.iclr_lora_rank": 32,
    "attention.value_residual_mix_lora_rank": 32,
    "attention.gate_lora_rank": 32,
}
INDEXER: Metadata = {
    "attention.indexer.head_count": 64,
    "attention.indexer.key_length": 128,
    "attention.indexer.top_k": 4096,
    "attention.indexer.block_size": 4,
    "attention.indexer.local_blocks": 1,
    "attention.indexer.kpool": 4,
    "attention.indexer.kpool_select_tail": True,
}
HYPER: Metadata = {
    "hyper_connection.count": 4,
    "hyper_connection.sinkhorn_iterations": 2,
    "hyper_connection.epsilon": 1e-6,
    "hyper_connection.magnitude": 2.0,
    "hyper_connection.low_rank": 8,
}

FIXTURES: dict[str, Fixture] = {
    # plain
    "llama": Fixture("llama", decoder()),
    "qwen2": Fixture("qwen2", decoder(rope_base=1e6)),
    "qwen3": Fixture("qwen3", decoder(rope_base=1e6)),
    "qwen3moe": Fixture("qwen3moe", decoder(MOE, rope_base=1e6)),
    "granite": Fixture("granite", decoder(GRANITE)),
    "granitemoe": Fixture("granitemoe", decoder(GRANITE | MOE)),
    "phi3": Fixture("phi3", decoder(n_head_kv=4)),
    "phi3_long": Fixture("phi3", decoder(longrope(64), n_head_kv=4)),  # Phi-3.5: the long factors
    "phi4mini": Fixture("phi3", decoder(longrope(4096) | {"rope.dimension_count": 12}, n_head_kv=4)),
    "minicpm": Fixture("minicpm", decoder(MULTIPLIERS)),
    "mistral3": Fixture(
        "mistral3",
        decoder(
            yarn(16.0, 16384) | {"rope.scaling.yarn_log_multiplier": 1.0, "attention.temperature_scale": 0.1},
            rope_base=1e6,
        ),
    ),
    "mistral3_short": Fixture(  # the temperature begins within the stream
        "mistral3",
        decoder(
            yarn(16.0) | {"rope.scaling.yarn_log_multiplier": 1.0, "attention.temperature_scale": 0.1}, rope_base=1e6
        ),
    ),
    "mistral3_notemp": Fixture(
        "mistral3", decoder(yarn(16.0) | {"rope.scaling.yarn_log_multiplier": 1.0}, rope_base=1e6)
    ),
    "glm4": Fixture("glm4", decoder({"rope.dimension_count": 8})),
    "glm4moe": Fixture("glm4moe", decoder(EXPERTS | {"rope.dimension_count": 8})),
    "olmo2": Fixture("olmo2", decoder(rope_base=5e5)),
    "olmo3": Fixture("olmo2", decoder(sliding(24, EVERY_4TH) | yarn(8.0), rope_base=5e5)),
    "ernie4_5": Fixture("ernie4_5", decoder()),
    "ernie4_5-moe": Fixture("ernie4_5-moe", decoder(MOE | SHARED | DENSE_FIRST | {"interleave_moe_layer_step": 1})),
    "apertus": Fixture(
        "apertus",
        decoder({f"/xielu.{key}": [1.0] * 4 for key in ("alpha_n", "alpha_p", "beta")} | {"/xielu.eps": [1e-7] * 4}),
    ),
    "seed_oss": Fixture("seed_oss", decoder()),
    "nanbeige": Fixture("nanbeige", decoder({"num_loops": 2}, n_layer=2)),
    "talkie": Fixture("talkie", decoder({"logit_scale": 1.0}, n_head_kv=4)),
    "stablelm": Fixture("stablelm", decoder(LAYER_NORM | {"rope.dimension_count": 4})),
    "minimax-m2": Fixture("minimax-m2", decoder(MOE | SIGMOID | {"rope.dimension_count": 8})),
    "grovemoe": Fixture(
        "grovemoe",
        decoder(MOE | {"expert_chunk_feed_forward_length": 32, "expert_group_scale": 1.0, "experts_per_group": 2}),
    ),
    "chameleon": Fixture("chameleon", decoder({"vocab_size": 10240}, n_head_kv=4)),
    "chatglm": Fixture("chatglm", decoder({"rope.dimension_count": 8})),
    "hrm_text": Fixture(
        "hrm_text", decoder({"hrm.layers_per_stack": 1, "hrm.h_cycles": 2, "hrm.l_cycles": 2}, n_layer=6)
    ),
    "graniteswitch": Fixture(
        "graniteswitch",
        decoder(
            GRANITE
            | {
                "adapters.count": 2,
                "adapters.lora_rank": 4,
                "adapters.token_ids_activate": [300, 301],
                "adapters.token_ids_substitute": [10, 11],
            }
        ),
    ),
    # sliding windows, learned sinks, layers that share a cache
    "gemma2": Fixture(
        "gemma2", decoder(sliding(24) | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0})
    ),
    "gemma3": Fixture("gemma3", decoder(sliding(24) | {"rope.freq_base_swa": 10000.0}, n_layer=6, rope_base=1e6)),
    "gemma3n": Fixture(
        "gemma3n",
        decoder(
            sliding(24) | {"embedding_length_per_layer_input": 16, "altup.num_inputs": 4, "altup.active_idx": 0},
            n_layer=25,
            rope_base=1e6,
        ),
    ),
    "gemma4": Fixture(
        "gemma4",
        decoder(GEMMA4 | {"attention.shared_kv_layers": 0}, n_layer=8, head_dim=32, rope_base=1e6),
        {"rope_freqs": _proportional},
    ),
    "gemma4_shared": Fixture(
        "gemma4",
        decoder(GEMMA4 | {"attention.shared_kv_layers": 4}, n_layer=8, head_dim=32, rope_base=1e6),
        {"rope_freqs": _proportional},
    ),
    "gpt-oss": Fixture("gpt-oss", decoder(MOE | sliding(24) | yarn(32.0), rope_base=150000.0)),
    "laguna": Fixture(
        "laguna",
        decoder(
            EXPERTS
            | sliding(24, [False, True, True, True])
            | yarn(8.0)
            | {"rope.dimension_count": 8, "rope.dimension_count_swa": 16, "rope.freq_base_swa": 10000.0},
            rope_base=5e5,
        ),
    ),
    # layers without rotation
    "smollm3": Fixture("smollm3", decoder(rope_base=5e6)),
    "smollm3_wide": Fixture("smollm3", decoder(rope_base=5e6, head_dim=64)),  # a head that llama.cpp quantises turned
    "cohere2": Fixture("cohere2", decoder(sliding(24) | LAYER_NORM | {"logit_scale": 1.0}, rope_base=50000.0)),
    "cohere2moe": Fixture(
        "cohere2moe",
        decoder(
            MOE | SHARED | SIGMOID | DENSE_FIRST | sliding(24, EVERY_4TH) | LAYER_NORM | {"logit_scale": 1.0},
            rope_base=50000.0,
        ),
    ),
    "exaone4_12": Fixture("exaone4", decoder(rope_base=1e6)),
    "exaone4_32": Fixture(
        "exaone4",
        decoder(sliding(24, EVERY_4TH * 16), n_layer=64, n_embd=32, n_head=2, n_head_kv=1, n_ff=32, rope_base=1e6),
    ),
    "exaone-moe": Fixture(
        "exaone-moe", decoder(MOE | SHARED | SIGMOID | DENSE_FIRST | sliding(24, EVERY_4TH), rope_base=1e6)
    ),
    "smallthinker": Fixture("smallthinker", decoder(MOE | SIGMOID | sliding(24), n_layer=8, rope_base=1e6)),
    "afmoe": Fixture("afmoe", decoder(MOE | SIGMOID | DENSE_FIRST | sliding(24) | {"expert_shared_count": 1})),
    "muse-glimmer": Fixture("muse-glimmer", decoder(sliding(24, EVERY_4TH) | {"logit_scale": 1.0}, rope_base=5e5)),
    "maple": Fixture("maple", decoder(MOE | sliding(24, EVERY_4TH) | {"swiglu_clamp_exp": 7.0}, rope_base=5e5)),
    "llama4": Fixture("llama4", decoder(MOE | {"interleave_moe_layer_step": 1, "attention.chunk_size": 8192})),
    # keys are rotated and then changed again
    "hunyuan-dense": Fixture("hunyuan-dense", decoder(rope_base=1e6)),
    "hunyuan-moe": Fixture("hunyuan-moe", decoder(MOE | {"expert_shared_feed_forward_length": 32})),
    "maincoder": Fixture("maincoder", decoder(rope_base=1e6)),
    # sliding-window layers with a base or a scale of their own
    "granite_swa": Fixture("granite_swa", decoder(GRANITE | sliding(24, EVERY_4TH), rope_base=1e7)),
    "mellum": Fixture("mellum", decoder(MOE | sliding(24, EVERY_4TH) | yarn(16.0), rope_base=5e5)),
    "granite_swa_wide": Fixture(  # the window is wider than the cache, so that these layers see the sinks
        "granite_swa", decoder(GRANITE | sliding(64, EVERY_4TH), rope_base=1e7)
    ),
    "mellum_wide": Fixture("mellum", decoder(MOE | sliding(64, EVERY_4TH) | yarn(16.0), rope_base=5e5)),
    "cohere2_wide": Fixture("cohere2", decoder(sliding(64) | LAYER_NORM | {"logit_scale": 1.0}, rope_base=50000.0)),
    # learned positions, ALiBi, another rotation than the model's type says
    "starcoder": Fixture("starcoder", decoder(LAYER_NORM, n_head_kv=1)),
    "baichuan13": Fixture("baichuan", decoder(n_layer=40, n_embd=32, n_head=2, n_head_kv=2, n_ff=32)),
    "baichuan7": Fixture("baichuan", decoder(n_layer=32, n_embd=32, n_head=2, n_head_kv=2, n_ff=32)),
    "falcon40": Fixture("falcon", decoder(LAYER_NORM)),
    "mpt": Fixture(
        "mpt",
        decoder(LAYER_NORM | {"attention.max_alibi_bias": 8.0, "attention.clamp_kqv": 8.0}, n_head_kv=4),
        without="position_embd",
    ),
    "deepseek2-ocr": Fixture(
        "deepseek2-ocr",
        decoder(MOE | SHARED | DENSE_FIRST | {"expert_weights_scale": 1.0, "expert_gating_func": 1}, n_head_kv=4),
    ),
    # a position of several numbers, of which text uses one
    "qwen2vl": Fixture("qwen2vl", decoder({"rope.dimension_sections": [2, 3, 3, 0]}, rope_base=1e6)),
    "qwen3vl": Fixture(
        "qwen3vl",
        decoder({"rope.dimension_sections": [6, 5, 5, 0], "n_deepstack_layers": 0}, head_dim=32, rope_base=5e6),
    ),
    "qwen3vl_wide": Fixture(
        "qwen3vl",
        decoder({"rope.dimension_sections": [12, 10, 10, 0], "n_deepstack_layers": 0}, head_dim=64, rope_base=5e6),
    ),
    "qwen3vlmoe": Fixture(
        "qwen3vlmoe",
        decoder(MOE | {"rope.dimension_sections": [6, 5, 5, 0], "n_deepstack_layers": 0}, head_dim=32, rope_base=5e6),
    ),
    "paddleocr": Fixture("paddleocr", decoder({"rope.dimension_sections": [2, 3, 3, 0]}, rope_base=5e5)),
    "qwen3tts": Fixture(
        "qwen3tts", decoder({"rope.dimension_sections": [2, 3, 3, 0], "vocab_size": 3072}, rope_base=1e6)
    ),
    # latent attention
    "deepseek2": Fixture("deepseek2", decoder(latent() | EXPERTS)),  # GLM-4.7-Flash
    "deepseek2_wide": Fixture("deepseek2", decoder(latent(n_rot=32) | EXPERTS)),  # a row that q8_0 can hold
    "deepseek2_yarn": Fixture(
        "deepseek2",
        decoder(latent() | MOE | SHARED | DENSE_FIRST | yarn(40.0) | {"rope.scaling.yarn_log_multiplier": 0.0707}),
    ),
    "deepseek2_lite": Fixture(  # DeepSeek-V2-Lite: 27 layers, queries are not compressed
        "deepseek2", decoder(latent(q_lora=False) | MOE | SHARED | DENSE_FIRST | {"block_count": 27})
    ),
    "deepseek2_expanded": Fixture(  # as converted before keys were absorbed: keys of every head are cached
        "deepseek2",
        decoder(
            MOE
            | SHARED
            | DENSE_FIRST
            | {
                "attention.kv_lora_rank": 32,
                "attention.q_lora_rank": 32,
                "attention.head_count_kv": 4,
                "attention.key_length": 24,
                "attention.value_length": 16,
                "rope.dimension_count": 8,
            }
        ),
    ),
    "mistral4": Fixture("mistral4", decoder(latent() | MOE | SHARED | SCALED)),
    "minicpm3": Fixture(
        "minicpm3",
        decoder(
            {
                "attention.q_lora_rank": 32,
                "attention.kv_lora_rank": 32,
                "attention.head_count_kv": 4,
                "attention.key_length": 24,
                "rope.dimension_count": 8,
            }
        ),
    ),
    "plm": Fixture(
        "plm",
        decoder(
            {
                "attention.kv_lora_rank": 32,
                "attention.head_count_kv": 4,
                "attention.key_length": 24,
                "rope.dimension_count": 8,
            }
        ),
    ),
    # sparse attention with an indexer
    "deepseek32": Fixture("deepseek32", decoder(latent() | EXPERTS | INDEXER)),
    "glm-dsa": Fixture("glm-dsa", decoder(latent() | EXPERTS | INDEXER)),
    "dots3note": Fixture(
        "dots3note",
        decoder(
            latent()
            | EXPERTS
            | INDEXER
            | sliding(24, [False, True] * 2)
            | {
                "attention.kv_lora_rank_swa": 32,
                "attention.key_length_swa": 40,
                "attention.value_length_swa": 32,
                "attention.key_length_mla_swa": 24,
                "attention.value_length_mla_swa": 16,
                "rope.freq_base_swa": 10000.0,
                "attention.indexer.types": [1, 0, 1, 0],
            }
        ),
    ),
    "hy_v4": Fixture(
        "hy_v4",
        decoder(
            latent() | EXPERTS | INDEXER | HYPER | {"swiglu_clamp_exp": 10.0, "attention.indexer.types": [1, 0, 1, 0]}
        ),
    ),
    "minimax-m3": Fixture("minimax-m3", decoder(EXPERTS | INDEXER, n_head_kv=4)),
    "deepseek4": Fixture(
        "deepseek4",
        decoder(
            MOE
            | SHARED
            | SCALED
            | INDEXER
            | HYPER
            | sliding(24)
            | {
                "attention.q_lora_rank": 32,
                "attention.output_group_count": 8,
                "attention.output_lora_rank": 32,
                "attention.compress_ratios": [0, 0, 4, 128],
                "attention.compress_rope_freq_base": 160000.0,
                "hash_layer_count": 0,
                "swiglu_clamp_exp": 10.0,
                "expert_gating_func": 4,
            },
            n_head=8,
            n_head_kv=1,
        ),
    ),
    # hybrids: attention layers beside layers that keep a state
    "lfm2": Fixture("lfm2", decoder(EVERY_2ND | {"shortconv.l_cache": 3}, rope_base=1e6)),
    "lfm2_wide": Fixture("lfm2", decoder(EVERY_2ND | {"shortconv.l_cache": 3}, rope_base=1e6, n_embd=256, head_dim=64)),
    "lfm2moe": Fixture(
        "lfm2moe", decoder(EVERY_2ND | MOE | SIGMOID | DENSE_FIRST | {"shortconv.l_cache": 3}, rope_base=1e6)
    ),
    "granitehybrid": Fixture(
        "granitehybrid", decoder(EVERY_2ND | mamba() | GRANITE | {"rope.scaling.finetuned": False})
    ),
    "granitehybrid_rope": Fixture(
        "granitehybrid", decoder(EVERY_2ND | mamba() | GRANITE | {"rope.scaling.finetuned": True})
    ),
    "falcon-h1": Fixture("falcon-h1", decoder(mamba(), n_layer=2, rope_base=1e6), without="rope_freqs"),
    "nemotron_h": Fixture(
        "nemotron_h",
        decoder(EVERY_2ND | mamba() | LAYER_NORM | {"feed_forward_length": [0, 0, 96, 0]}),
    ),
    "nemotron_h_moe": Fixture(
        "nemotron_h_moe",
        decoder(EVERY_2ND | mamba() | LAYER_NORM | MOE | SHARED | {"feed_forward_length": [0, 0, 96, 0]}),
    ),
    "jamba": Fixture("jamba", decoder(EVERY_2ND | mamba() | MOE)),
    "plamo2": Fixture("plamo2", decoder(EVERY_2ND | mamba(group_count=0, inner_size=128))),
    "qwen3next": Fixture(
        "qwen3next",
        decoder(DELTA_NET | MOE | {"expert_shared_feed_forward_length": 32, "rope.dimension_count": 8}, rope_base=1e6),
    ),
    "qwen35": Fixture(
        "qwen35",
        decoder(
            DELTA_NET | {"rope.dimension_count": 8, "rope.dimension_sections": [2, 1, 1, 0]}, head_dim=32, rope_base=1e7
        ),
    ),
    "qwen35_mtp": Fixture(  # with a layer that predicts a second token, which is not decoded
        "qwen35",
        decoder(
            DELTA_NET
            | {"rope.dimension_count": 8, "rope.dimension_sections": [2, 1, 1, 0]}
            | {"block_count": 5, "nextn_predict_layers": 1},
            head_dim=32,
            rope_base=1e7,
        ),
    ),
    "qwen35moe": Fixture(
        "qwen35moe",
        decoder(
            DELTA_NET
            | MOE
            | {"expert_shared_feed_forward_length": 32}
            | {"rope.dimension_count": 8, "rope.dimension_sections": [2, 1, 1, 0]},
            head_dim=32,
            rope_base=1e7,
        ),
    ),
    "kimi-linear": Fixture(
        "kimi-linear",
        decoder(latent() | EXPERTS | KDA | {"attention.head_count_kv": [0, 1, 0, 1]}),
    ),
    "kimi-k3": Fixture(
        "kimi-k3",
        decoder(
            latent()
            | EXPERTS
            | KDA
            | {"attention.head_count_kv": [0, 1, 0, 1]}
            | {"expert_latent_length": 32, "attn_res.block_size": 12}
            | {"activation.situ_beta": 4.0, "activation.situ_linear_beta": 25.0}
        ),
    ),
    "bailingmoe3": Fixture(
        "bailingmoe3",
        decoder(latent() | EXPERTS | KDA | {"attention.head_count_kv": [0, 1, 0, 1]}),
    ),
    "glm5-next": Fixture(
        "glm5-next", decoder(latent(0) | EXPERTS | KDA | INDEXER | HYPER | {"attention.head_count_kv": [0, 1, 0, 1]})
    ),
    "minimax-01": Fixture(
        "minimax-01", decoder(MOE | {"residual_scale": 1.0, "full_attention_interval": 2, "rope.dimension_count": 8})
    ),
    "qwen4exp": Fixture(
        "qwen4exp",
        decoder(
            DELTA_NET
            | MOE
            | INDEXER
            | HYPER
            | {"expert_shared_feed_forward_length": 32, "attention.compress_ratios": [4] * 4}
            | {"rope.dimension_count": 8, "rope.dimension_sections": [2, 1, 1, 0]},
            rope_base=1e7,
        ),
    ),
    # a draft, which reads the hidden states of another model
    "dflash": Fixture("dflash", decoder({"target_layers": [0, 1, 2], "dflash.block_size": 4})),
    # a state and no cache
    "mamba": Fixture("mamba", decoder(mamba())),
    "mamba2": Fixture("mamba2", decoder(mamba())),
    "rwkv6": Fixture("rwkv6", decoder(RWKV, n_embd=128, n_head=2)),
    "rwkv6qwen2": Fixture(
        "rwkv6qwen2", decoder(RWKV | {"token_shift_count": 1}, n_embd=128, n_head=2), without="time_mix_first"
    ),
    "rwkv7": Fixture("rwkv7", decoder(RWKV, n_embd=128, n_head=2)),
    "arwkv7": Fixture("arwkv7", decoder(RWKV | {"token_shift_count": 1}, n_embd=128, n_head=2)),
}


def generic(arch: str) -> Iterator[Fixture]:
    """Metadata to try for an architecture without a fixture, the most demanding first."""
    common: Metadata = LAYER_NORM | {
        "attention.group_norm_epsilon": 1e-5,
        "attention.group_norm_groups": 4,
        "attention.clamp_kqv": 8.0,
        "attention.max_alibi_bias": 8.0,
        "attention.relative_buckets_count": 8,
        "logit_scale": 1.0,
        "use_parallel_residual": False,
        "features_length": 64,
        "/tokenizer.ggml.token_type_count": 2,
    }
    windows: list[Metadata] = [sliding(24, EVERY_4TH), sliding(24, 4), {}]
    for experts in (EXPERTS, {}):  # dense architectures ignore them, and others abort without
        for n_head_kv in (2, 4):
            for window in windows:
                yield Fixture(arch, decoder(common | experts | window, n_head_kv=n_head_kv))
    state = mamba() | KDA | RWKV | {"shortconv.l_cache": 3, "full_attention_interval": 2}
    attentions: list[Metadata] = [{}, EVERY_2ND, latent(), latent() | {"attention.head_count_kv": [0, 1, 0, 1]}]
    for attention in attentions:
        for sections in ([0, 0, 0, 0], [2, 3, 3, 0]):
            positions = {"rope.dimension_sections": sections}
            yield Fixture(arch, decoder(common | EXPERTS | state | attention | positions))


def architectures() -> list[str]:
    """The architectures that the pinned llama.cpp knows; those of the gguf package where its source is not there."""
    if LLAMA_SOURCE.exists():
        table = LLAMA_SOURCE.read_text(encoding="utf-8").split("LLM_ARCH_NAMES = {", 1)[1].split("};", 1)[0]
        names = re.findall(r'\{\s*LLM_ARCH_\w+,\s*"([^"]+)"\s*\}', table)
    else:
        names = list(gguf.MODEL_ARCH_NAMES.values())
    return [name for name in names if name != "(unknown)"]


def names() -> list[str]:
    """Every model to examine: the fixtures, and the architectures that none of them has."""
    covered = {fixture.arch for fixture in FIXTURES.values()}
    return sorted([*FIXTURES, *(arch for arch in architectures() if arch not in covered)])


# ---------------------------------------------------------------------------------------------------------
# files
# ---------------------------------------------------------------------------------------------------------

# Tensors that llama.cpp takes if they are there, and that most checkpoints of most architectures have not: left out
# unless the model does not load without.
_OPTIONAL = re.compile(r"\.(input_)?scale$|^dense_|attn_(q|k|v|qkv|output)\.bias$")


class NoFixtureError(Exception):
    """llama.cpp does not take the metadata; the message is its own."""


class _Tensor(C.Structure):
    """The head of ggml_tensor."""

    _fields_ = (("type", C.c_int), ("buffer", C.c_void_p), ("ne", C.c_int64 * 4), ("nb", C.c_size_t * 4))


class _GgufInit(C.Structure):
    _fields_ = (("no_alloc", C.c_bool), ("ctx", C.c_void_p))


_SetTensor = C.CFUNCTYPE(None, C.c_void_p, C.c_void_p)


_LOG_CALLBACKS: list[Any] = []


class Llama:
    """libllama's and ggml's functions that are called here, and what libllama last complained about."""

    def __init__(self) -> None:
        self.api = libraries.llama()
        self.errors: list[str] = []
        self._log = self.api.llama_log_callback(self._hear)
        _LOG_CALLBACKS.append(self._log)  # libllama keeps the pointer for the life of the process
        self.quiet()
        self.lib = self.api._lib
        suffix = "dylib" if sys.platform == "darwin" else "so"
        self.ggml = ggml = C.CDLL(str(libraries.llama_dir() / f"libggml-base.{suffix}"))
        ggml.ggml_get_name.restype, ggml.ggml_get_name.argtypes = C.c_char_p, [C.c_void_p]
        ggml.ggml_n_dims.argtypes = [C.c_void_p]
        ggml.ggml_backend_tensor_set.argtypes = [C.c_void_p, C.c_void_p, C.c_size_t, C.c_size_t]
        ggml.gguf_init_from_file.restype, ggml.gguf_init_from_file.argtypes = C.c_void_p, [C.c_char_p, _GgufInit]
        ggml.gguf_free.argtypes = [C.c_void_p]
        init = self.lib.llama_model_init_from_user
        init.restype = C.c_void_p
        init.argtypes = [C.c_void_p, _SetTensor, C.c_void_p, type(self.api.llama_model_default_params())]

    def quiet(self) -> None:
        """Send libllama's messages to `errors` (an Engine sets a callback of its own)."""
        self.api.llama_log_set(self._log, None)

    def _hear(self, level: int, text: bytes, _user: object) -> None:
        if level == 4:  # GGML_LOG_LEVEL_ERROR
            self.errors.append(text.decode(errors="replace").strip())

    def params(self) -> Any:
        """Default parameters of a model that this process loads."""
        params = self.api.llama_model_default_params()
        devices.place(params)
        return params

    def complaint(self) -> str:
        """The reason among the errors since the last call: the one that names it, without the function that said it."""
        heard, self.errors = self.errors, []
        reasons = [text for text in heard if "error loading model" in text] or heard
        if not reasons:
            return "no reason given"
        return re.sub(r"^(error loading model( hyperparameters)?: )*", "", reasons[0].split(": ", 1)[-1])


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
        tensor = _Tensor.from_address(pointer)
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
        metadata = llama.ggml.gguf_init_from_file(os.fsencode(path), _GgufInit(True, None))
    callback = _SetTensor(answer)
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


# ---------------------------------------------------------------------------------------------------------
# the oracle
# ---------------------------------------------------------------------------------------------------------


class Raw:
    """A llama_context driven by hand: float32 cache, no flash attention, every cell kept until it is removed."""

    def __init__(self, llama: Llama, path: Path, n_cells: int) -> None:
        llama.quiet()
        self.llama, api = llama, llama.api
        self.model = api.llama_model_load_from_file(os.fsencode(path), llama.params())
        if not self.model:
            raise NoFixtureError(llama.complaint())
        params = api.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = n_cells, 64, 64, 2
        params.kv_unified = params.swa_full = True
        params.type_k = params.type_v = 0  # GGML_TYPE_F32
        params.flash_attn_type = 0
        params.n_threads = params.n_threads_batch = 1
        self.ctx = api.llama_init_from_model(self.model, params)
        if not self.ctx:
            raise NoFixtureError(llama.complaint())
        self.memory = api.llama_get_memory(self.ctx)
        check = getattr(llama.lib, "llama_es_bank_check", None)
        if check is not None:  # from here on llama.cpp reuses no cell outside of a sliding window
            check.argtypes = [C.c_void_p, C.POINTER(C.c_char_p)]
            check(self.ctx, C.byref(C.c_char_p()))
        self.n_vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self.model))
        self.batch = api.llama_batch_init(64, 0, 1)

    @property
    def kind(self) -> str:
        """The memory that the model keeps."""
        api = self.llama.api
        if api.llama_model_has_encoder(self.model):
            return "encoder"
        if api.llama_model_is_recurrent(self.model):
            return "state"
        if not self.memory:
            return "none"
        window = "sliding window" if api.llama_model_n_swa(self.model) > 0 else "cache"
        return f"{window} + state" if api.llama_model_is_hybrid(self.model) else window

    def decode(self, tokens: Sequence[int], position: int, sequence: int = 0) -> Array:
        """The logits of every token."""
        batch = self.batch
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position + i, 1, 1
            batch.seq_id[i][0] = sequence
        status = self.llama.api.llama_decode(self.ctx, batch)
        if status != 0:
            raise NoFixtureError(f"llama_decode returned {status}: {self.llama.complaint()}")
        rows = [self.llama.api.llama_get_logits_ith(self.ctx, i) for i in range(len(tokens))]
        return np.array([np.ctypeslib.as_array(row, shape=(self.n_vocab,)) for row in rows], dtype=np.float32)

    def _state(self) -> Any:
        """What the model keeps of the stream besides the cache, as bytes."""
        api = self.llama.api
        size = api.llama_state_seq_get_size_ext(self.ctx, 0, api.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY)
        state = (C.c_uint8 * size)()
        api.llama_state_seq_get_data_ext(self.ctx, state, size, 0, api.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY)
        return state

    def move_sinks(self, sinks: Sequence[int], old: int, new: int) -> None:
        """Put the sinks, which are at `old`, at `new`: decoded there from nothing, as they were in the beginning."""
        api, memory = self.llama.api, self.memory
        hybrid = api.llama_model_is_hybrid(self.model)
        state = self._state() if hybrid else None
        for i, token in enumerate(sinks):
            self.decode([token], new + i, 1)
        api.llama_memory_seq_rm(memory, 0, old, old + len(sinks))
        api.llama_memory_seq_cp(memory, 1, 0, -1, -1)
        api.llama_memory_seq_rm(memory, 1, -1, -1)
        if state is not None:  # seq_cp brought the sinks' state too
            flags = api.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY
            if api.llama_state_seq_set_data_ext(self.ctx, state, len(state), 0, flags) == 0:
                raise RuntimeError("llama_state_seq_set_data_ext took no state")

    def stream(self, tokens: Sequence[int], sinks: str = "move") -> Array:
        """Logits of a stream over N_CTX cells, token by token. sinks: move, or leave or drop them, which is wrong."""
        api = self.llama.api
        logits, first, n_window = [], 0, 0  # positions: sinks from `first`, the window behind them
        for i, token in enumerate(tokens):
            if i < N_KEEP or self.kind == "state":
                logits.append(self.decode([token], i))
                continue
            if N_KEEP + n_window == N_CTX:
                api.llama_memory_seq_rm(self.memory, 0, first + N_KEEP, first + N_KEEP + 1)
                if sinks == "move":
                    self.move_sinks(tokens[:N_KEEP], first, first + 1)
                elif sinks == "drop":
                    api.llama_memory_seq_rm(self.memory, 0, 0, N_KEEP)
                first, n_window = first + 1, n_window - 1
            logits.append(self.decode([token], first + N_KEEP + n_window))
            n_window += 1
        return np.concatenate(logits)

    def clear(self) -> None:
        self.llama.api.llama_memory_clear(self.memory, True)

    def close(self) -> None:
        api = self.llama.api
        api.llama_batch_free(self.batch)
        api.llama_free(self.ctx)
        api.llama_model_free(self.model)


def engine_logits(path: Path, tokens: Sequence[int], rebase_at: int = 0) -> tuple[Array, int]:
    """The same from edge-stream, and the number of rebases."""
    with (
        Engine.load(
            path,
            n_ctx=N_CTX,
            n_keep=N_KEEP,
            cache_type_k="f32",
            cache_type_v="f32",
            flash_attn="off",
            n_threads=1,
            n_slide=1,
            sink_move="bank",
            rebase_at=rebase_at,
        ) as engine,
        engine.stream() as stream,
    ):
        logits = np.concatenate([stream.logits_of([token]) for token in tokens])
        return logits, stream.stats.n_rebases


# ---------------------------------------------------------------------------------------------------------
# the examination
# ---------------------------------------------------------------------------------------------------------

EXACT, REFUSED, WRONG, CRASHED, NO_FIXTURE = "exact", "refused", "wrong", "crashed", "no fixture"


@dataclass
class Result:
    """What came of a model. Errors: largest absolute difference of a logit from the oracle's; None: not measured."""

    name: str
    arch: str
    status: str
    memory: str = ""
    plain: float | None = None
    rebased: float | None = None
    n_rebases: int = 0
    noise: float | None = None  # one by one against batches of 16, before any slide
    effect: float | None = None  # what leaving the sinks where they were, or dropping them, changes in the oracle
    reason: str = ""

    @property
    def allowed(self) -> float:
        """Exact means: no further from the oracle than this."""
        return max(TOLERANCE, NOISE_FACTOR * (self.noise or 0.0))


def arch_of(name: str) -> str:
    return FIXTURES[name].arch if name in FIXTURES else name


def draw(n: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(0).integers(10, 256, n)]


def difference(a: Array, b: Array) -> float:
    """Infinite if either is not a number."""
    # Chameleon's graph masks image tokens with -FLT_MAX, in the first row of a batch only
    shown = ~((np.abs(a) >= 1e30) | (np.abs(b) >= 1e30))
    largest = float(np.abs(a - b)[shown].max())
    return largest if np.isfinite(largest) else float("inf")


def examine(name: str, path: Path) -> Result:
    """Compare edge-stream with the oracle over the model in `path`."""
    result = Result(name, arch_of(name), WRONG)
    llama = Llama()
    raw = Raw(llama, path, N_CTX + 2 * N_KEEP)
    result.memory = raw.kind
    tokens = draw(N_TOKENS)
    try:
        plain, _ = engine_logits(path, tokens)
        rebased, result.n_rebases = engine_logits(path, tokens, REBASE_AT)
    except UnsupportedModelError as error:
        raw.close()
        result.status, result.reason = REFUSED, re.sub(r"^.*? cannot stream: ", "", str(error))
        return result
    except EdgeStreamError as error:
        raw.close()
        result.reason = str(error)
        return result
    llama.quiet()
    oracle = raw.stream(tokens)
    raw.clear()
    batches = [raw.decode(tokens[i : i + 16], i) for i in range(0, N_CTX, 16)]
    result.noise = difference(oracle[:N_CTX], np.concatenate(batches))
    result.effect = 0.0
    for sinks in ("leave", "drop") if raw.kind != "state" else ():
        raw.clear()
        result.effect = max(result.effect, difference(oracle, raw.stream(tokens, sinks)))
    raw.close()
    result.plain, result.rebased = difference(plain, oracle), difference(rebased, oracle)
    if result.noise > MAX_NOISE:
        result.reason = f"its own float noise is {result.noise:.0e}, which hides everything"
    elif max(result.plain, result.rebased) <= result.allowed:
        result.status = EXACT
    else:
        result.reason = f"differs from the oracle by more than {result.allowed:.0e}"
    return result


def run(name: str, folder: Path) -> Result:
    """Make and examine a model, in a process of its own for each candidate that llama.cpp aborts over."""
    result = Result(name, arch_of(name), NO_FIXTURE)
    environment = os.environ | {"GGML_NO_BACKTRACE": "1"}
    first = 0
    while True:
        command = [sys.executable, str(Path(__file__).resolve()), str(folder), name, str(first)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, env=environment)
        except subprocess.TimeoutExpired:
            return replace(result, status=CRASHED, reason=f"no answer within {TIMEOUT:.0f} s")
        finally:
            (folder / f"{name}.gguf").unlink(missing_ok=True)
        lines = done.stdout.splitlines()
        if done.returncode == 0:
            answer = Result(**json.loads(lines[-1]))
            return answer if len(lines) > 1 else result  # no candidate was left: the last one's abort is the reason
        aborted = re.findall(r"[^/\s]+:\d+: GGML_.*", done.stderr)
        reason = [*aborted, *done.stderr.strip().splitlines()[-1:], f"ended with status {done.returncode}"][0]
        tried = [int(line.split()[1]) for line in lines if line.startswith("candidate")]
        if "made" in lines or not tried:
            return replace(result, status=CRASHED, reason=reason)
        result, first = replace(result, reason=reason), tried[-1] + 1


def main() -> None:
    folder, name, first = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 0
    try:
        path = make(folder / f"{name}.gguf", name, first=first)
        print("made", flush=True)
        result = examine(name, path)
    except NoFixtureError as error:
        result = Result(name, arch_of(name), NO_FIXTURE, reason=str(error))
    print(json.dumps(asdict(result)))


if __name__ == "__main__":
    main()
