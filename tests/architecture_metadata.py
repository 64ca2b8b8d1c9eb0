"""Metadata of a tiny model of every architecture that llama.cpp knows.

FIXTURES names the models that need metadata of their own, because real checkpoints of that architecture have a property
that matters here; every other architecture gets `generic` metadata, so that one which a newer llama.cpp brings is
examined without a change here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[1]
LLAMA_SOURCE = ROOT / "build" / "llama.cpp" / "llama.cpp" / "src" / "llama-arch.cpp"

Fill = Callable[[tuple[int, ...], np.random.Generator], NDArray[Any]]
Metadata = dict[str, Any]


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
