"""kill -9, or a loss of power, at random moments: is more lost than the unfinished turn, or a file half-written?

    python benchmarks/kills.py chat --kills 20
    python benchmarks/kills.py convert --power --kills 20

A scenario is run until it is killed, then what it left is examined, and it goes on from there. Power is cut before a
random write, fsync, rename or removal by a preload (native/tests/power.c), and what is examined is the worst that a
disk may hold then, in two ways: with names as they were when their folder was last synced, and with all names, but in
both of each file only what was synced. Figures are kept in build/endurance and added to; so is what
a kill left where something is wrong with it, as it was found.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from serve_kill import Talker
from serving_bench import free_port

from edge_stream.output.files import replace_text
from edge_stream.recall import Log
from edge_stream.session_file import peek_session

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "endurance"
SHIM = FOLDER / "libpower.so"
CLI = [sys.executable, "-m", "edge_stream.cli"]


class Ended(Exception):
    """The process was killed."""


def build_shim() -> None:
    """Compile the preload."""
    SHIM.parent.mkdir(parents=True, exist_ok=True)
    source = ROOT / "native" / "tests" / "power.c"
    if not SHIM.exists() or SHIM.stat().st_mtime < source.stat().st_mtime:
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", SHIM, source, "-ldl"], check=True)


class Run:
    """A process over a folder, with the preload if `cut` is given (0: count only)."""

    def __init__(self, command: list[str], folder: Path, cut: int | None) -> None:
        self.disk, env = None, dict(os.environ)
        if cut is not None:
            self.disk = Path(tempfile.mkdtemp(prefix="edge-stream-disk-")) / "disk"
            env |= {"ES_POWER_ROOT": str(folder), "ES_POWER_DISK": str(self.disk), "ES_POWER_CUT": str(cut)}
            env["LD_PRELOAD"] = str(SHIM)
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=subprocess.DEVNULL, stderr=pipe, env=env, text=True, start_new_session=True
        )
        self.said: list[str] = []

    def send(self, text: str) -> None:
        """A line to its stdin."""
        assert self.process.stdin
        try:
            self.process.stdin.write(text + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise Ended from None

    def until(self, *words: str) -> None:
        """Read its stderr up to a line with these words. Raises Ended."""
        assert self.process.stderr
        for line in self.process.stderr:
            self.said.append(line)
            if all(word in line for word in words):
                return
        raise Ended

    def kill(self) -> None:
        """kill -9 of all its processes."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        _, rest = self.process.communicate()
        self.said.append(rest or "")

    def end(self) -> int:
        """Wait; its status, -9 if it was killed."""
        _, rest = self.process.communicate()
        self.said.append(rest)
        return self.process.returncode

    @property
    def n_steps(self) -> int:
        """Operations so far."""
        assert self.disk
        return int(struct.unpack("l", (self.disk / "counter").read_bytes())[0])

    def forget(self) -> None:
        """Remove what the preload kept."""
        if self.disk:
            shutil.rmtree(self.disk.parent)


def after_power_loss(folder: Path, disk: Path, out: Path, all_names: bool) -> None:
    """Write to `out` what a disk may hold of `folder` after the cut."""
    for inner, _, names in os.walk(folder):
        path = Path(inner)
        target = out / path.relative_to(folder)
        target.mkdir(parents=True, exist_ok=True)
        relative = path.relative_to(folder).as_posix()
        kept = disk / "names" / ("".join(f":{part}" for part in relative.split("/") if part != ".") + ":")
        if all_names:
            for name in names:
                if (path / name).is_file():
                    durable = disk / "inodes" / str((path / name).stat().st_ino)
                    (target / name).write_bytes(durable.read_bytes() if durable.exists() else b"")
        elif kept.exists():
            for file in kept.iterdir():
                shutil.copyfile(file, target / file.name)


