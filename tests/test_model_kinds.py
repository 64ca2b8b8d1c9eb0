"""What Llama's streams can do, the other kinds of model can too: layers without rotation, recurrent layers beside
attention, M-RoPE, a latent cache, and recurrent layers alone."""

from __future__ import annotations

import ctypes as C
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving import WORDS, serve

from edge_stream import EdgeStreamError, Engine, Sampling
from edge_stream.chat.conversation import Conversation
from edge_stream.measure.modes import open_reader
from edge_stream.native import bindings, libraries

pytestmark = pytest.mark.skipif(not bindings.library().es_bank_available(), reason="a stock libllama has no sink bank")

N_CTX = 48
TOLERANCE = 1e-3
KINDS = {
    "no rotation": "smollm3",
    "convolution": "lfm2",
    "SSM": "falcon-h1",
    "SSM, no rotation": "granitehybrid",
    "M-RoPE": "qwen3vl",
    "DeltaNet, M-RoPE": "qwen35",
    "latent": "deepseek2",
}
STATEFUL = ["lfm2", "falcon-h1", "granitehybrid", "qwen35", "mamba", "rwkv7"]

Draw = Callable[..., list[int]]
Load = Callable[..., Engine]


@pytest.fixture
def load_kind(made: Callable[[str], Path]) -> Iterator[Load]:
    """load_kind(name, **options): an exact engine, closed after the test."""
    engines: list[Engine] = []

    def get(name: str, **options: Any) -> Engine:
        exact = {"cache_type_k": "f32", "cache_type_v": "f32", "flash_attn": "off", "n_threads": 1, "n_ctx": N_CTX}
        engines.append(Engine.load(made(name), **(exact | options)))
        return engines[-1]

    yield get
    for engine in engines:
        engine.close()


def one_by_one(stream: Any, tokens: list[int]) -> np.ndarray:
    return np.concatenate([stream.logits_of([token]) for token in tokens])


@pytest.mark.parametrize("name", KINDS.values(), ids=KINDS)
def test_a_restored_session_goes_on_identically(name: str, load_kind: Load, draw: Draw, tmp_path: Path) -> None:
    tokens = draw(4 * N_CTX)
    with load_kind(name, rebase_at=N_CTX + 20).stream() as stream:
        one_by_one(stream, tokens[: 3 * N_CTX])
        stream.save(tmp_path / "s")
        want = one_by_one(stream, tokens[3 * N_CTX :])
        assert stream.stats.n_rebases > 3
    with load_kind(name, rebase_at=N_CTX + 20).restore(tmp_path / "s") as stream:
        assert np.array_equal(one_by_one(stream, tokens[3 * N_CTX :]), want)


@pytest.mark.parametrize("name", KINDS.values(), ids=KINDS)
def test_streams_side_by_side(name: str, load_kind: Load, draw: Draw) -> None:
    """Three at a time, at different depths: each as if it were alone."""
    texts = [draw(n, seed=n) for n in (150, 170, 190)]
    alone = []
    for text in texts:
        with load_kind(name).stream() as stream:
            one_by_one(stream, text[:-40])
            alone.append(one_by_one(stream, text[-40:]))
    engine = load_kind(name, n_parallel=3)
    streams = [engine.stream(seq_id=i) for i in range(3)]
    for stream, text in zip(streams, texts, strict=True):
        one_by_one(stream, text[:-40])
    rows: list[list[Any]] = [[], [], []]
    for i in range(40):
        engine.feed_each(streams, [text[len(text) - 40 + i] for text in texts])
        for k, stream in enumerate(streams):
            rows[k].append(stream.logits)
    for k in range(3):
        assert np.abs(np.array(rows[k]) - alone[k]).max() < TOLERANCE


