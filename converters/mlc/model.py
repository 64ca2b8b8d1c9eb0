"""The compiled decoder, in tvm.relax.frontend.nn, with the functions and parameters that MLC's runtime expects.

For families with `compiles` (edge_stream/families); parameters have Llama's names (see Mlc.rename). Shapes:
n tokens, d hidden size, v vocabulary, b sequences. Attention is TVM's paged cache (tvm.relax.frontend.nn.llm.kv_cache),
which keeps sinks and a sliding window once the runtime enables them for a sequence. Function names and signatures:
mlc-llm, cpp/serve/function_table.cc.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from tvm import relax, te, tirx
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn.llm import kv_cache
from tvm.target import Target

from edge_stream.converters.mlc.decoder_config import DecoderConfig
from edge_stream.converters.mlc.layer_kinds import scale_of
from edge_stream.converters.mlc.quantization import Quantization
from edge_stream.converters.mlc.rope import scaling_for_tvm


class Matrix(nn.Module):  # type: ignore[misc]
    """A weight [rows, columns], quantised or not, optionally with a bias [rows]."""

    def __init__(self, rows: int, columns: int, q: Quantization, *, bias: bool = False, linear: bool = True) -> None:
        super().__init__()
        self.rows, self.columns, self.q = rows, columns, q
        self.transposed = q.transposed and linear
        if q.bits:
            weight, scale = q.shapes(rows, columns)
            self.q_weight = nn.Parameter(weight[::-1] if self.transposed else weight, "uint32")
            self.q_scale = nn.Parameter(scale[::-1] if self.transposed else scale, q.dtype)
        else:
            self.weight = nn.Parameter((rows, columns), q.dtype)
        if bias:
            self.bias = nn.Parameter((rows,), q.dtype)
        self.has_bias = bias

    def take(self, ids: nn.Tensor) -> nn.Tensor:
        """Rows of ids [n]: [n, columns]."""
        if not self.q.bits:
            return nn.op.take(self.weight, ids, axis=0)
        words, scales = nn.op.take(self.q_weight, ids, axis=0), nn.op.take(self.q_scale, ids, axis=0)
        return self._dequantise(words, scales, words.shape[0], transposed=False)

    def forward(self, x: nn.Tensor, out_dtype: str | None = None) -> nn.Tensor:
        """x [.., columns] times the transposed matrix: [.., rows]."""
        if not self.q.bits:
            weight = nn.op.permute_dims(self.weight)
        elif self.transposed:
            weight = self._dequantise(self.q_weight, self.q_scale, self.rows, transposed=True)
        else:
            weight = nn.op.permute_dims(self._dequantise(self.q_weight, self.q_scale, self.rows, transposed=False))
        out = nn.op.matmul(x, weight, out_dtype=out_dtype)
        return out + self.bias if self.has_bias else out

    def gated(self, x: nn.Tensor, activation: str) -> nn.Tensor:
        """For a matrix with gate's rows, then up's: activation(gate(x)) * up(x), [.., rows / 2]."""
        gate, up = nn.op.split(self(x), 2, axis=-1)
        return (nn.op.silu(gate) if activation == "silu" else nn.op.gelu(gate, approximate="tanh")) * up

    def _dequantise(self, words: nn.Tensor, scales: nn.Tensor, rows: Any, *, transposed: bool) -> nn.Tensor:
        q, columns = self.q, self.columns

        def expression(w: te.Tensor, s: te.Tensor) -> te.Tensor:
            def value(*index: Any) -> Any:
                k, n = index if transposed else index[::-1]
                at_word = (k // q.per_word, n) if transposed else (n, k // q.per_word)
                at_scale = (k // q.group_size, n) if transposed else (n, k // q.group_size)
                shift = (k % q.per_word * q.bits).astype("uint32")
                bits = tirx.bitwise_and(w(*at_word) >> shift, tirx.const(2**q.bits - 1, "uint32"))
                return (bits.astype(q.dtype) - tirx.const(q.max_int, q.dtype)) * s(*at_scale)

            return te.compute((columns, rows) if transposed else (rows, columns), value, name="dequantize")

        return nn.op.tensor_expr_op(expression, "dequantize", [words, scales])


class Stack(nn.Module):  # type: ignore[misc]
    """The matrices [rows, columns] of n experts, quantised or not. Never transposed."""

    def __init__(self, n: int, rows: int, columns: int, q: Quantization) -> None:
        super().__init__()
        self.rows, self.columns, self.q = rows, columns, q
        if q.bits:
            weight, scale = q.shapes(rows, columns)
            self.q_weight = nn.Parameter((n, *weight), "uint32")
            self.q_scale = nn.Parameter((n, *scale), q.dtype)
        else:
            self.weight = nn.Parameter((n, rows, columns), q.dtype)

    def forward(self, x: nn.Tensor, chosen: nn.Tensor, share: int) -> nn.Tensor:
        """chosen [n, k] experts; x [n k / share, columns], each row for `share` of them: [n k, rows]."""
        q, k, f32 = self.q, int(chosen.shape[1]), "float32"

        def expression(x: te.Tensor, chosen: te.Tensor, *weights: te.Tensor) -> te.Tensor:
            column = te.reduce_axis((0, self.columns), name="column")

            def weight(e: Any, r: Any, c: Any) -> Any:
                if not q.bits:
                    return weights[0][e, r, c].astype(f32)
                word, scale = weights[0][e, r, c // q.per_word], weights[1][e, r, c // q.group_size]
                bits = (word >> (c % q.per_word * q.bits).astype("uint32")) & tirx.const(2**q.bits - 1, "uint32")
                value = (bits.astype(q.dtype) - tirx.const(q.max_int, q.dtype)) * scale
                return value.astype(f32)

            def product(i: Any, r: Any) -> Any:
                e = chosen[i // k, i % k]
                return te.sum(x[i // share, column].astype(f32) * weight(e, r, column), axis=column)

            return te.compute((chosen.shape[0] * k, self.rows), product, name="experts")

        weights = [self.q_weight, self.q_scale] if q.bits else [self.weight]
        return nn.op.astype(nn.op.tensor_expr_op(expression, "experts", [x, chosen, *weights]), q.dtype)


Matrix.stack = Stack
MatrixType = Any  # Matrix, or its replacement (edge_stream.mlc.model); its `stack` is Stack or its replacement


class RMSNorm(nn.Module):  # type: ignore[misc]
    """Over the last axis, in the model's dtype."""

    def __init__(self, size: int, eps: float, dtype: str) -> None:
        super().__init__()
        self.weight = nn.Parameter((size,), dtype)
        self.eps = eps

    def forward(self, x: nn.Tensor) -> nn.Tensor:
        """Same shape as x."""
        return nn.op.rms_norm(x, self.weight, axes=-1, epsilon=self.eps)


