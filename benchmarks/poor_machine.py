"""A poor machine: no disk, a slow disk, no memory, no file descriptors, a clock that is set back.

    python benchmarks/poor_machine.py            # all
    python benchmarks/poor_machine.py full-serve clock

While something is missing, each command must end in one sentence and status 1, or go on without it and say so; the
server must answer, or refuse with an error. What was on disk before must be there as it was, with nothing half-written
beside it. When the cause is gone, the same command works, and the server and its conversations go on.

The small disks are mounted (tmpfs), for which one must be root; the rest are limits and a preload (poor.c in
native/tests). Results are kept in build/endurance/poor.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from poor_parts import CLI, ROOT, Poor, fill, leftovers, run, small_disk
from serving_bench import Answer, ServerProcess, chat, edge_stream_command

from edge_stream.output.files import replace_text

SCENARIOS: dict[str, Callable[[argparse.Namespace, Path], str]] = {}


def scenario(function: Callable[[argparse.Namespace, Path], str]) -> Callable[[argparse.Namespace, Path], str]:
    """One of SCENARIOS. It returns what was seen, and raises AssertionError."""
    SCENARIOS[function.__name__.replace("_", "-")] = function
    return function


def digest(path: Path) -> str:
    """Of a file, or of the files of a folder."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return hashlib.sha256(b"".join(file.name.encode() + file.read_bytes() for file in files)).hexdigest()


def chat_command(model: str, session: Path) -> list[str]:
    """A chat that keeps its session."""
    return [*CLI, "chat", "-m", model, "-c", "128", "-n", "6", "-t", "1", "--session", str(session)]


def convert_command(model: str, out: Path, to: str, variant: int = 0) -> list[str]:
    """A conversion that replaces what is there."""
    gguf, mlc = ("q8_0", "f16")[variant], ("q4f16_1", "q4f32_1")[variant]
    flags = ["--outtype", gguf] if to == "gguf" else ["--quantization", mlc]
    return [*CLI, "convert", model, "--to", to, *flags, "--overwrite", "-o", str(out)]


def train_command(python: str, out: Path, variant: int = 0) -> list[str]:
    """A training run of seconds."""
    sizes = ["--layers", "1", "--width", "32", "--heads", "2", "--vocab", "300", "-c", "32", "-b", "2"]
    sizes += ["-n", "4000", "--save-every", "5", "-t", "1", "--device", "cpu"]
    text, seed = str(Path(__file__)), ["--seed", str(variant)]
    return [python, "-m", "edge_stream.cli", "train", text, *sizes, *seed, "--overwrite", "-o", str(out)]


class Server:
    """`serve` in slots of 256 tokens, its log, and conversations with it."""

    def __init__(self, model: str, folder: Path, env: dict[str, str] | None = None, n_files: int = 0) -> None:
        sessions = folder / "sessions"
        command = edge_stream_command(model, sessions, "-c", "256", "-np", "2", "-t", "1")
        before = dict(os.environ)
        os.environ.update(env or {})
        if n_files:
            command = ["prlimit", f"--nofile={n_files}:{n_files}", *command]
        self.log = folder / "server.log"
        try:
            self.process = ServerProcess(command, self.log)
        finally:
            os.environ.clear()
            os.environ.update(before)
        self.histories: dict[str, list[dict[str, str]]] = {}
        self.process.wait()

    def turn(self, name: str, **options: Any) -> Answer:
        """A turn of a conversation; its history grows if it was answered."""
        history = self.histories.setdefault(name, [])
        said = {"role": "user", "content": f"I am {name}, this is number {len(history)}."}
        with httpx.Client(base_url=self.process.url, timeout=120) as client:
            options = {"max_tokens": 8, "ignore_eos": True, "seed": 1} | options
            answer = chat(client, [*history, said], {"X-Conversation": name}, **options)
        if answer.finished:
            history += [said, {"role": "assistant", "content": answer.text}]
        return answer

    def good_turn(self, name: str) -> Answer:
        """One that must be answered, and go on where the last one ended."""
        was = bool(self.histories.get(name))
        answer = self.turn(name)
        assert answer.finished and answer.text, f"{name}: {answer}\n{self.said()}"
        assert answer.info["history"] in (("continued", "branched") if was else ("new",)), answer
        return answer

    def said(self) -> str:
        """Its log."""
        return self.log.read_text(errors="replace")[-4000:]

    def end(self) -> None:
        """SIGTERM, and what the log says. Raises AssertionError."""
        assert self.process.process.poll() is None, f"the server has ended: {self.said()}"
        self.process.stop()
        assert self.process.process.returncode == 0, self.said()
        assert "Traceback" not in self.log.read_text(errors="replace"), self.said()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()


