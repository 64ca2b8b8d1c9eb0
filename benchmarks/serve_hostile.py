"""Hostile clients on loopback, in every API: they connect and send nothing, send garbage, broken JSON, wrong types,
huge headers, a body byte by byte, hang up half-way or in the middle of an answer, read a byte per second.

One well-behaved client repeats a request throughout. Its speed is compared with and without the others, in alternating
rounds on the same server. At the end: was nothing answered with 5xx, and are memory, file descriptors and slots what
they were before?

    python benchmarks/serve_hostile.py -m demo --clients 1000
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from collections import Counter
from typing import Any
from urllib.parse import urlsplit

import httpx
from serving_bench import ServerProcess, chat, edge_stream_command, print_stamp

KINDS = (
    *("silent", "rubbish", "half a request", "bad JSON") * 2,
    *("wrong types", "broken JSON", "huge headers", "slow body"),
    *("asks and hangs up", "hangs up in an answer", "reads a byte a second"),
)
APIS = {
    "/v1/chat/completions": "messages",
    "/v1/messages": "messages",
    "/v1/responses": "input",
    "/api/chat": "messages",
    "/api/generate": "prompt",
    "/v1/completions": "prompt",
}
ODD = (
    None,
    7,
    "x",
    [],
    {},
    [[]],
    [{}],
    [{"role": 1}],
    [{"role": "user", "content": 5}],
    {"a": [1]},
    True,
    1e308,
    "\ud800",
)


def wrong(rng: random.Random, body: dict[str, Any]) -> dict[str, Any]:
    """A body with values of wrong types."""
    fields = ("tools", "stream", "temperature", "stop", "options", "text", "thinking", "system", "format", "grammar")
    out = dict(body)
    for name in (*rng.sample(fields, 3), rng.choice(list(body))):
        out[name] = rng.choice(ODD)
    return out


async def hostile(url: str, i: int, seconds: float, seen: Counter[str]) -> None:
    """One client, which starts within `seconds` and stays for half as long.

    Those that ask for an answer without end are few: until they hang up they are load like anybody's.
    """
    rng, parts = random.Random(i), urlsplit(url)
    kind, (path, field) = KINDS[i % len(KINDS)], list(APIS.items())[i // len(KINDS) % len(APIS)]
    said = f"I am {i}" if field == "prompt" else [{"role": "user", "content": f"I am {i}"}]
    asked = {field: said, "stream": True, "max_tokens": 100_000}
    if kind == "wrong types":
        asked = wrong(rng, asked) | {"max_tokens": 1, "max_output_tokens": 1, "options": {"num_predict": 1}}
    body = json.dumps(asked).encode()
    if kind == "broken JSON":
        cut = rng.randrange(len(body))
        body = body[:cut] + rng.choice((b"", b"[" * 5000, b'"', b"\xff\x00", b"}}", b"\\u")) + body[cut + 1 :]
    more = "".join(f"X-{k}: {'y' * 2000}\r\n" for k in range(rng.randrange(40, 200))) if kind == "huge headers" else ""
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
        f"{more}Content-Length: {len(body)}\r\n\r\n"
    ).encode()
    await asyncio.sleep(rng.uniform(0, seconds))
    try:
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    except OSError:
        seen["not connected"] += 1
        return
    try:
        if kind == "rubbish":
            writer.write(rng.randbytes(rng.randrange(1, 4000)))
        elif kind == "half a request":
            writer.write((head + body)[: rng.randrange(1, len(head + body))])
        elif kind == "bad JSON":
            writer.write(head + rng.randbytes(len(body)))
        elif kind in ("asks and hangs up", "hangs up in an answer", "wrong types", "broken JSON", "huge headers"):
            writer.write(head + body)
        elif kind == "slow body":
            writer.write(head)
            for k in range(len(body) - 1):
                writer.write(body[k : k + 1])
                await asyncio.sleep(rng.uniform(0, seconds / len(body)))
        elif kind == "reads a byte a second":  # 40 KiB
            writer.write(f"GET /openapi.json HTTP/1.1\r\nHost: {parts.netloc}\r\n\r\n".encode())
        if kind == "reads a byte a second":
            end = time.monotonic() + seconds / 2
            first = await asyncio.wait_for(reader.read(12), seconds)
            seen[first[9:12].decode(errors="replace") or "closed"] += 1
            while time.monotonic() < end and await reader.read(1):
                await asyncio.sleep(1)
        elif kind == "asks and hangs up":
            await asyncio.sleep(rng.uniform(0, 0.1))
        elif kind == "hangs up in an answer":
            first = await asyncio.wait_for(reader.read(12), 10 * seconds)
            seen[first[9:12].decode(errors="replace") or "closed"] += 1
            await asyncio.wait_for(reader.read(rng.randrange(1, 4000)), seconds)
        elif kind in ("rubbish", "bad JSON", "wrong types", "broken JSON", "huge headers"):
            first = await asyncio.wait_for(reader.read(12), seconds)
            seen[first[9:12].decode(errors="replace") or "closed"] += 1
        else:
            await asyncio.sleep(rng.uniform(0, seconds / 2))
    except (OSError, asyncio.TimeoutError):
        seen["reset or nothing"] += 1
    finally:
        if rng.random() < 0.5:
            writer.transport.abort()
        else:
            writer.close()


def good(client: httpx.Client, n: int) -> float:
    """The well-behaved client's tokens per second within an answer."""
    messages = [{"role": "user", "content": "Please tell me about the sea."}]
    answer = chat(client, messages, headers={"X-Conversation": "good"}, max_tokens=n, seed=1, ignore_eos=True)
    if answer.status != 200 or not answer.finished:
        raise SystemExit(f"the well-behaved client got {answer.status} {answer.error}")
    return answer.timings["predicted_per_second"]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", default="demo")
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=24)
    parser.add_argument("-n", "--predict", type=int, default=64)
    args = parser.parse_args()
    quiet: list[float] = []
    beside: list[float] = []
    seen: Counter[str] = Counter()

    async def crowd(url: str, numbers: range) -> list[float]:
        crowd_ = [asyncio.ensure_future(hostile(url, i, args.seconds, seen)) for i in numbers]
        speeds = []
        with httpx.Client(base_url=url, timeout=300) as client:
            await asyncio.sleep(1)
            while not all(task.done() for task in crowd_):
                speeds.append(await asyncio.to_thread(good, client, args.predict))
        await asyncio.gather(*crowd_)
        return speeds

    with ServerProcess(edge_stream_command(args.model, None, "-c", "256", "-np", "2", "--queue", "1000")) as server:
        with httpx.Client(base_url=server.url, timeout=300) as client:
            good(client, 8)
            before = server.rss(), server.n_files()
            for round_ in range(args.rounds):
                quiet += [good(client, args.predict) for _ in range(3)]
                size = args.clients // args.rounds
                beside += asyncio.run(crowd(server.url, range(round_ * size, (round_ + 1) * size)))
                while "busy 0.0" not in client.get("/metrics").text:
                    time.sleep(0.2)
            time.sleep(25)  # the time that a client has for its headers
            slots = client.get("/slots").json()
            after = server.rss(), server.n_files()
    print("| | before | after |")
    print("|---|---|---|")
    print(f"| memory | {before[0]:.0f} MiB | {after[0]:.0f} MiB |")
    print(f"| open files | {before[1]} | {after[1]} |")
    print(f"| busy slots | 0 | {sum(slot['is_processing'] for slot in slots)} |")
    a, b = statistics.median(quiet), statistics.median(beside)
    print(f"\nThe well-behaved client: {a:.1f} tok/s alone, {b:.1f} beside the others ({b / a:.2f}).")
    bad = {k: n for k, n in seen.items() if k.startswith("5") and k != "503"}
    print("What the hostile ones got: " + ", ".join(f"{k}: {n}" for k, n in seen.most_common()))
    print_stamp()
    if bad or any(slot["is_processing"] for slot in slots):
        raise SystemExit(f"errors of the server, or slots that stay busy: {bad}")


if __name__ == "__main__":
    main()
