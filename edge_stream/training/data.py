"""From texts to batches: a byte-level BPE, the tokens of the texts, and an order that depends on the seed alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from edge_stream.errors import EdgeStreamError
from edge_stream.training.settings import END_TOKEN

_CHUNK = 1 << 20  # characters that are tokenized at a time, to the end of a line
_HELD_OUT = 20  # one part in so many of each text is evaluated on, and not trained on


def train_tokenizer(texts: Sequence[str], n_vocab: int) -> Tokenizer:
    """A byte-level BPE like GPT-2's with n_vocab words, END_TOKEN the first. Raises EdgeStreamError for short texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=n_vocab,
        special_tokens=[END_TOKEN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((part for text in texts for part in _chunks(text)), trainer)
    if tokenizer.get_vocab_size() != n_vocab:
        raise EdgeStreamError(
            f"the text gives a vocabulary of {tokenizer.get_vocab_size()} words, not {n_vocab}: lower --vocab, or give "
            "more text"
        )
    return tokenizer


def put_in_front(tokenizer: Tokenizer, token: str) -> None:
    """Let the tokenizer put a token in front of every text, as it does with BOS."""
    ids = [(token, tokenizer.token_to_id(token))]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A $B", special_tokens=ids
    )


def _chunks(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        end = text.find("\n", start + _CHUNK)
        end = len(text) if end < 0 else end + 1
        yield text[start:end]
        start = end


def encode(tokenizer: Tokenizer, texts: Sequence[str], end: int | None) -> torch.Tensor:
    """The texts' tokens, int32, each text followed by `end`. Nothing is put in front."""
    ids: list[int] = []
    for text in texts:
        for part in tokenizer.encode_batch(list(_chunks(text)), add_special_tokens=False):
            ids += part.ids
        ids += [] if end is None else [end]
    return torch.tensor(ids, dtype=torch.int32)


def split(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """What is trained on, and the last twentieth of each text, which is evaluated on."""
    cuts = [len(text) - len(text) // _HELD_OUT for text in texts]
    pairs = list(zip(texts, cuts, strict=True))
    return [text[:cut] for text, cut in pairs], [text[cut:] for text, cut in pairs]


class Samples:
    """Endless batches of samples that do not overlap: in each epoch all of them, from another first token, shuffled.

    A batch depends on the seed and its number only, so that a resumed run reads what the first one would have.
    """

    def __init__(self, tokens: torch.Tensor, length: int, batch: int, seed: int) -> None:
        """tokens: int32. Raises EdgeStreamError unless they make a sample and one token more."""
        if len(tokens) <= length:
            raise EdgeStreamError(
                f"the text has {len(tokens)} tokens, and a sample needs {length + 1}: give more text or a smaller -c"
            )
        self._tokens, self._length, self._batch, self._seed = tokens, length, batch, seed
        self.n_samples = (len(tokens) - 1) // length
        self._starts = lru_cache(maxsize=2)(self._starts_of)

    def batch(self, step: int) -> torch.Tensor:
        """[batch, length + 1], int64: a token and the one after it, all along."""
        first = step * self._batch
        starts = [self._starts(i // self.n_samples)[i % self.n_samples] for i in range(first, first + self._batch)]
        return torch.stack([self._tokens[s : s + self._length + 1] for s in starts]).long()

    def _starts_of(self, epoch: int) -> list[int]:
        random = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
        spare = len(self._tokens) - 1 - self.n_samples * self._length
        offset = int(torch.randint(spare + 1, (), generator=random))
        order = torch.randperm(self.n_samples, generator=random)
        return [int(i) * self._length + offset for i in order]


def in_order(tokens: torch.Tensor, length: int, n_max: int) -> torch.Tensor:
    """The first samples, at most n_max, [n, length + 1], int64: to evaluate on. Raises EdgeStreamError if none."""
    n = min(n_max, (len(tokens) - 1) // length)
    if n < 1:
        raise EdgeStreamError(
            f"the text to evaluate on has {len(tokens)} tokens, and a sample needs {length + 1}: give more text or a "
            "smaller -c"
        )
    return tokens[: n * length + 1].unfold(0, length + 1, length).long()
