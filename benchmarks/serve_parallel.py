"""N conversations at once, and the same ones one after another: tokens per second, and whether the texts agree.

Every conversation has its own message and seed. Both ways include reading the prompts, on the same server, in
alternating rounds; medians are printed. The clients run on the same machine.

    python benchmarks/serve_parallel.py -m demo -np 8
"""

from __future__ import annotations

import argparse
import statistics
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
from serving_bench import Answer, ServerProcess, chat, edge_stream_command, print_stamp


def ask(url: str, i: int, n: int) -> Answer:
    """One conversation's answer."""
    with httpx.Client(base_url=url, timeout=300) as client:
        text = f"Conversation {i}: write a long story about the number {i * 37 + 11}."
        return chat(client, [{"role": "user", "content": text}], max_tokens=n, seed=i, ignore_eos=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", default="demo")
    parser.add_argument("-c", "--ctx-size", type=int, default=512)
    parser.add_argument("-np", "--parallel", type=int, default=8)
    parser.add_argument("-n", "--predict", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    n, k = args.predict, args.parallel
    speeds: dict[str, list[float]] = {"alone": [], "together": []}
    texts: dict[str, list[str]] = {}
    flags = ("-c", str(args.ctx_size), "-np", str(k))
    with ServerProcess(edge_stream_command(args.model, None, *flags)) as server, ThreadPoolExecutor(k) as pool:
        ask(server.url, 99, 8)
        for _ in range(args.rounds):
            for way, mapped in (("alone", map), ("together", pool.map)):
                start = time.perf_counter()
                answers = list(mapped(lambda i: ask(server.url, i, n), range(k)))
                speeds[way].append(k * n / (time.perf_counter() - start))
                texts.setdefault(way, [a.text for a in answers])
    same = sum(a == b for a, b in zip(texts["alone"], texts["together"], strict=True))
    one, all_ = statistics.median(speeds["alone"]), statistics.median(speeds["together"])
    print("| conversations | tok/s in total | per conversation | ratio |")
    print("|---|---|---|---|")
    print(f"| 1 | {one:.1f} | {one:.1f} | 1 |")
    print(f"| {k} | {all_:.1f} | {all_ / k:.1f} | {all_ / one:.2f} |")
    print(f"\n{same} of {k} conversations wrote the same text of {n} tokens as alone.")
    print_stamp()


if __name__ == "__main__":
    main()
