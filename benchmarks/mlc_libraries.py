"""Cross-compile the MLC libraries of a model's shape, and list what is in them.

    python benchmarks/mlc_libraries.py [iphone,metal,cuda] [mistral-7b, ministral-3-3b, smollm3-3b, ...] [folder]

No weights are needed: the shape is given as in mlc-chat-config.json. The libraries are compiled, not run. If nvcc is
on PATH (PyPI: nvidia-cuda-nvcc, -crt, -runtime, -cccl and nvidia-nvvm), it compiles the CUDA source to machine code.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from make_checkpoint import MODELS

from edge_stream.converters.config import read_config
from edge_stream.converters.mlc.chat_config import model_config, prefill_chunk_size
from edge_stream.converters.mlc.compile import compile_library
from edge_stream.converters.streaming_defaults import StreamingDefaults
from edge_stream.ios.mlc_package import memory_plan
from edge_stream.mlc.folder import MlcFolder


def chat_config(name: str, n_ctx: int = 4096) -> dict[str, Any]:
    """mlc-chat-config.json of a model of make_checkpoint.py, as far as the compiler reads it."""
    config = MODELS[name][0]
    model, streaming = read_config(config), StreamingDefaults(n_ctx=n_ctx, n_keep=4)
    return {
        "model_type": model.family.model_type,
        "quantization": "q4f16_1",
        "model_config": model_config(SimpleNamespace(model=model, config=config), streaming),  # type: ignore[arg-type]
        "context_window_size": -1,
        "sliding_window_size": n_ctx,
        "attention_sink_size": 4,
        "prefill_chunk_size": prefill_chunk_size(streaming),
    }


def print_plan(path: Path) -> None:
    """The memory that `edge-stream export-ios` would plan for."""
    folder = MlcFolder(path)
    stored = (np.dtype(dtype).itemsize * math.prod(shape) for _, shape, dtype in folder.expected_tensors())
    plan = memory_plan(folder) | {"weights": sum(stored)}
    parts = ", ".join(f"{part} {size / 2**20:,.0f}" for part, size in plan.items())
    print(f"memory on a phone, MiB: {parts}, together {sum(plan.values()) / 2**20:,.0f}")


def macho_symbols(data: bytes) -> list[str]:
    """External symbols that a 64-bit Mach-O object defines (mach-o/loader.h and nlist.h)."""
    n_commands, at = struct.unpack_from("<I", data, 16)[0], 32
    for _ in range(n_commands):
        command, size = struct.unpack_from("<II", data, at)
        if command == 2:  # LC_SYMTAB
            symbols, count, strings, _ = struct.unpack_from("<4I", data, at + 8)
            names = []
            for i in range(count):
                name, kind, section = struct.unpack_from("<IBB", data, symbols + 16 * i)
                if kind & 1 and section:  # external, defined
                    start = strings + name
                    names.append(data[start : data.index(b"\0", start)].decode())
            return sorted(names)
        at += size
    return []


def describe(library: Path) -> None:
    """Print members, sizes, symbols and kernels of a .tar of object files."""
    with tarfile.open(library) as archive:
        for member in archive.getmembers():
            file = archive.extractfile(member)
            if file is None:
                continue
            data = file.read()
            print(f"  {member.name}: {len(data):,} bytes")
            if data[:4] == bytes.fromhex("cffaedfe"):
                names = macho_symbols(data)
                print(f"    Mach-O, {len(names)} symbols: {', '.join(names[:400])}")
            for word in (rb"kernel void (\w+)", rb'extern "C" __global__ void (?:__launch_bounds__\(\d+\) )?(\w+)'):
                kernels = sorted({k.decode() for k in re.findall(word, data)})
                if kernels:
                    print(f"    {len(kernels)} kernels: {', '.join(kernels)}")
            if b'extern "C" __global__' in data:
                compile_cuda(data)


def compile_cuda(data: bytes) -> None:
    """Compile the CUDA source inside an object file with nvcc, if there is one."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        print("    CUDA source not compiled: nvcc is not on PATH")
        return
    # a C string between other data: the text around the first kernel
    kernel = data.index(b'extern "C" __global__')
    source = max(re.findall(rb"[\t\n\r -~]+", data[max(0, kernel - 65536) :]), key=len)
    with tempfile.TemporaryDirectory() as folder:
        text, code = Path(folder) / "kernels.cu", Path(folder) / "kernels.cubin"
        text.write_bytes(source)
        subprocess.run([nvcc, "-w", "-arch=sm_80", "-cubin", "-o", str(code), str(text)], check=True)
        print(f"    nvcc -arch=sm_80: {len(source):,} bytes of source, {code.stat().st_size:,} of machine code")


def main() -> None:
    """Compile for each device."""
    devices = sys.argv[1].split(",") if len(sys.argv) > 1 else ["iphone", "metal", "cuda"]
    with tempfile.TemporaryDirectory() as scratch:
        model = sys.argv[2] if len(sys.argv) > 2 else "mistral-7b"
        folder = Path(sys.argv[3] if len(sys.argv) > 3 else scratch)
        folder.mkdir(exist_ok=True)
        (folder / "mlc-chat-config.json").write_text(json.dumps(chat_config(model)))
        print_plan(folder)
        for device in devices:
            out = folder / device
            out.mkdir(exist_ok=True)
            start = time.perf_counter()
            library = compile_library(folder, device, print, out=out)
            print(f"{device}: {library.name}, {library.stat().st_size:,} bytes, {time.perf_counter() - start:.0f} s")
            describe(library)


if __name__ == "__main__":
    main()