class Attention(nn.Module):  # type: ignore[misc]
    """Grouped-query attention over the paged cache, which also applies the rotary positions."""

    def __init__(self, config: DecoderConfig, q: Quantization, matrix: MatrixType) -> None:
        super().__init__()
        c = self.config = config
        heads = {"q_proj": c.n_head, "k_proj": c.n_head_kv, "v_proj": c.n_head_kv}
        if c.qkv_name:
            heads = {c.qkv_name: sum(heads.values())}
        for name, n in heads.items():
            setattr(self, name, matrix(n * c.head_dim, c.n_embd, q, bias=c.qkv_bias))
        if c.qk_norm:
            self.q_norm = RMSNorm(c.head_dim, c.norm_eps, q.dtype)
            self.k_norm = RMSNorm(c.head_dim, c.norm_eps, q.dtype)
        self.o_proj = matrix(c.n_embd, c.n_head * c.head_dim, q)

    def forward(self, x: nn.Tensor, cache: kv_cache.PagedKVCache, layer: int) -> nn.Tensor:
        """x [b, n, d]: [b, n, d]."""
        c = self.config
        b, n, _ = x.shape
        if c.qkv_name:
            qkv = nn.op.reshape(getattr(self, c.qkv_name)(x), (b, n, c.n_head + 2 * c.n_head_kv, c.head_dim))
            q, k, v = nn.op.split(qkv, [c.n_head, c.n_head + c.n_head_kv], axis=2) if c.qk_norm else (None,) * 3
        else:
            q, k, v = (nn.op.reshape(getattr(self, f"{p}_proj")(x), (b, n, -1, c.head_dim)) for p in "qkv")
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if q is not None:
            qkv = nn.op.concat([q, k, v], dim=2)
        out = cache.attention_with_fused_qkv(layer, qkv, c.n_head, sm_scale=scale_of(c, layer))
        return self.o_proj(nn.op.reshape(out, (b, n, c.n_head * c.head_dim)))


