"""Requests that may be anything, to a server over a tiny model: each is answered, and with an error if it is wrong."""

from __future__ import annotations

import json
import random
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mutate
from serving import serve
from tiny_models import write_tiny_llama

from edge_stream import Engine

Attempt = Callable[[random.Random], str]

MOMENT = 0.1
TRIES = 100  # moments, after which a server that is still busy, or says nothing, hangs
SILENT = 4  # moments; fewer, and a busy machine may not have looked at the request yet
LONG = 200  # parts of an answer, after which it is left
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SHORT = {"max_tokens": 2, "seed": 1}
_TOOL = {
    "type": "function",
    "function": {
        "name": "get",
        "description": "d",
        "parameters": {"type": "object", "properties": {"where": {"type": "string", "enum": ["x", "y"]}}},
    },
}
_SCHEMA = {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "integer", "maximum": 9}}}}
BODIES: tuple[tuple[str, str, Any], ...] = (
    ("POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "stream": True, **_SHORT}),
    (
        "POST",
        "/v1/chat/completions",
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
                {"role": "assistant", "content": None, "reasoning_content": "r", "tool_calls": [
                    {"id": "a", "type": "function", "function": {"name": "get", "arguments": "{}"}}]},
                {"role": "tool", "tool_call_id": "a", "content": "sun"},
            ],
            "tools": [_TOOL], "tool_choice": "auto", "stop": ["x"], "logprobs": True, "top_logprobs": 2, "n": 1,
            "logit_bias": {"5": -1.0}, "temperature": 0.5, "top_p": 0.9, "frequency_penalty": 0.1,
            "stream_options": {"include_usage": True}, "chat_template_kwargs": {"enable_thinking": False}, **_SHORT,
        },
    ),
    (
        "POST",
        "/v1/chat/completions",
        {
            "messages": [{"role": "user", "content": "J"}],
            "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": _SCHEMA, "strict": True}},
            **_SHORT,
        },
    ),
    ("POST", "/v1/completions", {"prompt": ["a", [5, 6]], "echo": True, "logprobs": 1, "suffix": "b", **_SHORT}),
    (
        "POST",
        "/completion",
        {
            "prompt": "once", "n_predict": 2, "samplers": ["top_k", "temperature"], "grammar": 'root ::= "a" [b-c]*',
            "id_slot": 0, "cache_prompt": True, "n_probs": 2, "dry_sequence_breakers": ["\n"], "mirostat": 0,
            "json_schema": None, "logit_bias": [[5, 1.0], ["a", False]],
        },
    ),
    ("POST", "/infill", {"input_prefix": "a", "input_suffix": "b", "input_extra": [{"filename": "f", "text": "t"}]}),
    (
        "POST",
        "/v1/messages",
        {
            "model": "tiny", "max_tokens": 2, "system": [{"type": "text", "text": "s"}],
            "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
            "tools": [{"name": "get", "description": "d", "input_schema": _SCHEMA}], "tool_choice": {"type": "any"},
            "thinking": {"type": "enabled", "budget_tokens": 1024}, "stop_sequences": ["x"], "top_k": 5,
        },
    ),
    (
        "POST",
        "/v1/responses",
        {
            "model": "tiny", "input": [{"role": "user", "content": [{"type": "input_text", "text": "Hi"}]}],
            "instructions": "i", "max_output_tokens": 16, "reasoning": {"effort": "low"}, "tools": [],
            "text": {"format": {"type": "json_schema", "name": "n", "schema": _SCHEMA}},
        },
    ),
    (
        "POST",
        "/api/chat",
        {
            "model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "stream": False, "think": False,
            "options": {"num_predict": 2, "seed": 1, "temperature": 0.1, "stop": ["x"]}, "format": _SCHEMA,
            "keep_alive": "5m",
        },
    ),
    ("POST", "/api/generate", {"model": "tiny", "prompt": "a", "raw": True, "options": {"num_predict": 2}}),
    ("POST", "/v1/embeddings", {"input": ["a", [5, 6]], "encoding_format": "float", "dimensions": 8}),
    ("POST", "/rerank", {"query": "a", "documents": ["b"]}),
    ("POST", "/tokenize", {"content": "a b", "add_special": True, "with_pieces": True}),
    ("POST", "/detokenize", {"tokens": [5, 6, 7]}),
    ("POST", "/apply-template", {"messages": [{"role": "user", "content": "Hi"}]}),
    ("POST", "/v1/chat/completions/input_tokens", {"messages": [{"role": "user", "content": "Hi"}]}),
    ("POST", "/slots/0?action=erase", {}),
    ("POST", "/lora-adapters", [{"id": 0, "scale": 0.5}]),
    ("GET", "/v1/models/tiny", None),
    ("GET", "/slots", None),
    ("GET", "/metrics", None),
    ("GET", "/props", None),
    ("POST", "/api/show", {"model": "tiny"}),
)  # fmt: skip
HEADERS = (
    "Content-Type: application/json", "Accept: text/event-stream", "Connection: close", "X-Conversation: a",
    "Authorization: Bearer x", "Origin: http://127.0.0.1", "Transfer-Encoding: chunked", "Expect: 100-continue",
    "Upgrade: websocket", "Content-Encoding: gzip", "Range: bytes=0-5", "Cookie: a=b", "Forwarded: for=1.2.3.4",
)  # fmt: skip


