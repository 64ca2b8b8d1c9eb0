"""docs/method.py, the method in one short file: it runs, and it shows what it says."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

PROGRAM = Path(__file__).resolve().parents[1] / "docs" / "method.py"


@pytest.fixture(scope="module")
def method() -> dict[str, Any]:
    """The program's names; nothing has been read yet."""
    return runpy.run_path(str(PROGRAM))


@pytest.fixture(scope="module")
def results(method: dict[str, Any]) -> dict[str, tuple[np.ndarray, float, float]]:
    """Per cache: logits [n_tokens, n_vocab], attention to the oldest token at the end, keys turned per token."""
    return {name: method["read"](cache) for name, cache in method["CACHES"].items()}


def difference(results: dict[str, Any], a: str, b: str) -> float:
    """Largest difference of a logit."""
    return float(np.abs(results[a][0] - results[b][0]).max())


def test_it_runs_and_prints_a_line_per_cache(method: dict[str, Any]) -> None:
    done = subprocess.run([sys.executable, str(PROGRAM)], check=True, capture_output=True, text=True, timeout=120)
    assert all(name in done.stdout for name in method["CACHES"])


def test_it_stays_short() -> None:
    assert len(PROGRAM.read_text(encoding="utf-8").splitlines()) <= 150


def test_the_cache_equals_attention_over_the_whole_text(
    method: dict[str, Any], results: dict[str, tuple[np.ndarray, float, float]]
) -> None:
    """Causal attention without any cache, and with rotation matrices instead of complex numbers."""
    n, n_head, d = 60, method["N_HEAD"], method["HEAD_DIM"]
    x = method["EMBED"][method["TEXT"][:n]]
    angle = np.arange(n)[:, None] * method["THETA"]  # [n, pair]
    matrix = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])  # [2, 2, n, pair]

    def rotated(y: np.ndarray) -> np.ndarray:
        return np.einsum("abnp,nhpb->nhpa", matrix, y.reshape(n, n_head, d // 2, 2)).reshape(n, n_head, d)

    for wq, wk, wv, wo in zip(method["WQ"], method["WK"], method["WV"], method["WO"], strict=True):
        h = x / x.std(axis=1, keepdims=True)
        q, k, v = ((h @ w.T).reshape(n, n_head, d) for w in (wq, wk, wv))
        q[..., -2] += method["SINK"]
        k[..., -2] += method["SINK"] * h[:, :1]
        scores = np.einsum("qhd,khd->hqk", rotated(q), rotated(k)) / np.sqrt(d)
        p = np.exp(np.where(np.tri(n, dtype=bool), scores, -np.inf))
        p /= p.sum(axis=2, keepdims=True)
        x = x + np.einsum("hqk,khd->qhd", p, v).reshape(n, -1) @ wo.T
    logits = x / x.std(axis=1, keepdims=True) @ method["EMBED"].T / np.sqrt(x.shape[1])
    assert np.abs(logits - results["1 everything kept"][0][:n]).max() < 1e-9


def test_all_caches_agree_until_the_first_eviction(
    method: dict[str, Any], results: dict[str, tuple[np.ndarray, float, float]]
) -> None:
    full = method["N_CTX"]
    dense = results["1 everything kept"][0]
    for name in ("2 window, no sinks", "3 StreamingLLM", "4 sinks moved"):
        assert np.abs(results[name][0] - dense)[:full].max() < 1e-9, name
        assert np.abs(results[name][0] - dense)[full:].max() > 0.1, name


def test_moving_sinks_and_rebasing_change_no_logit(results: dict[str, tuple[np.ndarray, float, float]]) -> None:
    paper = "3 StreamingLLM"
    assert difference(results, "4 sinks moved", paper) < 1e-9
    assert difference(results, "  from position 10,000,000", paper) < 1e-5
    assert difference(results, "5 rebased, float32 angles", paper) < 1e-5
    assert difference(results, "  the same, float32 angles", paper) > 1e-2  # what the rebase is for


def test_without_sinks_the_logits_go_astray(results: dict[str, tuple[np.ndarray, float, float]]) -> None:
    dense, window, paper = (results[k] for k in ("1 everything kept", "2 window, no sinks", "3 StreamingLLM"))
    assert window[1] < 0.1 < 0.3 < paper[1]  # attention to the oldest token
    assert np.abs(window[0] - dense[0]).mean() > 2 * np.abs(paper[0] - dense[0]).mean()


def test_keys_turned_per_token(method: dict[str, Any], results: dict[str, tuple[np.ndarray, float, float]]) -> None:
    assert results["1 everything kept"][2] == results["2 window, no sinks"][2] == 1
    assert results["3 StreamingLLM"][2] == method["N_CTX"]
    assert results["4 sinks moved"][2] == method["N_KEEP"] + 1
    rebased = method["CACHES"]["5 rebased, float32 angles"]
    assert rebased.position < method["REBASE_AT"]
    assert results["5 rebased, float32 angles"][2] < method["N_KEEP"] + 2