#
# no disk
#


@scenario
def full_chat(args: argparse.Namespace, folder: Path) -> str:
    """A session that cannot be saved."""
    with small_disk(16) as disk:
        command = chat_command(args.model, disk / "session")
        run(command, text="Hello\n").check(fails=False)
        before = digest(disk / "session")
        ballast = fill(disk, 64 << 10)
        done = run(command, text="I am Anna\n/stats\n")
        done.check()
        assert "the disk is full" in done.stderr, done.stderr
        assert digest(disk / "session") == before and not leftovers(disk), leftovers(disk)
        said = next(line for line in done.stderr.splitlines() if "full" in line)
        ballast.unlink()
        run(command, text="I am Anna\n").check(fails=False)
        assert digest(disk / "session") != before
    return said


@scenario
def full_serve(args: argparse.Namespace, folder: Path) -> str:
    """Conversations that cannot be saved."""
    with small_disk(40) as disk, Server(args.model, disk) as server:
        server.good_turn("Anna")
        ballast = fill(disk, 64 << 10)
        for _ in range(3):
            server.good_turn("Anna")
        server.good_turn("Ben")
        saved = httpx.post(server.process.url + "/slots/0?action=save", json={"filename": "x"}, timeout=60)
        assert saved.status_code >= 400 and "the disk is full" in saved.json()["error"]["message"], saved.text
        ballast.unlink()
        for name in ("Anna", "Ben", "Cleo", "Anna", "Ben"):  # in two slots
            server.good_turn(name)
        assert not leftovers(disk), leftovers(disk)
        said = [line for line in server.said().splitlines() if "full" in line]
        server.end()
        with Server(args.model, disk) as again:
            again.histories = server.histories
            for name in ("Anna", "Ben", "Cleo"):
                assert again.good_turn(name).info["history"] == "continued"
            again.end()
    return f"{len(said)} lines in the log: {said[0]}"


