"""The tensor cache: what is written is what is read, by our reader and by TVM's, and damage is seen."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_stream.converters.mlc.tensor_cache import TensorCacheReader, TensorCacheWriter, from_bf16, to_bf16
from edge_stream.errors import EdgeStreamError


def tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "a.q_weight": rng.integers(0, 2**32, (33, 8), np.uint32),
        "a.q_scale": rng.standard_normal((33, 2)).astype(np.float16),
        "large": rng.standard_normal((100, 90)).astype(np.float16),  # over half of the cap: a shard of its own
        "norm": rng.standard_normal(700).astype(np.float32),
        "empty": np.zeros((0, 4), np.float16),
        "b.q_weight": rng.integers(0, 2**32, (60, 60), np.uint32),
        "b.bias": rng.standard_normal(9).astype(np.float32),
    }


def write(folder: Path, cap: int = 20_000, encoding: str = "f32-to-bf16") -> list[Path]:
    writer = TensorCacheWriter(folder, cap)
    for name, tensor in tensors().items():
        writer.add(name, tensor, encoding)
    return writer.finish({"ParamSize": len(tensors())})


def test_reader_gets_what_the_writer_got(tmp_path: Path) -> None:
    files = write(tmp_path)
    assert len([f for f in files if f.suffix == ".bin"]) == 2
    reader = TensorCacheReader(tmp_path)
    reader.verify()
    assert list(reader.metadata.items()) == [("ParamSize", 7)]
    for name, want in tensors().items():
        if want.dtype == np.float32:
            want = from_bf16(to_bf16(want))
        got = reader.read(name)
        assert got.dtype == want.dtype and np.array_equal(got, want), name


def test_raw_float32_is_exact(tmp_path: Path) -> None:
    write(tmp_path, encoding="raw")
    assert np.array_equal(TensorCacheReader(tmp_path).read("norm"), tensors()["norm"])


def test_bf16_rounds_to_nearest_even_and_never_to_infinity() -> None:
    cases = {
        0x3F800000: 0x3F80,  # 1
        0x3F808000: 0x3F80,  # halfway, to the even one below
        0x3F818000: 0x3F82,  # halfway, to the even one above
        0x3F808001: 0x3F81,
        0xBF807FFF: 0xBF80,
        0x7F7FFFFF: 0x7F7F,  # the largest float32 would round to infinity
        0xFF7FFFFF: 0xFF7F,
        0x80000000: 0x8000,  # -0
        0x00000001: 0x0000,  # the smallest subnormal
    }
    bits = np.array(list(cases), np.uint32)
    assert to_bf16(bits.view(np.float32)).tolist() == list(cases.values())


def test_a_name_is_used_once_and_dtypes_are_known(tmp_path: Path) -> None:
    writer = TensorCacheWriter(tmp_path)
    writer.add("a", np.zeros(3, np.float16))
    for name, tensor in (("a", np.zeros(3, np.float16)), ("b", np.zeros(3, np.float64))):
        with pytest.raises(ValueError, match="cannot be added"):
            writer.add(name, tensor)


def test_files_are_those_of_tvm(tmp_path: Path) -> None:
    """tvm.contrib.tvmjs writes the same shards and the same records."""
    tvmjs = pytest.importorskip("tvm.contrib.tvmjs")
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir()
    writer = TensorCacheWriter(ours, 1 << 20)
    rng = np.random.default_rng(1)
    params = {
        f"p{i}": rng.standard_normal((int(n), 64)).astype(np.float32) for i, n in enumerate(rng.integers(1, 6000, 40))
    }
    params |= {f"h{i}": rng.standard_normal((i + 1, 512)).astype(np.float16) for i in range(40)}
    for name, tensor in params.items():
        writer.add(name, tensor)
    writer.finish({"a": 1})
    with contextlib.redirect_stdout(io.StringIO()):
        tvmjs.dump_tensor_cache(params, str(theirs), meta_data={"a": 1}, shard_cap_mb=1, show_progress=False)
    for path in sorted(theirs.iterdir()):
        same = ours / path.name
        if path.suffix == ".json":
            assert json.loads(same.read_text()) == json.loads(path.read_text()), path.name
        else:
            assert same.read_bytes() == path.read_bytes(), path.name
    names = {p.name for p in theirs.iterdir()}
    assert {p.name for p in ours.iterdir()} - names == {"ndarray-cache.json", "ndarray-cache-b16.json"}


def test_tvm_reads_what_is_written(tmp_path: Path) -> None:
    pytest.importorskip("tvm")
    from edge_stream.converters.mlc.runtime import load_params

    write(tmp_path)
    reader = TensorCacheReader(tmp_path)
    names = [name for name in tensors() if name != "empty"]
    for name, tensor in zip(names, load_params(tmp_path, names), strict=True):
        want = reader.read(name)
        assert str(tensor.dtype) == str(want.dtype) and np.array_equal(tensor.numpy(), want), name


def _cut(folder: Path, _index: Any) -> None:
    path = folder / "params_shard_0.bin"
    path.write_bytes(path.read_bytes()[:-1])


def _remove(folder: Path, _index: Any) -> None:
    (folder / "params_shard_0.bin").unlink()


def _record(**changes: Any) -> Callable[[Path, Any], None]:
    return lambda _folder, index: index["records"][0]["records"][0].update(changes)


def _shard(**changes: Any) -> Callable[[Path, Any], None]:
    return lambda _folder, index: index["records"][0].update(changes)


DAMAGE: dict[str, tuple[Callable[[Path, Any], None], str]] = {
    "short shard": (_cut, "has .* bytes, not"),
    "missing shard": (_remove, "No such file"),
    "outside the folder": (_shard(dataPath="../params_shard_0.bin"), "names a shard"),
    "unknown shard format": (_shard(format="zip"), "names a shard"),
    "beyond the shard": (_record(byteOffset=10**9), "describes .* wrongly"),
    "negative offset": (_record(byteOffset=-1), "describes .* wrongly"),
    "another shape": (_record(shape=[1, 2]), "describes .* wrongly"),
    "unknown dtype": (_record(dtype="complex64"), "describes .* wrongly"),
    "unknown encoding": (_record(format="f32-to-f8"), "describes .* wrongly"),
    "shape of truth": (_record(shape=[True, True, True], nbytes=4), "describes .* wrongly"),
    "shape without end": (_record(shape=[2**62, 2**62, 0], nbytes=0), "describes .* wrongly"),
    "shape of words": (_record(shape=["a"]), "describes .* wrongly"),
    "no records": (lambda _f, index: index.pop("records"), "is not a tensor cache"),
    "records of numbers": (lambda _f, index: index.update(records=[1]), "is not a tensor cache"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_one_sentence(tmp_path: Path, damage: str) -> None:
    write(tmp_path)
    change, message = DAMAGE[damage]
    path = tmp_path / "tensor-cache.json"
    index = json.loads(path.read_text())
    change(tmp_path, index)
    path.write_text(json.dumps(index))
    with pytest.raises(EdgeStreamError, match=message):
        TensorCacheReader(tmp_path)


def test_changed_bytes_are_seen(tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / "params_shard_0.bin"
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(data)
    with pytest.raises(EdgeStreamError, match=r"params_shard_0\.bin is damaged"):
        TensorCacheReader(tmp_path).verify()
