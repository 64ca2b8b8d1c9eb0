"""What recall finds, and what it is worth.

    python benchmarks/recall.py gate            what comes back for facts, the world's knowledge and requests
    python benchmarks/recall.py passkey TEXT    a passkey among a million tokens, and the time of a search
    python benchmarks/recall.py perplexity TEXT what a recalled line does to a text that has no use for it
    python benchmarks/recall.py place           where a line that comes back is of most use in a conversation
    python benchmarks/recall.py chat -m demo    facts told in a conversation and asked for 10 and 100 caches later
    python benchmarks/recall.py speed -m demo   what recall costs: time to the first token, tokens per second
    python benchmarks/recall.py memory -m demo  resident memory along a hundred caches

The facts and questions are in recall_data: written for this, none of a data set. Those named *-tune are what the gate's
bounds were chosen with; nothing else is measured with them. The dialogue between is chatterbot-corpus of PyPI (BSD),
in eight languages, which pip downloads; the half of it that belongs to *-tune is not used for the rest.
"""

from __future__ import annotations

import argparse
import itertools
import math
import multiprocessing
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from edge_stream import Engine, Sampling
from edge_stream.chat.conversation import Conversation
from edge_stream.measure.metrics import resident_mib
from edge_stream.measure.table import markdown
from edge_stream.recall import Hit, Log, StreamLog

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(__file__).with_name("recall_data")
CORPUS = "chatterbot-corpus==1.3.3"
LANGUAGES = ("dutch", "english", "french", "german", "italian", "portuguese", "spanish", "swedish")
TUNED_WITH = ("ai", "computers", "emotion", "health", "humor", "literature", "psychology", "sports", "trivia")
REPETITIVE = "tech_support"  # a few lines over and over
N_TOKENS = 64  # --recall
RECALL_EVERY = 64  # tokens, where it is forced
GREEDY = Sampling(temp=0)
Message = dict[str, str]


def table(name: str) -> list[list[str]]:
    """The rows of a file of recall_data."""
    return [line.split("\t") for line in (DATA / f"{name}.tsv").read_text(encoding="utf-8").splitlines()]


def dialogues(is_tuned: bool, languages: tuple[str, ...] = LANGUAGES) -> list[list[str]]:
    """Different conversations in a fixed order, each a list of messages that begins with the user's."""
    import yaml

    folder = ROOT / "build" / "results"
    wheels = list(folder.glob("chatterbot_corpus-1.3.3-*.whl"))
    if not wheels:
        folder.mkdir(parents=True, exist_ok=True)
        words = ["download", "--quiet", "--disable-pip-version-check", "--no-deps", "-d", str(folder), CORPUS]
        subprocess.run([sys.executable, "-m", "pip", *words], check=True, stdout=sys.stderr)
        wheels = list(folder.glob("chatterbot_corpus-1.3.3-*.whl"))
    found = dict[tuple[str, ...], None]()
    with zipfile.ZipFile(wheels[0]) as wheel:
        for name in sorted(wheel.namelist()):
            path = Path(name)
            language, topic = path.parent.name, path.stem
            tuned = language == "english" and topic in TUNED_WITH
            if path.suffix == ".yml" and language in languages and topic != REPETITIVE and tuned == is_tuned:
                for messages in yaml.safe_load(wheel.read(name))["conversations"]:
                    found[tuple(str(message) for message in messages)] = None
    out = [list(messages) for messages in found]
    random.Random(1).shuffle(out)
    return out


#
# gate
#


