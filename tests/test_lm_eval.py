"""EleutherAI's lm-evaluation-harness, unmodified, over the server. Its packages are heavy: `lm_eval[api]`.

What it relies on is tested without it: see test_an_echoed_prompt_is_scored in test_serve_native.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from serving import serve

from edge_stream.engine import Engine

pytest.importorskip("lm_eval.models.openai_completions", reason="needs lm_eval[api]", exc_type=ImportError)

TASK = """
task: tiny
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{file}"}}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{target}}}}"
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
DOCUMENTS = [
    ("The sky is", " blue"),
    ("One two three four", " five six"),
    ("é" * 20, " ü"),
    ("a" + " a" * 60, " b c d"),
]


def test_a_task_gets_the_streams_own_logprobs(
    load: Callable[..., Engine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    (tmp_path / "tiny.jsonl").write_text("\n".join(json.dumps({"text": a, "target": b}) for a, b in DOCUMENTS))
    (tmp_path / "tiny.yaml").write_text(TASK.format(file=tmp_path / "tiny.jsonl"))
    engine = load("chat", n_ctx=256, n_parallel=1)
    expected = []
    for text, target in DOCUMENTS:
        n = len(engine.tokenize(text))
        tokens = engine.tokenize(text + target)
        with engine.stream() as stream:
            expected.append(-float(stream.score(tokens)[n:].sum()))
    with serve(engine) as served:
        results = simple_evaluate(
            model="local-completions",
            model_args={"base_url": served.url + "/v1/completions", "model": "tiny"},
            tasks=["tiny"],
            task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
            bootstrap_iters=0,
        )
    assert results is not None
    samples = sorted(results["samples"]["tiny"], key=lambda sample: sample["doc_id"])
    assert [sample["filtered_resps"][0][0] for sample in samples] == pytest.approx(expected, abs=2e-2)
