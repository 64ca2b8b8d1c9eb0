"""TVM's tensor cache: params_shard_N.bin beside tensor-cache.json; a streaming writer, and a reader.

Format (apache-tvm, python/tvm/contrib/tvmjs.py and src/runtime/vm/tensor_cache_support.cc): the JSON file holds
{metadata, records: [{dataPath, format "raw-shard", nbytes, md5sum, records: [{name, shape, dtype, format, nbytes,
byteOffset}]}]}. Tensors are little-endian and C-contiguous. Every record says "f32-to-bf16", as mlc_llm's do, and a
float32 tensor of that format is stored as bfloat16, rounded to nearest even; "raw" would keep float32. Older runtimes
read the same content from ndarray-cache.json, so it is written under both names; if there is a float32 tensor,
*-b16.json describes the same bytes as bfloat16.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_stream.errors import EdgeStreamError
from edge_stream.text import parse_json

SHARD_CAP = 32 << 20  # bytes, mlc_llm's default
_LARGEST_BF16 = np.uint32(0x7F7F0000).view(np.float32)
_BLOCK = 1 << 22
_DTYPES = {"float32": 4, "float16": 2, "bfloat16": 2, "uint32": 4}


def to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The upper halves of float32 values, rounded to nearest even; truncated beyond bfloat16's range."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    inside = np.abs(values) < _LARGEST_BF16
    bias = np.where(inside, ((bits >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF), np.uint32(0))
    halves: NDArray[np.uint16] = ((bits + bias) >> np.uint32(16)).astype(np.uint16)
    return halves


def from_bf16(halves: NDArray[np.uint16]) -> NDArray[np.float32]:
    """bfloat16 bits as float32, exactly."""
    values: NDArray[np.float32] = (halves.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return values


def stored_nbytes(shape: tuple[int, ...], dtype: str, encoding: str = "f32-to-bf16") -> int:
    """Bytes that a tensor takes in a shard."""
    each = 2 if dtype == "float32" and encoding == "f32-to-bf16" else _DTYPES[dtype]
    return math.prod(shape) * each


class TensorCacheWriter:
    """Writes a tensor cache into a folder, holding at most one shard in memory. Call `finish` at the end."""

    def __init__(self, folder: Path, shard_cap: int = SHARD_CAP) -> None:
        self._folder = folder
        self._cap = shard_cap
        self._shards: list[dict[str, Any]] = []
        self._pending: list[dict[str, Any]] = []
        self._data: list[memoryview] = []
        self._size = 0
        self._names: set[str] = set()
        self.nbytes = 0  # of the tensors as the runtime holds them

    def add(self, name: str, tensor: NDArray[Any], encoding: str = "f32-to-bf16") -> None:
        """Append a float32, float16 or uint32 tensor. Raises ValueError for what the format cannot hold."""
        dtype = str(tensor.dtype)
        if (
            name in self._names
            or dtype not in ("float32", "float16", "uint32")
            or encoding not in ("f32-to-bf16", "raw")
        ):
            raise ValueError(f"tensor {name} ({dtype}, {encoding}) cannot be added to the cache")
        self._names.add(name)
        self.nbytes += tensor.nbytes
        shape = list(tensor.shape)
        stored = (
            _encode_bf16(tensor) if dtype == "float32" and encoding == "f32-to-bf16" else np.ascontiguousarray(tensor)
        )
        data = stored.reshape(-1).view(np.uint8).data
        record = {"name": name, "shape": shape, "dtype": dtype, "format": encoding, "nbytes": data.nbytes}
        if self._size + data.nbytes >= self._cap:
            if data.nbytes * 2 >= self._cap:  # its own shard; pending tensors wait for the next
                self._write([data], [record | {"byteOffset": 0}])
                return
            self._flush()
        self._pending.append(record | {"byteOffset": self._size})
        self._data.append(data)
        self._size += data.nbytes

    def finish(self, metadata: dict[str, Any]) -> list[Path]:
        """Write the pending tensors and the JSON files; return all files, tensor-cache.json last."""
        self._flush()
        files = [self._folder / shard["dataPath"] for shard in self._shards]
        names = {"ndarray-cache": self._shards}
        as_bf16 = copy.deepcopy(self._shards)
        changed = False
        for record in (r for shard in as_bf16 for r in shard["records"]):
            if record["dtype"] == "float32" and record["format"] == "f32-to-bf16":
                record.update(dtype="bfloat16", format="raw")
                changed = True
        if changed:
            names |= {"ndarray-cache-b16": as_bf16, "tensor-cache-b16": as_bf16}
        names["tensor-cache"] = self._shards
        for name, shards in names.items():
            files.append(self._folder / f"{name}.json")
            files[-1].write_text(json.dumps({"metadata": metadata, "records": shards}, indent=2), encoding="utf-8")
        return files

    def _flush(self) -> None:
        if self._pending:
            self._write(self._data, self._pending)
            self._pending, self._data, self._size = [], [], 0

    def _write(self, data: list[memoryview], records: list[dict[str, Any]]) -> None:
        path = f"params_shard_{len(self._shards)}.bin"
        digest = hashlib.md5(usedforsecurity=False)
        with (self._folder / path).open("wb") as file:
            for part in data:
                digest.update(part)
                file.write(part)
        nbytes = sum(part.nbytes for part in data)
        self._shards.append(
            {
                "dataPath": path,
                "format": "raw-shard",
                "nbytes": nbytes,
                "records": records,
                "md5sum": digest.hexdigest(),
            }
        )


def _encode_bf16(tensor: NDArray[np.float32]) -> NDArray[np.uint16]:
    """to_bf16 in blocks, so that temporaries stay small."""
    flat = np.ascontiguousarray(tensor).reshape(-1)
    halves = np.empty(len(flat), np.uint16)
    for start in range(0, len(flat), _BLOCK):
        halves[start : start + _BLOCK] = to_bf16(flat[start : start + _BLOCK])
    return halves


class TensorCacheReader:
    """Reads a tensor cache, a tensor at a time, without TVM. Sizes are checked at once, md5 sums by `verify`."""

    def __init__(self, folder: Path) -> None:
        """Raises EdgeStreamError if a file is missing, truncated or inconsistent."""
        self._folder = folder
        try:
            index = parse_json((folder / "tensor-cache.json").read_text(encoding="utf-8"))
            self.metadata: dict[str, Any] = dict(index["metadata"])
            self._shards: list[dict[str, Any]] = list(index["records"])
            self.records: dict[str, dict[str, Any]] = {}
            self._path: dict[str, Path] = {}
            for shard in self._shards:
                path = self._shard_path(shard)
                if path.stat().st_size != shard["nbytes"]:
                    raise EdgeStreamError(f"{path.name} has {path.stat().st_size} bytes, not {shard['nbytes']}")
                if not isinstance(shard["md5sum"], str):
                    raise EdgeStreamError(f"tensor-cache.json gives {path.name} no md5 sum")
                for record in shard["records"]:
                    self._check(record, shard["nbytes"])
                    self.records[record["name"]] = record
                    self._path[record["name"]] = path
        except OSError as error:
            raise EdgeStreamError(f"{folder} is not an MLC model: {error.strerror} ({error.filename})") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise EdgeStreamError(f"tensor-cache.json of {folder} is not a tensor cache: {error}") from error

    def _shard_path(self, shard: dict[str, Any]) -> Path:
        name = shard["dataPath"]
        if shard["format"] != "raw-shard" or Path(name).name != name:
            raise EdgeStreamError(f"tensor-cache.json names a shard {name!r} of format {shard['format']!r}")
        return self._folder / str(name)

    def _check(self, record: dict[str, Any], shard_nbytes: int) -> None:
        name, start = record["name"], record["byteOffset"]
        shape = tuple(record["shape"])
        # true is an int, but no size
        sizes = all(type(n) is int and n >= 0 for n in (*shape, start)) and math.prod(n or 1 for n in shape) < 2**48
        known = record["dtype"] in _DTYPES and record["format"] in ("f32-to-bf16", "raw") and name not in self.records
        if (
            not known
            or not sizes
            or stored_nbytes(shape, record["dtype"], record["format"]) != record["nbytes"]
            or start + record["nbytes"] > shard_nbytes
        ):
            raise EdgeStreamError(f"tensor-cache.json describes {name!r} wrongly")

    def read(self, name: str) -> NDArray[Any]:
        """One tensor: uint32, float16 or float32. Raises KeyError for an unknown name."""
        record = self.records[name]
        with self._path[name].open("rb") as file:
            file.seek(record["byteOffset"])
            data = file.read(record["nbytes"])
        if record["dtype"] == "bfloat16" or (record["dtype"] == "float32" and record["format"] == "f32-to-bf16"):
            flat: NDArray[Any] = from_bf16(np.frombuffer(data, "<u2"))
        else:
            flat = np.frombuffer(data, np.dtype(record["dtype"]).newbyteorder("<"))
        return flat.reshape(tuple(record["shape"]))

    def verify(self) -> None:
        """Compare every shard with its md5 sum. Raises EdgeStreamError for the first that differs."""
        for shard in self._shards:
            path = self._shard_path(shard)
            with path.open("rb") as file:
                digest = hashlib.md5(usedforsecurity=False)
                while block := file.read(1 << 20):
                    digest.update(block)
            if digest.hexdigest() != shard["md5sum"]:
                raise EdgeStreamError(f"{path.name} is damaged: its md5 sum differs from tensor-cache.json's")