def filled(is_tuned: bool, told: list[str]) -> Log:
    """A log of dialogue with messages of the user told along the way."""
    log, turn = Log(max_bytes=1 << 30), 0

    def say(text: str, role: str) -> None:
        nonlocal turn
        log.append(text, turn, role, when=0)
        turn += 1

    talks = dialogues(is_tuned)
    told = list(told)
    random.Random(0).shuffle(told)
    for i, talk in enumerate(talks):
        for j, text in enumerate(talk):
            say(text, "assistant" if j % 2 else "user")
        for text in told[i * len(told) // len(talks) : (i + 1) * len(told) // len(talks)]:
            say(text, "user")
            say("I see.", "assistant")
    return log


def comes_back(log: Log, questions: list[str]) -> list[Hit | None]:
    """What is recalled for each question, when all that was said has left the window."""
    return [log.recall(question, log.stats.n_turns) for question in questions]


def gate(_args: argparse.Namespace) -> None:
    """What comes back for what is asked, without a model."""
    rows = []
    for name in ("-tune", ""):
        facts, requests, world = table(f"facts{name}"), table(f"requests{name}"), table(f"world{name}")
        log = filled(bool(name), [row[0] for row in facts + requests])
        data = "tuned with" if name else "held out"
        found = comes_back(log, [row[1] for row in facts])
        right = sum(bool(hit) and hit.text == row[0] for hit, row in zip(found, facts, strict=True) if hit)
        rows.append(row_of(data, "facts", found, right))
        rows.append(row_of(data, "the world's knowledge", comes_back(log, [row[0] for row in world])))
        rows.append(row_of(data, "requests like an earlier one", comes_back(log, [row[1] for row in requests])))
    rows += limits()
    print(markdown(rows, list(rows[0])))


def row_of(data: str, what: str, found: list[Hit | None], right: int | None = None) -> dict[str, Any]:
    """How often something came back, and the right line."""
    n = sum(hit is not None for hit in found)
    return {"texts": data, "asked": what, "n": len(found), "recalled": n, "share": n / len(found), "right": right}


def limits() -> list[dict[str, Any]]:
    """What cannot be found by words, or with one line."""
    rows = []
    for name, what in (("paraphrases", "facts in other words"), ("updates", "facts told twice: the newer one")):
        cases = table(name)
        log = filled(False, [row[0] for row in cases])
        n = log.stats.n_turns
        for row in cases if name == "updates" else ():
            log.append(row[1], n, "user", when=0)
            n += 1
        found = comes_back(log, [row[-1] for row in cases])
        wanted = [row[-2] for row in cases]
        right = sum(hit is not None and hit.text == text for hit, text in zip(found, wanted, strict=True))
        rows.append(row_of("held out", what, found, right))
    cases = table("counting")
    log = filled(False, [text for row in cases for text in row[0].split(" | ")])
    # one line comes back, and all would be needed
    rows.append(row_of("held out", "sums over several lines", comes_back(log, [row[1] for row in cases]), 0))
    return rows


#
# passkey
#


def passkey(args: argparse.Namespace) -> None:
    """A line with a number among a million tokens of text: its rank from each of 50 depths; the time of a search."""
    with Engine.load(args.model, n_ctx=64) as engine:
        lines = Path(args.text).read_text(encoding="utf-8").splitlines()
        n_tokens, used = 0, []
        for line in lines:
            n_tokens += len(engine.tokenize(line + "\n"))
            used.append(line)
            if n_tokens >= args.tokens:
                break
    if n_tokens < args.tokens:
        raise SystemExit(f"{args.text} has {n_tokens} tokens: give a longer text")
    depths = [len(used) * i // args.depths for i in range(args.depths)]
    question, fact = "What is the pass key of the vault?", "The pass key of the vault is {}."
    ranks = []
    for i, depth in enumerate(depths):
        log = Log(max_bytes=1 << 30)
        for turn, line in enumerate(used):
            if turn == depth:
                log.append(fact.format(10007 + i), turn)
            log.append(line, turn, when=0)
        hit = log.recall(question, len(used))
        first = [h.text for h in log.search(question, 1)]
        ranks.append(first == [fact.format(10007 + i)] and hit is not None and hit.text == first[0])
        if i == 0:
            rows = [search_row(log, n_tokens, question)]
    big = Log(max_bytes=1 << 30)
    for part in range(10):
        for turn, line in enumerate(used):
            big.append(line, part * len(used) + turn, when=0)
    rows.append(search_row(big, 10 * n_tokens, question))
    print(markdown(rows, list(rows[0])))
    print(f"\nA pass key at {args.depths} depths of {n_tokens:,} tokens: first in {sum(ranks)} searches.")


def search_row(log: Log, n_tokens: int, question: str) -> dict[str, Any]:
    """The time of a search, and what the log takes."""
    times = []
    for _ in range(21):
        start = time.perf_counter()
        log.search(question)
        times.append(1000 * (time.perf_counter() - start))
    stats = log.stats
    return {
        "tokens": n_tokens,
        "entries": stats.n_entries,
        "file_mib": stats.n_bytes / 2**20,
        "bytes/token": stats.n_bytes / n_tokens,
        "search_ms": statistics.median(times),
        "slowest_ms": max(times),
    }


#
# perplexity
#


def perplexity(args: argparse.Namespace) -> None:
    """Of a text, with a line recalled every 64 tokens whether or not it belongs there, and without."""
    lines = Path(args.text).read_text(encoding="utf-8").splitlines()[: args.lines]
    rows: list[dict[str, Any]] = []
    with Engine.load(args.model, n_ctx=args.ctx_size, n_keep=4) as engine:
        for how in ("off", "as text", "between sinks and window"):
            nll, n_notes, since = [], 0, 0
            with engine.stream() as stream, Log() as log:
                seen = StreamLog(stream, log)
                stream.feed(lines[0] + "\n")
                for i, line in enumerate(lines[1:], 1):
                    if how != "off" and since >= RECALL_EVERY and stream.stats.n_evicted:
                        hits = [h for h in log.search(lines[i - 1]) if h.turn < seen.first_held]
                        hit = seen.fitted(hits[0]) if hits else None
                        if hit:
                            if how == "as text":
                                stream.feed(hit.text + "\n")
                            else:
                                stream.recall(hit.block)
                            n_notes, since = n_notes + 1, 0
                    tokens = engine.tokenize(line + "\n")
                    seen.add(line, stream.stats.n_past)
                    since += len(tokens)
                    nll += list(stream.score(tokens, chunk=32))
            rows.append({"recalled": how, "lines": n_notes, "tokens": len(nll), "ppl": ppl(nll)})
            rows[-1]["ppl / off"] = rows[-1]["ppl"] / rows[0]["ppl"]
    print(markdown(rows, list(rows[0])))


def ppl(nll: list[float]) -> float:
    """Perplexity of negative log-likelihoods in nats."""
    return math.exp(sum(nll) / len(nll))


#
# place
#

REMARK = 'The user said: "{}" Use this to answer.'


def turn(role: str, text: str) -> str:
    """A message as ChatML, the demo model's template, writes it."""
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


# what is held between sinks and window, and what is put in front of the question
PLACES = {
    "a remark in the message": ("", REMARK + "\n\n"),
    "behind the sinks: the line": ("{}\n", ""),
    "behind the sinks: the user's message": (turn("user", "{}"), ""),
    "behind the sinks: a system message": (turn("system", REMARK), ""),
    "both: message and remark": (turn("user", "{}"), REMARK + "\n\n"),
}


def place(_args: argparse.Namespace) -> None:
    """Right answers of the demo model, in a cache full of dialogue, by where the right line is put (facts-tune)."""
    facts, right = table("facts-tune"), dict.fromkeys(PLACES, 0)
    talks = [
        turn("assistant" if i % 2 else "user", t) for talk in dialogues(False, ("english",)) for i, t in enumerate(talk)
    ]
    with Engine.load("demo", n_ctx=512, n_keep=4) as engine, engine.stream() as stream:
        stream.feed(
            turn("system", "You are a helpful AI assistant named SmolLM, trained by Hugging Face"), special=True
        )
        stream.feed("".join(talks)[:5000], special=True)
        for fact, question, answers in facts:
            for name, (held, before) in PLACES.items():
                stream.unrecall()
                if held:
                    stream.recall(engine.tokenize(held.format(fact), special=True))
                n_past = stream.stats.n_past
                stream.feed(turn("user", before.format(fact) + question) + "<|im_start|>assistant\n", special=True)
                right[name] += is_right("".join(t.text for t in stream.generate(24, sampling=GREEDY)), answers)
                stream.rewind(stream.stats.n_past - n_past)
    rows = [{"the line is": name, "n": len(facts), "right": n} for name, n in right.items()]
    print(markdown(rows, list(rows[0])))


def is_right(said: str, answers: str) -> bool:
    """Whether an answer has one of the words, which | separates."""
    return any(re.search(rf"\b{re.escape(a)}", said, re.IGNORECASE) for a in answers.split("|"))


#
# chat
#


class Talk:
    """A conversation that goes on for many caches; questions are asked of a copy of it, so that none disturbs another.

    A message of the dialogue is answered by the model with a few tokens, where it is the last of those fed at once.
    """

    def __init__(self, model: str, n_ctx: int, folder: Path) -> None:
        self._engine = Engine.load(model, n_ctx=n_ctx, n_keep=4)
        self._path, self._log = folder / "session", Log()
        self._conversation = Conversation(self._engine)
        self._conversation.use_log(self._log, 0)
        self._messages = self._dialogue()
        self.n_past = 0

    @staticmethod
    def _dialogue() -> Iterator[Message]:
        while True:
            for talk in dialogues(False, ("english",)):
                for i, text in enumerate(talk):
                    yield {"role": "assistant" if i % 2 else "user", "content": text}
                if len(talk) % 2:
                    yield {"role": "assistant", "content": "I see."}

    def go_on(self, n_tokens: int) -> None:
        """Read about so much dialogue."""
        end = self.n_past + n_tokens
        while self.n_past < end:
            batch = [next(self._messages) for _ in range(10)]
            while batch[-1]["role"] != "assistant":
                batch.append(next(self._messages))
            self.say(batch[:-1])

    def say(self, messages: list[Message]) -> None:
        """Say something, and have it answered in a few words."""
        for _ in self._conversation.say(messages, max_tokens=12, sampling=GREEDY):
            pass
        self.n_past = self._conversation.stream.stats.n_past

    def ask(self, cases: list[tuple[str, str]]) -> tuple[int, int, int]:
        """Right answers with recall and without it, and how often something was recalled. cases: question, answers."""
        self.save()
        on = off = n_recalled = 0
        for question, answers in cases:
            right, recalled = self._answer(question, answers, N_TOKENS)
            n_recalled += recalled
            on += right
            off += self._answer(question, answers, 0)[0] if recalled else right
        self.resume(0)
        return on, off, n_recalled

    def _answer(self, question: str, answers: str, n_tokens: int) -> tuple[bool, bool]:
        conversation = self.resume(n_tokens)
        said = "".join(t.text for t in conversation.reply(question, max_tokens=24, sampling=GREEDY))
        return is_right(said, answers), conversation.recalled is not None

    def save(self) -> None:
        """Keep what was said until now, for resume."""
        self._conversation.save(self._path)

    def resume(self, n_tokens: int) -> Conversation:
        """The conversation as it was saved, with entries of so many tokens that may come back."""
        self._conversation.close()
        self._conversation = Conversation.resume(self._engine, self._path)
        self._conversation.use_log(self._log, n_tokens)
        return self._conversation


def chat(args: argparse.Namespace) -> None:
    """Facts among dialogue, and questions that have nothing to do with it."""
    facts = table("facts")[: args.facts]
    cases = [(question, answer) for _, question, answer in facts]
    rows = []

    def add(what: str, caches: float, result: tuple[int, int, int], n: int) -> None:
        on, off, recalled = result
        rows.append(
            {
                "asked": what,
                "caches ago": caches,
                "n": n,
                "right": on / n,
                "right_off": off / n,
                "recalled": recalled / n,
            }
        )
        print(rows[-1], file=sys.stderr)

    with tempfile.TemporaryDirectory() as folder:
        talk = Talk(args.model, args.ctx_size, Path(folder))
        talk.go_on(args.ctx_size)
        near = [0, 0, 0]
        for fact, *case in facts:
            talk.say([{"role": "user", "content": fact}])
            result = talk.ask([(case[0], case[1])])
            near = [a + b for a, b in zip(near, result, strict=True)]
            talk.go_on(80)
        add("facts, in the window", 0, (near[0], near[1], near[2]), len(facts))
        start = talk.n_past
        for caches in (float(word) for word in args.caches.split(",")):
            talk.go_on(int(caches * args.ctx_size) - (talk.n_past - start))
            add("facts", caches, talk.ask(cases), len(cases))
        world = [(question, answer) for question, answer in table("world")[: args.questions]]
        add("the world's knowledge", caches, talk.ask(world), len(world))
    print(markdown(rows, list(rows[0])))


#
# speed
#

N_WRITTEN = 64  # tokens of an answer
BLOCK = 32  # tokens held between sinks and window


def speed(args: argparse.Namespace) -> None:
    """The time to the first token of an answer and tok/s after it, with what comes back and without, in turns."""
    rows = [conversation_speed(args), *text_speed(args)]
    print(markdown(rows, list(rows[0])))


Timed = tuple[float, float]  # ms to the first token, tokens per second after it


def timed(tokens: Iterable[Any], start: float) -> Timed:
    """Of an answer that is written while it is iterated over."""
    times = [time.perf_counter() for _ in tokens]
    return 1000 * (times[0] - start), (len(times) - 1) / (times[-1] - times[0])


def speed_row(what: str, n_tokens: int, on: list[Timed], off: list[Timed]) -> dict[str, Any]:
    """Medians; on and off are of the same rounds."""
    pairs = list(zip(on, off, strict=True))
    return {
        "read with": what,
        "tokens": n_tokens,
        "n": len(pairs),
        "first_ms_off": statistics.median(first for first, _ in off),
        "first_ms": statistics.median(first for first, _ in on),
        "more_ms": statistics.median(with_it[0] - without[0] for with_it, without in pairs),
        "tok/s / off": statistics.median(with_it[1] / without[1] for with_it, without in pairs),
    }


def conversation_speed(args: argparse.Namespace) -> dict[str, Any]:
    """A remark in front of the message."""
    fact, question, _ = table("facts")[0]
    with tempfile.TemporaryDirectory() as folder:
        talk = Talk(args.model, args.ctx_size, Path(folder))
        talk.go_on(args.ctx_size)
        talk.say([{"role": "user", "content": fact}])
        talk.go_on(2 * args.ctx_size)
        rounds: dict[int, list[Timed]] = {0: [], N_TOKENS: []}
        read = dict.fromkeys(rounds, 0)
        talk.save()
        for _ in range(args.rounds):
            for n_tokens, results in rounds.items():
                conversation = talk.resume(n_tokens)
                answer = conversation.reply(question, max_tokens=N_WRITTEN, sampling=GREEDY, ignore_eos=True)
                results.append(timed(answer, time.perf_counter()))
                read[n_tokens] = conversation.n_read
                assert (conversation.recalled is not None) == (n_tokens > 0)
    return speed_row("a remark, in a conversation", read[N_TOKENS] - read[0], rounds[N_TOKENS], rounds[0])


def text_speed(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A block between sinks and window: decoded, and from the copy of one that was there before."""
    words = " ".join(text for talk in dialogues(False, ("english",)) for text in talk)
    with Engine.load(args.model, n_ctx=args.ctx_size, n_keep=4) as engine, engine.stream() as stream:
        tokens = engine.tokenize(words)
        question, rest = tokens[:16], tokens[16:]
        stream.feed_tokens(rest[: 2 * args.ctx_size])
        blocks = rest[2 * args.ctx_size :]

        def answer(block: list[int]) -> Timed:
            stream.unrecall()
            stream.feed_tokens(rest[:BLOCK])  # the cache is full again
            start = time.perf_counter()
            if block:
                stream.recall(block)
            stream.feed_tokens(question)
            return timed(stream.generate(N_WRITTEN, sampling=GREEDY, ignore_eos=True, loop_guard=False), start)

        off, decoded, kept = [], [], []
        for i in range(args.rounds):
            block = blocks[i * BLOCK : (i + 1) * BLOCK]
            off.append(answer([]))
            decoded.append(answer(block))
            kept.append(answer(block))
    yield speed_row("a block between sinks and window, decoded", BLOCK, decoded, off)
    yield speed_row("the same block again", BLOCK, kept, off)


#
# memory
#


def memory(args: argparse.Namespace) -> None:
    """Resident memory of a text's reader after 2 caches and after many: with a log, or also a block after each cache.

    Each is measured in a process of its own. The same lines come again and again, in less than two caches: the model's
    file is mapped, and more of it is resident with each token that is new.
    """
    rows = []
    for how in ("off", "a log that is searched", "a log, and a block for each cache"):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            rows.append(pool.apply(memory_row, (how, args.model, args.ctx_size, args.caches)))
    print(markdown(rows, list(rows[0])))


def memory_row(how: str, model: str, n_ctx: int, caches: int) -> dict[str, Any]:
    """Memory in MiB; log_mib: the log's file."""
    texts = [text + "\n" for talk in dialogues(False, ("english",)) for text in talk]
    resident, pending = [], list[int]()
    with (
        tempfile.TemporaryDirectory() as folder,
        Engine.load(model, n_ctx=n_ctx, n_keep=4) as engine,
        engine.stream() as stream,
        Log(Path(folder) / "log") as log,
    ):
        seen = StreamLog(stream, log)
        ends = itertools.accumulate(len(engine.tokenize(text)) for text in texts)
        lines = itertools.cycle([text for text, end in zip(texts, ends, strict=True) if end < 1.5 * n_ctx])
        for n_caches in range(1, caches + 1):
            while stream.stats.n_past < n_caches * n_ctx:
                line = next(lines)
                if how != "off":
                    seen.add(line, stream.stats.n_past + len(pending))
                pending += engine.tokenize(line)
                while len(pending) >= BLOCK:  # always as many at once
                    stream.feed_tokens(pending[:BLOCK])
                    del pending[:BLOCK]
            hits = log.search(next(lines), 1)
            hit = seen.fitted(hits[0]) if hits else None
            if hit and "block" in how:
                stream.recall(hit.block)
            if n_caches in (2, caches):
                resident.append(resident_mib())
        n_bytes = log.stats.n_bytes
    assert resident[0] is not None and resident[1] is not None
    return {
        "recall": how,
        "tokens": caches * n_ctx,
        "mib_at_2_caches": resident[0],
        f"mib_at_{caches}": resident[1],
        "more_mib": resident[1] - resident[0],
        "log_mib": n_bytes / 2**20,
    }


def main() -> None:
    """Run one of the measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(work: Callable[[argparse.Namespace], None]) -> argparse.ArgumentParser:
        sub = commands.add_parser(work.__name__, help=work.__doc__)
        sub.set_defaults(work=work)
        return sub

    command(gate)
    sub = command(passkey)
    sub.add_argument("text")
    sub.add_argument("-m", "--model", default="demo")
    sub.add_argument("--tokens", type=int, default=1_000_000)
    sub.add_argument("--depths", type=int, default=50)
    sub = command(perplexity)
    sub.add_argument("text")
    sub.add_argument("-m", "--model", default="demo")
    sub.add_argument("-c", "--ctx-size", type=int, default=512)
    sub.add_argument("--lines", type=int, default=150)
    command(place)
    sub = command(chat)
    sub.add_argument("-m", "--model", default="demo")
    sub.add_argument("-c", "--ctx-size", type=int, default=512)
    sub.add_argument("--caches", default="10,100")
    sub.add_argument("--facts", type=int, default=1000)
    sub.add_argument("--questions", type=int, default=1000)
    sub = command(speed)
    sub.add_argument("-m", "--model", default="demo")
    sub.add_argument("-c", "--ctx-size", type=int, default=512)
    sub.add_argument("--rounds", type=int, default=15)
    sub = command(memory)
    sub.add_argument("-m", "--model", default="demo")
    sub.add_argument("-c", "--ctx-size", type=int, default=512)
    sub.add_argument("--caches", type=int, default=100)
    args = parser.parse_args()
    args.work(args)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    main()
