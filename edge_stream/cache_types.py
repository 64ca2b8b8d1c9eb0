"""KV cache types, and what they imply for flash attention. A new type is one line in CACHE_TYPES."""

from __future__ import annotations

from typing import NamedTuple

from edge_stream.errors import EdgeStreamError


class CacheType(NamedTuple):
    """ggml_type: value of enum ggml_type. n_block, n_bytes: elements and bytes per block."""

    ggml_type: int
    n_block: int
    n_bytes: int

    @property
    def is_quantised(self) -> bool:
        return self.n_block > 1

    def row_bytes(self, n: int) -> int:
        """Bytes of a row of n elements."""
        return -(-n // self.n_block) * self.n_bytes


# ggml.h (enum ggml_type) and ggml-common.h (the block structs)
CACHE_TYPES = {
    "f32": CacheType(0, 1, 4),
    "f16": CacheType(1, 1, 2),
    "bf16": CacheType(30, 1, 2),
    "q8_0": CacheType(8, 32, 34),
    "q5_1": CacheType(7, 32, 24),
    "q5_0": CacheType(6, 32, 22),
    "q4_1": CacheType(3, 32, 20),
    "q4_0": CacheType(2, 32, 18),
    "iq4_nl": CacheType(20, 32, 18),
}


def choose_flash_attn(wanted: str, type_k: str, type_v: str, *, independent: bool = False) -> tuple[str, str]:
    """Resolve `-fa` for these cache types: (auto, on or off; a note for the user, or "").

    independent: streams decoded together must not affect each other's logits, which only the CPU without flash
    attention guarantees. llama.cpp (llama-context.cpp, and build_attn_mha in llama-graph.cpp) requires flash attention
    for a quantised V, and casts f32 to f16 for it. Raises EdgeStreamError if `wanted` contradicts the types.
    """
    quantised = CACHE_TYPES[type_v].is_quantised
    rounded = " and ".join(part for part, name in (("keys", type_k), ("values", type_v)) if name == "f32")
    if wanted == "off" and quantised:
        raise EdgeStreamError(f"a {type_v} V cache needs flash attention: use -fa auto, or -ctv f16")
    if wanted == "on" and rounded:
        return "on", f"-fa on: f32 {rounded} are rounded to f16 in flash attention (-fa off computes in f32)"
    if wanted != "auto":
        return wanted, ""
    if quantised and rounded:
        return (
            "on",
            f"-fa auto: on, which a {type_v} V cache needs; f32 {rounded} are rounded to f16 (-ctv f16 avoids it)",
        )
    if quantised and independent:
        return "on", (
            f"-fa auto: on, which a {type_v} V cache needs; what a conversation says may depend on its neighbours "
            "(-ctv f16 avoids it)"
        )
    if rounded:
        return "off", f"-fa auto: off, because flash attention would round f32 {rounded} to f16"
    if independent:
        return "off", "-fa auto: off, so that what a conversation says does not depend on its neighbours"
    return "auto", ""
