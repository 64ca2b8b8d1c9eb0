"""kill -9 of a chat with a log, again and again: is anything lost that is older than the turn it was killed in?

    python benchmarks/recall_kill.py -m demo --kills 20

Each run of the chat resumes the session, says a few things, and is killed at a random moment of the next turn. Then
the log must have every message of a finished turn, once, and the session must resume.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from edge_stream.measure.table import markdown
from edge_stream.recall import Log


class Talk:
    """A running `edge-stream chat`."""

    def __init__(self, model: str, session: Path, n_ctx: int) -> None:
        flags = ["-c", str(n_ctx), "-n", "6", "--temp", "0", "--recall", "64", "--session", str(session)]
        command = [sys.executable, "-m", "edge_stream.cli", "chat", "-m", model, *flags]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=subprocess.DEVNULL, stderr=pipe, text=True)
        self.said: list[str] = []  # on stderr

    def send(self, text: str) -> None:
        """Say something."""
        assert self._process.stdin
        self._process.stdin.write(f"{text}\n")
        self._process.stdin.flush()

    def finish(self) -> None:
        """Wait until all that was sent was answered and saved: a command comes after it."""
        self.send("/stats")
        assert self._process.stderr
        for line in self._process.stderr:
            self.said.append(line)
            if "tokens seen, " in line and "in the cache" in line:
                return
        raise AssertionError(f"the chat ended: {''.join(self.said)}")

    def kill(self) -> None:
        """kill -9"""
        self._process.kill()
        self._process.communicate()


def run(model: str, folder: Path, kills: int, n_ctx: int, seed: int = 0) -> dict[str, Any]:
    """Returns counts; lost: messages of finished turns that a log lacked, or had twice, after a kill."""
    rng = random.Random(seed)
    session, log_path = folder / "session", folder / "session.log"
    finished, lost, n_cut, length = list[str](), set[str](), 0, 0.0
    for i in range(kills):
        talk = Talk(model, session, n_ctx)
        talk.finish()
        for j in range(rng.randint(1, 3)):
            message = f"The secret of box {i}x{j} is number {rng.randrange(10**6)}."
            began = time.monotonic()
            talk.send(message)
            talk.finish()
            length = time.monotonic() - began
            finished.append(message)
        talk.send(f"This message {i} is cut.")
        time.sleep(rng.random() * 1.2 * length)
        talk.kill()
        with Log(log_path) as log:
            for message in finished:
                found = [hit.text for hit in log.search(message, 4) if hit.role == "user"]
                if found.count(message) != 1:
                    lost.add(message)
            n_cut += any(f"message {i} is cut" in hit.text for hit in log.search(f"message {i} cut", 4))
    talk = Talk(model, session, n_ctx)
    talk.send(f"What is the secret of box {finished[0].split()[4]}?")
    talk.finish()
    talk.kill()
    return {
        "kills": kills,
        "finished turns": len(finished),
        "lost": len(lost),
        "cut turns in the log": n_cut,
        "the first recalled at last": "yes" if any(finished[0] in line for line in talk.said) else "no",
    }


def main() -> None:
    """Run it in a folder of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", default="demo")
    parser.add_argument("-c", "--ctx-size", type=int, default=256)
    parser.add_argument("--kills", type=int, default=20)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        row = run(args.model, Path(folder), args.kills, args.ctx_size)
    print(markdown([row], list(row)))


if __name__ == "__main__":
    main()
