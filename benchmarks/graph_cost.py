"""What a slide adds to a decode, counted: graph nodes by op, splits, copies between devices, waits, host traffic.

The counts come from the calls that llama.cpp makes into ggml's scheduler and backends (native/tests/count_calls.cpp,
preloaded), so they hold for whatever backend and model run. Both kinds of decode are in their steady state: one token,
its logits read, the graph of the token before used again.

    python benchmarks/graph_cost.py -m demo
    python benchmarks/graph_cost.py -m mistral-shape       # Mistral-7B's graph, narrow

On a software GPU: GGML_VK_VISIBLE_DEVICES=0, LLAMA_CPP_LIB_PATH=build/vulkan/install/edge_stream/lib, and -c 64.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
COUNTER = ROOT / "build" / "native" / "native" / "tests" / "libes_count_calls.so"
NAMES = (
    "builds",
    "splits",
    "nodes",
    "copies",
    "syncs",
    "reads",
    "read_bytes",
    "writes",
    "write_bytes",
    "buffers",
    "pairs",
)
N_TOKENS = 8


def mistral_shape(folder: Path) -> Path:
    """A model whose decode graph is Mistral-7B's node for node: 32 layers, 32 heads and 8 KV heads of 128 dimensions.

    Only what does not change the graph is narrow: embedding and feed-forward widths, vocabulary; weights are random.
    """
    sys.path.insert(0, str(ROOT / "tests"))
    from tiny_models import write_tiny_llama

    path = folder / "mistral-shape.gguf"
    return write_tiny_llama(path, n_layer=32, n_embd=64, n_head=32, n_head_kv=8, head_dim=128, n_ff=64)


def decodes(stream: Any, n_ctx: int, take: Callable[[], Any], *, size: int = 512) -> dict[str, Any]:
    """Fill a stream's cache and slide it, token by token where it counts: what take() returned after each part.

    start: the cache is filled but for 2 N_TOKENS, in pieces of `size`. plain: N_TOKENS decodes. between: the rest of
    the cache, and the first two slides, which build the graph with the sinks in it. sliding: N_TOKENS decodes that
    slide.
    """

    def feed(tokens: Sequence[int], size: int) -> None:
        for i in range(0, len(tokens), size):
            stream.feed(list(tokens[i : i + size]))

    counting = range(20, 20 + N_TOKENS)
    parts = {}
    # the cache is looked at in blocks of 256 cells: stay within one while counting
    feed([10 + i % 200 for i in range(n_ctx - 2 * N_TOKENS)], size)
    feed([10], 1)
    parts["start"] = take()
    feed(counting, 1)
    parts["plain"] = take()
    feed([10 + i % 200 for i in range(N_TOKENS)], size)
    feed([10, 11], 1)
    parts["between"] = take()
    before = stream.stats
    feed(counting, 1)
    parts["sliding"] = take()
    after = stream.stats
    assert after.n_slides - before.n_slides == N_TOKENS and after.n_rebases == before.n_rebases
    return parts


def measure(model: str | Path, n_ctx: int = 512, **options: Any) -> dict[str, dict[str, Any]]:
    """Counts per token of a plain and of a sliding decode; ops: nodes by ggml's name of the op.

    first: buffers allocated until the cache was full (the model's, the cache's, those that decodes compute in), and
    from then to the second slide.

    The process must have been started with COUNTER preloaded. Raises RuntimeError otherwise.
    """
    counter = ctypes.CDLL(None)
    if not hasattr(counter, "es_counts_take"):
        raise RuntimeError(f"{COUNTER} is not preloaded")
    from edge_stream.engine import Engine
    from edge_stream.native import libraries

    raw = (ctypes.c_int64 * 1024)()
    ggml = ctypes.CDLL(str(libraries.llama_dir() / libraries._lib_name("ggml-base")))
    ggml.ggml_op_name.restype, ggml.ggml_op_name.argtypes = ctypes.c_char_p, [ctypes.c_int]

    def take() -> list[int]:
        return list(raw[: counter.es_counts_take(raw)])

    def per_token(counts: list[int]) -> dict[str, Any]:
        shares = [value / N_TOKENS for value in counts]
        ops = {ggml.ggml_op_name(op).decode(): v for op, v in enumerate(shares[len(NAMES) :]) if v}
        return {**dict(zip(NAMES, shares, strict=False)), "ops": ops}

    with Engine.load(model, n_ctx=n_ctx, **options) as engine, engine.stream() as stream:
        parts = decodes(stream, n_ctx, take)
    at_start, at_slide = (parts[name][NAMES.index("buffers")] for name in ("start", "between"))
    return {
        "plain": per_token(parts["plain"]),
        "sliding": per_token(parts["sliding"]),
        "first": {"buffers": at_start, "buffers at a slide": at_slide},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", default="demo", help="a model, or mistral-shape")
    parser.add_argument("-ctk", "--cache-type-k", default="f16")
    parser.add_argument("-fa", "--flash-attn", default="auto")
    parser.add_argument("--keep", type=int, default=4)
    parser.add_argument("-c", "--ctx-size", type=int, default=512, help="the counts do not depend on it")
    parser.add_argument("-b", "--batch-size", type=int, default=512)
    parser.add_argument("--rpc", default="", help="host:port,... of RPC servers to run on")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if not COUNTER.exists():
        raise SystemExit(f"{COUNTER.relative_to(ROOT)} is missing: make build (Linux)")
    if str(COUNTER) not in os.environ.get("LD_PRELOAD", ""):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "LD_PRELOAD": str(COUNTER)})

    options: dict[str, Any] = {"cache_type_k": args.cache_type_k, "flash_attn": args.flash_attn, "n_keep": args.keep}
    options |= {"n_ctx": args.ctx_size, "n_batch": args.batch_size}
    options["rpc"] = [endpoint for endpoint in args.rpc.split(",") if endpoint]
    with tempfile.TemporaryDirectory() as folder:
        model = mistral_shape(Path(folder)) if args.model == "mistral-shape" else args.model
        result = measure(model, **options)
    if args.json:
        print(json.dumps(result))
        return
    plain, sliding = result["plain"], result["sliding"]
    print("| per token | plain decode | with a slide | added |\n|---|---|---|---|")
    rows = [(name, plain[name], sliding[name]) for name in NAMES]
    ops = sorted({*plain["ops"], *sliding["ops"]})
    rows += [(f"nodes: {op}", plain["ops"].get(op, 0), sliding["ops"].get(op, 0)) for op in ops]
    for name, a, b in rows:
        print(f"| {name} | {a:g} | {b:g} | {b - a:+g} |")


if __name__ == "__main__":
    main()
