"""64 conversations in 4 slots: nearly every turn waits for a slot, and for its session to come back from disk.

    python benchmarks/many_conversations.py --minutes 60

Clients, as many at once as --clients, take the conversations as they come, in four APIs, and now and then one hangs up
in the middle of an answer. Each conversation tells facts with numbers of its own, and its texts depend on all that was
said in it. None may be lost (a turn that neither continues it nor says again what was cut), mixed with another (its
name, and what is recalled, must be its own), or left waiting. Some that were never cut are held again afterwards, each
alone on a new server: texts are the same up to rounding, which differs since a session back from disk lies in other
cells (restore_rounding.py). Memory and open files are looked at from the first minute on.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
from chat_apis import APIS, Message, Reply, ask
from serving_bench import ServerProcess, edge_stream_command, print_stamp

from edge_stream.measure.table import markdown
from edge_stream.output.files import replace_text

ROOT = Path(__file__).resolve().parents[1]


class Talk:
    """A conversation: its history, and what is known of it."""

    def __init__(self, i: int) -> None:
        self.name, self.i = f"Person{i}", i
        self.messages: list[Message] = []
        self.apis: list[str] = []  # of every turn
        self.how: list[dict[str, Any]] = []  # how each was answered, where the API says it
        self.turns = self.n_past = self.n_last = 0
        self.was_cut = self.ever_cut = False
        self.lock = threading.Lock()

    def said(self) -> Message:
        """The next message."""
        rng = random.Random(f"{self.i} {self.turns}")
        if self.turns % 4 == 3:
            text = f"What does box {rng.randrange(self.turns)} of {self.name} hold?"
        else:
            text = f"Box {self.turns} of {self.name} holds {rng.randrange(1000, 9999)} coins."
        return {"role": "user", "content": text}

    def options(self, n: int) -> dict[str, Any]:
        """Of the next turn."""
        return {"max_tokens": n, "ignore_eos": True, "temperature": 0.7, "seed": self.turns}

    def turn(self, client: httpx.Client, api: str, n: int) -> Reply:
        """A turn. Raises AssertionError if it is lost or mixed."""
        said = self.said()
        reply = ask(client, api, [*self.messages, said], self.name, **self.options(n))
        where = f"{self.name}, turn {self.turns}, {api}: {reply}"
        assert reply.status == 200 and reply.finish == "length" and reply.text.strip(), where
        known = ("new", "continued") if not self.messages else ("continued",)
        # where an answer was cut, its turn is said again, or the session is that of the turn before; an answer
        # that begins after a ping has no header
        assert (reply.known or reply.info.get("history", known[0])) in (
            *known,
            *(("branched", "rebuilt") if self.was_cut else ()),
        ), where
        if reply.info:
            assert reply.info["conversation"] == self.name, where
            cut = 2 * (n + 40) if self.was_cut else 0
            assert reply.info["n_reused"] >= self.n_past - self.n_last - 16 - cut or reply.known == "rebuilt", where
            self.n_past, self.n_last = reply.info["n_past"], reply.n_tokens
            recalled = reply.info["recalled"]
            assert not recalled or any(recalled["text"] in m["content"] for m in self.messages), where
        self.messages += [said, reply.message]
        self.apis.append(api)
        self.how.append({"known": reply.known, **reply.info})
        self.turns, self.was_cut = self.turns + 1, False
        return reply

    def hang_up(self, client: httpx.Client, n: int) -> None:
        """Ask, and go away after some of the answer."""
        api = APIS["chat completions"]
        body = {**api.body([*self.messages, self.said()], self.options(n)), "stream": True}
        self.was_cut = self.ever_cut = True
        with client.stream("POST", api.path, json=body, headers={"X-Conversation": self.name}) as response:
            for k, _line in enumerate(response.iter_lines()):
                if k == 8:
                    break


class Crowd:
    """The clients."""

    def __init__(self, args: argparse.Namespace, server: ServerProcess, folder: Path) -> None:
        self.args, self.server, self.folder = args, server, folder
        self.talks = [Talk(i) for i in range(args.conversations)]
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []
        self.longest = 0.0
        self.end = time.monotonic() + 60 * args.minutes

    def client(self, i: int) -> None:
        """One client, until the end."""
        rng = random.Random(i)
        with httpx.Client(base_url=self.server.url, timeout=600) as client:
            while time.monotonic() < self.end and len(self.faults) < 20:
                talk = rng.choice(self.talks)
                if not talk.lock.acquire(blocking=False):
                    continue
                try:
                    if rng.random() < 0.05:
                        talk.hang_up(client, self.args.predict)
                        self.counts["hung up"] += 1
                        continue
                    began = time.monotonic()
                    api = rng.choice(list(APIS))
                    reply = talk.turn(client, api, self.args.predict)
                    self.longest = max(self.longest, time.monotonic() - began)
                    self.counts[api] += 1
                    self.counts["turns"] += 1
                    self.counts["from disk"] += bool(reply.info.get("restored"))
                    self.counts["recalled"] += bool(reply.info.get("recalled"))
                except (AssertionError, httpx.HTTPError) as error:
                    self.faults.append(repr(error))
                    print(repr(error), flush=True)
                finally:
                    talk.lock.release()

    def run(self) -> dict[str, Any]:
        """All of it; figures."""
        threads = [threading.Thread(target=self.client, args=(i,)) for i in range(self.args.clients)]
        for thread in threads:
            thread.start()
        seen: list[tuple[float, int]] = []
        began = time.monotonic()
        while any(thread.is_alive() for thread in threads):
            time.sleep(2)
            if time.monotonic() - began > 60 * min(1.0, self.args.minutes / 4):
                seen.append((self.server.rss(), self.server.n_files()))
        for thread in threads:
            thread.join()
        out: dict[str, Any] = {"minutes": self.args.minutes, "conversations": len(self.talks), **self.counts}
        out["fewest turns of one"] = min(talk.turns for talk in self.talks)
        out["seconds of the longest turn"] = round(self.longest, 1)
        out["memory at first, at most, at last"] = ", ".join(
            f"{mib:.0f}" for mib in (seen[0][0], max(x for x, _ in seen), seen[-1][0])
        )
        out["open files at most"] = max(n for _, n in seen)
        out["lost, mixed or failed"] = len(self.faults)
        return out


def alone(command: list[str], talks: list[Talk], n: int) -> tuple[int, int]:
    """The same conversations, one after the other: texts that are the same, and all."""
    same = all_ = 0
    with ServerProcess(command) as server, httpx.Client(base_url=server.url, timeout=600) as client:
        for talk in talks:
            again = Talk(talk.i)
            for api in talk.apis:
                again.turn(client, api, n)
            pairs = list(zip(talk.messages, again.messages, strict=True))[1::2]
            differ = [k for k, (a, b) in enumerate(pairs) if a["content"] != b["content"]]
            if differ:  # those after it follow from it
                k = differ[0]
                print(
                    f"{talk.name} differs from turn {k} of {len(pairs)} on: {pairs[k]}\n{talk.how[k]}\n{again.how[k]}"
                )
            same, all_ = same + len(pairs) - len(differ), all_ + len(pairs)
    return same, all_


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", default="demo")
    parser.add_argument("-c", "--ctx-size", type=int, default=256)
    parser.add_argument("-n", "--predict", type=int, default=12)
    parser.add_argument("-t", "--threads", type=int, default=1)
    parser.add_argument("--conversations", type=int, default=64)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--again", type=int, default=4, metavar="N", help="conversations that are held again, alone")
    args = parser.parse_args()
    flags = ("-c", str(args.ctx_size), "-np", "4", "-t", str(args.threads))
    with tempfile.TemporaryDirectory(prefix="edge-stream-many-") as folder:
        command = edge_stream_command(args.model, folder, *flags)
        with ServerProcess(command, Path(folder) / "server.log") as server:
            crowd = Crowd(args, server, Path(folder))
            out = crowd.run()
            assert server.process.poll() is None, "the server has ended"
        log = (Path(folder) / "server.log").read_text()
        out["errors in the log"] = log.count("ERROR")
        whole = [talk for talk in crowd.talks if not talk.ever_cut] or crowd.talks
        chosen = sorted(whole, key=lambda talk: talk.turns)[-args.again :]
        same, all_ = alone(edge_stream_command(args.model, None, *flags), chosen, args.predict)
        out["texts that are the same alone"] = f"{same} of {all_}"
    print(markdown([{"what": what, "measured": str(value)} for what, value in out.items()], ["what", "measured"]))
    print_stamp()
    path = ROOT / "build" / "endurance" / "many-conversations.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(out, indent=1))
    if crowd.faults:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
