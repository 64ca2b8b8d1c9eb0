"""Try another llama-cpp-python and, if it passes, pin it: bump.py VERSION (or `newest`).

Everything happens in a copy of this tree, `build/bump/VERSION`: fetch, patch, build, then the tests of exactness,
sessions, counts, RPC and bad input against the new libraries and bindings. A second run continues with what the first
one built. Only when all of it has passed is the pin in pyproject.toml changed. What differs from the pinned version,
and how long each step took, is printed as Markdown.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import fetch_llama
import llama_changes
import llama_pin

ROOT = Path(__file__).resolve().parent.parent
TESTS = ("test_stream_exact", "test_session", "test_graph_cost", "test_rpc", "test_bad_input")
# of the stage, the tests must not see the libraries or the options of the outer tree, nor make its variables
_DROPPED = ("LLAMA_CPP_LIB_PATH", "EDGE_STREAM_LLAMA", "MAKEFLAGS", "MAKEOVERRIDES", "MFLAGS", "VERSION")
_SHOWN = 40  # lines of a failed step's output, from the first error on


class StepFailed(Exception):
    """The step's name, and why."""


class Stage:
    """A copy of the tree that another version is tried in."""

    def __init__(self, version: str) -> None:
        self.version = version
        self.folder = ROOT / "build" / "bump" / version
        self.llama = self.folder / "build" / "llama.cpp"
        self.bindings = self.folder / "build" / "bindings"
        self.python = self.folder / ".venv" / "bin" / "python"

    def run(self, name: str, *command: str | Path, **env: str) -> str:
        """Run a command in the stage; its output, which is also in `build/NAME.log`. Raises StepFailed."""
        log = self.folder / "build" / f"{name}.log"
        full = {key: value for key, value in os.environ.items() if key not in _DROPPED} | env
        with log.open("w") as out:
            rc = subprocess.run(command, cwd=self.folder, env=full, stdout=out, stderr=subprocess.STDOUT).returncode
        text = log.read_text()
        if rc:
            lines = text.rstrip().split("\n")
            first = next((i for i, line in enumerate(lines) if re.search(r"error|fail", line, re.IGNORECASE)), -_SHOWN)
            raise StepFailed("\n".join([*lines[first:][:_SHOWN], f"all of it: {log}"]))
        return text

    def copy(self) -> None:
        """The tracked and new files of the tree; what was built here stays."""
        (self.folder / "build").mkdir(parents=True, exist_ok=True)
        for path in self.folder.iterdir():
            if path.is_symlink() or path.is_file():
                path.unlink()
            elif path.name != "build":
                shutil.rmtree(path)
        names = self.run("files", "git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard", "-z")
        for name in filter(None, names.split("\0")):
            if (ROOT / name).is_file():
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, self.folder / name)
        (self.folder / ".venv").symlink_to(ROOT / ".venv")

    def fetch(self) -> llama_pin.Pin:
        archive = fetch_llama.download(self.llama, self.version)
        commit = llama_changes.read(archive)["HEAD"][:9]
        return llama_pin.Pin(self.version, fetch_llama.sha256(archive), commit)

    def patch(self, pin: llama_pin.Pin) -> str:
        """The hunks that moved, a line each."""
        llama_pin.write(pin, self.folder / "pyproject.toml")
        (self.llama / "llama.cpp" / ".edge-stream-patched").unlink(missing_ok=True)
        return self.run("patch", "make", "-s", "build/llama.cpp/.stamp")

    def build(self) -> None:
        self.run("build", "make", "-s", "edge_stream/lib/.stamp")
        archive = fetch_llama.archive_path(self.llama, self.version)
        pip = [self.python, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target", self.bindings]
        self.run("bindings", *pip, archive, CMAKE_ARGS="-DLLAMA_BUILD=OFF")

    def test(self) -> str:
        """pytest's last line."""
        path = f"{self.folder}{os.pathsep}{self.bindings}"
        wanted = f"{self.version} {self.folder / 'edge_stream' / 'lib'}"
        code = "import edge_stream.native.libraries as l, llama_cpp; l.llama(); print(llama_cpp.__version__, l.llama_dir())"
        loaded = self.run("loaded", self.python, "-c", code, PYTHONPATH=path).strip()
        if loaded != wanted:
            raise StepFailed(f"the tests would run against {loaded}, not {wanted}")
        tests = [f"tests/{name}.py" for name in TESTS]
        return self.run("tests", self.python, "-m", "pytest", "-q", *tests, PYTHONPATH=path).rstrip().split("\n")[-1]


def newest() -> str:
    """The newest version that pip sees."""
    cmd = [sys.executable, "-m", "pip", "index", "versions", "llama-cpp-python"]
    text = subprocess.run(cmd, capture_output=True, text=True, check=True).stdout
    return re.findall(r"llama-cpp-python \((.+?)\)", text)[0]


def changes(pinned: llama_pin.Pin, stage: Stage) -> str:
    old = fetch_llama.download(ROOT / "build" / "llama.cpp", pinned.version)
    new = fetch_llama.archive_path(stage.llama, stage.version)
    return llama_changes.report(llama_changes.read(old), llama_changes.read(new))


def bump(version: str) -> None:
    """Raises SystemExit, with the name of the step, if one fails; the tree is then as it was."""
    pinned, stage = llama_pin.read(), Stage(version)
    print(f"## llama-cpp-python {pinned.version} -> {version}\n", flush=True)

    def step(name: str, action: Callable, *args: object) -> object:
        start = time.monotonic()
        try:
            result = action(*args)
        except (StepFailed, SystemExit) as error:
            raise SystemExit(f"{name} failed; the pin stays at {pinned.version}\n{error}") from None
        print(f"- {name}: {time.monotonic() - start:.0f} s", flush=True)
        if result and isinstance(result, str):
            print(f"\n{result.rstrip()}\n", flush=True)
        return result

    step("copy", stage.copy)
    pin = step("fetch", stage.fetch)
    step("compare", changes, pinned, stage)
    step("patch", stage.patch, pin)
    step("build", stage.build)
    step("test", stage.test)
    llama_pin.write(pin)
    print(f"\npyproject.toml pins {version}: `make build test` next")


def main() -> None:
    if len(sys.argv) != 2 or not re.fullmatch(r"newest|\d[\w.]*", sys.argv[1]):
        raise SystemExit("which version? make bump VERSION=0.3.36, or VERSION=newest")
    version = newest() if sys.argv[1] == "newest" else sys.argv[1]
    if sys.argv[1] == "newest" and version == llama_pin.read().version:
        print(f"{version} is pinned, and the newest there is")
    else:
        bump(version)


if __name__ == "__main__":
    main()
