"""kill -9 under load (benchmarks/serve_kill.py does it twenty times)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import serve_kill


def test_no_finished_turn_is_lost_and_no_file_damaged(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    counts = serve_kill.run(str(tiny("chat")), tmp_path, kills=2, clients=3, n_ctx=96)
    assert counts["turns finished"] > 6 and counts["session files verified"] >= 4