class MLP(nn.Module):  # type: ignore[misc]
    """down(activation(gate(x)) * up(x))."""

    def __init__(self, config: DecoderConfig, q: Quantization, matrix: MatrixType) -> None:
        super().__init__()
        self.activation = config.activation
        self.gate_up_proj = matrix(2 * config.n_ff, config.n_embd, q)
        self.down_proj = matrix(config.n_embd, config.n_ff, q)

    def forward(self, x: nn.Tensor) -> nn.Tensor:
        """x [b, n, d]: [b, n, d]."""
        return self.down_proj(self.gate_up_proj.gated(x, self.activation))


class Experts(nn.Module):  # type: ignore[misc]
    """The sum of the best experts' MLPs, by their share of the router's softmax, which is made to add up to 1.

    Names as in mlc-llm's qwen3_moe. The router is not quantised.
    """

    def __init__(self, config: DecoderConfig, q: Quantization, matrix: MatrixType) -> None:
        super().__init__()
        c = self.config = config
        self.dtype = q.dtype
        self.gate = matrix(c.n_expert, c.n_embd, replace(q, bits=0, transposed=False))
        self.moe_gate_up_proj = matrix.stack(c.n_expert, 2 * c.n_ff_expert, c.n_embd, q)
        self.moe_down_proj = matrix.stack(c.n_expert, c.n_embd, c.n_ff_expert, q)

    def forward(self, x: nn.Tensor) -> nn.Tensor:
        """x [b, n, d]: [b, n, d]."""
        c, k = self.config, self.config.n_expert_used
        b, n, d = x.shape
        scores = nn.op.reshape(self.gate(x, out_dtype="float32"), (b * n, c.n_expert))
        order = nn.op.tensor_expr_op(_rank, "rank", [scores])
        chosen = nn.op.tensor_expr_op(partial(_chosen, k), "chosen", [order])
        best = nn.op.tensor_expr_op(partial(_best, k), "best", [scores, order])
        h = self.moe_gate_up_proj(nn.op.reshape(x, (b * n, d)), chosen, k)
        gate, up = nn.op.split(h, 2, axis=-1)
        activated = nn.op.silu(gate) if c.activation == "silu" else nn.op.gelu(gate, approximate="tanh")
        h = self.moe_down_proj(activated * up, chosen, 1)
        out = nn.op.tensor_expr_op(_weighted, "weighted", [h, nn.op.softmax(best, axis=-1)])
        return nn.op.reshape(nn.op.astype(out, self.dtype), (b, n, d))


def _rank(scores: te.Tensor) -> te.Tensor:
    """scores [n, e]: how many experts of a token come before each one, 0 to e - 1, each once whatever the scores are.

    The ranks become indices of matrices: not a number counts as the lowest.
    """
    other = te.reduce_axis((0, scores.shape[1]), name="other")

    def before(i: Any, e: Any) -> Any:
        a, b = _ordered(scores[i, other]), _ordered(scores[i, e])
        first = tirx.Or(a > b, tirx.And(a == b, other < e))
        return te.sum(tirx.Select(first, tirx.const(1, "int32"), tirx.const(0, "int32")), axis=other)

    return te.compute(scores.shape, before, name="rank")


def _ordered(score: Any) -> Any:
    return tirx.Select(tirx.isnan(score), tirx.min_value("float32"), score)


def _chosen(k: int, order: te.Tensor) -> te.Tensor:
    """The k best experts of each token, [n, k]."""
    e = te.reduce_axis((0, order.shape[1]), name="e")
    none = tirx.const(0, "int32")

    def which(i: Any, j: Any) -> Any:
        return te.sum(tirx.Select(order[i, e] == j.astype("int32"), e.astype("int32"), none), axis=e)

    return te.compute((order.shape[0], k), which, name="chosen")


def _best(k: int, scores: te.Tensor, order: te.Tensor) -> te.Tensor:
    """Their scores, [n, k]."""
    e = te.reduce_axis((0, order.shape[1]), name="e")
    none = tirx.const(0, "float32")

    def which(i: Any, j: Any) -> Any:
        return te.sum(tirx.Select(order[i, e] == j.astype("int32"), scores[i, e], none), axis=e)

    return te.compute((order.shape[0], k), which, name="best")


def _weighted(h: te.Tensor, weights: te.Tensor) -> te.Tensor:
    """h [n k, d], weights [n, k]: their sums [n, d], float32."""
    n, k = weights.shape
    j = te.reduce_axis((0, k), name="j")

    def total(i: Any, c: Any) -> Any:
        return te.sum(h[i * k + j, c].astype("float32") * weights[i, j], axis=j)

    return te.compute((n, h.shape[1]), total, name="weighted")


