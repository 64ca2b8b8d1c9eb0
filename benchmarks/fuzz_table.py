"""What the fuzzers have read so far, as a table.

A fault ends a run. What a native one had read since its last slice counts for nothing then; Python's inputs are the
same in every run, and those before the fault count.

python benchmarks/fuzz_table.py
"""

from __future__ import annotations

import json
from pathlib import Path

from edge_stream.measure.table import markdown

FOLDER = Path(__file__).resolve().parents[1] / "build" / "endurance"
COLUMNS = ["what", "reader", "inputs", "minutes", "memory, MiB"]
WHAT = {
    "native-gguf": "GGUF: metadata and tensors, as a model that is loaded",
    "native-session": "session files",
    "native-log": "logs of what was said",
    "native-template": "chat templates",
    "native-request": "chat requests, with their tools",
    "native-schema": "JSON schemas",
    "native-grammar": "grammars",
    "native-answer": "a model's answers, parsed",
    "native-rpc": "an RPC server's answers",
    "checkpoints": "safetensors, configs, tokenizers of a checkpoint",
    "gguf": "GGUF files that are converted",
    "mlc": "MLC folders",
    "http": "HTTP: bodies, headers, forms",
}


def main() -> None:
    """Print it."""
    rows = []
    for name, what in WHAT.items():
        path = FOLDER / f"fuzz-{name}.json"
        if path.exists():
            found = json.loads(path.read_text())
            reader = "C++, sanitizers" if name.startswith("native-") else "Python"
            more = f"{found['peak_mib']:.0f} at most"
            if found.get("grown_mib") is not None:
                more += f", {found['grown_mib']:+.0f} in the last run"
            row = [what, reader, f"{found['inputs']:,}", f"{found['seconds'] / 60:.0f}", more]
            rows.append(dict(zip(COLUMNS, row, strict=True)))
    if not rows:
        raise SystemExit("nothing has been counted yet: make endurance-fuzz")
    print(markdown(rows, COLUMNS))


if __name__ == "__main__":
    main()
