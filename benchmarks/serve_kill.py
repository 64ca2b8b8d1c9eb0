"""kill -9 under load, again and again: is a finished turn ever lost, or a file damaged?

Several clients talk at once, each resending its history. At a random moment the server is killed. Then every session
file must restore (with its checksums verified), no half-written file may remain once the server runs again, and every
conversation must continue from its last finished turn, reading only what came after it.

    python benchmarks/serve_kill.py -m demo --kills 20
"""

from __future__ import annotations

import argparse
import random
import threading
import time
from pathlib import Path
from typing import Any

import httpx
from serving_bench import Answer, ServerProcess, chat, edge_stream_command, print_stamp, scratch

from edge_stream import Engine

_N_ANSWER = 12  # tokens


class Talker:
    """One client. `finished` is n_past after the last finished turn."""

    def __init__(self, i: int) -> None:
        self.i, self.messages, self.finished, self.turns = i, list[dict[str, str]](), 0, 0
        self.cut = 0  # turns that a kill interrupted
        self.error = ""  # of the last turn that got no whole answer

    def turn(self, url: str) -> Answer | None:
        """Send a message (or the last one again if it got no answer); None if the server went away."""
        if not self.messages or self.messages[-1]["role"] == "assistant":
            self.messages.append({"role": "user", "content": f"I am {self.i}, this is number {self.turns}."})
        with httpx.Client(base_url=url, timeout=600) as client:
            try:
                answer = chat(client, self.messages, max_tokens=_N_ANSWER, seed=self.turns, ignore_eos=True)
            except httpx.TransportError as error:
                answer, self.error = None, repr(error)
        if answer is None or not answer.finished:
            self.cut += 1
            if answer:
                self.error = f"status {answer.status}, {answer.n_chunks} parts: {answer.error}"
            return None
        self.messages.append({"role": "assistant", "content": answer.text})
        self.finished, self.turns = answer.info["n_past"], self.turns + 1
        return answer

    def talk(self, url: str, stop: threading.Event) -> None:
        """Talk until told to stop, or until the server is gone."""
        while not stop.is_set() and self.turn(url):
            pass


def run(model: str, folder: Path, kills: int, clients: int, n_ctx: int, seed: int = 0) -> dict[str, Any]:
    """Returns counts; raises AssertionError if something was lost."""
    rng = random.Random(seed)
    talkers = [Talker(i) for i in range(clients)]
    flags = ("-c", str(n_ctx), "-np", "2", "-fa", "off", "-t", "1")
    n_files = n_half = 0
    for kill in range(kills + 1):
        server = ServerProcess(edge_stream_command(model, folder, *flags), log=folder / "server.log")
        server.wait()
        for talker in talkers if kill else ():  # the first turn after a kill
            expected = talker.finished
            answer = talker.turn(server.url)
            if answer is None:
                server.kill()
                raise AssertionError(f"conversation {talker.i} got no answer after kill {kill}")
            if expected:
                # an answer with control tokens, which are not sent, is read again as it was sent
                assert answer.info["n_reused"] >= expected - _N_ANSWER, (
                    f"kill {kill}, conversation {talker.i}: {expected} tokens were finished, "
                    f"{answer.info['n_reused']} are known ({answer.info['history']})"
                )
        assert not list(folder.rglob("*.tmp-*")), "a half-written file stayed"
        if kill == kills:
            server.stop()
            break
        stop = threading.Event()
        threads = [threading.Thread(target=t.talk, args=(server.url, stop)) for t in talkers]
        for thread in threads:
            thread.start()
        time.sleep(rng.uniform(0.05, 1.5))
        server.kill()
        stop.set()
        for thread in threads:
            thread.join()
        n_half += len(list(folder.rglob("*.tmp-*")))
        with Engine.load(model, n_ctx=n_ctx, n_parallel=2, flash_attn="off", n_threads=1) as engine:
            for file in folder.rglob("*.session"):
                engine.restore(file).close()
                n_files += 1
    return {
        "kills": kills,
        "turns finished": sum(t.turns for t in talkers),
        "turns interrupted": sum(t.cut for t in talkers),
        "files left half-written, and removed": n_half,
        "session files verified": n_files,
        "turns lost": 0,
    }


def main() -> None:
    """Print the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", default="demo")
    parser.add_argument("-c", "--ctx-size", type=int, default=256)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--clients", type=int, default=4)
    args = parser.parse_args()
    with scratch() as folder:
        for what, n in run(args.model, Path(folder), args.kills, args.clients, args.ctx_size).items():
            print(f"| {what} | {n} |")
    print_stamp()


if __name__ == "__main__":
    main()
