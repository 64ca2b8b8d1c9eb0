"""CPU kernels in TIR, scheduled by hand: each is the loop nest that will run, with explicit vectors and parallel loop.

`Lanes` is the vector width. Weights and keys are stored in blocks of `block` rows, so that one vector holds the same
column of many rows and a product needs no sum across a vector.
"""

from __future__ import annotations

from dataclasses import dataclass

ROWS = (1, 8)  # one row is memory-bound; with eight, the sums of a vector of rows fit into registers


@dataclass(frozen=True)
class Lanes:
    """vector: float32 values in a register. block: rows, or cache slots, of a block; a few registers."""

    vector: int

    @property
    def block(self) -> int:
        """Four vectors: enough independent sums to hide the latency of a multiply-add."""
        return 4 * self.vector


def count_blocks(n_ctx: int, lanes: Lanes) -> int:
    """Blocks that hold n_ctx tokens, however many of them are sinks."""
    return -(-n_ctx // lanes.block) + 1
