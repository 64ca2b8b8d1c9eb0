"""CPU kernels in TIR, scheduled by hand: each is the loop nest that will run, with explicit vectors and parallel loop.

`Lanes` is the vector width. Weights and keys are stored in blocks of `block` rows, so that one vector holds the same
column of many rows and a product needs no sum across a vector.
"""

from __future__ import annotations

from dataclasses import dataclass

# one row is memory-bound; with six, two vectors of sums for each, two of weights and one of the input fill 16 registers
ROWS = (1, 2, 4, 6)


@dataclass(frozen=True)
class Lanes:
    """vector: float32 values in a register. block: rows, or cache slots, of a block; a few registers.

    dot: LLVM's name of an instruction that multiplies pairs of int16 and sums the two products into an int32, of vector
    lanes; empty if the processor has none. dot_adds: it adds a third operand as well.
    """

    vector: int
    dot: str = ""

    @property
    def dot_adds(self) -> bool:
        """Of VNNI, not of its predecessors."""
        return "vpdpwssd" in self.dot

    def in_integers(self, m: int) -> bool:
        """Whether m rows are multiplied by 4-bit weights faster in integers than in float32.

        Where the sum is an instruction of its own, 16 registers do not hold what six rows need.
        """
        return self.dot_adds or (bool(self.dot) and (self.vector > 8 or m <= 4))

    @property
    def block(self) -> int:
        """Four vectors: enough independent sums to hide the latency of a multiply-add."""
        return 4 * self.vector

    def of_rows(self, m: int) -> int:
        """Values that are computed at once for each of m rows."""
        return self.block if m <= 2 else 2 * self.vector


def count_blocks(n_ctx: int, lanes: Lanes) -> int:
    """Blocks that hold n_ctx tokens, however many of them are sinks."""
    return -(-n_ctx // lanes.block) + 1
