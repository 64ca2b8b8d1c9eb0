"""Decode in the steady state beside what memory allows, with and without our kernels, and several streams at once.

    python benchmarks/speed.py -m demo-q4_0.gguf                    # n_ctx 512 to 4096, f16 and q8_0
    python benchmarks/speed.py -m llama-1b.gguf -c 1024 -ctk f16    # a model that no processor's cache holds
    python benchmarks/speed.py -m demo-q4_0.gguf -c 512 --streams   # 1 to 8 conversations in one batch

Every process has a full cache and slides with each token; they take turns of 16 tokens. MiB: weights and cache that a
token reads; of memory's: their share of what as many threads read, as memchr over 400 MiB measures between the turns.
kernels: ours; ours without huge pages; llama.cpp's attention, products and pages (EDGE_STREAM_ATTENTION,
EDGE_STREAM_PRODUCTS and EDGE_STREAM_HUGE_PAGES say so).
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from edge_stream import Engine
from edge_stream.converters.gguf_reader import GgufReader
from edge_stream.measure.reader_process import BLOCK, ReaderProcess, close_all, in_turns
from edge_stream.measure.table import as_json, markdown

N_BYTES = 400 << 20  # more than any cache of a processor that people have
SMALL_PAGES = {"EDGE_STREAM_HUGE_PAGES": "off"}
KERNELS: dict[str, dict[str, str]] = {
    "ours": {},
    "small pages": SMALL_PAGES,
    "llama.cpp's": {"EDGE_STREAM_ATTENTION": "stock", "EDGE_STREAM_PRODUCTS": "stock", **SMALL_PAGES},
}


class Memory:
    """What so many threads read per second."""

    def __init__(self, n_threads: int) -> None:
        self._search = ctypes.CDLL(None).memchr
        self._search.restype, self._search.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
        self._size = N_BYTES // n_threads
        self._parts = [mmap.mmap(-1, self._size) for _ in range(n_threads)]
        for part in self._parts:
            if hasattr(mmap, "MADV_HUGEPAGE"):
                part.madvise(mmap.MADV_HUGEPAGE)
            part.write(b"\1" * self._size)
        self._addresses = [ctypes.addressof(ctypes.c_char.from_buffer(part)) for part in self._parts]

    def read(self) -> float:
        """Bytes per second, this once."""
        threads = [threading.Thread(target=self._search, args=(at, 0, self._size)) for at in self._addresses]
        start = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return N_BYTES / (time.perf_counter() - start)


def weight_bytes(path: Path) -> int:
    """Bytes of weights that a token reads: all but an embedding table that is not the output matrix too."""
    tensors = {tensor.name: int(tensor.n_bytes) for tensor in GgufReader(path).tensors}
    return sum(tensors.values()) - (tensors["token_embd.weight"] if "output.weight" in tensors else 0)


def open_reader(model: str, kernels: str, size: int, cache: str) -> ReaderProcess:
    """A process with a full cache that has slid."""
    print(f"filling {size} cells of {cache}, kernels: {kernels}", file=sys.stderr)
    os.environ.update(KERNELS[kernels])
    try:
        reader = ReaderProcess(model, "stream", size, 4, {"cache_type_k": cache, "cache_type_v": cache})
    finally:
        for name in KERNELS[kernels]:
            del os.environ[name]
    reader.read(size)
    reader.call("generate", 2)
    return reader


def decode(model: str, sizes: list[int], caches: list[str], n: int) -> list[dict[str, Any]]:
    """A row per kernels, size and type of the cache."""
    cases = [(kernels, size, cache) for kernels in KERNELS for cache in caches for size in sizes]
    readers: list[ReaderProcess] = []
    ms: list[list[float]] = [[] for _ in cases]
    speeds = []
    try:
        for case in cases:
            readers.append(open_reader(model, *case))
        memory = Memory(readers[0].facts["n_threads"])
        weights = weight_bytes(Path(readers[0].facts["model_filename"]))
        for turn in range(0, n, BLOCK):
            print(f"{turn} of {n} tokens", file=sys.stderr)
            speeds.append(memory.read())
            for own, times in zip(ms, in_turns(readers, BLOCK), strict=True):
                own += times.tolist()
        n_bytes = [weights + reader.n_ctx * reader.facts["kv_bytes_per_token"] for reader in readers]
    finally:
        close_all(readers)
    median = {case: float(np.median(own)) for case, own in zip(cases, ms, strict=True)}
    bandwidth = float(np.median(speeds))
    rows = []
    for (kernels, size, cache), read in zip(cases, n_bytes, strict=True):
        ms_per_token = median[kernels, size, cache]
        rows.append(
            {
                "kernels": kernels,
                "n_ctx": size,
                "cache": cache,
                "p50_ms": ms_per_token,
                f"/ n_ctx {sizes[0]}": ms_per_token / median[kernels, sizes[0], cache],
                f"/ {caches[0]}": ms_per_token / median[kernels, size, caches[0]],
                "/ ours": ms_per_token / median["ours", size, cache],
                "MiB": read / 2**20,
                "GB/s": read / ms_per_token / 1e6,
                "memory's GB/s": bandwidth / 1e9,
                "of memory's": f"{100 * read / ms_per_token / 1e-3 / bandwidth:.0f} %",
            }
        )
    return rows


def streams(model: str, size: int, n: int) -> list[dict[str, Any]]:
    """A row per number of conversations that are decoded together, of all that are there, each with a full cache."""
    numbers = [1, 2, 4, 8]
    random = np.random.default_rng(0)
    ms: dict[int, list[float]] = {k: [] for k in numbers}
    with Engine.load(model, n_ctx=size, n_parallel=max(numbers)) as engine:
        own = [engine.stream(seq_id=i) for i in range(max(numbers))]

        def draw(n: int) -> list[int]:
            return [int(token) for token in random.integers(0, engine.n_vocab, n)]

        for stream in own:
            stream.feed_tokens(draw(size + 1))
        for _ in range(n):
            for k in numbers:
                tokens = draw(k)
                start = time.perf_counter()
                engine.feed_each(own[:k], tokens)
                engine.backend.synchronize()
                ms[k].append(1e3 * (time.perf_counter() - start))
    median = {k: float(np.median(times)) for k, times in ms.items()}
    return [
        {
            "conversations": k,
            "n_ctx each": size,
            "batch_ms": median[k],
            "tok/s": 1e3 * k / median[k],
            "tok/s / one's": k * median[1] / median[k],
        }
        for k in numbers
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", default="demo")
    parser.add_argument("-c", "--ctx-size", default="512,1024,4096")
    parser.add_argument("-ctk", "--cache-type-k", default="f16,q8_0", help="of keys and values")
    parser.add_argument("-n", "--n-gen", type=int, default=320)
    parser.add_argument("--streams", action="store_true", help="several conversations at once, with the first -c")
    parser.add_argument("-o", "--output", choices=("md", "json"), default="md")
    args = parser.parse_args()
    sizes = [int(size) for size in args.ctx_size.split(",")]
    if args.streams:
        rows = streams(args.model, sizes[0], args.n_gen)
    else:
        rows = decode(args.model, sizes, args.cache_type_k.split(","), args.n_gen)
    print(as_json(rows) if args.output == "json" else markdown(rows, list(rows[0])))


if __name__ == "__main__":
    main()
