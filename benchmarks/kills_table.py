"""What benchmarks/kills.py has counted so far, as a table. A fault would have ended it.

python benchmarks/kills_table.py
"""

from __future__ import annotations

import json

from kills import FOLDER, SCENARIOS

from edge_stream.measure.table import markdown


def main() -> None:
    """Print it."""
    rows = []
    for name in SCENARIOS:
        for how, suffix in (("kill -9", ""), ("power cut", "-power")):
            path = FOLDER / f"kills-{name}{suffix}.json"
            if path.exists():
                found = json.loads(path.read_text())
                kills = found.pop("kills")
                counted = ", ".join(f"{what} {n}" for what, n in found.items() if n)
                rows.append({"what": name, "how": how, "times": str(kills), "lost": "0", "besides": counted})
    if not rows:
        raise SystemExit("nothing has been counted yet: make endurance-kill")
    print(markdown(rows, ["what", "how", "times", "lost", "besides"]))


if __name__ == "__main__":
    main()
