"""The reference is checked before anything is checked against it.

Without eviction it must agree with llama.cpp (plain decode, F32 cache, no flash attention), with eviction
with llama.cpp's context shift; its bookkeeping must agree with a naive list model, and its answers with
properties that need no second implementation.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference import Reference, Window, default_chunk, load_reference, log_softmax
from tiny_models import (
    N_VOCAB,
    write_tiny_bert,
    write_tiny_gemma3,
    write_tiny_gpt2,
    write_tiny_llama,
    write_tiny_mamba,
    write_tiny_qwen2,
    write_tiny_qwen2vl,
    write_tiny_qwen3,
)

from edge_stream.native import libraries

N_TOKENS = 40

# name -> how to write it. head_dim 64 and a cheap 16/32 are both here, GQA and MHA too.
VARIANTS: dict[str, Callable[[Path], Path]] = {
    "llama": write_tiny_llama,
    "llama-cheap": lambda p: write_tiny_llama(p, head_dim=16, n_embd=48, n_ff=96, seed=1),
    "llama-mha-tied": lambda p: write_tiny_llama(p, head_dim=32, n_head_kv=4, tied=True, seed=2),
    "llama-base": lambda p: write_tiny_llama(p, head_dim=32, rope_base=500000.0, seed=3),
    "llama-linear": lambda p: write_tiny_llama(p, head_dim=32, rope_scaling=("linear", 4.0), seed=4),
    "llama-yarn": lambda p: write_tiny_llama(p, rope_scaling=("yarn", 4.0, 64), seed=5),
    "llama-factors": lambda p: write_tiny_llama(p, rope_base=500000.0, rope_factors=True, seed=6),
    "qwen2": lambda p: write_tiny_qwen2(p, seed=7),
    "qwen2-yarn": lambda p: write_tiny_qwen2(p, rope_base=10000.0, rope_scaling=("yarn", 8.0, 128), seed=8),
    "qwen3": lambda p: write_tiny_qwen3(p, n_embd=128, seed=9),
    "gemma3": lambda p: write_tiny_gemma3(p, seed=10),
    "gemma3-yarn": lambda p: write_tiny_gemma3(
        p,
        head_dim=32,
        rope_base=10000.0,
        rope_scaling=("yarn", 4.0, 64),
        sliding_window_pattern=[True, False, False, True],
        seed=11,
    ),
}
REFUSED: dict[str, Callable[[Path], Path]] = {
    "gpt2": write_tiny_gpt2,
    "bert": write_tiny_bert,
    "mamba": write_tiny_mamba,
    "qwen2vl": write_tiny_qwen2vl,
}

TOLERANCE = 1e-4  # measured on x86-64: 1.8e-5 at most
# ggml-cpu looks GELU up in a float16 table. The reference reproduces the table, but an argument that float32
# and float64 round to different float16 neighbours costs half a permille of one activation: measured 2.5e-4
# (and 3.2e-3 against exact GELU).
TOLERANCE_GELU = 1e-3


# ---------------------------------------------------------------------------------------------------------
# helpers
# ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tiny:
    """One tiny model: its file and its float64 reference."""

    name: str
    path: Path
    ref: Reference

    @property
    def tolerance(self) -> float:
        """Largest acceptable difference of a logit from llama.cpp's."""
        return TOLERANCE_GELU if self.ref.config.arch == "gemma3" else TOLERANCE


@contextmanager
def open_llama(path: Path, n_ctx: int = 256, **params: Any) -> Iterator[Any]:
    """Helper: a llama_context over ``path``, CPU, F32 cache, no flash attention; yields (lib, model, ctx)."""
    lib = libraries.llama()
    lib.llama_backend_init()
    mp = lib.llama_model_default_params()
    mp.n_gpu_layers = 0
    model = lib.llama_model_load_from_file(str(path).encode(), mp)
    assert model, f"llama.cpp does not load {path.name}"
    cp = lib.llama_context_default_params()
    cp.n_ctx = cp.n_batch = cp.n_ubatch = n_ctx
    cp.type_k = cp.type_v = 0  # GGML_TYPE_F32
    cp.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
    cp.offload_kqv = cp.op_offload = False  # a GPU build must not lend a hand either
    cp.n_threads = cp.n_threads_batch = 1
    for key, value in params.items():
        setattr(cp, key, value)
    ctx = lib.llama_init_from_model(model, cp)
    try:
        assert ctx, f"llama.cpp makes no context for {path.name}"
        yield lib, model, ctx
    finally:
        if ctx:
            lib.llama_free(ctx)
        lib.llama_model_free(model)


