"""benchmarks/results.py: a section that was interrupted goes on where it was."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import results


def test_what_was_finished_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = tmp_path / "count"
    words = [sys.executable, "-c", f"f = open({str(count)!r}, 'a'); f.write('x'); print('| a table |')"]
    commit = ["1"]
    monkeypatch.setattr(results, "source", lambda: commit[0])
    for n_runs in (1, 1):
        assert results.finished(words, "a section", tmp_path / "kept")[0] == "| a table |"
        assert count.read_text() == "x" * n_runs
    commit[0] = "2"  # of another source it is no result
    results.finished(words, "a section", tmp_path / "kept")
    assert count.read_text() == "xx"
    with pytest.raises(SystemExit, match="a section failed"):
        results.finished([*words[:2], "raise SystemExit(3)"], "a section", tmp_path / "kept")
    assert len(list((tmp_path / "kept").iterdir())) == 2
