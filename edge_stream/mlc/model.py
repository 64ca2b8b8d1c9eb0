"""The converters' model definition (converters/mlc/model.py) on our CPU kernels and ring cache.

Compiled once for each number of rows m in ROWS; a step of any length is split into those.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm.relax.frontend import nn
from tvm.target import Target

from edge_stream.converters.mlc.decoder_config import DecoderConfig
from edge_stream.converters.mlc.model import Decoder
from edge_stream.converters.mlc.quantization import Quantization
from edge_stream.mlc.kernels import ROWS, Lanes, experts, integer, linear
from edge_stream.mlc.kernels.attention import NO_WINDOW, attention
from edge_stream.mlc.kernels.elementwise import gated


def blocked(lanes: Lanes) -> type[Any]:
    """A replacement for edge_stream.converters.mlc.model.Matrix, with the layout of layout.py."""

    class BlockedMatrix(nn.Module):  # type: ignore[misc]
        """A weight [rows, columns] in blocks of rows, float32 or 4 bits, optionally with a bias [rows]."""

        def __init__(self, rows: int, columns: int, q: Quantization, *, bias: bool = False, linear: bool = True):
            super().__init__()
            self.rows, self.columns, self.bits, self.has_bias = rows, columns, q.bits, bias
            blocks, groups = -(-rows // lanes.block), -(-columns // 32)
            if q.bits:
                self.q_weight = nn.Parameter((blocks, groups * 4, lanes.block), "uint32")
                self.q_scale = nn.Parameter((blocks, groups, lanes.block), "float32")
            else:
                self.weight = nn.Parameter((blocks, columns, lanes.block), "float32")
            if bias:
                self.bias = nn.Parameter((rows,), "float32")

        def take(self, ids: nn.Tensor) -> nn.Tensor:
            """Rows of ids [m]: [m, columns]."""
            m = int(ids.shape[0])
            kernel = linear.take_q4 if self.bits else linear.take_f32
            return self._call(kernel, "take", m, ids, (m, self.columns))

        def forward(self, x: nn.Tensor, out_dtype: str | None = None) -> nn.Tensor:
            """x [1, m, columns] times the transposed matrix: [1, m, rows]."""
            m = int(x.shape[1])
            four_bits = integer.matmul_q4 if lanes.in_integers(m) else linear.matmul_q4
            out = self._call(four_bits if self.bits else linear.matmul_f32, "matmul", m, x, (1, m, self.rows))
            return out + self.bias if self.has_bias else out

        def gated(self, x: nn.Tensor, activation: str) -> nn.Tensor:
            """See Matrix.gated."""
            m, n = int(x.shape[1]), self.rows // 2
            out = nn.Tensor.placeholder((1, m, n), "float32")
            return nn.op.tensor_ir_op(gated(m, n, activation, lanes), "gated", [self(x)], out)

        def _call(self, kernel: Any, name: str, m: int, x: nn.Tensor, shape: tuple[int, ...]) -> nn.Tensor:
            function = kernel(m, self.rows, self.columns, lanes)
            weights = [self.q_weight, self.q_scale] if self.bits else [self.weight]
            return nn.op.tensor_ir_op(function, name, [x, *weights], nn.Tensor.placeholder(shape, "float32"))

    class BlockedStack(nn.Module):  # type: ignore[misc]
        """The matrices of n experts; each begins a block."""

        def __init__(self, n: int, rows: int, columns: int, q: Quantization):
            super().__init__()
            self.n, self.rows, self.columns, self.bits = n, rows, columns, q.bits
            blocks, groups = n * -(-rows // lanes.block), -(-columns // 32)
            if q.bits:
                self.q_weight = nn.Parameter((blocks, groups * 4, lanes.block), "uint32")
                self.q_scale = nn.Parameter((blocks, groups, lanes.block), "float32")
            else:
                self.weight = nn.Parameter((blocks, columns, lanes.block), "float32")

        def forward(self, x: nn.Tensor, chosen: nn.Tensor, share: int) -> nn.Tensor:
            """See Stack.forward."""
            m = int(chosen.shape[0]) * int(chosen.shape[1])
            kernel = experts.matmul_q4 if self.bits else experts.matmul_f32
            function = kernel(m, int(chosen.shape[1]), share, self.n, self.rows, self.columns, lanes)
            weights = [self.q_weight, self.q_scale] if self.bits else [self.weight]
            out = nn.Tensor.placeholder((m, self.rows), "float32")
            return nn.op.tensor_ir_op(function, "experts", [x, chosen, *weights], out)

    BlockedMatrix.stack = BlockedStack
    return BlockedMatrix


class RingCache:
    """Replaces TVM's paged cache while the model is traced. See kernels/attention.py for the arguments."""

    def __init__(self, config: DecoderConfig, dtype: tuple[str, str], lanes: Lanes, **arguments: nn.Tensor) -> None:
        self.config, self.dtype, self.lanes = config, dtype, lanes
        self.inputs = [arguments[name] for name in ("at_absolute", "at_cached", "scales", "rows", "ring")]
        self.memory = [arguments[name] for name in ("keys", "values", "scores")]

    def attention_with_fused_qkv(self, layer: int, qkv: nn.Tensor, n_head: int, sm_scale: float) -> nn.Tensor:
        """qkv [1, m, heads, head_dim]: [1, m, n_head, head_dim]. Memory is written in place; sm_scale is in scales."""
        c, m = self.config, int(qkv.shape[1])
        kinds = sorted(set(c.rope_kinds))
        kernel = attention(m, c.n_layer, n_head, c.n_head_kv, c.head_dim, len(kinds), self.dtype, self.lanes)
        which = [layer, kinds.index(c.rope_kinds[layer]), c.window(layer) or NO_WINDOW]
        out = nn.Tensor.placeholder((1, m, n_head, c.head_dim), "float32")
        *self.memory, result = nn.op.tensor_ir_inplace_op(
            kernel,
            "attention",
            [qkv, *self.inputs, *self.memory, nn.Tensor.from_const(np.array(which, np.int32))],
            [6, 7, 8, -1],
            [*self.memory, out],
        )
        return result


