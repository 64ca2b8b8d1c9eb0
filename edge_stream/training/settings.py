"""What a training run is asked for: everything that its result depends on, besides the text and the base model."""

from __future__ import annotations

from dataclasses import dataclass

SINKS = ("none", "token", "softmax1")
SINK_TOKEN = "<|sink|>"
END_TOKEN = "<|endoftext|>"


@dataclass(frozen=True)
class Shape:
    """A new model: a Llama with tied embeddings and as many key-value heads as heads."""

    n_vocab: int = 2048  # words of the tokenizer, END_TOKEN included and SINK_TOKEN not
    n_layer: int = 4
    n_embd: int = 128
    n_head: int = 4

    @property
    def n_ff(self) -> int:
        """8/3 of the width, as Llama has it, rounded up to a multiple of 32."""
        return -(-self.n_embd * 8 // 3 // 32) * 32


@dataclass(frozen=True)
class Settings:
    """sink: one of SINKS. only_sink: nothing but the sink token's embedding is learned. length: tokens of text per
    sample, to which the sink token is added. n_tokens: of text, repeated ones counted. every: steps from one evaluation
    and checkpoint to the next. n_held_out: most samples to evaluate on. lr: the highest learning rate.
    weight_decay: of matrices, if more than the sink is learned; each step takes that times the rate from them.
    """

    sink: str = "none"
    only_sink: bool = False
    length: int = 256
    batch: int = 8
    n_tokens: int = 1_000_000
    lr: float = 3e-3
    weight_decay: float = 0.1
    seed: int = 0
    every: int = 100
    n_held_out: int = 64

    @property
    def n_steps(self) -> int:
        """Steps of the whole run."""
        return -(-self.n_tokens // (self.batch * self.length))
