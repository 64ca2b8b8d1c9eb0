"""The CPU decoder: weights, the ring cache's memory, and steps of any length over the compiled functions.

Positions and slots: a stream's window tokens have consecutive absolute positions, and the one at position p is in ring
slot (p + offset) mod ring size; `offset` changes only at a rebase. Nothing is moved, and evictions and rewinds need no
bookkeeping: the step determines which slots are visible. Recalled tokens are further sinks: their slots follow those of
the sinks, and memory for them is taken when there are some.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_stream.converters.mlc import rope
from edge_stream.converters.mlc.decoder_config import DecoderConfig
from edge_stream.converters.mlc.quantization import Quantization
from edge_stream.converters.mlc.tensor_cache import TensorCacheReader
from edge_stream.errors import EdgeStreamError
from edge_stream.mlc import layout
from edge_stream.mlc.kernels import ROWS, Lanes, count_blocks
from edge_stream.mlc.runtime import Tensor

F32 = NDArray[np.float32]
DTYPES = {"f32": "float32", "f16": "float16"}


@dataclass(frozen=True)
class Step:
    """es_decoder_step of edge_stream.h, without its tokens."""

    n_ctx: int
    n_keep: int
    n_sinks: int
    n_window: int
    pos_sinks: int
    n_recalled: int
    recalls: bool

    @property
    def n_pinned(self) -> int:
        """Sinks, and what was recalled."""
        return self.n_sinks + self.n_recalled

    @property
    def pos_window(self) -> int:
        """Absolute position of the oldest window token."""
        return self.pos_sinks + self.n_pinned

    @property
    def n_cached(self) -> int:
        """All of these."""
        return self.n_pinned + self.n_window


def load_weights(
    folder: Path, names: list[tuple[str, tuple[int, ...], str]], q: Quantization, lanes: Lanes
) -> list[Tensor]:
    """The tensors of a folder in the decoder's layout and order. names: (name, stored shape, dtype) as expected.

    Raises EdgeStreamError if the folder's tensors are not the model's.
    """
    reader = TensorCacheReader(folder)
    reader.verify()
    found = []
    for name, shape, dtype in names:
        record = reader.records.get(name)
        if record is None:
            raise EdgeStreamError(f"{folder} lacks the tensor {name} of a model in {q.name}")
        if tuple(record["shape"]) != shape or record["dtype"] not in (dtype, "bfloat16"):
            raise EdgeStreamError(
                f"{folder} holds {name} as {record['dtype']} {record['shape']}, {q.name} has {dtype} {list(shape)}"
            )
        tensor = Tensor(*layout.blocked_shape(name, shape, dtype, q, lanes))
        layout.fill(name, reader.read(name), tensor.np, q)
        found.append(tensor)
    return found


class RingDecoder:
    """Computes the logits of a stream's steps. One stream at a time."""

    def __init__(
        self,
        functions: Any,
        weights: list[Tensor],
        config: DecoderConfig,
        dtype: tuple[str, str],
        lanes: Lanes,
        n_ctx: int,
    ) -> None:
        self.config, self.width = config, lanes.block
        self._vm = functions
        self._weights = [w.tvm for w in weights]
        self.n_cells = n_ctx
        self._dtype = dtype
        self._n_more = 0  # blocks for recalled tokens
        self._take_memory(count_blocks(n_ctx, lanes))
        self._ring = Tensor((4,), "int32")
        self._tables = rope.tables(config)
        self._kinds = [sorted(set(config.rope_kinds)).index(kind) for kind in config.rope_kinds]
        self._offset = 0

    def _take_memory(self, n_blocks: int) -> None:
        c, n = self.config, n_blocks
        self._keys = Tensor((c.n_layer, c.n_head_kv, n, c.head_dim, self.width), self._dtype[0])
        self._values = Tensor((c.n_layer, c.n_head_kv, n, self.width, c.head_dim), self._dtype[1])
        self._rows = {m: _Rows(m, c, n, self.width) for m in ROWS}

    def _make_room(self, step: Step, n_recalled: int) -> None:
        """Take memory for so many recalled tokens, between the sinks' and the ring's."""
        old, n_old = (self._keys.np, self._values.np), self._layout(step)[0]
        n_more = -(-(step.n_keep + n_recalled) // self.width) - n_old
        if n_more <= 0:
            return
        self._n_more += n_more
        self._take_memory(old[0].shape[2] + n_more)
        for new, was in zip((self._keys.np, self._values.np), old, strict=True):
            new[:, :, :n_old] = was[:, :, :n_old]
            new[:, :, n_old + n_more :] = was[:, :, n_old:]

    def decode(self, tokens: NDArray[np.int32], step: Step, all_logits: bool) -> F32:
        """Logits [n or 1, n_vocab] of tokens that follow the cached ones."""
        n = len(tokens)
        if step.recalls:
            self._make_room(step, step.n_recalled + n)
        most = max(ROWS)
        out = np.empty((n if all_logits else 1, self.config.n_vocab), np.float32)
        at = 0
        while at < n:
            count = min(most, n - at)
            m = min(m for m in ROWS if m >= count)  # the rest is padding
            hidden = self._hidden(tokens[at : at + count], m, step, at)
            last = at + count == n
            if all_logits:
                out[at : at + count] = self._logits(hidden, m)[:count]
            elif last:
                row = self._rows[1].hidden
                row.np[0, 0] = np.from_dlpack(hidden)[0, count - 1]
                out[0] = self._logits(row.tvm, 1)[0]
            at += count
        return out

    def _hidden(self, tokens: NDArray[np.int32], m: int, step: Step, done: int) -> Any:
        """Run some of a step's tokens, `done` of which are already cached, through all layers."""
        rows, count = self._rows[m], len(tokens)
        pinned = step.n_sinks < step.n_keep or step.recalls
        n_pinned = step.n_pinned + (done if pinned else 0)
        n_window = step.n_window + (0 if pinned else done)
        index = np.arange(count)
        cached = n_pinned + (0 if pinned else n_window) + index  # in-cache positions
        position = step.pos_sinks + cached
        rows.ids.np[:count] = tokens
        rows.ids.np[count:] = 0
        table = rows.rows.np
        table[count:] = (-1, 0, 0)
        sink_blocks, ring_size = self._layout(step)
        if pinned:
            table[:count, 0] = n_pinned + index
            table[:count, 1] = n_pinned + index + 1
            table[:count, 2] = 0
        else:
            table[:count, 0] = sink_blocks * self.width + (position + self._offset) % ring_size
            table[:count, 1] = n_pinned
            table[:count, 2] = n_window + index + 1
        start = (step.pos_window + self._offset) % ring_size
        end = start + n_window + count
        reach = 0 if pinned else ring_size if end > ring_size else end
        self._ring.np[:] = (sink_blocks, start, ring_size, sink_blocks + -(-reach // self.width))
        self._angles(rows.at_absolute.np, cached if pinned else position)  # pinned keys are never moved
        self._angles(rows.at_cached.np, cached)
        rows.scales.np[:count] = self.config.score_scale * self._temperature(cached)
        arguments = [t.tvm for t in (rows.ids, rows.at_absolute, rows.at_cached, rows.scales, rows.rows, self._ring)]
        memory = [t.tvm for t in (self._keys, self._values, rows.scores)]
        return self._vm[f"hidden_{m}"](*arguments, *memory, self._weights)

    def _logits(self, hidden: Any, m: int) -> F32:
        return np.asarray(np.from_dlpack(self._vm[f"logits_{m}"](hidden, self._weights))[0])

    def _angles(self, out: NDArray[np.float32], position: NDArray[np.int64]) -> None:
        """Cosines and sines in float64, rounded once."""
        angle = position[:, None] * self._tables[:, None]
        out[:, 0, : len(position)] = np.cos(angle)
        out[:, 1, : len(position)] = np.sin(angle)

    def _temperature(self, position: NDArray[np.int64]) -> Any:
        """Factor on queries at in-cache positions: it grows in steps beyond the original training length."""
        beta, scaling = self.config.temperature, self.config.rope_scaling
        return 1.0 + beta * np.log1p(position // scaling.n_ctx_orig) if scaling else 1.0

    def _layout(self, step: Step) -> tuple[int, int]:
        """Blocks of pinned tokens, and slots of the ring."""
        return -(-step.n_keep // self.width) + self._n_more, step.n_ctx - step.n_keep

    def _slots(self, step: Step) -> NDArray[np.int64]:
        """Slots of the cached tokens, in order."""
        sink_blocks, ring_size = self._layout(step)
        window = (step.pos_window + np.arange(step.n_window) + self._offset) % ring_size
        return np.concatenate([np.arange(step.n_pinned), sink_blocks * self.width + window])

    def rebase(self, step: Step, delta: int) -> None:
        """Rotate the window's keys back by delta positions. Slots and sinks do not change."""
        slots = self._slots(step)[step.n_pinned :]
        half = self.config.head_dim // 2
        angles = -delta * self._tables[..., None, None]
        block, lane = slots // self.width, slots % self.width
        for kind, layer in zip(self._kinds, self._keys.np, strict=True):  # [kv heads, blocks, head_dim, block]
            cos, sin = np.cos(angles[kind]), np.sin(angles[kind])
            keys = layer[:, block, :, lane].astype(np.float64).T  # [head_dim, kv heads, n]
            a, b = keys[:half], keys[half:]
            layer[:, block, :, lane] = np.concatenate([a * cos - b * sin, a * sin + b * cos]).T
        self._offset += delta

    def state_size(self, step: Step) -> int:
        """Bytes of `state`."""
        c = self.config
        each = c.n_layer * c.n_head_kv * c.head_dim
        return step.n_cached * each * (self._keys.np.itemsize + self._values.np.itemsize)

    def state(self, step: Step) -> bytes:
        """Keys, then values, of the cached tokens, [n, layers, kv heads, head_dim], in stream order."""
        block, lane = np.divmod(self._slots(step), self.width)
        keys = self._keys.np[:, :, block, :, lane]
        values = self._values.np[:, :, block, lane].transpose(2, 0, 1, 3)
        return bytes(keys.tobytes() + values.tobytes())

    def set_state(self, step: Step, data: bytes) -> bool:
        """Restore what `state` returned; False if the size differs."""
        if len(data) != self.state_size(step):
            return False
        self._make_room(step, step.n_recalled)
        c = self.config
        shape = (step.n_cached, c.n_layer, c.n_head_kv, c.head_dim)
        split = len(data) * self._keys.np.itemsize // (self._keys.np.itemsize + self._values.np.itemsize)
        block, lane = np.divmod(self._slots(step), self.width)
        self._keys.np[:, :, block, :, lane] = np.frombuffer(data[:split], self._keys.np.dtype).reshape(shape)
        values = np.frombuffer(data[split:], self._values.np.dtype).reshape(shape)
        self._values.np[:, :, block, lane] = values.transpose(1, 2, 0, 3)
        return True


class _Rows:
    """Inputs of the functions for m rows, refilled for each call, and their scratch memory."""

    def __init__(self, m: int, c: DecoderConfig, n_blocks: int, width: int) -> None:
        self.ids = Tensor((m,), "int32")
        angles = (len(set(c.rope_kinds)), 2, m, c.head_dim // 2)
        self.at_absolute = Tensor(angles, "float32")
        self.at_cached = Tensor(angles, "float32")
        self.scales = Tensor((m,), "float32")
        self.rows = Tensor((m, 3), "int32")
        self.scores = Tensor((c.n_head, m, n_blocks, width), "float32")
        self.hidden = Tensor((1, m, c.n_embd), "float32")
