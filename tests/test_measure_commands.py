"""bench, eval and inspect as their users run them, on a tiny model."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from edge_stream.cli import cli
from edge_stream.cli.lists import IntList

Tiny = Callable[[str], Path]


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(cli, [str(a) for a in arguments])


def good(*arguments: Any) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def ids(tmp_path: Path) -> Path:
    path = tmp_path / "ids.npy"
    np.save(path, np.random.default_rng(0).integers(10, 256, 160))
    return path


@pytest.mark.parametrize(
    ("text", "values"),
    [("5", [5]), ("1,2", [1, 2]), ("64-256+64", [64, 128, 192, 256]), ("64-512*2", [64, 128, 256, 512])],
)
def test_ranges(text: str, values: list[int]) -> None:
    assert IntList().convert(text, None, None) == values


def test_bench_speaks_like_llama_bench(tiny: Tiny) -> None:
    out = good("bench", "-m", tiny("gqa"), "-p", 8, "-n", 4, "-d", "0,full,100", "-c", 32, "-r", 2, "-t", 1,
               "--mode", "stream,dense,shift,recompute", "-o", "json")  # fmt: skip
    rows = json.loads(out)
    assert {row["test"] for row in rows} == {"pp8", "tg4", "pp8 @ d32", "tg4 @ d32", "pp8 @ d100", "tg4 @ d100"}
    assert {row["mode"] for row in rows} == {"stream", "dense", "shift", "recompute"}
    for name in ("build_commit", "cpu_info", "model_filename", "model_n_params", "n_batch", "n_threads", "type_k",
                 "n_prompt", "n_gen", "n_depth", "test_time", "avg_ns", "stddev_ns", "avg_ts", "samples_ns",
                 "mode", "n_ctx", "n_keep", "cache_type_k", "p50_ms", "p99_ms", "max_ms", "rss_start_mib",
                 "rss_end_mib"):  # fmt: skip
        assert name in rows[0]
    for row in rows:
        assert len(row["samples_ns"]) == 2
        assert row["avg_ts"] > 0
        assert (row["p50_ms"] is None) == (row["n_gen"] == 0)
        if row["n_gen"]:
            assert row["p50_ms"] <= row["p99_ms"] <= row["max_ms"]
    deep = next(row for row in rows if row["mode"] == "stream" and row["test"] == "tg4 @ d100")
    assert deep["counters"]["slides"] >= 4
    assert deep["avg_fill"] == 32


def test_bench_placed_depth_says_so(tiny: Tiny) -> None:
    arguments = (
        "bench",
        "-m",
        tiny("gqa"),
        "-p",
        0,
        "-n",
        4,
        "-d",
        "16,1000000",
        "-c",
        32,
        "-r",
        1,
        "-t",
        1,
        "--place",
    )
    read, placed = json.loads(good(*arguments, "-o", "json"))
    assert read["depth_by"] == "read in chunks"
    assert placed["depth_by"] == "32 read, then counted as 1000000"
    assert (placed["test"], placed["avg_fill"], placed["counters"]["slides"] >= 4) == ("tg4 @ d1000000", 32, True)
    assert "counted as 1000000" in good(*arguments)
    rows = json.loads(good("bench", "-m", tiny("gqa"), "-p", 0, "-n", 4, "-d", 100, "-c", 32, "-r", 1, "-t", 1,
                           "--place", "--mode", "stream,shift", "-o", "json"))  # fmt: skip
    assert [row["depth_by"] for row in rows] == ["32 read, then counted as 100", "read in chunks"]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "md"])
def test_bench_formats(tiny: Tiny, kind: str) -> None:
    out = good("bench", "-m", tiny("gqa"), "-p", 0, "-n", 2, "-c", "16,32", "-r", 1, "-t", 1, "-o", kind)
    if kind == "csv":
        rows = list(csv.DictReader(io.StringIO(out)))
        assert [row["n_ctx"] for row in rows] == ["16", "32"]
    elif kind == "jsonl":
        assert [json.loads(line)["n_ctx"] for line in out.splitlines()] == [16, 32]
    else:
        assert "| test " in out
        assert "tg2" in out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["-c", "32", "--mode", "fast"], "'fast' is not one of"),
        (["-c", "32", "-n", "x"], "neither a number nor a range"),
        (["-c", "4", "-n", "2", "-p", "0"], "--keep 4"),
        (["-c", "32", "--plot", "a.txt"], ".png"),
    ],
)
def test_bench_refuses(tiny: Tiny, arguments: list[str], sentence: str) -> None:
    result = run("bench", "-m", tiny("gqa"), *arguments)
    assert result.exit_code in (1, 2)
    assert sentence in result.stderr


def test_eval_ppl(tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    saved = tmp_path / "nll.npy"
    out = good("eval", "ppl", "-m", tiny("gqa"), "--tokens", ids, "-c", 32, "-t", 1, "--mode", "stream,shift",
               "--save-nll", saved, "-o", "json")  # fmt: skip
    rows = json.loads(out)
    for row in rows:
        for name in ("mode", "n_ctx", "n_keep", "n_tokens", "ppl", "ppl_after_fill", "segments", "rss_start_mib",
                     "rss_end_mib", "tok_per_s"):  # fmt: skip
            assert row[name] is not None
        nll = np.load(tmp_path / f"nll.{row['mode']}.npy")
        assert nll.shape == (159,)
        assert nll.dtype == np.float64
        assert row["ppl"] == pytest.approx(np.exp(nll.mean()), rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--tokens", "absent.npy"], "cannot read absent.npy"),
        (["-f", "absent.txt"], "absent.txt"),
        (["--max-tokens", "1"], "too few"),
        (["--keep", "-1"], "--keep -1"),
        (["-c", "8", "--keep", "8"], "must be less than --ctx-size"),
        (["--save-nll", "no/such/folder/x.npy"], "no/such/folder"),
    ],
)
def test_eval_refuses(tiny: Tiny, arguments: list[str], sentence: str) -> None:
    result = run("eval", "ppl", "-m", tiny("gqa"), *arguments)
    assert result.exit_code in (1, 2)
    assert sentence in result.stderr


def test_token_files_are_checked(tiny: Tiny, tmp_path: Path) -> None:
    for array, sentence in ((np.array([1, 999999]), "not in the vocabulary"), (np.eye(2), "one vector of integers")):
        np.save(tmp_path / "ids.npy", array)
        result = run("eval", "ppl", "-m", tiny("gqa"), "--tokens", tmp_path / "ids.npy")
        assert (result.exit_code, sentence in result.stderr) == (1, True)


def test_eval_sinks_recommends(tiny: Tiny, ids: Path) -> None:
    rows = json.loads(good("eval", "sinks", "-m", tiny("gqa"), "--tokens", ids, "-c", 32, "-t", 1, "-o", "json"))
    assert [row["n_keep"] for row in rows] == [0, 1, 2, 4, 8]
    assert sum(row["recommended"] for row in rows) == 1


def test_eval_qa_stream_takes_data_and_names_the_bad_line(tiny: Tiny, tmp_path: Path) -> None:
    data = tmp_path / "qa.jsonl"
    data.write_text('{"question": "What?", "answer": ["This", "that"]}\n')
    rows = json.loads(good("eval", "qa-stream", "-m", tiny("gqa"), "-f", data, "-c", 256, "-t", 1, "-o", "jsonl"))
    assert rows["mode"] == "stream"
    data.write_text('{"question": "What?"}\n')
    result = run("eval", "qa-stream", "-m", tiny("gqa"), "-f", data)
    assert result.exit_code == 1
    assert "line 1" in result.stderr or ":1" in result.stderr


def test_soak_command(tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    log = tmp_path / "soak.jsonl"
    out = good("eval", "soak", "-m", tiny("gqa"), "--tokens", ids, "-c", 32, "-t", 1, "--chunk", 8, "--interval", 64,
               "--intervals", 2, "--log", log)  # fmt: skip
    assert json.loads(out)["n_past"] == 128
    assert len(log.read_text().splitlines()) == 2


def test_inspect_attention(tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "map.png"
    out = good("inspect", "attention", "-m", tiny("gqa"), "--tokens", ids, "--max-tokens", 40, "-t", 1, "--format",
               "json", "-o", picture)  # fmt: skip
    rows = json.loads(out)
    assert [row["layer"] for row in rows[-2:]] == ["mean", "uniform"]
    for row in rows[:-2]:
        assert 0 < row["first 1"] <= row["first 2"] <= row["first 4"] <= row["first 8"] < 1
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_attention_rows_are_causal_and_sum_to_one(tiny: Tiny, draw: Callable[..., list[int]]) -> None:
    from edge_stream.measure.attention import maps

    found = maps(str(tiny("gqa")), draw(40), {"n_threads": 1})
    assert found.shape[1:] == (40, 40)
    assert np.abs(found.sum(axis=2) - 1).max() < 1e-5
    assert np.triu(found, 1).max() == 0


def test_pooled_attention_loses_nothing() -> None:
    from edge_stream.measure.plots import pooled

    weights = np.random.default_rng(0).random((2, 12, 12)).astype(np.float32)
    weights /= weights.sum(axis=2, keepdims=True)
    small, block = pooled(weights, 5)
    assert (small.shape, block) == ((2, 4, 4), 3)
    assert np.abs(small.sum(axis=2) - 1).max() < 1e-6
    assert small[1, 2, 0] == pytest.approx(weights[1, 6:9, :3].sum() / 3)
    assert pooled(weights, 12)[1] == 1


def test_plots_of_a_bench(tiny: Tiny, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "latency.png"
    good("bench", "-m", tiny("gqa"), "-p", 0, "-n", 2, "-c", "16,32", "-r", 1, "-t", 1, "--mode", "stream,dense",
         "--plot", picture)  # fmt: skip
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_eval_ppl_beside_a_fresh_stream(tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    """Both streams hold the same window at the end, so their last tokens are scored almost alike."""
    saved = tmp_path / "nll.npy"
    row = json.loads(good("eval", "ppl", "-m", tiny("gqa"), "--tokens", ids, "-c", 32, "-t", 1, "--fresh-tail", 40,
                          "--save-nll", saved, "--untimed", "-o", "json"))  # fmt: skip
    tail = row["fresh_tail"]
    assert (tail["last"], tail["fresh_start"]) == (40, 160 - 40 - 32)
    nll = np.load(saved)
    assert tail["ppl_last"] == pytest.approx(np.exp(nll[-40:].mean()), rel=1e-3)
    # the fresh stream is an ordinary one over the end of the text
    part = tmp_path / "part.npy"
    np.save(part, np.load(ids)[-72:])
    good("eval", "ppl", "-m", tiny("gqa"), "--tokens", part, "-c", 32, "-t", 1, "--save-nll", saved)
    assert tail["ppl_last_fresh"] == pytest.approx(np.exp(np.load(saved)[-40:].mean()), rel=1e-3)
    assert "tok_per_s" not in row
    assert row["segments"][-1]["rss_mib"] > 0


def test_eval_ppl_may_score_some_blocks(tiny: Tiny, tmp_path: Path) -> None:
    """Scored or only read, the stream is the same one."""
    ids, found = tmp_path / "ids.npy", []
    np.save(ids, np.random.default_rng(1).integers(10, 256, 1100))
    for every in (1, 3):
        saved = tmp_path / "nll.npy"
        good("eval", "ppl", "-m", tiny("gqa"), "--tokens", ids, "-c", 32, "-t", 1, "--chunk", 4, "--score-every",
             every, "--fresh-tail", 50, "--save-nll", saved, "-o", "json")  # fmt: skip
        found.append(np.load(saved))
    scored = np.isfinite(found[1])
    assert np.isfinite(found[0]).all()
    assert scored[-50:].all()
    assert 0 < scored.sum() < 1000
    assert np.abs(found[0] - found[1])[scored].max() < 1e-4


def test_samples_are_compared_at_the_same_tokens(tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    rows = json.loads(good("eval", "ppl", "-m", tiny("gqa"), "--tokens", ids, "-c", 32, "-t", 1, "--mode",
                           "stream,recompute", "--recompute-every", 7, "--save-nll", tmp_path / "n.npy", "-o", "json",
                           "--plot", tmp_path / "p.png"))  # fmt: skip
    stream, fresh = (np.load(tmp_path / f"n.{mode}.npy")[32:] for mode in ("stream", "recompute"))
    there = np.isfinite(fresh)
    assert 10 < there.sum() < 30
    for row, nll in zip(rows, (stream, fresh), strict=True):
        assert row["ppl_at_samples"] == pytest.approx(np.exp(nll[there].mean()), rel=1e-3)


def test_streameval_chooses_distances(tiny: Tiny) -> None:
    rows = json.loads(good("eval", "streameval", "-m", tiny("gqa"), "-c", 256, "-t", 1, "--mode", "stream",
                           "--questions", 1, "--format", "paper", "-o", "json"))  # fmt: skip
    assert len({row["distance"] for row in rows}) == len(rows) > 1


def test_the_build_knows_llama_cpps_commit() -> None:
    import llama_pin

    from edge_stream.hardware.system import system_facts
    from edge_stream.native import libraries

    facts = system_facts()
    if Path(facts["libraries"]) != libraries.lib_dir():
        pytest.skip("a stock libllama is in use")
    assert facts["llama_cpp"] == llama_pin.read().commit
