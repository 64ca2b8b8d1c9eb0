"""For poor_machine.py: commands that are run, a disk of its own, and a preload that takes things away (poor.c)."""

from __future__ import annotations

import os
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHIM = ROOT / "build" / "endurance" / "libpoor.so"
CLI = [sys.executable, "-m", "edge_stream.cli"]


@dataclass
class Ended:
    """How a command ended."""

    status: int
    stdout: str
    stderr: str

    @property
    def sentence(self) -> str:
        """The last line that it said."""
        lines = [line for line in self.stderr.splitlines() if line.strip()]
        return lines[-1] if lines else ""

    def check(self, *, fails: bool | None = None) -> None:
        """It did what it should, or said in one sentence why not. fails: which. Raises AssertionError."""
        said = f"status {self.status}: {self.stderr[-2000:]}"
        assert self.status in (0, 1), said
        assert "Traceback" not in self.stderr, said
        if fails is not None:
            assert (self.status == 1) is fails, said
        if self.status == 1:
            assert self.sentence.startswith("error: "), said


def run(
    command: list[str],
    *,
    text: str = "",
    limits: dict[int, int] | None = None,
    env: dict[str, str] | None = None,
    seconds: float = 300,
) -> Ended:
    """Run to the end, under limits (resource.RLIMIT_...)."""

    def limit() -> None:
        for what, n in (limits or {}).items():
            resource.setrlimit(what, (n, n))

    done = subprocess.run(
        command,
        input=text,
        capture_output=True,
        text=True,
        errors="replace",
        env=os.environ | (env or {}),
        preexec_fn=limit,
        timeout=seconds,
    )
    return Ended(done.returncode, done.stdout, done.stderr)


class Poor:
    """What the preload does at the moment; it may be changed while a process runs."""

    _FIELDS = ("fsync_ms", "clock_s", "refuse_one", "refuse_bytes", "n_refused", "state")

    def __init__(self, folder: Path) -> None:
        source = ROOT / "native" / "tests" / "poor.c"
        SHIM.parent.mkdir(parents=True, exist_ok=True)
        if not SHIM.exists() or SHIM.stat().st_mtime < source.stat().st_mtime:
            subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", SHIM, source, "-ldl"], check=True)
        self.path = folder / "poor"
        self.path.write_bytes(bytes(8 * len(self._FIELDS)))

    @property
    def env(self) -> dict[str, str]:
        """Of a process that it acts on."""
        return {"LD_PRELOAD": str(SHIM), "ES_POOR": str(self.path), "PYTHONFAULTHANDLER": "1"}  # says where it crashed

    def set(self, **values: int) -> None:
        """Change fields of poor.c's struct; the others become 0."""
        data = struct.pack(f"{len(self._FIELDS)}q", *(values.get(name, 0) for name in self._FIELDS))
        with self.path.open("r+b") as file:
            file.write(data)

    def get(self, name: str) -> int:
        """A field."""
        return int(struct.unpack(f"{len(self._FIELDS)}q", self.path.read_bytes())[self._FIELDS.index(name)])


@contextmanager
def small_disk(mib: int) -> Iterator[Path]:
    """A disk of so many MiB. Raises SystemExit where mounting is not allowed."""
    with tempfile.TemporaryDirectory(prefix="edge-stream-disk-") as folder:
        mount = ["mount", "-t", "tmpfs", "-o", f"size={mib}m", "edge-stream", folder]
        if subprocess.run(mount, capture_output=True).returncode:
            raise SystemExit(
                "a small disk cannot be mounted: run this as root, or in `unshare --map-root-user --mount`"
            )
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", "--lazy", folder], check=True)


def fill(disk: Path, leave: int = 0) -> Path:
    """A file that takes all of a disk but `leave` bytes."""
    ballast = disk / "ballast"
    with ballast.open("wb") as file:
        free = shutil.disk_usage(disk).free
        os.posix_fallocate(file.fileno(), 0, max(1, free - leave))
    return ballast


def leftovers(folder: Path) -> list[str]:
    """Names of files and folders that are being written."""
    return [p.name for p in folder.rglob("*") if ".tmp" in p.name or "staging" in p.name or p.name.startswith(".")]
