"""kill -9 of a whole chat with its log (benchmarks/recall_kill.py does it twenty times)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import recall_kill


def test_nothing_older_than_the_turn_is_lost(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    counts = recall_kill.run(str(tiny("chat")), tmp_path, kills=3, n_ctx=256)
    assert counts["lost"] == 0
    assert counts["finished turns"] >= 3 and counts["the first recalled at last"] in ("yes", "no")
