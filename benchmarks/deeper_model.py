"""Write a model that says what another says, at a multiple of its cost: to measure draft models without a large one.

    python benchmarks/deeper_model.py demo-f16.gguf demo-x4-f16.gguf --times 4

Further layers follow those of the model. They are copies of them whose two projections into the residual stream are
zero: they are computed like all others and add nothing.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import gguf
import numpy as np

_PROJECTIONS = ("attn_output.weight", "ffn_down.weight")


def write_deeper(source: Path, target: Path, times: int) -> None:
    """Write `target`, a GGUF of times as many layers, from `source`, one with f32 and f16 tensors."""
    reader = gguf.GGUFReader(source)
    arch = reader.fields["general.architecture"].contents()
    n_layer = reader.fields[f"{arch}.block_count"].contents()
    writer = gguf.GGUFWriter(target, arch)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        value = n_layer * times if name == f"{arch}.block_count" else field.contents()
        writer.add_key_value(name, value, field.types[0], field.types[-1] if len(field.types) > 1 else None)
    for tensor in reader.tensors:
        head, _, rest = tensor.name.partition(".")
        data: Any = tensor.data
        if head != "blk":
            writer.add_tensor(tensor.name, data)
            continue
        layer, _, name = rest.partition(".")
        for copy in range(times):
            zero = copy > 0 and name in _PROJECTIONS
            writer.add_tensor(f"blk.{int(layer) + copy * n_layer}.{name}", np.zeros_like(data) if zero else data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    """Write the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a GGUF file with f32 and f16 tensors")
    parser.add_argument("target", type=Path)
    parser.add_argument("--times", type=int, default=4)
    args = parser.parse_args()
    write_deeper(args.source, args.target, args.times)


if __name__ == "__main__":
    main()