def full_output(command: Callable[[Path, int], list[str]], name: str, mib: int) -> str:
    """A command that replaces a file or folder, on a disk with room for one and a half of it."""
    with small_disk(mib) as disk:
        out, said = disk / name, ""
        run(command(out, 0)).check(fails=False)
        before = digest(out)
        size = sum(p.stat().st_size for p in ([out] if out.is_file() else out.rglob("*")) if p.is_file())
        for leave in (size // 2, 4096):
            ballast = fill(disk, leave)
            done = run(command(out, 1))
            done.check(fails=True)
            said = done.sentence
            assert digest(out) == before and not leftovers(disk), (leave, leftovers(disk))
            ballast.unlink()
        # while it is being written, and after it was checked that there is room
        run(command(out, 1), limits={resource.RLIMIT_FSIZE: max(4096, size // 4)}).check(fails=True)
        assert digest(out) == before and not leftovers(disk), leftovers(disk)
        run(command(out, 1)).check(fails=False)
        assert digest(out) != before and not leftovers(disk), leftovers(disk)
    return said


@scenario
def full_convert(args: argparse.Namespace, folder: Path) -> str:
    """No room for a GGUF file."""
    return full_output(lambda out, i: convert_command(args.model, out, "gguf", i), "model.gguf", 1000)


@scenario
def full_convert_mlc(args: argparse.Namespace, folder: Path) -> str:
    """No room for an MLC folder."""
    return full_output(lambda out, i: convert_command(args.model, out, "mlc", i), "mlc", 600)


@scenario
def full_train(args: argparse.Namespace, folder: Path) -> str:
    """No room for what is trained."""
    return full_output(lambda out, i: train_command(args.train_python, out, i), "small", 8)


#
# a slow disk, another time
#


@scenario
def slow_disk(args: argparse.Namespace, folder: Path) -> str:
    """Every fsync takes 4 s: others do not wait for a conversation that is saved."""
    poor = Poor(folder)
    with Server(args.model, folder, poor.env) as server:
        for name in ("Anna", "Ben"):
            server.good_turn(name)
        poor.set(fsync_ms=4000)
        ends: dict[str, float] = {}

        def anna() -> None:
            server.good_turn("Anna")
            ends["Anna"] = time.monotonic()

        thread = threading.Thread(target=anna)
        thread.start()
        time.sleep(1)  # her answer is written, not saved
        before = time.monotonic()
        answer = server.good_turn("Ben")
        thread.join()
        assert before + answer.ttft < ends["Anna"], "an answer waited for the disk"
        poor.set()
        for name in ("Anna", "Ben"):
            server.good_turn(name)
        server.end()
    command = chat_command(args.model, folder / "session")
    poor.set(fsync_ms=500)
    done = run(command, text="Hello\n", env=poor.env)
    done.check(fails=False)
    return f"first token of another conversation after {answer.ttft:.2f} s"


@scenario
def clock(args: argparse.Namespace, folder: Path) -> str:
    """The clock is set back by a year and forward again, with more conversations than slots, and across a restart."""
    poor, year = Poor(folder), 365 * 86400
    names = ("Anna", "Ben", "Cleo", "Dan")
    with Server(args.model, folder, poor.env) as server:
        for ahead in (0, -year, -2 * year, year):
            poor.set(clock_s=ahead)
            for name in names:
                server.good_turn(name)
        poor.set(clock_s=-year)
        server.end()
        with Server(args.model, folder, poor.env) as again:
            again.histories = server.histories
            for name in names:
                assert again.good_turn(name).info["history"] == "continued"
            again.end()
    command = [*chat_command(args.model, folder / "session"), "--recall", "64"]
    said = []
    for i, ahead in enumerate((0, -year, year, -2 * year)):
        poor.set(clock_s=ahead)
        facts = "".join(f"Box {10 * i + j} holds {j * 97 + i} green coins.\n" for j in range(6))
        story = "".join(f"Tell me story {j} about a cat and a dog.\n" for j in range(6))
        done = run(command, text=f"{facts}{story}What does box 1 hold?\n", env=poor.env)
        done.check(fails=False)
        said += [line for line in done.stderr.splitlines() if "recalled: " in line and "Box 1 " in line]
    assert said, "nothing was recalled"
    return said[-1]


#
# no file descriptors
#


@scenario
def descriptors(args: argparse.Namespace, folder: Path) -> str:
    """`serve` with 64 descriptors, and more connections than that."""
    with Server(args.model, folder, n_files=64) as server:
        for name in ("Anna", "Ben"):
            server.good_turn(name)
        port = server.process.port
        with httpx.Client(base_url=server.process.url, timeout=120) as client:
            assert client.get("/health").status_code == 200
            held = [_connect(port) for _ in range(100)]
            time.sleep(2)
            messages = [{"role": "user", "content": "Are you there?"}]
            answer = chat(client, messages, {"X-Conversation": "Dan"}, max_tokens=8, ignore_eos=True)
            assert answer.finished and answer.text, answer
        for sock in held:
            sock.close()
        for name in ("Anna", "Ben", "Cleo", "Anna"):
            server.good_turn(name)
        said = [line for line in server.said().splitlines() if "open files" in line]
        server.end()
        with Server(args.model, folder) as again:
            again.histories = server.histories
            for name in ("Anna", "Ben", "Cleo"):
                assert again.good_turn(name).info["history"] == "continued"
            again.end()
    for n in (16, 12, 8, 6):  # below that Python does not start
        done = run(chat_command(args.model, folder / "session"), text="Hello\n", limits={resource.RLIMIT_NOFILE: n})
        assert done.status in (0, 1) and "Traceback" not in done.stderr, (n, done)
    return f"{len(said)} lines in the log" + (f": {said[0]}" if said else "")


def _connect(port: int) -> Any:
    import socket

    sock = socket.socket()
    sock.settimeout(5)
    sock.connect(("127.0.0.1", port))  # the kernel accepts it in any case
    return sock


#
# no memory
#


@scenario
def memory_limit(args: argparse.Namespace, folder: Path) -> str:
    """Less and less room for what a command maps (ulimit -v)."""
    sentences: Counter[str] = Counter()
    commands = {
        # below this numpy's own library ends the process, in its own words
        "chat": (chat_command(args.model, folder / "session"), range(48, 1000, 24)),
        "convert": (convert_command(args.model, folder / "model.gguf", "gguf"), range(220, 1500, 60)),
        "convert to mlc": (convert_command(args.model, folder / "mlc", "mlc"), range(220, 3000, 120)),
        "export-ios": ([*CLI, "export-ios", "-m", args.model, "-o", str(folder / "Exported")], range(220, 3000, 120)),
    }
    ended = []
    for what, (command, sizes) in commands.items():
        for mib in sizes:
            done = run(command, text="Hello\n", limits={resource.RLIMIT_AS: mib << 20})
            done.check()
            assert not [n for n in leftovers(folder) if n != "poor"], (what, mib, leftovers(folder))
            sentences[done.sentence] += done.status
            if done.status == 0:
                ended.append(f"{what} {mib} MiB")
                break
        else:
            raise AssertionError(f"{what} does not work with {mib} MiB: {done}")
    return f"{sum(sentences.values())} refusals in {len(sentences)} sentences; works from: {', '.join(ended)}"


@scenario
def memory_refused(args: argparse.Namespace, folder: Path) -> str:
    """One in N allocations of 1 MiB and more is refused, at random."""
    poor, counts = Poor(folder), Counter[str]()
    session = folder / "session"
    run(chat_command(args.model, session), text="Hello\n").check(fails=False)
    for i in range(args.tries):
        before = digest(session)
        poor.set(refuse_one=(3, 10, 30, 100)[i % 4], refuse_bytes=1 << 20, state=i)
        done = run(chat_command(args.model, session), text="I am Anna\nWho am I?\n", env=poor.env)
        done.check()
        counts["chat " + ("refused" if done.status else "went on")] += 1
        poor.set()
        assert session.exists() and not leftovers(folder), leftovers(folder)
        if done.status and digest(session) != before:
            run(chat_command(args.model, session), text="\n").check(fails=False)
        out = folder / "model.gguf"
        poor.set(refuse_one=(30, 100, 300, 1000)[i % 4], refuse_bytes=1 << 20, state=i)
        done = run(convert_command(args.model, out, "gguf"), env=poor.env)
        done.check()
        counts["convert " + ("refused" if done.status else "went on")] += 1
        assert not leftovers(folder), leftovers(folder)
    run(chat_command(args.model, session), text="Hello\n").check(fails=False)
    return ", ".join(f"{what} {n}" for what, n in sorted(counts.items()))


@scenario
def memory_serve(args: argparse.Namespace, folder: Path) -> str:
    """Allocations of 1 MiB and more are refused while a server answers four conversations in two slots.

    Smaller ones would be llama.cpp's own while it computes, which ends the process over them (docs/security.md).
    """
    poor, counts = Poor(folder), Counter[str]()
    with Server(args.model, folder, poor.env) as server:
        names = ("Anna", "Ben", "Cleo", "Dan")
        for name in names:
            server.good_turn(name)
        for i in range(args.tries):
            poor.set(refuse_one=(1, 2, 5)[i % 3], refuse_bytes=1 << 20, state=i)
            for name in names:
                try:
                    answer = server.turn(name, grammar='root ::= "a" [a-z ]{4,20}' if i % 5 == 4 else None)
                except (httpx.HTTPError, json.JSONDecodeError) as error:
                    ended = server.process.process.poll()
                    assert ended is None, f"the server ended with {ended}: {server.said()}"
                    answer = Answer(599, error=repr(error))
                counts["answered" if answer.finished else f"status {answer.status}"] += 1
                assert answer.finished or answer.error, f"{answer}\n{server.said()}"
            counts["refused allocations"] += poor.get("n_refused")
        poor.set()
        for name in names:
            answer = server.turn(name)
            assert answer.finished and answer.text, f"{answer}\n{server.said()}"
        for name in names:
            server.good_turn(name)
        assert not leftovers(folder / "sessions"), leftovers(folder)
        server.end()
    return ", ".join(f"{what}: {n}" for what, n in sorted(counts.items()))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", help=", ".join(SCENARIOS))
    parser.add_argument("-m", "--model", default="demo")
    parser.add_argument("--tries", type=int, default=20, help="of those with chance in them")
    parser.add_argument("--train-python", default=sys.executable, metavar="PYTHON", help="one that has torch")
    args = parser.parse_args()
    unknown = sorted(set(args.scenarios) - set(SCENARIOS))
    if unknown:
        parser.error(f"no scenario {', '.join(unknown)}: use any of {', '.join(SCENARIOS)}")
    path, failed = ROOT / "build" / "endurance" / "poor.json", 0
    path.parent.mkdir(parents=True, exist_ok=True)
    results: dict[str, str] = json.loads(path.read_text()) if path.exists() else {}
    for name in args.scenarios or SCENARIOS:
        if (
            name == "full-train"
            and subprocess.run([args.train_python, "-c", "import torch"], capture_output=True).returncode
        ):
            print(f"{name}: skipped, since {args.train_python} has no torch (--train-python)")
            continue
        with tempfile.TemporaryDirectory(prefix="edge-stream-poor-") as folder:
            try:
                results[name] = "holds: " + SCENARIOS[name](args, Path(folder))
            except (AssertionError, httpx.HTTPError, subprocess.TimeoutExpired, StopIteration) as error:
                results[name] = f"FAILS: {error!r}"
                failed += 1
                with Path(folder, "server.log").open("ab"):
                    shutil.copy(Path(folder, "server.log"), path.parent / f"poor-{name}.log")
                print(error)
        print(f"{name}: {results[name]}", flush=True)
        replace_text(path, json.dumps(results, indent=1))
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
