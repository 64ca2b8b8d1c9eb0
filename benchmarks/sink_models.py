"""The models that benchmarks/sink_training.py trained, on both engines and beside transformers, and as release assets.

    python benchmarks/sink_models.py FOLDER [--seed 0] [--assets OUT]

For each kind: the largest difference of its logits over a sample, as GGUF and as MLC (both float32), from transformers'
in float64; and its perplexity over the held-out text, streamed with one sink on each engine, tokens one by one. MLC has
no zero sink: softmax1 is refused there. --assets: OUT gets, of each kind, the checkpoint (tar.gz), the GGUF file (f16)
and the MLC folder (q0f16, tar.gz).
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from sink_training import LENGTH, convert, held_out_of

from edge_stream import Engine
from edge_stream.measure.table import markdown
from edge_stream.training.settings import SINKS

N_CTX, STREAMED = 128, 2048
EXACT = {"cache_type_k": "f32", "cache_type_v": "f32"}


def compare(path: Path, checkpoint: Path, text: str, **flags: Any) -> tuple[float, float]:
    """(largest difference of a sample's logits from transformers', perplexity when streamed with one sink)."""
    with Engine.load(path, n_ctx=max(N_CTX, LENGTH + 1), n_keep=1, **EXACT, **flags) as engine:
        tokens = engine.tokenize(text, add_bos=engine.add_bos)[: N_CTX + STREAMED]
        model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="eager")
        with torch.no_grad():
            for weights in model.parameters() if path.is_dir() else ():
                weights.copy_(weights.bfloat16())  # as MLC stores those that are not quantised
            want = model.double().eval()(torch.tensor([tokens[:LENGTH]])).logits[0].numpy()
        with engine.stream() as stream:
            error = float(np.abs(stream.logits_of(tokens[:LENGTH]) - want).max())
        with engine.stream(n_ctx=N_CTX, n_keep=1) as stream:
            nll = stream.score(tokens, chunk=1)[N_CTX:]
        return error, float(np.exp(nll.mean()))


def main() -> None:
    """Convert, compare, print the table, pack."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--assets", type=Path, metavar="OUT")
    args = parser.parse_args()
    text = held_out_of((args.folder / "text.txt").read_text(encoding="utf-8"))
    rows = []
    for kind in SINKS:
        name = f"{kind}-{args.seed}"
        checkpoint = args.folder / name
        gguf = convert(checkpoint, "gguf", args.folder / f"{name}.gguf", "--outtype", "f32")
        found = {"gguf": compare(gguf, checkpoint, text, flash_attn="off")}
        if kind != "softmax1":
            folder = convert(checkpoint, "mlc", args.folder / f"{name}-mlc", "--quantization", "q0f32")
            found["mlc"] = compare(folder, checkpoint, text)
        row: dict[str, Any] = {"trained with": kind}
        for engine in ("gguf", "mlc"):
            error, ppl = found.get(engine, (None, None))
            row[f"{engine}: logits off by"] = None if error is None else f"{error:.0e}"
            row[f"{engine}: perplexity"] = None if ppl is None else f"{ppl:.2f}"
        rows.append(row)
        if args.assets:
            args.assets.mkdir(parents=True, exist_ok=True)
            shutil.make_archive(str(args.assets / f"sink-{kind}"), "gztar", args.folder, name)
            convert(checkpoint, "gguf", args.assets / f"sink-{kind}.gguf", "--outtype", "f16")
            if kind != "softmax1":
                small = convert(checkpoint, "mlc", args.folder / f"sink-{kind}-mlc", "--quantization", "q0f16")
                shutil.make_archive(str(args.assets / small.name), "gztar", args.folder, small.name)
    print(f"The models of seed {args.seed}, one sink, a cache of {N_CTX}, {STREAMED} tokens beyond it.\n")
    print(markdown(rows, list(rows[0])))


if __name__ == "__main__":
    main()