class Scenario:
    """What is done over and over in a folder. A killed `work` raises Ended."""

    most_seconds = 3.0  # from the beginning of a work to a kill

    def __init__(self, model: str, folder: Path, rng: random.Random) -> None:
        self.model, self.folder, self.rng = model, folder, rng
        self.counts: dict[str, int] = {}

    def command(self) -> list[str]:
        """What is run."""
        raise NotImplementedError

    def begin(self, run: Run) -> None:
        """Until random moments count."""

    def work(self, run: Run) -> None:
        """As long as it lives."""
        if run.end() != 0:
            raise Ended

    def check(self, folder: Path) -> None:
        """Examine what a killed run left. Raises AssertionError. The folder may be changed."""
        raise NotImplementedError

    def next(self) -> None:
        """After all that a kill left was examined."""

    def count(self, what: str, n: int = 1) -> None:
        self.counts[what] = self.counts.get(what, 0) + n


class Chat(Scenario):
    """`chat --session --recall`: every finished message is in the log once, and the session is of a finished turn."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.finished: list[str] = []
        self.n = self.n_past = 0

    def command(self, folder: Path | None = None) -> list[str]:
        session = (folder or self.folder) / "session"
        flags = ["-c", "256", "-n", "6", "--temp", "0", "--recall", "64", "--session", str(session)]
        return [*CLI, "chat", "-m", self.model, *flags]

    def begin(self, run: Run) -> None:
        run.send("/stats")
        run.until("tokens seen, ", "in the cache")

    def tokens_seen(self, run: Run) -> int:
        """What /stats has just said."""
        return int(run.said[-1].split(" tokens seen")[0].split()[-1].replace(",", ""))

    def work(self, run: Run) -> None:
        while True:
            self.n += 1
            message = f"The secret of box {self.n} is number {self.rng.randrange(10**6)}."
            run.send(message)
            self.begin(run)
            self.finished.append(message)
            self.n_past = self.tokens_seen(run)
            self.count("turns finished")

    def check(self, folder: Path) -> None:
        again = Run(self.command(folder), folder, None)
        try:
            self.begin(again)
        except Ended:
            raise AssertionError(f"the session is lost: {''.join(again.said)}") from None
        finally:
            again.kill()
        n_past = self.tokens_seen(again)
        assert n_past >= self.n_past, f"{self.n_past} tokens were in the session, {n_past} are"
        if self.finished:
            with Log(folder / "session.log") as log:
                for message in self.finished:
                    found = [hit.text for hit in log.search(message, 4) if hit.role == "user"]
                    assert found.count(message) == 1, f"lost: {message}"


class Serve(Scenario):
    """`serve` with four clients: every conversation goes on from its last finished turn."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.talkers = [Talker(i) for i in range(4)]
        self.port = 0

    def command(self, folder: Path | None = None) -> list[str]:
        self.port = free_port()
        flags = ["-c", "256", "-np", "2", "-fa", "off", "-t", "1", "--port", str(self.port)]
        return [*CLI, "serve", "-m", self.model, "--session-dir", str(folder or self.folder), *flags]

    def begin(self, run: Run) -> None:
        run.until("listening on")

    def work(self, run: Run) -> None:
        while True:
            talker = self.rng.choice(self.talkers)
            if talker.turn(f"http://127.0.0.1:{self.port}") is None:
                raise Ended
            self.count("turns finished")

    def check(self, folder: Path) -> None:
        for file in folder.rglob("*.session"):
            peek_session(file)
            self.count("session files verified")
        again = Run(self.command(folder), folder, None)
        try:
            self.begin(again)
            assert not list(folder.rglob("*.tmp-*")), "a half-written file stayed"
            for talker in self.talkers:
                expected, kept = talker.finished, list(talker.messages)
                answer = talker.turn(f"http://127.0.0.1:{self.port}")
                if not answer:
                    again.kill()
                    ended = f"the server's status {again.process.returncode}: {''.join(again.said)}"
                    raise AssertionError(f"conversation {talker.i} got no answer: {talker.error}; {ended}")
                # an answer with control tokens, which are not sent, is read again as it was sent
                assert not expected or answer.info["n_reused"] >= expected - 12, (
                    f"conversation {talker.i}: {expected} tokens were finished, {answer.info}"
                )
                talker.messages, talker.finished, talker.turns = kept, expected, talker.turns - 1
        except Ended:
            raise AssertionError(f"the server does not begin: {''.join(again.said)}") from None
        finally:
            again.kill()


