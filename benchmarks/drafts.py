"""What drafts gain, by the kind of text: two streams write the same tokens in turns, one of them with drafts.

    python benchmarks/drafts.py -m demo -c 1024
    python benchmarks/drafts.py -m large.gguf -c 1024 --draft-model small.gguf

copy: the model, shown a text twice, writes it a third time (greedy). edit: the same text is fed token by token, as if
it were written, with every 25th token replaced. chat: answers to questions, greedy and sampled.

plain/drafts: how much faster drafts make it, as the ratio of whole times; a turn is 32 tokens. tokens per decode: how
many a decode gives. differ: tokens, of all, at which the two streams did not choose the same.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from edge_stream import Engine, Sampling
from edge_stream.chat.core import ChatCore
from edge_stream.measure.corpus import help_topics
from edge_stream.measure.table import as_json, markdown
from edge_stream.stream import Stream

TURN = 32  # tokens
QUESTIONS = (
    "Tell me about the sea.",
    "How does a bicycle stay upright?",
    "Write a letter to a friend about winter.",
    "Explain how bread is made.",
    "What is a function in Python? Give an example.",
    "Plan a birthday party for a child of seven.",
)


@dataclass
class Total:
    """Sums over the texts of a kind."""

    n: int = 0
    n_differ: int = 0
    seconds: list[float] = field(default_factory=lambda: [0.0, 0.0])
    n_drafted: int = 0
    n_accepted: int = 0

    def row(self, kind: str) -> dict[str, Any]:
        """A row of the table."""
        plain, drafts = (1e3 * seconds / self.n for seconds in self.seconds)
        return {
            "text": kind,
            "tokens": self.n,
            "plain_ms": plain,
            "drafts_ms": drafts,
            "plain/drafts": plain / drafts,
            "drafted": self.n_drafted,
            "accepted": self.n_accepted,
            "tokens per decode": self.n / (self.n - self.n_accepted),
            "differ": self.n_differ,
        }


Step = Callable[[], int]  # writes a token


class Pair:
    """An engine without drafts and one with, and what was measured on them."""

    def __init__(self, args: argparse.Namespace) -> None:
        options: dict[str, Any] = {"n_ctx": args.n_ctx, "n_slide": args.slide, "n_threads": args.threads}
        drafts = {"n_draft": args.draft, "draft_model": args.draft_model}
        self.engines = Engine.load(args.model, **options), Engine.load(args.model, **options, **drafts)
        self.n = args.n

    def measure(self, total: Total, prompt: list[int], make: Callable[[Stream], Step]) -> None:
        """Both streams read a prompt and write n tokens, in turns."""
        streams = [engine.stream() for engine in self.engines]
        steps = []
        for stream in streams:
            stream.feed(prompt)
            steps.append(make(stream))
        for start in range(0, self.n, TURN):
            written: list[list[int]] = []
            for i, step in enumerate(steps):
                begin = time.perf_counter()
                written.append([step() for _ in range(min(TURN, self.n - start))])
                total.seconds[i] += time.perf_counter() - begin
            total.n += len(written[0])
            total.n_differ += sum(a != b for a, b in zip(*written, strict=True))
        stats = streams[1].stats
        total.n_drafted += stats.n_drafted
        total.n_accepted += stats.n_accepted
        for stream in streams:
            stream.close()


def generating(sampling: Sampling) -> Callable[[Stream], Step]:
    """Steps that generate."""

    def make(stream: Stream) -> Step:
        tokens = stream.generate(-1, sampling=sampling, ignore_eos=True)
        return lambda: next(tokens).token

    return make


def feeding(tokens: list[int]) -> Callable[[Stream], Step]:
    """Steps that feed what is given."""

    def make(stream: Stream) -> Step:
        rest = iter(tokens)

        def step() -> int:
            token = next(rest)
            stream.feed_tokens((token,))
            return token

        return step

    return make


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", default="demo")
    parser.add_argument("-c", "--ctx-size", dest="n_ctx", type=int, default=1024)
    parser.add_argument("-n", type=int, default=256, help="tokens of each text")
    parser.add_argument("-r", "--texts", type=int, default=6, help="texts of each kind")
    parser.add_argument("--draft", type=int, default=8, help="most tokens of a draft")
    parser.add_argument("--draft-model", default="", help="a model that guesses as well")
    parser.add_argument("--slide", type=int, default=16)
    parser.add_argument("-t", "--threads", type=int)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    pair = Pair(args)
    plain = pair.engines[0]
    core = ChatCore(plain.backend.vocabulary)
    corpus = plain.tokenize(help_topics()[:100_000])
    again = plain.tokenize("\n\nThe same text again:\n\n")
    greedy = Sampling(temp=0)
    totals = {name: Total() for name in ("copy, greedy", "edit", "chat, greedy", "chat, temp 0.8")}
    for i in range(args.texts):
        text = corpus[2000 + 1000 * i : 2000 + 1000 * i + args.n]
        pair.measure(totals["copy, greedy"], text + again + text + again + text[:16], generating(greedy))
        edited = [corpus[j] if j % 25 == 24 else token for j, token in enumerate(text)]
        pair.measure(totals["edit"], text + again, feeding(edited))
        asked = core.request({"messages": [{"role": "user", "content": QUESTIONS[i % len(QUESTIONS)]}]}).prompt
        question = plain.tokenize(asked, special=True)
        pair.measure(totals["chat, greedy"], question, generating(greedy))
        pair.measure(totals["chat, temp 0.8"], question, generating(Sampling(seed=i)))
    rows = [total.row(kind) for kind, total in totals.items()]
    print(as_json(rows) if args.json else markdown(rows, list(rows[0])))


if __name__ == "__main__":
    main()