class Layer(nn.Module):  # type: ignore[misc]
    """Attention and MLP, each with a norm before, perhaps one after, and a residual connection."""

    def __init__(self, config: DecoderConfig, q: Quantization, matrix: MatrixType) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.n_embd, config.norm_eps, q.dtype)
        self.self_attn = Attention(config, q, matrix)
        self.post_attention_layernorm = RMSNorm(config.n_embd, config.norm_eps, q.dtype)
        self.post_norms = config.post_norms
        if config.post_norms:
            self.pre_feedforward_layernorm = RMSNorm(config.n_embd, config.norm_eps, q.dtype)
            self.post_feedforward_layernorm = RMSNorm(config.n_embd, config.norm_eps, q.dtype)
        self.mlp = (Experts if config.n_expert else MLP)(config, q, matrix)

    def forward(self, x: nn.Tensor, cache: kv_cache.PagedKVCache, layer: int) -> nn.Tensor:
        """x [b, n, d]: [b, n, d]."""
        h = self.self_attn(self.input_layernorm(x), cache, layer)
        if self.post_norms:
            x = x + self.post_attention_layernorm(h)
            return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        x = x + h
        return x + self.mlp(self.post_attention_layernorm(x))


class Body(nn.Module):  # type: ignore[misc]
    """All but the output matrix; `model.` in parameter names."""

    def __init__(self, config: DecoderConfig, q: Quantization, matrix: MatrixType) -> None:
        super().__init__()
        self.embed_tokens = matrix(config.n_vocab, config.n_embd, q, linear=False)
        self.layers = nn.ModuleList([Layer(config, q, matrix) for _ in range(config.n_layer)])
        self.norm = RMSNorm(config.n_embd, config.norm_eps, q.dtype)
        self.scale = config.embed_scale

    def forward(self, x: nn.Tensor, cache: kv_cache.PagedKVCache) -> nn.Tensor:
        """x [b, n, d]: [b, n, d], normed."""
        x = x if self.scale == 1.0 else x * self.scale
        for i, layer in enumerate(self.layers):
            x = layer(x, cache, i)
        return self.norm(x)


