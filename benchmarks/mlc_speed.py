"""Speed of the MLC engine and of llama.cpp, in turns within one run, and where the MLC engine's time goes.

    python benchmarks/mlc_speed.py model.gguf mlc-folder [-c 1024] [-t 2]

Each engine runs in its own process. Both streams are full and slide with every token. decode: tokens one by one.
prefill: a text of 512 tokens in the stream's own chunks. Medians over the rounds; the ratio is MLC / llama.cpp.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter
from typing import Any

import numpy as np

from edge_stream import Engine
from edge_stream.measure.reader_process import ReaderProcess, close_all

N_DECODE, N_PREFILL, ROUNDS = 32, 512, 5


def draw(engine: Engine, n: int, seed: int) -> list[int]:
    """Random tokens."""
    return [int(t) for t in np.random.default_rng(seed).integers(100, engine.n_vocab, n)]


def decode(worker: ReaderProcess) -> float:
    """Tokens per second, one by one."""
    times, _ = worker.call("generate", N_DECODE)
    return N_DECODE * 1e9 / sum(times)


def prefill(worker: ReaderProcess) -> float:
    """Tokens per second of a text."""
    return N_PREFILL * 1e9 / worker.call("prompt", N_PREFILL)


def breakdown(stream: Any, feed: list[list[int]]) -> list[tuple[str, float, int]]:
    """(function of the library, milliseconds, calls) per token; the instrument itself adds about 1 us to a call."""
    spent: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    start = 0.0

    def instrument(_function: Any, name: str, before: bool, _result: Any, *_arguments: Any) -> int:
        nonlocal start
        if before:
            start = time.perf_counter()
        else:
            spent[name] += time.perf_counter() - start
            calls[name] += 1
        return 0

    vm = stream.backend.decoder._vm
    vm["set_instrument"](instrument)
    for tokens in feed:
        stream.feed(tokens)
    vm["set_instrument"](lambda *_: 0)
    n = sum(map(len, feed))
    return [(name, seconds * 1e3 / n, calls[name]) for name, seconds in spent.most_common(10)]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("gguf")
    parser.add_argument("folder")
    parser.add_argument("-c", type=int, default=1024)
    parser.add_argument("-t", type=int, default=2)
    flags = parser.parse_args()
    settings = {"n_threads": flags.t}
    models = {"llama.cpp": flags.gguf, "MLC": flags.folder}
    workers = {name: ReaderProcess(model, "stream", flags.c, 4, settings) for name, model in models.items()}
    try:
        for name, worker in workers.items():
            worker.call("fill", flags.c + 64)
            print(f"{name}: {worker.facts['model_type']}")
        for what in (decode, prefill):
            found: dict[str, list[float]] = {name: [] for name in workers}
            for _ in range(ROUNDS):
                for name, worker in workers.items():
                    found[name].append(what(worker))
            llama, mlc = (statistics.median(values) for values in found.values())
            best = ", ".join(f"{name} {max(values):.1f}" for name, values in found.items())
            print(
                f"{what.__name__}: llama.cpp {llama:.1f} tok/s, MLC {mlc:.1f}, ratio {mlc / llama:.2f} (best: {best})"
            )
    finally:
        close_all(workers.values())
    with Engine.load(flags.folder, n_ctx=flags.c, **settings) as engine, engine.stream() as stream:
        stream.feed(draw(engine, flags.c + 64, 0))
        single = [[token] for token in draw(engine, 16, 1)]
        for title, feed in (("decode", single), ("prefill", [draw(engine, 128, 1)])):
            print(f"MLC {title}, ms per token by function:")
            for name, ms, calls in breakdown(stream, feed):
                print(f"  {name:28s} {ms:7.3f}  {calls} calls")


if __name__ == "__main__":
    main()