@pytest.mark.parametrize("flash_attn", ["off", "on"])
@pytest.mark.parametrize("name", KINDS.values(), ids=KINDS)
def test_moving_adds_nothing_to_the_rounding_of_f16(name: str, flash_attn: str, load_kind: Load, draw: Draw) -> None:
    """Hundreds of slides on, an f16 cache is as far from a float32 one as it was before the first slide."""
    tokens = draw(8 * N_CTX)

    def logits(**options: Any) -> np.ndarray:
        with load_kind(name, n_slide=1, **options).stream() as stream:
            return one_by_one(stream, tokens)

    error = np.abs(logits(cache_type_k="f16", cache_type_v="f16", flash_attn=flash_attn) - logits()).mean(axis=1)
    # the median: where a rounding sends a token to another expert, all of that token's logits differ, slides or not
    assert np.median(error[6 * N_CTX :]) < 2 * np.median(error[N_CTX // 2 : N_CTX])


@pytest.mark.parametrize("cache_type", ["q8_0", "q4_0"])
@pytest.mark.parametrize(
    "name", ["smollm3_wide", "lfm2_wide", "qwen3vl", "qwen3vl_wide", "deepseek2_wide", "cohere2_wide"]
)
def test_moving_adds_nothing_to_a_quantised_cache(name: str, cache_type: str, load_kind: Load, draw: Draw) -> None:
    tokens = draw(8 * N_CTX)

    def logits(**options: Any) -> np.ndarray:
        with load_kind(name, n_slide=1, **options).stream() as stream:
            return one_by_one(stream, tokens)

    # llama.cpp turns most quantised keys by a Hadamard matrix, those of latent caches not: so must the sinks
    quantised = {"cache_type_k": cache_type}
    if name == "deepseek2_wide":  # keys and values are one
        quantised |= {"cache_type_v": cache_type, "flash_attn": "on"}
    error = np.abs(logits(**quantised) - logits()).mean(axis=1)
    # the median: where a rounding sends a token to another expert, all of that token's logits differ, slides or not
    assert np.median(error[6 * N_CTX :]) < 2 * np.median(error[N_CTX // 2 : N_CTX])


@pytest.mark.parametrize("name", STATEFUL)
def test_rewinding_far_along(name: str, load_kind: Load, draw: Draw) -> None:
    """After slides and a rebase since the mark, the stream goes on from the mark the same each time."""
    with load_kind(name, rebase_at=N_CTX + 20).stream() as stream:
        one_by_one(stream, draw(3 * N_CTX))
        stream.mark()
        n_rebases = stream.stats.n_rebases
        one_by_one(stream, draw(30, seed=6))  # evicts 30 tokens before the mark
        assert stream.stats.n_rebases > n_rebases
        rows = []
        for _ in range(3):
            stream.rewind(30)
            assert stream.stats.n_past == 3 * N_CTX
            rows.append(one_by_one(stream, draw(30, seed=5)))
    assert np.abs(rows[1] - rows[0]).max() < TOLERANCE
    assert np.array_equal(rows[2], rows[1])


@pytest.mark.parametrize("name", STATEFUL)
def test_rewinding_is_exact(name: str, load_kind: Load, draw: Draw) -> None:
    """With room in the cache: at a mark, and between marks, where the tokens since the mark are read again."""
    tokens = draw(30)
    engine = load_kind(name)
    for n_back, n_again in ((8, 0), (5, 3)):
        kept = [*tokens, *draw(8, seed=6)[:n_again]]
        with engine.stream() as stream:
            one_by_one(stream, kept)
            want = one_by_one(stream, draw(6, seed=5))
        with engine.stream() as stream:
            one_by_one(stream, tokens)
            stream.mark()
            one_by_one(stream, draw(8, seed=6))
            stream.rewind(n_back)
            assert stream.stats.n_past == len(kept)
            assert stream.logits is None
            assert np.abs(one_by_one(stream, draw(6, seed=5)) - want).max() < TOLERANCE


@pytest.mark.parametrize("name", STATEFUL)
def test_what_cannot_be_rewound_is_an_error(name: str, load_kind: Load, draw: Draw) -> None:
    """Nothing is kept of the state: with everything still there it is read again, else the stream stays as it is."""
    tokens = draw(3 * N_CTX)
    engine = load_kind(name)
    with engine.stream() as stream:
        one_by_one(stream, tokens[:30])
        stream.rewind(4)
        got = one_by_one(stream, tokens[30:34])
    with engine.stream() as stream:
        one_by_one(stream, tokens[:26])
        assert np.abs(one_by_one(stream, tokens[30:34]) - got).max() < TOLERANCE
    with engine.stream() as stream, engine.stream() as again:
        del stream
        one_by_one(again, tokens)
        before = again.tokens()
        with pytest.raises(EdgeStreamError, match="cannot go back"):
            again.rewind(4)
        assert again.tokens() == before
        again.feed(draw(3, seed=8))


@pytest.mark.parametrize("name", STATEFUL)
def test_a_callback_that_stops_inside_a_chunk(name: str, load_kind: Load, draw: Draw) -> None:
    """The stream holds every token that was reported, and no other."""
    tokens = draw(N_CTX + 30)
    native = bindings.library()
    engine = load_kind(name)
    with engine.stream() as stream:
        one_by_one(stream, tokens[:40])
        seen = []
        stop = bindings.LogitsCallback(lambda _user, index, _logits: (seen.append(index), index < 44)[1])
        array = (C.c_int32 * 8)(*tokens[40:48])
        assert native.es_stream_feed(stream.handle, array, 8, stop, None) == bindings.STOPPED
        assert seen[-1] == 44
        assert stream.stats.n_past == 45
        got = one_by_one(stream, tokens[45:48])
    with engine.stream() as stream:
        want = one_by_one(stream, tokens[:48])[45:]
    assert np.abs(got - want).max() < TOLERANCE


@pytest.mark.parametrize("n_before", [2, 30, 3 * N_CTX])
@pytest.mark.parametrize("name", STATEFUL)
def test_a_decode_that_fails_is_undone(name: str, n_before: int, load_kind: Load, draw: Draw) -> None:
    """An aborted decode leaves the state neither old nor new; the next feed brings the old one back."""
    tokens = draw(n_before + 20)
    engine = load_kind(name, n_keep=4)
    aborting = False
    callback = libraries.llama().ggml_abort_callback(lambda _data: aborting)
    with engine.stream() as stream:
        one_by_one(stream, tokens[:n_before])
        stream.mark()
        libraries.llama().llama_set_abort_callback(engine.backend.context, callback, None)
        aborting = True
        with pytest.raises(EdgeStreamError, match="aborted"):
            stream.feed(draw(5, seed=9))
        aborting = False
        assert stream.stats.n_past == n_before
        if n_before > N_CTX:  # the failed decode made room for its tokens
            assert np.isfinite(one_by_one(stream, tokens[n_before:])).all()
            return
        got = one_by_one(stream, tokens[n_before:])
    with engine.stream() as stream:
        assert np.abs(got - one_by_one(stream, tokens)[n_before:]).max() < TOLERANCE


@pytest.mark.parametrize("name", ["qwen3vl", "granitehybrid", "mamba"])
def test_llama_cpp_own_shift_is_refused_where_it_would_abort(name: str, made: Callable[[str], Path]) -> None:
    with pytest.raises(EdgeStreamError, match="mode shift"):
        open_reader(str(made(name)), "shift", N_CTX, 4)


def test_a_recurrent_model_is_told_apart(load_kind: Load, draw: Draw) -> None:
    """It has no cache: -c and --keep change nothing, and memory is its state."""
    rows = []
    for options in ({"n_ctx": 48, "n_keep": 4}, {"n_ctx": 200, "n_keep": 0}):
        engine = load_kind("mamba", **options)
        assert (engine.is_recurrent, engine.sink_move, engine.kv_bytes_per_token) == (True, "none", 0)
        assert engine.state_bytes > 0
        with engine.stream() as stream:
            rows.append(one_by_one(stream, draw(300)))
    assert np.array_equal(rows[0], rows[1])


@pytest.mark.parametrize(("name", "n_attention"), [("lfm2", 2), ("falcon-h1", 2), ("qwen35", 2), ("smollm3", 4)])
def test_memory_counts_the_layers_that_have_a_cache(name: str, n_attention: int, load_kind: Load) -> None:
    engine = load_kind(name)
    cache, state = C.c_uint64(), C.c_uint64()
    bindings.library().es_context_memory(engine.backend.context, C.byref(cache), C.byref(state))
    n_cells = -(-N_CTX // 256) * 256  # llama.cpp rounds up
    assert cache.value == engine.kv_bytes_per_token * n_cells
    assert (state.value > 0) == (name != "smollm3")
    head = 32 if name == "qwen35" else 16
    assert engine.kv_bytes_per_token == n_attention * 2 * 2 * head * 4


def words(seed: int = 0) -> Sampling:
    return Sampling(temp=0.0, seed=seed, grammar=WORDS)


@pytest.mark.parametrize("name", ["lfm2", "qwen35", "mamba"])
def test_a_conversation(name: str, load_kind: Load) -> None:
    """Past the end of the cache; the same answer when it is given again, and after a message that was cut off."""
    with load_kind(name, n_ctx=512) as engine:
        conversation = Conversation(engine)
        for i in range(12):
            list(conversation.reply(f"This is message number {i}.", max_tokens=30, sampling=words()))
        assert conversation.stream.stats.n_evicted > 0
        answers = []
        for _ in range(3):  # the first time there may have been slides since the question
            list(conversation.regenerate(max_tokens=30, sampling=words()))
            answers.append(conversation.messages[-1]["content"])
        assert answers[1] and answers[1] == answers[2]
        n_past, n_messages = conversation.stream.stats.n_past, len(conversation.messages)

        def stop(_done: int, _total: int) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            list(conversation.reply("x" * 200, on_progress=stop))
        assert len(conversation.messages) == n_messages
        assert conversation.stream.stats.n_past == n_past
        list(conversation.reply("Are you still there?", max_tokens=30, sampling=words()))


@pytest.mark.parametrize("name", ["lfm2", "qwen35", "mamba"])
def test_a_server(name: str, load_kind: Load, tmp_path: Path) -> None:
    """Growing histories are continued; going back further than the kept states is read again; texts go on."""
    with serve(load_kind(name, n_ctx=512, n_parallel=2), tmp_path) as served:
        messages: list[dict[str, Any]] = []
        for i in range(10):
            answer = served.client.turn(messages, f"Message {i}.", temperature=0.0, seed=1)
            assert answer["choices"][0]["message"]["content"]
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
        again = messages[:-1]  # the last answer once more
        assert served.client.chat(again, grammar=WORDS, max_tokens=40, temperature=0.0, seed=1)["choices"]
        for n_kept in (16, 6, 2):
            edited = messages[:n_kept]
            served.client.turn(edited, "Something else.", temperature=0.0)
            assert edited[-1]["content"]
        text = "Once upon a time "
        for _ in range(3):
            body = {"prompt": text, "max_tokens": 5, "temperature": 0.0, "grammar": WORDS}
            reply = served.client.post("/v1/completions", json=body)
            assert reply.status_code == 200, reply.text
            text += reply.json()["choices"][0]["text"]