class Decoder(nn.Module):  # type: ignore[misc]
    """The functions of an MLC model library. Logits are float32. matrix: the weights' class."""

    def __init__(self, config: DecoderConfig, q: Quantization, target: Target, matrix: MatrixType = Matrix) -> None:
        super().__init__()
        self.config, self.q, self.target = config, q, target
        self.model = Body(config, q, matrix)
        if not config.tied:
            self.lm_head = matrix(config.n_vocab, config.n_embd, q)

    def embed(self, input_ids: nn.Tensor) -> nn.Tensor:
        """[n] int32: [n, d]."""
        return self.model.embed_tokens.take(input_ids)

    def get_logits(self, hidden: nn.Tensor) -> nn.Tensor:
        """[b, n, d]: [b, n, v] float32."""
        head = self.model.embed_tokens if self.config.tied else self.lm_head
        return head(hidden, out_dtype="float32")

    def prefill(self, input_embed: nn.Tensor, paged_kv_cache: kv_cache.PagedKVCache) -> Any:
        """[1, n, d]: logits of the last token [1, 1, v], and the cache."""
        hidden = self.model(input_embed, paged_kv_cache)

        def last(x: te.Tensor) -> te.Tensor:
            b, n, d = x.shape
            return te.compute((b, 1, d), lambda i, _, k: x[i, n - 1, k], name="last")

        return self.get_logits(nn.op.tensor_expr_op(last, "last", [hidden])), paged_kv_cache

    def decode(self, input_embed: nn.Tensor, paged_kv_cache: kv_cache.PagedKVCache) -> Any:
        """[1, 1, d]: logits [1, 1, v], and the cache."""
        return self.get_logits(self.model(input_embed, paged_kv_cache)), paged_kv_cache

    def batch_prefill(
        self, input_embeds: nn.Tensor, logit_positions: nn.Tensor, paged_kv_cache: kv_cache.PagedKVCache
    ) -> Any:
        """[1, n, d], [b] int32: logits at the positions [1, b, v], and the cache."""
        hidden = self.model(input_embeds, paged_kv_cache)
        return self.get_logits(nn.op.take(hidden, logit_positions, axis=1)), paged_kv_cache

    def batch_decode(self, input_embeds: nn.Tensor, paged_kv_cache: kv_cache.PagedKVCache) -> Any:
        """[b, 1, d]: logits [b, 1, v], and the cache."""
        return self.get_logits(self.model(input_embeds, paged_kv_cache)), paged_kv_cache

    def batch_verify(self, input_embeds: nn.Tensor, paged_kv_cache: kv_cache.PagedKVCache) -> Any:
        """[1, n, d]: logits of every token [1, n, v], and the cache."""
        return self.get_logits(self.model(input_embeds, paged_kv_cache)), paged_kv_cache

    def softmax_with_temperature(self, logits: nn.Tensor, temperature: nn.Tensor) -> nn.Tensor:
        """[b, 1, v], [b] float32: probabilities [b, 1, v]."""
        return nn.op.softmax(logits / nn.op.reshape(temperature, (temperature.shape[0], 1, 1)), axis=-1)

    def alloc_embedding_tensor(self) -> nn.Tensor:
        """Room for the embeddings of a whole prefill: [chunk, d]."""
        return nn.op.empty((self.config.prefill_chunk, self.config.n_embd), dtype=self.q.dtype)

    def create_tir_paged_kv_cache(
        self,
        max_batch_size: tirx.Var,
        max_total_seq_len: tirx.Var,
        prefill_chunk_size: tirx.Var,
        page_size: tirx.Var,
        support_sliding_window: tirx.Var,
    ) -> kv_cache.PagedKVCache:
        """An empty cache. Each argument is a shape of one element."""
        c = self.config
        return kv_cache.TIRPagedKVCache(
            attn_kind="mha",
            max_batch_size=max_batch_size,
            max_total_seq_len=max_total_seq_len,
            prefill_chunk_size=prefill_chunk_size,
            page_size=page_size,
            support_sliding_window=support_sliding_window,
            layer_partition=relax.ShapeExpr([0, c.n_layer]),
            num_hidden_layers=c.n_layer,
            num_attention_heads=c.n_head,
            num_key_value_heads=c.n_head_kv,
            qk_head_dim=c.head_dim,
            v_head_dim=c.head_dim,
            mla_original_qk_head_dim=0,
            mla_original_v_head_dim=0,
            rope_mode=kv_cache.RopeMode.NORMAL,
            rope_scale=1.0 / c.rope_scaling.factor if c.rope_scaling and c.rope_scaling.kind == "linear" else 1,
            rope_theta=c.rope_base,
            rope_scaling=scaling_for_tvm(c),
            rope_ext_factors=relax.prim_value(0),
            rotary_dim=c.head_dim,
            enable_disaggregation=False,
            dtype=self.q.dtype,
            target=self.target,
        )

    def spec(self) -> dict[str, Any]:
        """The inputs of every function, for export_tvm."""
        d, v, dtype = self.config.n_embd, self.config.n_vocab, self.q.dtype
        packed = {"param_mode": "packed", "effect_mode": "none"}
        alone = {"param_mode": "none", "effect_mode": "none"}
        cache = nn.spec.Object(object_type=kv_cache.PagedKVCache)

        def embeds(*shape: Any) -> Any:
            return nn.spec.Tensor([*shape, d], dtype)

        found: dict[str, Any] = {
            "embed": {"input_ids": nn.spec.Tensor(["seq_len"], "int32"), "$": packed},
            "get_logits": {"hidden": embeds("batch_size", "seq_len"), "$": packed},
            "batch_prefill": {
                "input_embeds": embeds(1, "seq_len"),
                "logit_positions": nn.spec.Tensor(["batch_size"], "int32"),
                "paged_kv_cache": cache,
                "$": packed,
            },
            "softmax_with_temperature": {
                "logits": nn.spec.Tensor(["batch_size", 1, v], "float32"),
                "temperature": nn.spec.Tensor(["batch_size"], "float32"),
                "$": alone,
            },
            "alloc_embedding_tensor": {"$": alone},
            "create_tir_paged_kv_cache": {
                "max_batch_size": int,
                "max_total_seq_len": int,
                "prefill_chunk_size": int,
                "page_size": int,
                "support_sliding_window": int,
                "$": alone,
            },
        }
        steps: dict[str, tuple[Any, ...]] = {"prefill": (1, "seq_len"), "decode": (1, 1)}
        batches: dict[str, tuple[Any, ...]] = {"batch_decode": ("batch_size", 1), "batch_verify": (1, "seq_len")}
        for name, shape in steps.items():
            found[name] = {"input_embed": embeds(*shape), "paged_kv_cache": cache, "$": packed}
        for name, shape in batches.items():
            found[name] = {"input_embeds": embeds(*shape), "paged_kv_cache": cache, "$": packed}
        return found
