"""Read a converted MLC model's weights back, dequantised and under their Hugging Face names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edge_stream.converters.mlc.params import Param, list_params, stored_tensors
from edge_stream.converters.mlc.quantization import find_quantization, unpack
from edge_stream.converters.mlc.tensor_cache import TensorCacheReader
from edge_stream.errors import EdgeStreamError

if TYPE_CHECKING:
    from edge_stream.converters.source import Source, TensorInfo
    from edge_stream.families import ModelConfig


class ReadBack:
    """A substitute for the original Source with `folder`'s converted weights, for reference.logits."""

    def __init__(self, folder: Path, source: Source, quantization: str) -> None:
        """Raises EdgeStreamError if the tensor cache is damaged or belongs to another model."""
        self.model: ModelConfig = source.model
        self.tensors: Mapping[str, TensorInfo] = source.tensors
        self._q = find_quantization(quantization)
        self._cache = TensorCacheReader(folder)
        self._cache.verify()
        self._place: dict[str, tuple[Param, int]] = {}
        for param in list_params(source):
            for stored in stored_tensors(param, self._q):
                record = self._cache.records.get(stored.name)
                if record is None or tuple(record["shape"]) != stored.shape or record["dtype"] != stored.dtype:
                    raise EdgeStreamError(f"{folder} is not {source.name} in {quantization}: {stored.name} differs")
            row = 0
            for part in param.parts:
                self._place[part] = (param, row)
                shape = source.tensors[part].shape
                row += shape[0] if len(shape) < 3 else 0  # experts in one tensor: the only part
        self._last: tuple[str, NDArray[np.float32]] | None = None

    def load(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[np.floating[Any]]:
        """Rows start..stop of a tensor, float32."""
        param, row = self._place[name]
        if self._last is None or self._last[0] != param.name:
            whole = self._read(param)
            self._last = (param.name, whole.reshape(param.shape) if len(self.tensors[name].shape) == 3 else whole)
        rows = self.tensors[name].shape[0]
        return self._last[1][row + start : row + (rows if stop is None else min(stop, rows))]

    def _read(self, param: Param) -> NDArray[np.float32]:
        found = [self._cache.read(stored.name) for stored in stored_tensors(param, self._q)]
        if param.kind == "experts":
            found = [array.reshape(-1, array.shape[-1]) for array in found]
        if len(found) == 1:
            whole: NDArray[np.float32] = found[0].astype(np.float32) - np.float32(param.offset)
            return whole
        if self._q.transposed and param.kind == "linear":
            found = [array.T for array in found]
        return unpack(found[0], found[1], param.shape[-1], self._q)