class StepDecoder(Decoder):
    """The library's functions: hidden_m (feeds m tokens) and logits_m, for every m in ROWS."""

    def __init__(self, config: DecoderConfig, q: Quantization, dtype: tuple[str, str], lanes: Lanes, target: Target):
        super().__init__(config, q, target, blocked(lanes))
        self.dtype, self.lanes = dtype, lanes
        for m in ROWS:
            setattr(self, f"hidden_{m}", self._hidden)
            setattr(self, f"logits_{m}", self.get_logits)

    def _hidden(
        self,
        input_ids: nn.Tensor,
        at_absolute: nn.Tensor,
        at_cached: nn.Tensor,
        scales: nn.Tensor,
        rows: nn.Tensor,
        ring: nn.Tensor,
        keys: nn.Tensor,
        values: nn.Tensor,
        scores: nn.Tensor,
    ) -> nn.Tensor:
        """[m] int32: [1, m, d], normed."""
        m = int(input_ids.shape[0])
        cache = RingCache(
            self.config, self.dtype, self.lanes, at_absolute=at_absolute, at_cached=at_cached, scales=scales, rows=rows,
            ring=ring, keys=keys, values=values, scores=scores,
        )  # fmt: skip
        x = nn.op.reshape(self.embed(input_ids), (1, m, self.config.n_embd))
        return self.model(x, cache)

    def spec(self) -> dict[str, Any]:
        """The inputs of every function, for export_tvm."""
        c, width = self.config, self.lanes.block
        angles = (len(set(c.rope_kinds)), 2)
        packed = {"param_mode": "packed", "effect_mode": "none"}
        found: dict[str, Any] = {}
        for m in ROWS:
            found[f"hidden_{m}"] = {
                "input_ids": nn.spec.Tensor([m], "int32"),
                "at_absolute": nn.spec.Tensor([*angles, m, c.head_dim // 2], "float32"),
                "at_cached": nn.spec.Tensor([*angles, m, c.head_dim // 2], "float32"),
                "scales": nn.spec.Tensor([m], "float32"),
                "rows": nn.spec.Tensor([m, 3], "int32"),
                "ring": nn.spec.Tensor([4], "int32"),
                "keys": nn.spec.Tensor([c.n_layer, c.n_head_kv, "n_blocks", c.head_dim, width], self.dtype[0]),
                "values": nn.spec.Tensor([c.n_layer, c.n_head_kv, "n_blocks", width, c.head_dim], self.dtype[1]),
                "scores": nn.spec.Tensor([c.n_head, m, "n_blocks", width], "float32"),
                "$": packed,
            }
            found[f"logits_{m}"] = {"hidden": nn.spec.Tensor([1, m, c.n_embd], "float32"), "$": packed}
        return found
