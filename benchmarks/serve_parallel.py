"""N conversations at once against one alone: tokens per second in total, and whether each says what it says alone.

Every conversation has its own message and seed. Alone: one after the other on the same server; together: all at once.
Tokens per second are counted from the first token of the first answer to the last of the last, without the prompts of
the alone runs; rounds are interleaved and the median is printed.

    python benchmarks/serve_parallel.py -m demo -np 8
"""

from __future__ import annotations

import argparse
import statistics
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
from serving_bench import Answer, ServerProcess, chat, edge_stream_command, print_stamp


def ask(url: str, i: int, n: int) -> tuple[Answer, float]:
    """One conversation's answer, and when it ended."""
    with httpx.Client(base_url=url, timeout=300) as client:
        text = f"Conversation {i}: write a long story about the number {i * 37 + 11}."
        answer = chat(client, [{"role": "user", "content": text}], max_tokens=n, seed=i, ignore_eos=True)
    return answer, time.perf_counter()


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
    alone: list[float] = []
    together: list[float] = []
    texts: dict[str, list[str]] = {"alone": [], "together": []}
    flags = ("-c", str(args.ctx_size), "-np", str(k))
    with ServerProcess(edge_stream_command(args.model, None, *flags)) as server, ThreadPoolExecutor(k) as pool:
        ask(server.url, 99, 8)
        for round_ in range(args.rounds):
            answers = [ask(server.url, i, n)[0] for i in (range(k) if round_ == 0 else range(2))]
            alone += [a.timings["predicted_per_second"] for a in answers]
            if round_ == 0:
                texts["alone"] = [a.text for a in answers]
            start = time.perf_counter()
            both = list(pool.map(lambda i: ask(server.url, i, n), range(k)))
            begun = start + min(a.ttft for a, _ in both)
            together.append(k * n / (max(end for _, end in both) - begun))
            texts["together"] = texts["together"] or [a.text for a, _ in both]
    same = sum(a == b for a, b in zip(texts["alone"], texts["together"], strict=True))
    one, all_ = statistics.median(alone), statistics.median(together)
    print("| conversations | tok/s in total | per conversation | ratio |")
    print("|---|---|---|---|")
    print(f"| 1 | {one:.1f} | {one:.1f} | 1 |")
    print(f"| {k} | {all_:.1f} | {all_ / k:.1f} | {all_ / one:.2f} |")
    print(f"\n{same} of {k} conversations have the same {n} tokens' text as alone.")
    print_stamp()


if __name__ == "__main__":
    main()