def digest(path: Path) -> str:
    """Of a file, or of all files of a folder."""
    hashed = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
        hashed.update(file.name.encode() + file.read_bytes())
    return hashed.hexdigest()


class Replaces(Scenario):
    """A command that replaces a file or folder: there is the old or the new one, and nothing else after another run."""

    name, changes = "", True
    resumes = False  # the same command goes on where it was killed, to the same bits

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.made: list[str] = []  # by variant, by a run that nobody killed
        for variant in range(2 if self.changes else 1):
            done = subprocess.run(self.command(variant=variant), capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            self.made.append(digest(self.folder / self.name))
        self.variant = 0
        self.after()

    def after(self) -> None:
        """What must be done before it can run again."""

    def command(self, folder: Path | None = None, variant: int | None = None) -> list[str]:
        raise NotImplementedError

    def work(self, run: Run) -> None:
        super().work(run)
        self.variant = 1 - self.variant
        self.count("finished before the kill")

    def check(self, folder: Path) -> None:
        out = folder / self.name
        if out.exists() or self.changes:
            assert out.exists(), f"{self.name} is gone"
            assert digest(out) in self.made, f"{self.name} is neither the old one nor the new one"
        if not self.resumes:
            self.variant = 1 - self.variant
        left = [p.name for p in folder.iterdir() if p.name != self.name]
        self.count("staging files and folders left", len(left))
        if not self.changes and out.exists():
            shutil.rmtree(out)
        done = subprocess.run(self.command(folder), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert digest(out) == self.made[self.variant % len(self.made)], (
            f"{self.name} is not what a run makes that is not killed"
        )
        self.count("went on from a part", "going on from step" in done.stderr)
        left = [p.name for p in folder.iterdir() if p.name != self.name]
        assert not left, f"{left} stays after another run"
        self.after()

    def next(self) -> None:
        if self.resumes:
            self.variant = 1 - self.variant


class Convert(Replaces):
    """`convert --overwrite` to a GGUF file."""

    name = "model.gguf"

    def command(self, folder: Path | None = None, variant: int | None = None) -> list[str]:
        outtype = ("q8_0", "f16")[self.variant if variant is None else variant]
        out = str((folder or self.folder) / self.name)
        return [*CLI, "convert", self.model, "--to", "gguf", "--outtype", outtype, "--overwrite", "-o", out]


class ConvertMlc(Replaces):
    """`convert --overwrite` to an MLC folder."""

    name = "mlc"

    def command(self, folder: Path | None = None, variant: int | None = None) -> list[str]:
        quantization = ("q4f16_1", "q4f32_1")[self.variant if variant is None else variant]
        out = str((folder or self.folder) / self.name)
        return [*CLI, "convert", self.model, "--to", "mlc", "--quantization", quantization, "--overwrite", "-o", out]


class ExportIos(Replaces):
    """`export-ios`, which replaces nothing: there is no folder, or the whole one."""

    name, changes = "Exported", False

    def command(self, folder: Path | None = None, variant: int | None = None) -> list[str]:
        return [*CLI, "export-ios", "-m", self.model, "-o", str((folder or self.folder) / self.name)]

    def after(self) -> None:
        shutil.rmtree(self.folder / self.name, ignore_errors=True)


class Train(Replaces):
    """`train --overwrite`: there is the old folder or the new one; a run that was killed goes on, to the same bits."""

    name, resumes, most_seconds = "small", True, 6.0

    def begin(self, run: Run) -> None:
        run.until("samples; ", " steps of ")

    def command(self, folder: Path | None = None, variant: int | None = None) -> list[str]:
        sizes = [
            "--layers", "1", "--width", "32", "--heads", "2", "--vocab", "300", "-c", "32", "-b", "2",
            "-n", "12000", "--save-every", "5", "-t", "1", "--device", "cpu",
        ]  # fmt: skip
        seed = str(self.variant if variant is None else variant)
        out = str((folder or self.folder) / self.name)
        return [*CLI, "train", str(ROOT / "LICENSE"), *sizes, "--seed", seed, "--overwrite", "-o", out]


SCENARIOS: dict[str, type[Scenario]] = {
    "chat": Chat,
    "serve": Serve,
    "convert": Convert,
    "convert-mlc": ConvertMlc,
    "export-ios": ExportIos,
    "train": Train,
}


def examine(scenario: Scenario, folder: Path) -> None:
    """Check what a kill left; of a fault it is kept, as it was found."""
    with tempfile.TemporaryDirectory(prefix="edge-stream-found-") as root:
        found = shutil.copytree(folder, Path(root) / "found")
        try:
            scenario.check(folder)
        except AssertionError:
            kept = FOLDER / "found"
            shutil.rmtree(kept, ignore_errors=True)
            print(f"what was found is kept in {shutil.move(found, kept)}", file=sys.stderr)
            raise


def one(scenario: Scenario, cut: Callable[[], int] | None) -> None:
    """Run, kill, examine."""
    run = Run(scenario.command(), scenario.folder, cut() if cut else None)
    try:
        if cut is None:
            scenario.begin(run)
            pid, moment = os.fork(), scenario.rng.uniform(0.0, scenario.most_seconds)
            if pid == 0:  # whatever this process is doing then
                time.sleep(moment)
                try:
                    os.killpg(run.process.pid, signal.SIGKILL)
                finally:
                    os._exit(0)
            try:
                scenario.work(run)
            finally:
                os.waitpid(pid, 0)
        else:
            scenario.begin(run)
            scenario.work(run)
    except Ended:
        pass
    run.kill()
    if cut is None:
        examine(scenario, scenario.folder)
        scenario.next()
        return
    assert run.disk
    with tempfile.TemporaryDirectory(prefix="edge-stream-power-") as root:
        for all_names in (True, False):
            copy = Path(root) / f"{all_names}"
            after_power_loss(scenario.folder, run.disk, copy, all_names)
            examine(scenario, copy)
    examine(scenario, scenario.folder)
    scenario.next()
    run.forget()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenario", choices=SCENARIOS)
    parser.add_argument("-m", "--model", default="demo")
    parser.add_argument("--kills", type=int, default=20, help="in all, those of earlier runs among them")
    parser.add_argument("--power", action="store_true", help="cut power instead")
    parser.add_argument(
        "--steps", type=int, default=60, help="with --power: chat and serve are cut within so many operations"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    build_shim()
    name = f"kills-{args.scenario}" + ("-power" if args.power else "")
    path = FOLDER / f"{name}.json"
    known = json.loads(path.read_text()) if path.exists() else {"kills": 0}
    with tempfile.TemporaryDirectory(prefix="edge-stream-kills-") as folder:
        rng = random.Random(f"{args.seed} {known['kills']}")
        scenario = SCENARIOS[args.scenario](args.model, Path(folder), rng)
        steps = args.steps
        if args.power and isinstance(scenario, Replaces):  # whose operations are few: as many as a whole run has
            whole = Run(scenario.command(), scenario.folder, 0)
            scenario.work(whole)
            steps = whole.n_steps
            whole.forget()
            scenario.after()
        while known["kills"] < args.kills:
            one(scenario, (lambda: rng.randint(1, steps)) if args.power else None)
            known["kills"] += 1
            found = known | {k: known.get(k, 0) + n for k, n in scenario.counts.items()}
            replace_text(path, json.dumps(found))
    print(name, path.read_text())


if __name__ == "__main__":
    main()
