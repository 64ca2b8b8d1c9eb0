"""Every sampler against llama.cpp's own, on random logits; what they keep survives a session."""

from __future__ import annotations

import ctypes as C
import math
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from serving import Served, serve
from session_files import rewritten

from edge_stream import Engine, Sampling
from edge_stream.backends import loading
from edge_stream.errors import EdgeStreamError
from edge_stream.native import bindings, libraries
from edge_stream.native.callbacks import Callbacks
from edge_stream.sampling import SAMPLERS, make_sampler, samplers_of
from edge_stream.vocabulary import Vocabulary

N_VOCAB = 320
SEED = 5
N_DRAWS = 60
MASK = 2**64 - 1


class TokenData(C.Structure):
    """llama_token_data."""

    _fields_ = [("id", C.c_int32), ("logit", C.c_float), ("p", C.c_float)]


class TokenDataArray(C.Structure):
    """llama_token_data_array."""

    _fields_ = [("data", C.POINTER(TokenData)), ("size", C.c_size_t), ("selected", C.c_int64), ("sorted", C.c_bool)]


def uniform(n: int) -> float:
    """Number n of the sampler's generator: splitmix64's finaliser."""
    z = ((SEED << 32 | 0x9E3779B9) + (n + 1) * 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return ((z ^ (z >> 31)) >> 11) * 2.0**-53


@pytest.fixture(scope="module")
def vocabulary(tiny: Callable[[str], Path]) -> Vocabulary:
    params = loading.start(False).llama_model_default_params()
    params.vocab_only = True
    return Vocabulary(loading.load_model(tiny("gqa"), params, Callbacks()))


class Drawing:
    """A stream whose logits are a table's rows in turn, and what an es_sampler draws from it."""

    def __init__(self, vocabulary: Vocabulary, sampling: Sampling, rows: NDArray[np.float32]) -> None:
        self.lib, self.rows, self.n = bindings.library(), rows, 0
        functions = [
            bindings.DecodeFunction(self._decode),
            bindings.RebaseFunction(lambda *_: True),
            bindings.StateSizeFunction(lambda *_: 1),
            bindings.StateGetFunction(lambda *_: True),
            bindings.StateSetFunction(lambda *_: True),
        ]
        self.kept = functions
        params = self.lib.es_stream_default_params()
        params.n_ctx = 256
        self.stream, self.vocabulary, self.sampling = C.c_void_p(), vocabulary, sampling
        decoder = bindings.Decoder(None, 256, 64, *functions)
        bindings.check(self.lib.es_stream_init_decoder(vocabulary.model, decoder, params, C.byref(self.stream)))
        self.feed([1, 10, 11, 12, 10])
        self.sampler = make_sampler(vocabulary, sampling, 256)
        bindings.check(self.lib.es_sampler_begin(self.sampler, self.stream))

    def _decode(self, _user: object, _step: Any) -> int:
        return int(self.rows[self.n % len(self.rows)].ctypes.data)

    def feed(self, tokens: list[int]) -> None:
        array = (C.c_int32 * len(tokens))(*tokens)
        bindings.check(self.lib.es_stream_feed(self.stream, array, len(array), bindings.NO_CALLBACK, None))

    def draw(self) -> int:
        out = bindings.GeneratedToken()
        self.n += 1
        bindings.check(self.lib.es_stream_next(self.stream, self.sampler, False, False, C.byref(out)))
        return int(out.token)

    def save(self, path: Path) -> None:
        bindings.check(self.lib.es_session_save(self.stream, self.sampler, 0, 0, str(path).encode(), b"", 0))

    def restored(self, path: Path) -> Drawing:
        other = Drawing(self.vocabulary, self.sampling, self.rows)
        self.lib.es_sampler_free(other.sampler)
        bindings.check(self.lib.es_session_load(other.stream, 0, 0, str(path).encode()))
        other.sampler, other.n = make_sampler(self.vocabulary, self.sampling, 256), self.n
        bindings.check(self.lib.es_sampler_begin(other.sampler, other.stream))
        return other

    def close(self) -> None:
        self.lib.es_sampler_free(self.sampler)
        self.lib.es_stream_free(self.stream)


class Llama:
    """A llama_sampler of llama.cpp's, made by calling its init function."""

    def __init__(self, name: str, *arguments: Any) -> None:
        self.lib = _llama_library()
        init = getattr(self.lib, f"llama_sampler_init_{name}")
        init.restype, init.argtypes = C.c_void_p, None
        self.handle = C.c_void_p(init(*arguments))

    def accept(self, tokens: list[int]) -> None:
        for token in tokens:
            self.lib.llama_sampler_accept(self.handle, C.c_int32(token))

    def apply(self, candidates: TokenDataArray) -> None:
        self.lib.llama_sampler_apply(self.handle, C.byref(candidates))


def _llama_library() -> Any:
    libraries.llama()
    return C.CDLL(str(libraries.llama_dir() / libraries._lib_name("llama")))


def f(x: float) -> C.c_float:
    return C.c_float(x)


def n(x: int) -> C.c_size_t:
    return C.c_size_t(x)


def candidates(row: NDArray[np.float32]) -> TokenDataArray:
    data = (TokenData * N_VOCAB)(*((i, float(x), 0.0) for i, x in enumerate(row)))
    array = TokenDataArray(data, N_VOCAB, -1, False)
    array.kept = data
    return array


def drawn(array: TokenDataArray, u: float) -> int:
    """The index of the candidate that u falls on."""
    logits = np.array([array.data[i].logit for i in range(array.size)], dtype=np.float64)
    p = np.exp(logits - logits.max())
    return int(np.searchsorted(np.cumsum(p) / p.sum(), u, side="right"))


def rows(seed: int, n_rows: int = N_DRAWS + 1) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(0, 3, (n_rows, N_VOCAB)).astype(np.float32)


DRY = [b"\n", b":", b'"', b"*"]
PENALTIES = ("penalties", C.c_int32(N_VOCAB), C.c_int32(64), f(1.0), f(0.0), f(0.0))
TEMP = ("temp_ext", f(0.8), f(0.0), f(1.0))
TOP = (("top_k", C.c_int32(40)), ("top_p", f(0.95), n(0)), ("min_p", f(0.05), n(0)))

# settings, and llama.cpp's samplers for them in order
CASES: dict[str, tuple[dict[str, Any], list[tuple[Any, ...]]]] = {
    "default": ({}, [PENALTIES, *TOP, TEMP]),
    "penalties": (
        {"repeat_penalty": 1.3, "frequency_penalty": 0.5, "presence_penalty": 0.4, "repeat_last_n": 8},
        [("penalties", C.c_int32(N_VOCAB), C.c_int32(8), f(1.3), f(0.5), f(0.4)), *TOP, TEMP],
    ),
    "dry": (
        {"dry_multiplier": 4.0, "dry_base": 1.5, "dry_allowed_length": 1, "dry_penalty_last_n": -1},
        [PENALTIES, ("dry", f(4.0), f(1.5), C.c_int32(1), C.c_int32(256)), *TOP, TEMP],
    ),
    "top_n_sigma": ({"top_n_sigma": 1.0}, [PENALTIES, ("top_n_sigma", f(1.0)), *TOP, TEMP]),
    "typical_p": (
        {"typical_p": 0.4, "min_keep": 3},
        [PENALTIES, ("top_k", C.c_int32(40)), ("typical", f(0.4), n(3)), ("top_p", f(0.95), n(3)),
         ("min_p", f(0.05), n(3)), TEMP],
    ),
    "typical_p of all": ({"typical_p": 0.4, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
                         [PENALTIES, ("typical", f(0.4), n(0)), TEMP]),
    "dynamic temperature": (
        {"dynatemp_range": 0.6, "dynatemp_exponent": 1.5}, [PENALTIES, *TOP, ("temp_ext", f(0.8), f(0.6), f(1.5))]
    ),
    "xtc": (
        {"xtc_probability": 0.5, "xtc_threshold": 0.05},
        [PENALTIES, *TOP, ("xtc", f(1.0), f(0.05), n(0), C.c_uint32(0)), TEMP],
    ),
    "another order": (
        {"samplers": ("temperature", "top-p", "topk"), "top_k": 5},
        [TEMP, ("top_p", f(0.95), n(0)), ("top_k", C.c_int32(5))],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_tokens_are_those_of_llama_cpp_s_samplers(case: str, vocabulary: Vocabulary) -> None:
    settings, links = CASES[case]
    table = rows(1)
    if case == "dry":  # few tokens, so that they repeat
        table[:, 20:] = -50
    drawing = Drawing(vocabulary, Sampling(seed=SEED, **settings), table)
    vocab = _llama_library().llama_model_get_vocab
    vocab.restype = C.c_void_p
    made: list[tuple[str, Llama]] = []
    for name, *arguments in links:
        if name == "dry":
            breakers = (C.c_char_p * 4)(*DRY)
            arguments = [C.c_void_p(vocab(C.c_void_p(vocabulary.model))), *arguments, breakers, n(4)]
        made.append((name, Llama(name, *arguments)))
        made[-1][1].accept([1, 10, 11, 12, 10])
    acted = 0
    for i in range(N_DRAWS):
        array = candidates(table[i])
        for name, link in made:
            if name != "xtc" or uniform(i + 2**63) < 0.5:
                acted += name == "xtc"
                link.apply(array)
        expected = array.data[drawn(array, uniform(i))].id
        assert drawing.draw() == expected, (case, i)
        for _, link in made:
            link.accept([expected])
    assert case != "xtc" or 15 < acted < 45
    drawing.close()


def softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    p = np.exp(logits - logits.max())
    return p / p.sum()


@pytest.mark.parametrize("version", [1, 2])
def test_mirostat_follows_its_papers(version: int, vocabulary: Vocabulary) -> None:
    table, tau, eta = rows(2), 3.0, 0.2
    drawing = Drawing(vocabulary, Sampling(seed=SEED, mirostat=version, mirostat_tau=tau, mirostat_eta=eta), table)
    mu = 2 * tau
    for i in range(N_DRAWS):
        logits = table[i].astype(np.float64) / 0.8
        order = np.argsort(-logits, kind="stable")
        p = softmax(logits[order])
        if version == 1:  # Basu et al. 2021, algorithm 1
            t = np.log(np.arange(2, 101) / np.arange(1, 100))
            s = (t * np.log(p[:99] / p[1:100])).sum() / (t * t).sum()
            epsilon = s - 1
            k = max(int(((epsilon * 2**mu) / (1 - N_VOCAB**-epsilon)) ** (1 / s)), 1)
        else:  # surprise of at most mu
            k = max(int((-np.log2(p) <= mu).sum()), 1)
        p = softmax(logits[order[:k]])
        index = int(np.searchsorted(np.cumsum(p), uniform(i), side="right"))
        assert drawing.draw() == order[index], i
        mu -= eta * (-math.log2(p[index]) - tau)
    assert abs(mu - 2 * tau) > 0.1
    drawing.close()


def test_adaptive_p_follows_its_definition(vocabulary: Vocabulary) -> None:
    table, target, decay = rows(3), 0.4, 0.8
    settings: dict[str, Any] = {"adaptive_target": target, "adaptive_decay": decay, "min_p": 0.02}
    drawing = Drawing(vocabulary, Sampling(seed=SEED, samplers=("min_p", "adaptive_p"), **settings), table)
    total, weight = target / (1 - decay), 1 / (1 - decay)
    for i in range(N_DRAWS):
        logits = table[i].astype(np.float64)
        ids = np.flatnonzero(logits >= logits.max() + math.log(0.02))
        p = softmax(logits[ids])
        distance = np.abs(p - min(max(2 * target - total / weight, 0.0), 1.0)) / 0.3
        q = softmax(5 - 10 * distance**2 / (1 + distance))
        index = int(np.searchsorted(np.cumsum(q), uniform(i), side="right"))
        assert drawing.draw() == ids[index], i
        total, weight = p[index] + decay * total, 1 + decay * weight
    drawing.close()


#
# greedy
#


@pytest.mark.parametrize("more", [{}, {"min_p": 0.5}, {"mirostat": 2}, {"samplers": ("top_k", "adaptive_p", "temp")}])
def test_greedy_is_the_best_token(more: dict[str, Any], vocabulary: Vocabulary) -> None:
    table = rows(4)
    drawing = Drawing(vocabulary, Sampling(temp=-1.0, adaptive_target=0.5, **more), table)
    assert [drawing.draw() for _ in range(20)] == [int(np.argmax(table[i])) for i in range(20)]
    drawing.close()


def test_a_sampler_may_exclude_the_best_token_before_the_temperature(vocabulary: Vocabulary) -> None:
    # as in llama.cpp, where the temperature of 0 decides at its place in the order
    row = np.full((1, N_VOCAB), -10, dtype=np.float32)
    row[0, 50:53] = (3.0, 2.9, 2.8)
    drawing = Drawing(vocabulary, Sampling(temp=0, xtc_probability=1.0, repeat_last_n=0), row)
    assert drawing.draw() == 52
    drawing.close()
    drawing = Drawing(vocabulary, Sampling(temp=0, xtc_probability=1.0, samplers=("temperature", "xtc")), row)
    assert drawing.draw() == 50
    drawing.close()


#
# sessions
#


STATEFUL: dict[str, dict[str, Any]] = {
    "penalties": {"repeat_penalty": 1.5, "repeat_last_n": 20},
    "dry": {"dry_multiplier": 3.0, "dry_penalty_last_n": -1, "repeat_last_n": 0},
    "xtc": {"xtc_probability": 0.5, "xtc_threshold": 0.05},
    "mirostat 1": {"mirostat": 1, "mirostat_tau": 3.0},
    "mirostat 2": {"mirostat": 2, "mirostat_tau": 3.0, "mirostat_eta": 0.5},
    "adaptive_p": {"samplers": ("min_p", "adaptive_p"), "adaptive_target": 0.3},
}


@pytest.mark.parametrize("case", STATEFUL)
def test_a_restored_session_goes_on_with_the_same_tokens(case: str, vocabulary: Vocabulary, tmp_path: Path) -> None:
    table = rows(6, 400)
    if case == "dry":
        table[:, 20:] = -50
    first = Drawing(vocabulary, Sampling(seed=SEED, **STATEFUL[case]), table)
    for _ in range(70):
        first.draw()
    first.save(tmp_path / "session")
    second = first.restored(tmp_path / "session")
    afresh = Drawing(vocabulary, Sampling(seed=SEED, **STATEFUL[case]), table)
    afresh.n = first.n
    tokens = [first.draw() for _ in range(100)]
    assert [second.draw() for _ in range(100)] == tokens
    assert [afresh.draw() for _ in range(100)] != tokens
    for drawing in (first, second, afresh):
        drawing.close()


def without_aim(sampler: bytes) -> bytes:
    """A sampler's state as edge-stream wrote it in version 1."""
    return sampler[: 20 + 4 * struct.unpack_from("<Q", sampler, 12)[0]]


def test_a_session_file_of_version_1_goes_on(vocabulary: Vocabulary, tmp_path: Path) -> None:
    table = rows(7, 200)
    first = Drawing(vocabulary, Sampling(seed=SEED, repeat_penalty=1.5), table)
    for _ in range(20):
        first.draw()
    first.save(tmp_path / "new")
    old = rewritten((tmp_path / "new").read_bytes(), b"SMPL", without_aim, version=1)
    assert len(old) == len((tmp_path / "new").read_bytes()) - 8
    (tmp_path / "old").write_bytes(old)
    second = first.restored(tmp_path / "old")
    assert [first.draw() for _ in range(50)] == [second.draw() for _ in range(50)]
    first.close()
    second.close()


#
# what is refused, and what is accepted
#


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"samplers": ("top_k", "tfs_z")}, "no sampler named tfs_z"),
        ({"mirostat": 3}, "mirostat = 3 must be between 0 and 2"),
        ({"dry_base": math.inf}, "finite"),
        ({"xtc_threshold": math.nan}, "finite"),
        ({"min_keep": -1}, "min_keep = -1"),
        ({"dry_penalty_last_n": -2}, "dry_penalty_last_n = -2"),
        ({"adaptive_decay": 1.0}, "adaptive_decay"),
        ({"dry_sequence_breakers": ("x" * 41,)}, "more than 40 bytes"),
        ({"dry_sequence_breakers": ("a\0b",)}, "null character"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], sentence: str, vocabulary: Vocabulary) -> None:
    with pytest.raises(EdgeStreamError, match=sentence):
        make_sampler(vocabulary, Sampling(**settings), 256)


def test_letters() -> None:
    assert samplers_of("edskypmxt") == SAMPLERS
    with pytest.raises(EdgeStreamError, match="letter 'q'"):
        samplers_of("ekq")


@pytest.fixture(scope="module")
def served(tiny: Callable[[str], Path]) -> Iterator[Served]:
    with Engine.load(tiny("chat"), n_ctx=256, n_threads=1) as engine, serve(engine) as running:
        yield running


ACCEPTED: list[dict[str, Any]] = [
    {"top_k": -1}, {"top_p": 1.5}, {"min_p": -0.1}, {"temperature": -2}, {"repeat_last_n": -1},
    {"repeat_last_n": 10**5},
    {"dry_multiplier": 0.8, "dry_penalty_last_n": -1}, {"dry_base": 0.5}, {"mirostat": 7}, {"mirostat": 1},
    {"samplers": ["top_k", "Min-P", "temperature"]}, {"samplers": "kmt"}, {"samplers": []}, {"adaptive_target": 2},
    {"dry_sequence_breakers": ["\n", ""]}, {"xtc_probability": 3, "xtc_threshold": 0.1}, {"typical_p": 0.3},
    {"top_n_sigma": 1}, {"dynatemp_range": 0.5, "dynatemp_exponent": 2}, {"min_keep": 3},
    dict.fromkeys(("top_k", "temperature", "dry_base", "samplers", "mirostat", "ignore_eos", "dry_sequence_breakers")),
]  # fmt: skip


@pytest.mark.parametrize("fields", ACCEPTED, ids=str)
def test_the_server_accepts_what_llama_server_accepts(fields: dict[str, Any], served: Served) -> None:
    answer = served.client.chat([{"role": "user", "content": "Hi"}], max_tokens=3, **({"ignore_eos": True} | fields))
    assert 1 <= answer["usage"]["completion_tokens"] <= 3


@pytest.mark.parametrize(
    "fields", [{"samplers": ["nope"]}, {"samplers": "kq"}, {"dry_sequence_breakers": []}, {"min_keep": -1}], ids=str
)
def test_the_server_refuses_what_means_nothing(fields: dict[str, Any], served: Served) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3, **fields}
    assert served.client.post("/v1/chat/completions", json=body).status_code == 400


