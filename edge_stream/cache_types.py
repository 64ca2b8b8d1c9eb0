"""The types that a KV cache can have: all that is known of them in Python."""

from __future__ import annotations

# name: ggml_type, elements and bytes per block (enum ggml_type and the block structs of ggml)
CACHE_TYPES = {
    "f32": (0, 1, 4),
    "f16": (1, 1, 2),
    "bf16": (30, 1, 2),
    "q8_0": (8, 32, 34),
    "q5_1": (7, 32, 24),
    "q5_0": (6, 32, 22),
    "q4_1": (3, 32, 20),
    "q4_0": (2, 32, 18),
    "iq4_nl": (20, 32, 18),
}


def ggml_type(name: str) -> int:
    """ggml's number of a type."""
    return CACHE_TYPES[name][0]


def row_bytes(name: str, n: int) -> int:
    """Bytes of a row of n elements."""
    _, block, size = CACHE_TYPES[name]
    return -(-n // block) * size