def decode(lib: Any, ctx: Any, tokens: list[int], pos: int, n_vocab: int) -> np.ndarray:
    """Helper: one llama_decode from position ``pos`` in sequence 0; logits [n_tokens, n_vocab] float32."""
    n = len(tokens)
    batch = lib.llama_batch_init(n, 0, 1)
    try:
        batch.n_tokens = n
        for i, token in enumerate(tokens):
            batch.token[i] = token
            batch.pos[i] = pos + i
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = 1
        assert lib.llama_decode(ctx, batch) == 0
        rows = [np.ctypeslib.as_array(lib.llama_get_logits_ith(ctx, i), shape=(n_vocab,)) for i in range(n)]
        return np.stack(rows)  # a copy: the context reuses its buffer
    finally:
        lib.llama_batch_free(batch)


def llama_logits(path: Path, tokens: list[int], n_batch: int) -> np.ndarray:
    """Helper: logits [n_tokens, n_vocab] of a fresh context, ``n_batch`` tokens per decode."""
    with open_llama(path) as (lib, _, ctx):
        parts = [decode(lib, ctx, tokens[i : i + n_batch], i, N_VOCAB) for i in range(0, len(tokens), n_batch)]
    return np.concatenate(parts)


def some_tokens(n: int, seed: int = 0) -> list[int]:
    """Helper: ``<s>`` and random tokens, none of them special."""
    return [1, *np.random.default_rng(seed).integers(3, N_VOCAB, n - 1).tolist()]


def naive_cache(steps: list[int], n_ctx: int, n_keep: int, n_slide: int) -> list[list[int]]:
    """Helper: the cache after every step, by popping one token at a time from plain lists."""
    sinks: list[int] = []
    window: list[int] = []
    states, seen = [], 0
    for m in steps:
        popped = 0
        must = len(sinks) + len(window) + m > n_ctx
        while len(sinks) + len(window) + m > n_ctx or (must and popped < n_slide and window):
            window.pop(0)
            popped += 1
        for _ in range(m):
            (sinks if seen < n_keep else window).append(seen)
            seen += 1
        states.append(sinks + window)
    return states


# ---------------------------------------------------------------------------------------------------------
# fixtures
# ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session", params=sorted(VARIANTS))
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Every streaming variant in turn."""
    name = request.param
    path = VARIANTS[name](tmp_path_factory.mktemp("tiny") / f"{name}.gguf")
    return Tiny(name, path, load_reference(path).with_gelu("table"))


@pytest.fixture(scope="session")
def cheap(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """The cheapest variant, for properties that no architecture changes."""
    path = VARIANTS["llama-cheap"](tmp_path_factory.mktemp("tiny") / "cheap.gguf")
    return Tiny("llama-cheap", path, load_reference(path))


# ---------------------------------------------------------------------------------------------------------
# against llama.cpp
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_batch", [N_TOKENS, 1], ids=["one-batch", "token-by-token"])
def test_matches_llama_cpp(tiny: Tiny, n_batch: int, record_property: Callable[[str, Any], None]) -> None:
    tokens = some_tokens(N_TOKENS)
    expected = tiny.ref.stream(n_ctx=N_TOKENS, n_keep=4).feed(tokens, n_batch)
    actual = llama_logits(tiny.path, tokens, n_batch)
    difference = float(np.abs(actual - expected).max())
    record_property("max_difference", difference)
    print(f"{tiny.name}: n_batch {n_batch}, max difference {difference:.2e}, logit std {expected.std():.2f}")
    assert difference <= tiny.tolerance


@pytest.mark.parametrize("chunk", [1, 6])
def test_matches_llama_cpp_context_shift(tiny: Tiny, chunk: int) -> None:
    """With eviction too: llama.cpp's own context shift re-rotates the whole window in place (F32 cache)."""
    if tiny.ref.config.yarn:
        pytest.skip("llama.cpp's K-shift multiplies the keys by the YaRN magnitude once more at every shift")
    tokens = some_tokens(80, seed=6)
    n_ctx, n_keep = 40, 4
    stream = tiny.ref.stream(n_ctx, n_keep)
    worst, start, n_cached = 0.0, 0, 0
    with open_llama(tiny.path) as (lib, _, ctx):
        memory = lib.llama_get_memory(ctx)
        for m in stream.window.plan(len(tokens), chunk):
            part = tokens[start : start + m]
            n_evict = max(0, n_cached + m - n_ctx)
            if n_evict:
                assert lib.llama_memory_seq_rm(memory, 0, n_keep, n_keep + n_evict)
                lib.llama_memory_seq_add(memory, 0, n_keep + n_evict, -1, -n_evict)
            actual = decode(lib, ctx, part, n_cached - n_evict, N_VOCAB)
            worst = max(worst, float(np.abs(actual - stream.feed(part, m)).max()))
            start, n_cached = start + m, n_cached - n_evict + m
    assert len(stream.cached) == n_cached <= n_ctx < start
    print(f"{tiny.name}: chunk {chunk}, max difference with eviction {worst:.2e}")
    assert worst <= tiny.tolerance


