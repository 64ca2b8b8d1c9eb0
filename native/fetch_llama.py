"""Put llama.cpp's source, patched, into a folder: fetch_llama.py FOLDER.

The source is the one inside the source distribution of the pinned llama-cpp-python, so that its Python bindings
and our libraries are of one version. The folder gets the archive itself (the Makefile installs the bindings from
it) and `llama.cpp/`. Nothing is done if the folder already holds this version with these patches.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import apply_patches
import llama_pin

PATCHES = Path(__file__).resolve().parent / "patches"


def archive_path(folder: Path, version: str) -> Path:
    return folder / f"llama_cpp_python-{version}.tar.gz"


def download(folder: Path, version: str) -> Path:
    """The archive of a version in `folder`, fetched with pip (so that the user's index and proxy settings hold)."""
    archive = archive_path(folder, version)
    if not archive.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as tmp:
            # the package's metadata step runs its build backend: no build happens here
            cmd = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", tmp]
            cmd += ["--no-binary", "llama-cpp-python", f"llama-cpp-python=={version}"]
            env = {**os.environ, "CMAKE_ARGS": "-DLLAMA_BUILD=OFF"}
            if subprocess.run(cmd, env=env).returncode:
                raise SystemExit(f"pip cannot fetch llama-cpp-python {version} (see above)")
            (Path(tmp) / archive.name).rename(archive)
    return archive


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def stamp(pin: llama_pin.Pin, patches: list[Path]) -> str:
    """What the folder must hold: the archive's hash and every patch's."""
    digest = hashlib.sha256(pin.sha256.encode())
    for patch in patches:
        digest.update(patch.read_bytes())
    return digest.hexdigest()


def sync(src: Path, dst: Path) -> None:
    """Make `dst` equal to `src`. Only what changed gets a new time stamp, so that the rest is not rebuilt."""
    wanted = {path.relative_to(src) for path in src.rglob("*")}
    for path in sorted(dst.rglob("*"), reverse=True):
        if path.relative_to(dst) not in wanted:
            path.rmdir() if path.is_dir() else path.unlink()
    for name in sorted(wanted):
        path, out = src / name, dst / name
        if path.is_dir():
            out.mkdir(exist_ok=True)
        elif not out.exists() or out.read_bytes() != path.read_bytes():
            shutil.copyfile(path, out)


def main() -> None:
    """Extract `vendor/llama.cpp` of the archive and apply the patches in name order."""
    folder = Path(sys.argv[1])
    target = folder / "llama.cpp"
    marker = target / ".edge-stream-patched"
    pin, patches = llama_pin.read(), sorted(PATCHES.glob("*.patch"))
    if marker.exists() and marker.read_text() == stamp(pin, patches):
        return

    archive = download(folder, pin.version)
    if sha256(archive) != pin.sha256:
        archive.unlink()
        raise SystemExit(f"{archive.name} does not have the expected SHA-256; deleted, please run again")
    for other in set(folder.glob(archive_path(folder, "*").name)) - {archive}:
        other.unlink()
    prefix = f"{archive.name.removesuffix('.tar.gz')}/vendor/llama.cpp/"
    with tempfile.TemporaryDirectory(dir=folder) as tmp:
        with tarfile.open(archive) as tar:
            members = [m for m in tar.getmembers() if m.name.startswith(prefix) and (m.isfile() or m.isdir())]
            for member in members:
                member.name = member.name.removeprefix(prefix)
            tar.extractall(tmp, members)
        try:
            hunks = apply_patches.apply(patches, Path(tmp))
        except apply_patches.PatchError as error:
            raise SystemExit(f"the patches do not fit llama-cpp-python {pin.version}:\n{error}") from None
        target.mkdir(exist_ok=True)
        sync(Path(tmp), target)
    marker.write_text(stamp(pin, patches))
    for hunk in hunks:
        if hunk.found != hunk.line:
            print(f"{hunk}: found {hunk.found - hunk.line:+d} lines away")


if __name__ == "__main__":
    main()
