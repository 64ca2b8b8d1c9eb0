"""Compile the CUDA build without a GPU and without a system-wide toolkit: check_cuda.py FOLDER [--all].

NVIDIA's compiler comes from PyPI into a virtual environment of its own (about 0.9 GB). Without --all: the files of
ggml-cuda that the ops of the sinks' moves run in (rope, set_rows, cpy, the Hadamard product, matrix products in
float32, and the backend's own file with support function, fusion and graph capture), then libllama and libedge_stream.
With --all: every file of ggml-cuda, and the library is linked. One architecture.

Nothing runs: that takes a device. The summary says what was compiled and what was not.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-nvvm==13.0.88",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-cuda-runtime==13.0.96",
    "nvidia-cuda-cccl==13.0.85",
    "nvidia-cublas==13.1.0.3",
)
ARCHITECTURE = "80-real"
# by the ops of edge_stream/hardware/bank_ops.py; ggml-cuda.cu dispatches, and decides what is supported and fused
FILES = ("ggml-cuda", "rope", "set-rows", "cpy", "fwht", "mmvf", "mmf", "convert", "getrows")


def toolkit(folder: Path) -> Path:
    """The compiler's root, with library names that a linker looks for."""
    home = folder / "venv"
    python = home / "bin" / "python"
    marker = home / ".packages"
    if not marker.exists() or marker.read_text() != "\n".join(PACKAGES):
        venv.create(home, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", *PACKAGES], check=True)
        marker.write_text("\n".join(PACKAGES))
    root = next(home.glob("lib/python3*/site-packages/nvidia/cu13"))
    for library in (root / "lib").glob("*.so.*"):
        link = library.with_name(re.sub(r"\.so\..*", ".so", library.name))
        if not link.exists():
            link.symlink_to(library.name)
    lib64 = root / "lib64"
    if not lib64.exists():
        lib64.symlink_to("lib")
    return root


def configure(folder: Path, root: Path) -> Path:
    """A CMake build of the project with the CUDA backend."""
    build = folder / "build"
    options = [
        "-DGGML_CUDA=ON",
        "-DGGML_CUDA_NO_VMM=ON",  # the driver's library is not on PyPI
        f"-DCMAKE_CUDA_COMPILER={root / 'bin' / 'nvcc'}",
        f"-DCUDAToolkit_ROOT={root}",
        f"-DCMAKE_CUDA_ARCHITECTURES={ARCHITECTURE}",
        f"-DPython3_EXECUTABLE={sys.executable}",
    ]
    command = ["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    (folder / "cmake.log").write_text(done.stdout + done.stderr)
    if done.returncode:
        raise SystemExit(f"CMake cannot configure the CUDA build: see {folder / 'cmake.log'}")
    return build


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--all", action="store_true", help="every file, and link (half an hour or more on 2 cores)")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    folder = args.folder.resolve()
    root = toolkit(folder)
    build = configure(folder, root)

    listed = subprocess.run(["ninja", "-C", str(build), "-t", "targets", "all"], capture_output=True, text=True)
    objects = sorted(set(re.findall(r"^(\S*ggml-cuda\.dir/\S+\.cu\.o):", listed.stdout, re.MULTILINE)))
    needed = [o for name in FILES for o in objects if o.endswith(f"/{name}.cu.o")]
    missing = [name for name in FILES if not any(o.endswith(f"/{name}.cu.o") for o in needed)]
    if missing:
        raise SystemExit(f"llama.cpp has no {', '.join(missing)}.cu any more: read its ggml-cuda again")
    # the libraries themselves depend on all of ggml-cuda: their files do not
    host = sorted(set(re.findall(r"^(\S*/(?:llama|ggml)\.dir/\S+\.o):", listed.stdout, re.MULTILINE)))
    jobs = {target.rpartition("/")[2].removesuffix(".o"): [target] for target in needed}
    if args.all:
        jobs["every other file, and the library"] = ["ggml-cuda"]
    jobs["libllama, libedge_stream"] = ["llama", "edge_stream"] if args.all else [*host, "edge_stream"]
    failed = []
    log = folder / "compile.log"
    log.write_text("")
    for name, targets in jobs.items():
        start = time.monotonic()
        done = subprocess.run(["ninja", "-C", str(build), "-k", "0", *targets], capture_output=True, text=True)
        with log.open("a") as file:
            file.write(done.stdout + done.stderr)
        if done.returncode:
            failed.append(name)
        print(f"{'FAILED' if done.returncode else 'ok':6}  {name:40} {time.monotonic() - start:6.1f} s", flush=True)
    version = subprocess.run([root / "bin" / "nvcc", "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release .*", version)
    n_files = sum((build / target).exists() for target in objects)
    print(f"\nnvcc {release[0] if release else '?'}, architecture {ARCHITECTURE}")
    print(f"{n_files} of {len(objects)} .cu files of ggml-cuda compiled, {len(failed)} steps failed")
    print("compiled, not run: that takes a CUDA device (make test-cuda)")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}; see {log}")


if __name__ == "__main__":
    main()
