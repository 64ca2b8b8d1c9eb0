"""A model's rotary frequencies, in float64 (transformers, modeling_rope_utils.py)."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from edge_stream.converters.mlc.decoder_config import DecoderConfig
from edge_stream.errors import UnsupportedModelError


def frequencies(config: DecoderConfig) -> NDArray[np.float64]:
    """Radians per position of each pair, [head_dim / 2]. Raises UnsupportedModelError for an unknown scaling."""
    plain = config.rope_base ** (-np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim)
    scaling = config.rope_scaling
    kind = (scaling or {}).get("rope_type", (scaling or {}).get("type", "default"))  # an older name of the key
    if not scaling or kind == "default":
        return plain
    if kind != "llama3":
        raise UnsupportedModelError(f"the MLC engine does not know rope scaling {kind}")
    factor, original = float(scaling["factor"]), float(scaling["original_max_position_embeddings"])
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    turns = original * plain / (2.0 * math.pi)  # within the original training length
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    scaled: NDArray[np.float64] = plain * (smooth + (1.0 - smooth) / factor)
    return scaled
