"""Safetensors files, read a few rows at a time.

The format (safetensors' README): 8 bytes little-endian length of a JSON header, the header, the tensors' bytes without
gaps. The header is checked here, for a specific message about each fault, and again by the safetensors library.
Bytes are read, not mapped: mapped pages would count as this process's memory.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_stream.converters.text import quoted
from edge_stream.errors import EdgeStreamError
from edge_stream.text import parse_json

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# safetensors' name -> ours, bytes per element
DTYPES = {"F32": ("f32", 4), "F16": ("f16", 2), "BF16": ("bf16", 2)}
_PACKED = {"F8_E4M3": ("f8_e4m3", 1), "U8": ("u8", 1), "I8": ("i8", 1), "I32": ("i32", 4), "I64": ("i64", 8)}
_VIEWS = {"f32": "<f4", "f16": "<f2", "u8": "u1", "i8": "i1", "i32": "<i4", "i64": "<i8"}
_MAX_HEADER = 100_000_000  # the limit of the safetensors library
_PICKLE_MAGICS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_CHECK_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Entry:
    """Where a tensor is stored. offset: from the beginning of the file."""

    path: Path
    dtype: str  # f32, f16, bf16
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of one file. Raises EdgeStreamError, in one sentence, for any violation of the format."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(8)
            if len(head) < 8:
                raise EdgeStreamError(f"{path.name} is too short for a safetensors file ({size} bytes)")
            length = int.from_bytes(head, "little")
            if length > _MAX_HEADER:
                if head.startswith(_PICKLE_MAGICS):
                    raise EdgeStreamError(f"{path.name} is a pickle file, not safetensors: it is never loaded")
                raise EdgeStreamError(
                    f"{path.name} claims a header of {length:,} bytes; it is damaged or not safetensors"
                )
            if 8 + length > size:
                raise EdgeStreamError(f"{path.name} is cut off inside its header ({size:,} bytes)")
            text = file.read(length)
    except OSError as error:
        raise EdgeStreamError(f"cannot read {path.name}: {error.strerror}") from error
    header = _parse(path, text)
    entries: dict[str, Entry] = {}
    for name, value in header.items():
        if name != "__metadata__":
            entries[name] = _entry(path, name, value, 8 + length)
    _check_layout(path, entries, 8 + length, size)
    _check_with_library(path)
    return entries


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise EdgeStreamError(f"{path.name} names {quoted(twice, 80)} twice in its header")
        return result

    try:
        header = parse_json(text, object_pairs_hook=unique)
    except ValueError as error:
        raise EdgeStreamError(f"{path.name}: the header is not valid JSON") from error
    if not isinstance(header, dict):
        raise EdgeStreamError(f"{path.name}: the header is not a JSON object")
    return header


def _entry(path: Path, name: str, value: Any, base: int) -> Entry:
    where = f"{path.name}: tensor {quoted(name, 80)}"
    if not isinstance(value, dict):
        raise EdgeStreamError(f"{where} has no description")
    dtype, shape, offsets = value.get("dtype"), value.get("shape"), value.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPES | _PACKED:
        raise EdgeStreamError(f"{where} has dtype {quoted(dtype, 30)}; supported are F32, F16 and BF16")
    if not isinstance(shape, list) or not all(_is_size(n) for n in shape):
        raise EdgeStreamError(f"{where} has no valid shape")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(n) for n in offsets):
        raise EdgeStreamError(f"{where} has no valid data_offsets")
    ours, width = (DTYPES | _PACKED)[dtype]
    nbytes = width
    for n in shape:
        nbytes *= n
    if offsets[1] - offsets[0] != nbytes:
        raise EdgeStreamError(
            f"{where} takes {offsets[1] - offsets[0]:,} bytes, its shape {quoted(shape)} needs {nbytes:,}"
        )
    return Entry(path, ours, tuple(shape), base + offsets[0], nbytes)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def _check_layout(path: Path, entries: Mapping[str, Entry], base: int, size: int) -> None:
    """Tensors follow each other without gap or overlap and end where the file ends."""
    end = base
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if entry.offset != end:
            what = "overlaps the one before it" if entry.offset < end else "leaves a gap before it"
            raise EdgeStreamError(f"{path.name}: tensor {quoted(name, 80)} {what}")
        end += entry.nbytes
    if end != size:
        what = "is cut off: it has" if end > size else "has bytes after its last tensor:"
        raise EdgeStreamError(f"{path.name} {what} {size:,} bytes, its header describes {end:,}")


def _check_with_library(path: Path) -> None:
    import safetensors

    try:
        with safetensors.safe_open(path, framework="numpy"):
            pass
    except Exception as error:  # the library raises several types
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise EdgeStreamError(f"{path.name} is not a valid safetensors file: {reason}") from error


class Reader:
    """Reads rows of tensors; holds one open file at a time."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._file: io.FileIO | None = None

    def read(self, name: str, entry: Entry, start: int = 0, stop: int | None = None) -> NDArray[np.floating[Any]]:
        """Rows start..stop: float16 for f16, float32 for other floats, integers as they are.

        Raises EdgeStreamError for a short read, NaN or infinity.
        """
        import numpy as np

        rows = entry.shape[0] if entry.shape else 1
        stop = rows if stop is None else min(stop, rows)
        row_bytes = entry.nbytes // max(1, rows)
        shape = (stop - start, *entry.shape[1:]) if entry.shape else ()
        raw = np.empty((stop - start) * row_bytes, dtype=np.uint8)
        view, done = memoryview(raw.data), 0
        try:
            file = self._open(entry.path)
            file.seek(entry.offset + start * row_bytes)
            while done < len(raw):
                count = file.readinto(view[done:])
                if not count:
                    raise EdgeStreamError(f"{entry.path.name} ends inside tensor {name}")
                done += count
        except OSError as error:
            raise EdgeStreamError(f"cannot read {entry.path.name}: {error.strerror}") from error
        if entry.dtype == "bf16":
            values: NDArray[np.floating[Any]] = widen_bf16(raw.view("<u2"))
        else:
            values = _float8_table()[raw] if entry.dtype == "f8_e4m3" else raw.view(_VIEWS[entry.dtype])
        if values.dtype.kind == "f":
            check_finite(values, name)
        return values.reshape(shape)

    def _open(self, path: Path) -> io.FileIO:
        if self._path != path or self._file is None:
            self.close()
            self._file, self._path = io.FileIO(path, "rb"), path
        return self._file

    def close(self) -> None:
        """Close the open file, if any."""
        if self._file is not None:
            self._file.close()
        self._file, self._path = None, None


@lru_cache(maxsize=1)
def _float8_table() -> NDArray[np.float32]:
    """The values of float8 e4m3 (finite only: the largest exponent is one like the others, but for NaN)."""
    import numpy as np

    bits = np.arange(256)
    exponent, fraction = (bits >> 3) & 15, (bits & 7) / 8.0
    values = np.where(exponent == 0, fraction * 2.0**-6, (1.0 + fraction) * 2.0 ** (exponent - 7.0))
    values[(bits & 127) == 127] = np.nan
    return np.where(bits < 128, values, -values).astype(np.float32)


def widen_bf16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """bfloat16 bit patterns as float32, exactly: it is the upper half of a float32."""
    import numpy as np

    wide = bits.astype(np.uint32)
    wide <<= np.uint32(16)
    return wide.view(np.float32)


def check_finite(values: NDArray[np.floating[Any]], name: str) -> None:
    """Raise EdgeStreamError if there is a NaN or an infinity."""
    import numpy as np

    flat = values.reshape(-1)
    for start in range(0, flat.size, _CHECK_ELEMENTS):
        if not np.isfinite(flat[start : start + _CHECK_ELEMENTS]).all():
            raise EdgeStreamError(f"tensor {name} holds NaN or infinity: the checkpoint is damaged")
