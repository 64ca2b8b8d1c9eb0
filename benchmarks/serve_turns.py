"""A long conversation sent as growing histories: time to first token and tokens processed per turn, and memory.

edge-stream and, if given, llama-server talk in turns of one run, each with its own history of the same user messages.
llama-server (with --context-shift) answers 400 to a history longer than its cache; the client then does what clients
must: it drops its oldest exchange and tries again, until the history is accepted. That is part of the time to the
first token, and whatever the server then reads again is part of the tokens processed.

The speed of a shared machine drifts within minutes, so edge-stream's turn 10 is measured again at the end: before each
of the last five turns a conversation is begun and brought to turn 10 in the other slot.

    python benchmarks/serve_turns.py -m demo -c 512 --turns 300 --llama-server build/llama-server/bin/llama-server
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass, field

import httpx
from serving_bench import Answer, ServerProcess, chat, edge_stream_command, print_stamp, scratch

from edge_stream.models import names

WORDS = ("time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school", "state")


def said(turn: int) -> str:
    """A user's message of about 10 tokens."""
    return f"{turn}: tell me about {WORDS[turn % len(WORDS)]} and {WORDS[turn * 7 % len(WORDS)]}."


@dataclass
class Side:
    """One server and the history that its client keeps."""

    name: str
    server: ServerProcess
    client: httpx.Client
    history: list[dict[str, str]] = field(default_factory=list)
    ttft: list[float] = field(default_factory=list)
    read: list[int] = field(default_factory=list)
    known: list[int] = field(default_factory=list)
    rss: list[float] = field(default_factory=list)
    refused: int = 0
    first_refused: int | None = None

    def fresh(self, i: int, max_tokens: int) -> float:
        """Time to first token on turn 10 of a new conversation."""
        history: list[dict[str, str]] = []
        for turn in range(1, 11):
            history.append({"role": "user", "content": f"({i}) {said(turn)}"})
            answer = chat(self.client, history, max_tokens=max_tokens, temperature=0, seed=1, ignore_eos=True)
            history.append({"role": "assistant", "content": answer.text})
        return answer.ttft

    def turn(self, turn: int, max_tokens: int) -> None:
        """Say something, and measure the answer."""
        self.history.append({"role": "user", "content": said(turn)})
        start, refused = time.perf_counter(), 0
        while True:
            answer: Answer = chat(
                self.client,
                self.history,
                max_tokens=max_tokens,
                temperature=0,
                seed=1,
                ignore_eos=True,
                cache_prompt=True,
            )
            if answer.status == 200:
                break
            if answer.status != 400 or len(self.history) < 3:
                raise SystemExit(f"{self.name}, turn {turn}: {answer.status} {answer.error}")
            refused += 1
            del self.history[:2]
        self.ttft.append(time.perf_counter() - start - answer.seconds + answer.ttft)
        if refused and self.first_refused is None:
            self.first_refused = turn
        self.refused += refused
        self.history.append({"role": "assistant", "content": answer.text})
        self.read.append(answer.timings["prompt_n"])
        self.known.append(answer.timings.get("cache_n", 0))
        self.rss.append(self.server.rss())


def row(side: Side, turns: int) -> str:
    """A line of the table; times are medians of 9 turns."""

    def around(values: list[float], turn: int) -> float:
        middle = min(max(turn - 1, 4), len(values) - 5)
        return statistics.median(values[middle - 4 : middle + 5])

    early, late = around(side.ttft, 10), around(side.ttft, turns)
    return (
        f"| {side.name} | {early * 1000:.0f} ms | {late * 1000:.0f} ms | {late / early:.2f} "
        f"| {around(side.read, 10):.0f} | {around(side.read, turns):.0f} | {sum(side.read):,} "
        f"| {side.refused}{f' (from turn {side.first_refused})' if side.refused else ''} "
        f"| {side.rss[9]:.0f} → {side.rss[-1]:.0f} MiB |"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", default="demo")
    parser.add_argument("-c", "--ctx-size", type=int, default=512)
    parser.add_argument("--turns", type=int, default=300)
    parser.add_argument("-n", "--predict", type=int, default=16)
    parser.add_argument("--llama-server", metavar="FILE", help="A llama-server to compare with.")
    parser.add_argument("--cache-reuse", type=int, default=0, help="llama-server's flag of that name.")
    args = parser.parse_args()
    size = ("-c", str(args.ctx_size))
    with scratch() as folder:
        servers = {"edge-stream serve": edge_stream_command(args.model, folder, *size, "-np", "2")}
        if args.llama_server:
            command = [args.llama_server, "-m", str(names.resolve(args.model)), "--port", "{port}", *size]
            command += ["-np", "1", "--context-shift", "--keep", "4", "--no-webui", "--jinja"]
            servers["llama-server --context-shift"] = command
            if args.cache_reuse:
                reuse = [*command, "--cache-reuse", str(args.cache_reuse)]
                servers[f"llama-server --context-shift --cache-reuse {args.cache_reuse}"] = reuse
        sides = []
        for name, command in servers.items():
            server = ServerProcess(command)
            server.wait()
            sides.append(Side(name, server, httpx.Client(base_url=server.url, timeout=300)))
        fresh: list[float] = []
        try:
            for turn in range(1, args.turns + 1):
                if turn > args.turns - 5:
                    fresh.append(sides[0].fresh(turn, args.predict))
                for side in sides:
                    side.turn(turn, args.predict)
        finally:
            for side in sides:
                side.server.stop()
    print(
        f"| server | TTFT at turn 10 | at turn {args.turns} | ratio | tokens read at turn 10 | at turn {args.turns} "
        "| in all | refused | memory, turn 10 to the last |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for side in sides:
        print(row(side, args.turns))
    total = sides[0].known[-1] + sides[0].read[-1] + args.predict
    print(f"\nThe conversation has {total:,} tokens, {total / args.ctx_size:.0f} times the cache of {args.ctx_size}.")
    new = [n for n in sides[0].read[1:] if n > statistics.median(sides[0].read) + 3]
    now, then = statistics.median(sides[0].ttft[-5:]), statistics.median(fresh)
    print(
        f"edge-stream, the last 5 turns in alternation with turn 10 of 5 new conversations: {now * 1000:.0f} ms and "
        f"{then * 1000:.0f} ms, ratio {now / then:.2f}."
    )
    print(f"Turns in which edge-stream read more than the new message: {len(new)} of {args.turns}.")
    print_stamp()


if __name__ == "__main__":
    main()
