"""llama-imatrix's importance matrices: the mean squared activation of each column of a tensor. Two file formats."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import TYPE_CHECKING

from edge_stream.converters.text import quoted
from edge_stream.errors import EdgeStreamError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def read_imatrix(path: Path) -> dict[str, NDArray[np.float32]]:
    """Tensor name -> importance of each column. Raises EdgeStreamError in one sentence for anything else."""
    try:
        with path.open("rb") as file:
            magic = file.read(4)
        return _read_gguf(path) if magic == b"GGUF" else _read_binary(path)
    except OSError as error:
        raise EdgeStreamError(f"cannot read {path}: {error.strerror}") from error


def _read_gguf(path: Path) -> dict[str, NDArray[np.float32]]:
    """`NAME.in_sum2` (sums of squares) and `NAME.counts` for each tensor (tools/imatrix of llama.cpp)."""
    import numpy as np

    from edge_stream.converters.gguf_reader import GgufReader

    try:
        reader = GgufReader(path)
        tensors = {t.name: np.array(t.data, dtype=np.float32) for t in reader.tensors}
    except (ValueError, IndexError, KeyError, UnicodeDecodeError) as error:
        raise EdgeStreamError(f"{path.name} is a damaged GGUF file") from error
    result = {}
    for name, sums in tensors.items():
        if not name.endswith(".in_sum2"):
            continue
        tensor = name.removesuffix(".in_sum2")
        counts = tensors.get(f"{tensor}.counts")
        if counts is None or not np.isfinite(sums).all() or float(counts.reshape(-1)[0]) <= 0:
            raise EdgeStreamError(f"{path.name} has no valid counts for {tensor}")
        result[tensor] = np.ascontiguousarray(sums.reshape(-1) / counts.reshape(-1)[0], dtype=np.float32)
    if not result:
        raise EdgeStreamError(f"{path.name} holds no importance matrix")
    return result


def _read_binary(path: Path) -> dict[str, NDArray[np.float32]]:
    """The older format (common/imatrix-loader.cpp of llama.cpp), little-endian, without a mark of its own.

    A count of entries; for each its name with a length, a count of calls, a count of columns, and for each column the
    mean times the calls, as float32. What may follow (a count of chunks, the text's name) is not used.
    """
    import numpy as np

    data, at, entry = path.read_bytes(), 0, 0

    def take(size: int) -> bytes:
        nonlocal at
        if not 0 <= size <= len(data) - at:
            raise ValueError("it is cut short")
        at += size
        return data[at - size : at]

    def number() -> int:
        return int(struct.unpack("<i", take(4))[0])

    result: dict[str, NDArray[np.float32]] = {}
    try:
        n_entries = number()
        if n_entries < 1:
            raise ValueError(f"it begins with {n_entries} for the number of entries")
        for entry in range(1, n_entries + 1):  # noqa: B007, used in the error
            name = take(number()).decode("utf-8")
            calls, columns = number(), number()
            if columns < 1:
                raise ValueError(f"{quoted(name)} has {columns} columns")
            values = np.frombuffer(take(4 * columns), "<f4").astype(np.float32)
            if not np.isfinite(values).all():
                raise ValueError(f"{quoted(name)} has values that are not finite")
            result[name] = values / np.float32(calls) if calls > 0 else values
    except ValueError as error:  # UnicodeDecodeError is one
        why = "a name is not UTF-8" if isinstance(error, UnicodeDecodeError) else error
        raise EdgeStreamError(
            f"{path.name} is not an importance matrix, or a damaged one: {why} (at entry {entry}, byte {at:,})"
        ) from None
    return result