def test_a_request_s_settings_are_used(served: Served) -> None:
    def text(**fields: Any) -> str:
        messages = [{"role": "user", "content": "Hi"}]
        answer = served.client.chat(messages, seed=1, max_tokens=20, ignore_eos=True, **fields)
        return str(answer["choices"][0]["message"]["content"])

    plain = text()
    assert plain == text(samplers="edskypmxt")
    for fields in (
        {"mirostat": 2},
        {"typical_p": 0.2},
        {"xtc_probability": 1, "xtc_threshold": 0.01},
        {"samplers": "t"},
    ):
        assert text(**fields) != plain, fields
    assert text(temperature=-1) == text(top_k=1)


@pytest.mark.parametrize("sampling", [Sampling(temp=0), Sampling(seed=SEED), Sampling(seed=SEED, mirostat=2)])
def test_a_token_that_cannot_be_is_minus_infinity_and_other_logits_are_numbers(
    sampling: Sampling, vocabulary: Vocabulary
) -> None:
    row = np.full(N_VOCAB, -np.inf, np.float32)
    rows = [row]
    for at, value in ((0, np.nan), (N_VOCAB // 2, np.nan), (N_VOCAB - 1, np.nan), (7, np.inf)):
        rows.append(np.zeros_like(row))
        rows[-1][at] = value
    for bad in rows:
        drawing = Drawing(vocabulary, sampling, bad[None])
        with pytest.raises(EdgeStreamError, match="computed no numbers"):
            drawing.draw()
        drawing.close()
    row[[20, 30]] = 1.0, 0.0
    drawing = Drawing(vocabulary, sampling, row[None])
    assert drawing.draw() in (20, 30)
    drawing.close()