def request(rng: random.Random, host: str) -> bytes:
    """One request: mostly a faulty body in good HTTP, else faulty HTTP."""
    method, path, body = rng.choice(BODIES)
    data = b"" if body is None else mutate.dumps(body)
    if body is not None and rng.random() < 0.8:
        data = mutate.dumps(mutate.change_json(rng, body))
    elif body is not None and rng.random() < 0.7:
        data = mutate.change_bytes(rng, data)
    lines = [
        f"{method} {path} HTTP/1.1",
        f"Host: {host}",
        "Connection: close",
        *rng.sample(HEADERS[:5], rng.randrange(3)),
    ]
    if rng.random() < 0.1:
        lines += rng.sample(HEADERS, rng.randint(1, 4))
    lines.append(f"Content-Length: {len(data)}")
    head = "\r\n".join(lines).encode() + b"\r\n\r\n"
    return (mutate.change_bytes(rng, head) if rng.random() < 0.15 else head) + data


def answer(url: tuple[str, int], data: bytes, idle: Callable[[], bool]) -> tuple[bytes, bool]:
    """What the server sends until it ends the connection, and whether it did so by itself.

    Once it has said nothing for a few moments and does nothing, it hears that nothing more comes, and has to end it. An
    answer without end (`"max_tokens": -1`) is left after a while. Raises AssertionError if the connection is not ended,
    or the server is busy with it without end.
    """
    parts: list[bytes] = []
    by_itself, silent = True, 0
    with socket.create_connection(url, timeout=MOMENT) as sock:
        try:
            sock.sendall(data)
            while len(parts) < LONG:
                try:
                    part = sock.recv(1 << 16)
                except TimeoutError:
                    silent += 1
                    assert silent < TRIES, f"the connection of {data!r} is held, which heard {b''.join(parts)!r}"
                    if silent >= SILENT and idle():
                        by_itself = False
                        sock.shutdown(socket.SHUT_WR)
                    continue
                if not part:
                    return b"".join(parts), by_itself
                parts.append(part)
                silent = 0
        except OSError:  # it was closed before all was sent
            return b"".join(parts), by_itself
    for _ in range(TRIES):
        if idle():
            return b"".join(parts), False
        time.sleep(MOMENT)
    raise AssertionError(f"the server is still busy with {data!r}")


@contextmanager
def requests(root: Path) -> Iterator[Attempt]:
    """A server, and one request after another, each on a connection of its own."""
    model = write_tiny_llama(root / "tiny.gguf", n_layer=1, head_dim=16, chat_template=CHATML)
    with (
        Engine.load(model, n_ctx=256, n_parallel=2, n_threads=1) as engine,
        serve(engine, root / "sessions", n_predict=4) as served,
    ):
        host, port = served.url.removeprefix("http://").split(":")

        def idle() -> bool:
            return not served.on_engine(lambda: len(served.scheduler.loop.tasks) + served.scheduler.counts()["waiting"])

        def attempt(rng: random.Random) -> str:
            sent = request(rng, f"{host}:{port}")
            got, ended = answer((host, int(port)), sent, idle)
            if not got:
                return "closed" if ended else "waited"
            code = int(got[9:12])
            assert code < 500 or code in (501, 503), f"{got!r}\nto {sent!r}"
            body = got.partition(b"\r\n\r\n")[2]
            if code >= 400 and ended and body.startswith(b"{"):
                # it may be followed by the answer to its body, taken for a request of its own
                error = json.JSONDecoder().raw_decode(body.decode())[0]["error"]
                message = error if isinstance(error, str) else error["message"]
                assert message and "\n" not in message and "Traceback" not in message, got
            return str(code)

        yield attempt
        assert served.client.get("/health").json()["status"] == "ok"
        served.wait_idle()
