"""The reader of GGUF files: what the gguf package reads, without a Python call for every word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from edge_stream.converters.gguf_reader import GgufReader

_VALUES: dict[str, tuple[Any, gguf.GGUFValueType, gguf.GGUFValueType | None]] = {
    "words": (["", "a", "Größe", "\U0001f999" * 30], gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.STRING),
    "floats": ([0.5, -1.25, 3e30], gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.FLOAT32),
    "bytes": ([0, 255], gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT8),
    "flags": ([True, False, True], gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.BOOL),
    "long": ([-(1 << 60), 7], gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.INT64),
    "text": ("naïve", gguf.GGUFValueType.STRING, None),
    "number": (1 << 40, gguf.GGUFValueType.UINT64, None),
}


def write(path: Path, n_words: int, endianess: gguf.GGUFEndian = gguf.GGUFEndian.LITTLE) -> Path:
    writer = gguf.GGUFWriter(path, "llama", endianess=endianess)
    for key, (value, kind, inner) in _VALUES.items():
        writer.add_key_value(key, value, kind, inner)
    writer.add_array("many", [f"word {i}" for i in range(n_words)])
    writer.add_tensor("t", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("endianess", [gguf.GGUFEndian.LITTLE, gguf.GGUFEndian.BIG])
def test_it_reads_what_the_gguf_package_reads(endianess: gguf.GGUFEndian, tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", 9, endianess)
    ours, theirs = GgufReader(path), gguf.GGUFReader(path)
    assert list(ours.fields) == list(theirs.fields)
    for key, field in theirs.fields.items():
        assert (ours.fields[key].contents(), ours.fields[key].types) == (field.contents(), field.types)
    assert {k: ours.fields[k].contents() for k in ("words", "flags", "long")} == {
        k: _VALUES[k][0] for k in ("words", "flags", "long")
    }
    assert [t.data_offset for t in ours.tensors] == [t.data_offset for t in theirs.tensors]
    assert np.array_equal(ours.tensors[0].data, theirs.tensors[0].data)


def test_an_array_costs_two_reads_whatever_its_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    for n_words in (10, 10_000):
        calls: list[int] = []
        with monkeypatch.context() as patch:
            get = gguf.GGUFReader._get
            patch.setattr(GgufReader, "_get", lambda *a, calls=calls, get=get, **k: calls.append(1) or get(*a, **k))
            assert len(GgufReader(write(tmp_path / f"{n_words}.gguf", n_words)).fields["many"].contents()) == n_words
        counts.append(len(calls))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("key", ["words", "floats", "many"])
def test_an_array_that_ends_with_the_file_is_an_error(key: str, tmp_path: Path) -> None:
    """Cut anywhere inside an array, or claiming more elements than a file can have."""
    path = write(tmp_path / "m.gguf", 9)
    field = GgufReader(path).fields[key]
    raw = path.read_bytes()
    count_at = raw.index(key.encode(), field.offset) + len(key) + 4 + 4
    for size in range(count_at + 8, count_at + 24):
        path.write_bytes(raw[:size])
        with pytest.raises((ValueError, IndexError)):
            GgufReader(path)
    for n in (1 << 40, (1 << 64) - 1):
        path.write_bytes(raw[:count_at] + n.to_bytes(8, "little") + raw[count_at + 8 :])
        with pytest.raises(ValueError, match="longer than the file"):
            GgufReader(path)
