"""Rotary positions: frequencies in float64 for our kernels, and an expression of them for TVM's (transformers,
modeling_rope_utils.py)."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_stream.converters.mlc.decoder_config import DecoderConfig
from edge_stream.errors import UnsupportedModelError
from edge_stream.families import RopeScaling


def tables(config: DecoderConfig) -> NDArray[np.float64]:
    """Radians per position of each pair, [kinds of layers, head_dim / 2]: see DecoderConfig.rope_kinds.

    Raises UnsupportedModelError for a scaling that only TVM knows.
    """
    scaling, d = config.rope_scaling, config.head_dim
    if scaling is not None and scaling.kind not in ("linear", "llama3", "yarn"):
        raise UnsupportedModelError(f"the MLC engine does not know rope scaling {scaling.kind}")
    if scaling is not None and scaling.magnitude != 1.0 and set(config.rope_kinds) != {"full"}:
        raise UnsupportedModelError(f"the MLC engine does not know {scaling.kind} in some of the layers only")
    found = {
        "full": frequencies(config.rope_base, d, scaling),
        "none": np.zeros(d // 2),
        "sliding": frequencies(config.rope_base_swa, d, None),
    }
    return np.stack([found[kind] for kind in sorted(set(config.rope_kinds))])


def frequencies(base: float, head_dim: int, scaling: RopeScaling | None) -> NDArray[np.float64]:
    """Radians per position of each pair, [head_dim / 2]."""
    plain: NDArray[np.float64] = base ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling is None:
        return plain
    slow = plain / scaling.factor
    if scaling.kind == "linear":
        return slow
    if scaling.kind == "llama3":
        turns = scaling.n_ctx_orig * plain / (2.0 * math.pi)  # within the original training length
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        share = np.clip((turns - low) / (high - low), 0.0, 1.0)
    else:
        first, last = yarn_range(base, head_dim, scaling)
        share = 1.0 - np.clip((np.arange(head_dim // 2) - first) / (last - first), 0.0, 1.0)
    return share * plain + (1.0 - share) * slow


def yarn_range(base: float, head_dim: int, scaling: RopeScaling) -> tuple[float, float]:
    """The pairs between which yarn goes from unchanged frequencies to divided ones."""

    def pair(turns: float) -> float:  # that makes so many turns within the original training length
        return head_dim * math.log(scaling.n_ctx_orig / (turns * 2.0 * math.pi)) / (2.0 * math.log(base))

    first, last = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0.0), min(last, head_dim - 1.0)
    return first, last if last != first else first + 0.001


def scaling_for_tvm(config: DecoderConfig) -> dict[str, Any]:
    """rope_scaling of TVM's cache; {} if there is none."""
    s = config.rope_scaling
    if s is None or s.kind == "linear":  # it has a factor on positions besides
        return {}
    if s.kind == "yarn":
        first, last = yarn_range(config.rope_base, config.head_dim, s)
        return {"rope_type": "yarn", "factor": s.factor, "first": first, "last": last}
    return {
        "rope_type": s.kind,
        "factor": s.factor,
        "low_freq_factor": s.low_freq_factor,
        "high_freq_factor": s.high_freq_factor,
        "original_max_position_embeddings": s.n_ctx_orig,
    }


def correct_yarn() -> None:
    """Replace TVM's yarn in this process: in 0.27 it gives the two dimensions of a pair different frequencies
    (position_embedding.py, rope_freq_yarn: its ramp goes over dimensions, not pairs) and never rounds its range."""
    from tvm.relax.frontend.nn.llm import _kernel_common, position_embedding

    others: Callable[[dict[str, Any]], Any] = position_embedding.switch_rope_freq_func

    def choose(scaling: dict[str, Any]) -> Any:
        if scaling.get("rope_type") != "yarn":
            return others(scaling)
        return partial(_yarn, **{key: scaling[key] for key in ("factor", "first", "last")})

    for module in (position_embedding, _kernel_common):
        module.switch_rope_freq_func = choose


def _yarn(s: Any, d: Any, d_range: int, theta: Any, dtype: str, factor: float, first: float, last: float) -> Any:
    """Cosine and sine of position s in dimension d, and the variable that they share, as TVM's own functions do."""
    from tvm import tirx

    one = tirx.const(1, "float32")
    pair = (d % (d_range // 2)).astype("float32")
    share = one - tirx.max(tirx.min((pair - first) / (last - first), 1.0), 0.0)
    frequency = (share + (one - share) / factor) / tirx.power(theta, pair * 2.0 / d_range)
    angle = tirx.Var("freq", "float32")
    return tirx.cos(angle).astype(dtype), tirx.sin(angle).astype(dtype), {angle: s * frequency}