def test_wrong_position_is_visible(tiny: Tiny) -> None:
    """A gap of one position behind the sinks must stand out, else agreement proves nothing."""
    tokens = some_tokens(N_TOKENS)
    right = tiny.ref.dense(tokens)
    gap = tiny.ref.stream(n_ctx=N_TOKENS + 1, n_keep=4)
    gap.rope = {swa: (np.delete(cos, 4, axis=0), np.delete(sin, 4, axis=0)) for swa, (cos, sin) in gap.rope.items()}
    wrong = gap.feed(tokens, N_TOKENS)
    difference = float(np.abs(right - wrong)[4:].max())
    print(f"{tiny.name}: gap of one position: {difference:.2f}, logit std {right.std():.2f}")
    assert difference > 0.1
    assert 1.0 < right.std() < 5.0


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_refused_models_load(name: str, tmp_path: Path) -> None:
    """llama.cpp accepts them; refusing to stream them is the engine's business."""
    path = REFUSED[name](tmp_path / f"{name}.gguf")
    with open_llama(path) as (lib, model, _):
        assert lib.llama_model_n_embd(model) > 0
    with pytest.raises(ValueError, match="architecture"):
        load_reference(path)


def test_vocabulary_round_trips_any_text(tmp_path: Path) -> None:
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    path = write_tiny_llama(
        tmp_path / "chat.gguf",
        head_dim=16,
        chat_template=template,
        special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    text = "the sinks and\nthe window: \u00e9\u6c34\U0001f30a  in <s> and \x00"
    raw = text.encode()
    with open_llama(path) as (lib, model, _):
        vocab = lib.llama_model_get_vocab(model)
        ids = (ctypes.c_int32 * 256)()
        n = lib.llama_tokenize(vocab, raw, len(raw), ids, 256, False, False)
        assert 0 < n < len(raw)  # pieces are merged
        out = ctypes.create_string_buffer(512)
        size = lib.llama_detokenize(vocab, ids, n, out, 512, False, False)
        assert out.raw[:size] == raw
        n = lib.llama_tokenize(vocab, b"<|im_start|>", 12, ids, 256, False, True)
        assert list(ids[:n]) == [259]
        assert lib.llama_model_chat_template(model, None).decode() == template


# ---------------------------------------------------------------------------------------------------------
# bookkeeping of the window, no tensors
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(40))
def test_cached_indices_equal_naive_lists(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n_ctx = int(rng.integers(6, 40))
    n_keep = int(rng.integers(0, n_ctx // 2))
    n_slide = int(rng.integers(0, n_ctx))
    window = Window(n_ctx, n_keep, n_slide)
    steps: list[int] = []
    states: list[list[int]] = []
    for _ in range(30):  # feeds of random size and rule, chunks from the plan
        n = int(rng.integers(1, 25))
        largest = int(rng.integers(1, n_ctx - n_keep + 1))
        for m in window.plan(n, largest):
            before = len(window.cached)
            evicted = window.admit(m)
            assert len(window.cached) == before - evicted + m <= n_ctx
            assert evicted == 0 or before + m > n_ctx
            steps.append(m)
            states.append(list(window.cached))
    assert states == naive_cache(steps, n_ctx, n_keep, n_slide)
    assert window.n_past == sum(steps)
    assert window.cached[:n_keep] == list(range(n_keep))
    assert window.cached[-1] == window.n_past - 1


def test_token_by_token_is_streaming_llm_as_published() -> None:
    """start_size + recent_size = n_ctx, and the cache is full after every step from then on."""
    window = Window(n_ctx=12, n_keep=4)
    for i in range(100):
        window.admit(1)
        recent = range(max(4, i + 1 - 8), i + 1)
        assert window.cached == [*range(min(4, i + 1)), *recent]


def test_plan_of_chunks() -> None:
    window = Window(n_ctx=20, n_keep=4)
    assert window.plan(19, 8) == [4, 8, 7]  # the sinks are decoded first
    assert window.plan(3, 8) == [3]
    assert window.plan(0, 8) == []
    assert window.plan(10, [6, 4]) == [4, 2, 4]
    window.admit(3)
    assert window.plan(5, 8) == [1, 4]
    window.admit(1)
    assert window.plan(17, 16) == [16, 1]
    for n, chunk in ((17, 17), (17, [17]), (3, 0), (3, [1, 1]), (3, [3, 0])):
        with pytest.raises(ValueError, match="chunk"):
            window.plan(n, chunk)
    assert Window(8, 0).plan(9, 8) == [8, 1]
    assert default_chunk(4096, 4, 512) == 512
    assert default_chunk(256, 4, 512) == 63
    assert default_chunk(6, 4) == 1


def test_slide_of_at_least_n_slide() -> None:
    window = Window(n_ctx=12, n_keep=4, n_slide=3)
    evicted = [window.admit(1) for _ in range(18)]
    assert evicted == [0] * 12 + [3, 0, 0, 3, 0, 0]
    whole = Window(n_ctx=12, n_keep=4, n_slide=1000)  # at most the whole window
    for _ in range(12):
        whole.admit(1)
    assert whole.admit(1) == 8
    assert whole.cached == [0, 1, 2, 3, 12]


@pytest.mark.parametrize(("n_ctx", "n_keep", "n_slide"), [(4, 4, 0), (4, -1, 0), (4, 0, -1)])
def test_impossible_windows_are_refused(n_ctx: int, n_keep: int, n_slide: int) -> None:
    with pytest.raises(ValueError, match=r"n_keep|n_slide"):
        Window(n_ctx, n_keep, n_slide)


# ---------------------------------------------------------------------------------------------------------
# the stream, with and without eviction
# ---------------------------------------------------------------------------------------------------------


def test_streaming_equals_dense_while_everything_fits(tiny: Tiny) -> None:
    tokens = some_tokens(30, seed=1)
    ref = tiny.ref.with_gelu("exact")  # a table would turn the last bit of a sum into a step
    dense = ref.dense(tokens)
    for chunk in (1, 7, [3, 20, 7]):
        stream = ref.stream(n_ctx=64, n_keep=4)
        np.testing.assert_allclose(stream.feed(tokens, chunk), dense, rtol=0, atol=1e-9)
        assert stream.cached == list(range(30))


def test_feeds_compose(cheap: Tiny) -> None:
    tokens = some_tokens(60, seed=2)
    whole = cheap.ref.stream(n_ctx=24, n_keep=4).feed(tokens, 5)
    stream = cheap.ref.stream(n_ctx=24, n_keep=4)  # 4 sinks + 5 * 5 tokens, then the rest
    parts = np.concatenate([stream.feed(tokens[:29], 5), stream.feed(tokens[29:], 5)])
    np.testing.assert_allclose(parts, whole, rtol=0, atol=1e-12)
    assert stream.n_past == 60
    assert len(stream.cached) <= 24


def test_eviction_changes_the_answer_only_once_it_happens(cheap: Tiny) -> None:
    tokens = some_tokens(50, seed=3)
    dense = cheap.ref.dense(tokens)
    streamed = cheap.ref.stream(n_ctx=20, n_keep=4).feed(tokens)
    np.testing.assert_allclose(streamed[:20], dense[:20], rtol=0, atol=1e-9)
    assert np.abs(streamed[20:] - dense[20:]).max() > 0.1


def test_one_layer_forgets_what_left_the_cache(tmp_path: Path) -> None:
    """With one layer K and V depend on their own token only: the stream equals a text of sinks + window."""
    path = write_tiny_llama(tmp_path / "one.gguf", n_layer=1, head_dim=16, seed=12)
    ref = load_reference(path)
    tokens = some_tokens(90, seed=4)
    stream = ref.stream(n_ctx=16, n_keep=4, n_slide=5)
    for i in range(90):
        logits = stream.feed([tokens[i]])[0]
        again = ref.dense([tokens[j] for j in stream.cached])[-1]
        np.testing.assert_allclose(logits, again, rtol=0, atol=1e-9)


def test_sinks_matter_and_are_kept(cheap: Tiny) -> None:
    """Streams that differ in a sink differ for ever; those that differ in a long evicted token agree."""
    tokens = some_tokens(200, seed=5)
    other_sink, other_window = list(tokens), list(tokens)
    other_sink[2] = 3 + (tokens[2] + 50) % 300
    other_window[6] = 3 + (tokens[6] + 50) % 300
    base, sink, window = (cheap.ref.stream(20, 4).feed(t)[-50:] for t in (tokens, other_sink, other_window))
    assert np.abs(base - sink).max() > 0.1
    # two layers reach back 2 * 20 tokens at most: token 6 is gone without a trace
    np.testing.assert_allclose(base, window, rtol=0, atol=1e-9)


def test_log_softmax_is_normalised() -> None:
    x = np.array([[1000.0, 0.0, -1000.0], [0.0, 0.0, 0.0]])
    np.testing.assert_allclose(np.exp(log_softmax(x)).sum(axis=-1), 1.0, rtol=1e-12)
