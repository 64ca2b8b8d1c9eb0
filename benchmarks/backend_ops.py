"""Which ops of the sinks' moves each backend computes: the table of docs/gpu.md.

CUDA's and Metal's support functions are taken out of the llama.cpp that is built (build/llama.cpp), reduced to the
cases that the patch's ops meet, compiled against ggml's headers and asked about the very tensors that
edge_stream/hardware/bank_ops.py describes: no hardware is needed. What they say is a promise: whether an op that a backend takes
on computes the right thing only a run can tell.

    python benchmarks/backend_ops.py             # print the table
    python benchmarks/backend_ops.py --write     # put it into docs/gpu.md
"""

from __future__ import annotations

import argparse
import ctypes
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from edge_stream.cache_types import CACHE_TYPES
from edge_stream.hardware import bank_ops, devices
from edge_stream.native import libraries

ROOT = Path(__file__).resolve().parent.parent
LLAMA = ROOT / "build" / "llama.cpp" / "llama.cpp"
DOC = ROOT / "docs" / "gpu.md"
BEGIN, END = "<!-- begin ops -->", "<!-- end ops -->"

# the ggml_op of every op in bank_ops (the test asserts that these are all)
OPS = ("ROPE", "MUL_MAT", "SET_ROWS", "CPY")
CUDA = "ggml/src/ggml-cuda/ggml-cuda.cu"
METAL = "ggml/src/ggml-metal/ggml-metal-device.m"


def function_text(path: str, head: str) -> str:
    """A function of the source: from the line that begins with `head` to its closing brace in the first column."""
    text = (LLAMA / path).read_text(encoding="utf-8")
    start = text.index(f"\n{head}") + 1
    while text.find("{", start) > text.find(";", start):  # only a declaration
        start = text.index(f"\n{head}", start) + 1
    return text[start : text.index("\n}", start) + 3]


def cases(function: str, ops: tuple[str, ...] = OPS) -> str:
    """The top-level cases of a `switch (op->op)` that handle the ops, as they stand in the source."""
    body = function[function.index("switch (op->op)") :]
    blocks = re.split(r"\n(?=        (?:case GGML_OP_\w+:|default:))", body)[1:]
    kept: list[str] = []
    group: list[str] = []
    for block in blocks:
        group.append(block)
        if block.strip().endswith(":"):  # a bare label: it falls through to the next
            continue
        if any(f"case GGML_OP_{op}:" in label for op in ops for label in group):
            kept += group
        group = []
    missing = [op for op in ops if not any(f"case GGML_OP_{op}:" in block for block in kept)]
    if missing:
        raise SystemExit(f"the support function has no case for {', '.join(missing)}: read the source again")
    return "\n".join(kept)


def program() -> str:
    """C++ with two functions: es_cuda(op) and es_metal(op, has_bfloat)."""
    cuda = function_text(CUDA, "static bool ggml_backend_cuda_device_supports_op(")
    fwht = function_text("ggml/src/ggml-cuda/fwht.cu", "bool ggml_cuda_op_mul_mat_use_fwht(")
    metal = function_text(METAL, "bool ggml_metal_device_supports_op(")
    before_switch = metal[metal.index("{") + 1 : metal.index("switch (op->op)")]
    mul_mat = function_text(METAL, "static bool ggml_metal_supports_mul_mat_op(")
    use_mm = function_text("ggml/src/ggml-metal/ggml-metal-common.cpp", "bool ggml_metal_op_mul_mat_use_mm(")
    return f"""
#include "ggml.h"
#include "ggml-impl.h"
#include <cstring>
{fwht}
extern "C" bool es_cuda(const ggml_tensor * op) {{
    switch (op->op) {{
{cases(cuda)}
        default: return false;
    }}
}}
struct device_props {{ bool has_simdgroup_mm, has_simdgroup_reduction, has_bfloat; int max_theadgroup_memory_size; }};
struct device {{ device_props props; }};
static bool ggml_metal_op_mul_mat_use_fwht(const ggml_tensor *, int) {{ return false; }} // asked about F16 only
static bool ggml_metal_op_mul_mat_id_use_mm(const ggml_tensor *, bool) {{ return false; }}
static {use_mm}
{mul_mat}
extern "C" bool es_metal(const ggml_tensor * op, bool bfloat) {{
    device the_device = {{ {{ true, true, bfloat, 32768 }} }}; // Apple7 (M1, A14) and later
    device * dev = &the_device;
{before_switch}
    switch (op->op) {{
{cases(metal)}
        default: return false;
    }}
}}
"""


def loaded(library: Path) -> ctypes.CDLL:
    """A library that takes ggml's functions from this process: they are there first, one of each."""
    libraries.llama()
    for part in ("ggml-base", "ggml"):
        ctypes.CDLL(str(libraries.llama_dir() / libraries._lib_name(part)), mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(library))


def backends() -> dict[str, Callable[[int], bool]]:
    """Name -> support function of a ggml_tensor *."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "ops.cpp", Path(folder) / "ops.so"
        source.write_text(program(), encoding="utf-8")
        include = [f"-I{LLAMA / 'ggml' / part}" for part in ("include", "src")]
        link = [f"-L{libraries.lib_dir()}", "-lggml-base"]
        command = ["c++", "-std=c++17", "-w", "-shared", "-fPIC", *include, str(source), "-o", str(library), *link]
        subprocess.run(command, check=True)
        lib = loaded(library)
    lib.es_cuda.restype = lib.es_metal.restype = ctypes.c_bool
    lib.es_cuda.argtypes, lib.es_metal.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_bool]
    found: dict[str, Callable[[int], bool]] = {
        "CUDA": lib.es_cuda,
        "Metal": lambda op: bool(lib.es_metal(op, True)),
        "Metal without bfloat": lambda op: bool(lib.es_metal(op, False)),
    }
    return found


def here() -> dict[str, Callable[[int], bool]]:
    """The same for the devices of this build and machine."""
    ask = devices.ggml().ggml_backend_dev_supports_op
    return {d.backend: (lambda op, d=d: bool(ask(d.handle, op))) for d in devices.devices()}


def table(found: dict[str, Callable[[int], bool]]) -> str:
    """Markdown: cache types by backends; `all`, or the ops of a step that would go to the CPU."""
    lines = ["| K cache | " + " | ".join(found) + " |", "|---|" + "---|" * len(found)]
    for cache_type in CACHE_TYPES:
        cells = []
        for supports in found.values():
            missing = bank_ops.unsupported(supports, cache_type)
            bad = [f"not {step}: {', '.join(names)}" for step, names in missing.items() if names]
            cells.append("; ".join(bad) or "all")
        lines.append(f"| {cache_type} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into docs/gpu.md")
    args = parser.parse_args()
    text = table(backends())
    print(text)
    print(f"\n{table(here())}")
    if args.write:
        page = DOC.read_text(encoding="utf-8")
        start, end = page.index(BEGIN) + len(BEGIN), page.index(END)
        DOC.write_text(f"{page[:start]}\n{text}\n{page[end:]}", encoding="utf-8")


if __name__ == "__main__":
    main()
