"""GET /metrics under llama-server's names, and timings in its sense. Counts are exact; no time is asserted on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from serving import Served, serve
from tiny_models import write_tiny_bert

from edge_stream.embedder import Embedder
from edge_stream.engine import Engine
from edge_stream.server.scheduling.metrics import LlamaMetrics

Load = Callable[..., Engine]


def values(text: str) -> dict[str, float]:
    """llama-server's metrics, each of which says what it is and of which kind."""
    found = {}
    lines = text.splitlines()
    for i, line in enumerate(lines):
        if line.startswith("llamacpp:"):
            name, value = line.split(" ")
            assert lines[i - 2].startswith(f"# HELP {name} ") and lines[i - 1].startswith(f"# TYPE {name} ")
            found[name.removeprefix("llamacpp:")] = float(value)
    return found


def complete(served: Served, prompt: str, n_predict: int, **options: Any) -> dict[str, Any]:
    body = {"prompt": prompt, "n_predict": n_predict, "seed": 1, "ignore_eos": True, **options}
    answer = served.client.post("/completion", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()  # type: ignore[no-any-return]


def test_counters_are_the_sums_of_what_answers_say(load: Load) -> None:
    with serve(load("chat", n_ctx=64)) as served:
        timings = [complete(served, "Hello there", n)["timings"] for n in (1, 4, 4, 80)]
        assert timings[2]["cache_n"] > 0
        answer = served.client.get("/metrics")
        found = values(answer.text)
        assert found["prompt_tokens_total"] == sum(t["prompt_n"] for t in timings)
        assert found["prompt_tokens_cached_total"] == sum(t["cache_n"] for t in timings)
        assert found["tokens_predicted_total"] == 1 + 4 + 4 + 80
        # a batch for each prompt, and one for each token, one conversation at a time
        assert found["n_decode_total"] == 4 + 89 and found["n_busy_slots_per_decode"] == 1
        assert found["n_tokens_max"] == len(served.engine.tokenize("Hello there")) + served.engine.add_bos + 80
        assert found["requests_processing"] == found["requests_deferred"] == 0
        written = sum(t["predicted_ms"] for t in timings) / 1000
        assert found["tokens_predicted_seconds_total"] == pytest.approx(written)
        assert found["predicted_tokens_seconds"] == pytest.approx((0 + 3 + 3 + 79) / written)
        assert 0 < found["prompt_seconds_total"] <= sum(t["prompt_ms"] for t in timings) / 1000
        assert answer.headers["Process-Start-Time-Unix"] == str(served.scheduler.metrics.t_start)
        # the speeds are those since the last look
        again = values(served.client.get("/metrics").text)
        assert again["predicted_tokens_seconds"] == again["prompt_tokens_seconds"] == 0
        assert again["tokens_predicted_total"] == 89


def test_the_first_token_takes_no_decode(load: Load) -> None:
    with serve(load("chat", n_ctx=64)) as served:
        one = complete(served, "Hello", 1)["timings"]
        assert one["predicted_n"] == 1 and one["predicted_per_second"] == one["predicted_per_token_ms"] == 0
        more = complete(served, "Hello", 16)["timings"]
        assert more["predicted_per_second"] == pytest.approx(15 * 1000 / more["predicted_ms"])
        # of every choice
        choices: Any = complete(served, "Hello", 6, n=3, seed=2)
        timings = choices[0]["timings"]
        assert timings["predicted_n"] == 18
        assert timings["predicted_per_token_ms"] == pytest.approx(timings["predicted_ms"] / 15)


def test_timings_come_with_the_progress_of_a_prompt(load: Load) -> None:
    body = {"prompt": "Hello there " * 20, "n_predict": 2, "stream": True, "return_progress": True}
    with serve(load("chat", n_ctx=256), n_prefill=16) as served:
        lines = served.client.post("/completion", json=body | {"timings_per_token": True}).text.splitlines()
        plain = served.client.post("/completion", json=body | {"cache_prompt": False}).text
    parts = [json.loads(line[6:]) for line in lines if line.startswith("data: ")]
    progress = [part for part in parts if "prompt_progress" in part]
    assert "prompt_progress" in plain and plain.count('"timings"') == 1  # at the end
    assert len(progress) > 3
    first = progress[0]["timings"]
    assert {first[name] for name in ("prompt_n", "prompt_ms", "predicted_n", "predicted_ms")} == {0}
    for part in progress:
        timings, place = part["timings"], part["prompt_progress"]
        assert timings["prompt_n"] == place["processed"] - place["cache"]
    times = [part["timings"]["prompt_ms"] for part in progress]
    assert times == sorted(times) and times[-1] > 0


def test_embeddings_are_counted_as_prompts(load: Load, tmp_path: Path) -> None:
    with (
        Embedder(write_tiny_bert(tmp_path / "bert.gguf")) as embedder,
        serve(load("chat"), embedder=embedder) as served,
    ):
        answer = served.client.post("/v1/embeddings", json={"input": ["Hello", "Hello there"]}).json()
        found = values(served.client.get("/metrics").text)
    assert found["prompt_tokens_total"] == answer["usage"]["prompt_tokens"]
    assert found["n_decode_total"] == 2 and found["tokens_predicted_total"] == 0


def test_speeds_and_averages() -> None:
    metrics = LlamaMetrics()
    assert all(value == 0 for value in values(metrics.text(0, 0)).values())
    metrics.read(10, 2.0)
    metrics.predicted(5, 4, 8.0)
    metrics.decoded(3, 40)
    metrics.decoded(2, 20)
    found = values(metrics.text(2, 7))
    assert (found["prompt_tokens_seconds"], found["predicted_tokens_seconds"]) == (5, 0.5)
    assert (found["n_busy_slots_per_decode"], found["n_tokens_max"]) == (2.5, 40)
    assert (found["requests_processing"], found["requests_deferred"]) == (2, 7)
    metrics.read(2, 1.0)
    assert values(metrics.text(0, 0))["prompt_tokens_seconds"] == 2
