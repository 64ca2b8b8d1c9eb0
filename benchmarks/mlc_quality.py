"""Perplexity of a text with a model's own weights, and with those of its MLC conversions.

    python benchmarks/mlc_quality.py [-m demo] [-n 256] [--quantization q4f32_1,q4f16_1,...]

The forward pass is the same NumPy float64 one for all, so that differences are the weights' alone. Q4_0 is llama.cpp's
quantisation of as many bits per weight, beside which MLC's is to be seen.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from edge_stream.converters import reference
from edge_stream.converters.mlc import MlcOptions, convert
from edge_stream.converters.mlc.readback import ReadBack
from edge_stream.converters.mlc.verify import tokenize
from edge_stream.measure.corpus import help_topics
from edge_stream.models.conversion import open_source


def perplexity(source: Any, tokens: list[int]) -> float:
    """exp of the mean NLL of tokens 1.., float64."""
    logits = reference.logits(source, tokens)[:-1]
    peak = logits.max(axis=1, keepdims=True)
    log_sum = (peak + np.log(np.exp(logits - peak).sum(axis=1, keepdims=True)))[:, 0]
    return float(np.exp((log_sum - logits[np.arange(len(logits)), tokens[1:]]).mean()))


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", default="demo", help="what edge-stream convert takes")
    parser.add_argument("-n", type=int, default=256, help="tokens")
    parser.add_argument("--quantization", default="q0f32,q0f16,q4f32_1,q4f16_1,q4f16_0,q3f16_1", help="comma list")
    args = parser.parse_args()
    source = open_source(args.model)
    with tempfile.TemporaryDirectory(prefix="edge-stream-") as scratch:
        tokens: list[int] = []
        rows = []
        for name in args.quantization.split(","):
            folder = Path(scratch) / name
            convert(source, folder, MlcOptions(quantization=name), lambda _line: None)
            if not tokens:
                tokens = tokenize(folder, help_topics()[: args.n * 16])[: args.n]
                rows.append(("as it is", perplexity(source, tokens), 0))
            size = sum(path.stat().st_size for path in folder.glob("*.bin"))
            rows.append((name, perplexity(ReadBack(folder, source, name), tokens), size))
        requantised = Path(scratch) / "q4_0.gguf"
        _to_gguf(args.model, requantised)
        rows.append(("GGUF Q4_0", perplexity(open_source(str(requantised)), tokens), requantised.stat().st_size))
    print(f"{args.model}, {len(tokens)} tokens of Python's help\n\n| weights | perplexity | MiB |\n|---|---|---|")
    for name, value, size in rows:
        print(f"| {name} | {value:.2f} | {f'{size / 2**20:.0f}' if size else ''} |")


def _to_gguf(model: str, out: Path) -> None:
    import subprocess
    import sys

    command = [sys.executable, "-m", "edge_stream.cli", "convert", model, "--to", "gguf", "--quantize", "Q4_0"]
    subprocess.run([*command, "-o", str(out)], check=True, capture_output=True)


if __name__ == "__main__":
    main()
