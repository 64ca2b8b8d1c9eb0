"""What a slide adds to a decode, counted at ggml's scheduler and backends: two or three nodes per layer, a few bytes.

No copy of K to the host, no wait, no further split, whatever backend the libraries in use bring.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import graph_cost
import pytest
import tiny_architectures

from edge_stream.hardware import devices
from edge_stream.native import bindings, libraries

pytestmark = [
    pytest.mark.skipif(not graph_cost.COUNTER.exists(), reason="the counter is built on Linux only (make build)"),
    pytest.mark.skipif(not bindings.library().es_bank_available(), reason="a stock libllama has no sink bank"),
]


def counted(model: str | Path, *flags: str) -> dict[str, dict[str, Any]]:
    """Counts per token of benchmarks/graph_cost.py, in a process of its own: the counter must be preloaded."""
    command = [sys.executable, graph_cost.__file__, "--json", "-m", str(model), *flags]
    out = subprocess.run(command, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    result: dict[str, dict[str, Any]] = json.loads(out.stdout.splitlines()[-1])
    return result


ON_DEVICE = any(d.is_local_gpu for d in devices.devices())


def check(
    result: dict[str, dict[str, Any]],
    n_layer: int,
    *,
    hadamard: bool = False,
    n_caches: int = 1,
    n_sections: int = 1,
    in_pairs: bool = True,
    on_device: bool = ON_DEVICE,
) -> None:
    plain, sliding = result["plain"], result["sliding"]
    assert plain["nodes"] > 10 * n_layer and plain["read_bytes"] > 0  # the counter sees something
    # the graph of the token before is used again, in as many pieces, with as many copies and waits
    for name in ("builds", "splits", "copies", "syncs", "reads", "read_bytes", "buffers"):
        assert sliding[name] == plain[name], name
    assert sliding["builds"] == 0
    # the only thing that travels is how far the sinks have moved: an int32 per cache (M-RoPE: 4), on devices per sink
    assert sliding["writes"] - plain["writes"] == n_caches
    n_positions = n_sections * (4 if on_device else 1)
    assert sliding["write_bytes"] - plain["write_bytes"] == 4 * n_caches * n_positions
    expected = {"ROPE": n_layer, "SET_ROWS": n_layer} | ({"MUL_MAT": n_layer} if hadamard else {})
    added = {op: n - plain["ops"].get(op, 0) for op, n in sliding["ops"].items()}
    assert {op: n for op, n in added.items() if n} == expected
    assert sliding["nodes"] - plain["nodes"] == sum(expected.values())
    # what CUDA and Vulkan run as one kernel stays so, and is so for the sinks
    if in_pairs:
        assert plain["pairs"] == (0 if hadamard else n_layer)
    assert sliding["pairs"] - plain["pairs"] == (n_layer if on_device and not hadamard else 0)


@pytest.mark.parametrize("type_k", ["f16", "q8_0"])
@pytest.mark.parametrize("flash_attn", ["on", "off"])
def test_tiny(type_k: str, flash_attn: str, tiny: Callable[[str], Path]) -> None:
    """llama.cpp rotates a quantised K by a Hadamard matrix; so do the sinks that join it."""
    check(counted(tiny("head64"), "-ctk", type_k, "-fa", flash_attn), 2, hadamard=type_k == "q8_0")


# rotated layers, positions per token
KINDS = {
    "smollm3": (3, 1),
    "lfm2": (2, 1),
    "falcon-h1": (2, 1),
    "qwen3vl": (4, 4),
    "qwen35": (2, 4),
    "deepseek2": (4, 1),
}


@pytest.mark.parametrize("name", KINDS)
def test_other_kinds_of_model(name: str, tmp_path: Path) -> None:
    """Layers that rotate nothing, or keep a state, cost nothing; M-RoPE sends four distances instead of one."""
    n_rotated, n_sections = KINDS[name]
    model = tiny_architectures.make(tmp_path / f"{name}.gguf", name)
    check(counted(model), n_rotated, n_sections=n_sections, in_pairs=False)


@pytest.mark.parametrize("keep", [4, 40])
def test_nothing_grows_when_the_sinks_begin_to_move(keep: int, tiny: Callable[[str], Path]) -> None:
    """Their part of the graph was measured before. A batch of 1: with more, other graphs have room enough for it."""
    first = counted(tiny("head64"), "-b", "1", "--keep", str(keep))["first"]
    assert first["buffers"] > 2
    assert first["buffers at a slide"] == 0


def test_sliding_window_layers(tiny: Callable[[str], Path]) -> None:
    # llama.cpp itself has V between the two there; a backend may bring them together
    check(counted(tiny("gemma3")), 4, n_caches=2, in_pairs=False)


@pytest.mark.skipif(libraries.llama_dir() != libraries.lib_dir(), reason="minutes on a software GPU")
@pytest.mark.parametrize(("model", "n_layer"), [("demo", 30), ("mistral-shape", 32)])
def test_real_shapes(model: str, n_layer: int) -> None:
    check(counted(model), n_layer)
