"""Streams of layers that Llama does not have, against NumPy float64 (reference_layers.py).

The reference is checked first, without the engine: before any slide it agrees with a plain llama.cpp decode, and after
three cache lengths with a llama.cpp context in which the sinks are decoded anew at every slide. Then the engine is held
to it. Faulty references show that a fault in any of these layers would be seen.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from architecture_metadata import EVERY_2ND, FIXTURES, Fixture, decoder, mamba
from numpy.typing import NDArray
from raw_llama import Llama, Raw
from reference import F64, Weights
from reference_layers import (
    LayerConfig,
    LayeredReference,
    LayeredStream,
    load,
    load_layered_reference,
    still_pairs,
)
from tiny_architectures import make
from tiny_models import write_tiny_llama

from edge_stream import Engine
from edge_stream.native import bindings

N_CTX, N_KEEP = 48, 4
N_TOKENS = 4 * N_CTX  # three cache lengths past the end
N_BEFORE = 40  # tokens before any slide
REBASE_AT = N_CTX + 20
TOLERANCE = 1e-3  # measured on x86-64: 7.5e-5 at most
TOLERANCE_PLAIN = 1e-4  # without slides: 1.8e-5 at most
VISIBLE = 20 * TOLERANCE  # what a fault must change

_SCALES = {"logit_scale": 3.0, "residual_scale": 0.6, "embedding_scale": 4.0, "attention.scale": 0.2}
_GRANITE = decoder(EVERY_2ND | mamba(group_count=2) | _SCALES)
# An epsilon of 1e-6, as Qwen2-VL's own is: the pinned llama.cpp takes 0 whatever the file says
_QWEN2VL = decoder({"attention.layer_norm_rms_epsilon": 1e-6}, rope_base=1e6)

# "still": some pairs do not turn in text. So do two of Qwen3-VL, which would hardly turn anyway; here the base is small
# enough for a difference.
VARIANTS: dict[str, Fixture] = {
    "smollm3": FIXTURES["smollm3"],
    "lfm2": FIXTURES["lfm2"],
    "granitehybrid": Fixture("granitehybrid", _GRANITE | {"rope.scaling.finetuned": False}),
    "granitehybrid-rope": Fixture("granitehybrid", _GRANITE | {"rope.scaling.finetuned": True}),
    "falcon-h1": FIXTURES["falcon-h1"],
    "qwen2vl": Fixture("qwen2vl", _QWEN2VL | {"rope.dimension_sections": [2, 3, 3, 0]}),
    "qwen2vl-still": Fixture("qwen2vl", _QWEN2VL | {"rope.dimension_sections": [2, 2, 2, 2], "rope.freq_base": 100.0}),
    "qwen3vl": FIXTURES["qwen3vl"],
    "qwen3vl-still": Fixture(
        "qwen3vl", decoder({"rope.dimension_sections": [6, 4, 3, 3]}, head_dim=32, rope_base=100.0)
    ),
    "qwen35": FIXTURES["qwen35"],
}
UNROTATED = ["smollm3", "granitehybrid"]  # some layers, all layers
RECURRENT = ["lfm2", "granitehybrid", "granitehybrid-rope", "falcon-h1", "qwen35"]
STILL = ["qwen2vl-still", "qwen3vl-still"]

needs_bank = pytest.mark.skipif(not bindings.library().es_bank_available(), reason="a stock libllama has no sink bank")


TOKENS: list[int] = np.random.default_rng(0).integers(10, 256, N_TOKENS).tolist()


class Tiny:
    """A tiny model, its reference, and the reference's answer to TOKENS over N_CTX cells."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.ref = load_layered_reference(path)
        self.expected = self.ref.stream(N_CTX, N_KEEP).feed(TOKENS)


Get = Callable[[str], Tiny]

the_llama = cache(Llama)  # one that lives on: llama.cpp keeps a pointer to its log callback


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Get:
    """tiny(name): the model of VARIANTS[name], made once."""
    folder = tmp_path_factory.mktemp("layers")

    @cache
    def get(name: str) -> Tiny:
        with mock.patch.dict(FIXTURES, {name: VARIANTS[name]}):
            return Tiny(make(folder / f"{name}.gguf", name))

    return get


@pytest.fixture
def open_raw() -> Iterator[Callable[[Path], Raw]]:
    """open_raw(path): a llama.cpp context driven by hand, closed after the test."""
    opened: list[Raw] = []

    def get(path: Path) -> Raw:
        opened.append(Raw(the_llama(), path, N_CTX + 2 * N_KEEP))
        return opened[-1]

    yield get
    for raw in opened:
        raw.close()


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """The largest of any logit."""
    assert np.isfinite(a).all()
    return float(np.abs(a - b).max())


# ---------------------------------------------------------------------------------------------------------
# the reference
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_batch", [N_BEFORE, 1], ids=["one-batch", "token-by-token"])
@pytest.mark.parametrize("name", VARIANTS)
def test_reference_matches_llama_cpp(name: str, n_batch: int, tiny: Get, open_raw: Callable[[Path], Raw]) -> None:
    model = tiny(name)
    raw = open_raw(model.path)
    got = np.concatenate([raw.decode(TOKENS[i : i + n_batch], i) for i in range(0, N_BEFORE, n_batch)])
    want = model.ref.stream(N_CTX, N_KEEP).feed(TOKENS[:N_BEFORE], n_batch)
    print(f"{name}: {difference(got, want):.1e}, logit std {want.std():.2f}")
    assert difference(got, want) < TOLERANCE_PLAIN


@pytest.mark.parametrize("name", VARIANTS)
def test_reference_matches_sinks_that_llama_cpp_decodes_anew(
    name: str, tiny: Get, open_raw: Callable[[Path], Raw]
) -> None:
    model = tiny(name)
    found = difference(open_raw(model.path).stream(TOKENS), model.expected)
    print(f"{name}: {found:.1e}")
    assert found < TOLERANCE


def test_chunks_change_nothing_before_a_slide(tiny: Get) -> None:
    for name in VARIANTS:
        ref = tiny(name).ref
        want = ref.stream(N_CTX, N_KEEP).feed(TOKENS[:N_BEFORE], 1)
        assert difference(ref.stream(N_CTX, N_KEEP).feed(TOKENS[:N_BEFORE], 7), want) < 1e-12
        assert difference(ref.dense(TOKENS[:N_BEFORE]), want) < 1e-12


def test_which_pairs_stay_still() -> None:
    assert not any(still_pairs(64, [16, 24, 24, 0], interleaved=False))  # Qwen2-VL
    assert np.flatnonzero(still_pairs(64, [24, 20, 20, 0], interleaved=True)).tolist() == [61, 62]  # Qwen3-VL
    assert not any(still_pairs(32, [11, 11, 10, 0], interleaved=True))  # Qwen 3.5
    assert np.flatnonzero(still_pairs(8, [2, 2, 2, 2], interleaved=False)).tolist() == [6, 7]
    assert np.flatnonzero(still_pairs(16, [6, 4, 3, 3], interleaved=True)).tolist() == [11, 13, 14]


def test_refuses_what_it_does_not_implement(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not implement architecture 'llama'"):
        load(write_tiny_llama(tmp_path / "llama.gguf", head_dim=16))


# ---------------------------------------------------------------------------------------------------------
# the engine
# ---------------------------------------------------------------------------------------------------------


def engine_logits(path: Path, n_chunk: int, rebase_at: int) -> tuple[np.ndarray, int]:
    """TOKENS fed in chunks to an exact stream: its logits, and how often it was rebased."""
    exact = {"cache_type_k": "f32", "cache_type_v": "f32", "flash_attn": "off", "n_threads": 1}
    with (
        Engine.load(path, n_ctx=N_CTX, n_keep=N_KEEP, n_slide=1, rebase_at=rebase_at, **exact) as engine,
        engine.stream() as stream,
    ):
        chunks = [TOKENS[i : i + n_chunk] for i in range(0, N_TOKENS, n_chunk)]
        return np.concatenate([stream.logits_of(chunk) for chunk in chunks]), stream.stats.n_rebases


@needs_bank
@pytest.mark.parametrize("rebase_at", [0, REBASE_AT], ids=["plain", "rebased"])
@pytest.mark.parametrize("name", VARIANTS)
def test_engine_matches_the_reference(name: str, rebase_at: int, tiny: Get) -> None:
    model = tiny(name)
    got, n_rebases = engine_logits(model.path, 1, rebase_at)
    print(f"{name}: {difference(got, model.expected):.1e}, {n_rebases} rebases")
    assert n_rebases >= 6 if rebase_at else n_rebases == 0
    assert difference(got, model.expected) < TOLERANCE


@needs_bank
@pytest.mark.parametrize("name", VARIANTS)
def test_engine_matches_the_reference_in_chunks(name: str, tiny: Get) -> None:
    model = tiny(name)
    got, n_rebases = engine_logits(model.path, 8, REBASE_AT)
    want = model.ref.stream(N_CTX, N_KEEP, n_slide=1).feed(TOKENS, [8] * (N_TOKENS // 8))
    print(f"{name}: {difference(got, want):.1e}, {n_rebases} rebases")
    assert n_rebases >= 6
    assert difference(got, want) < TOLERANCE


# ---------------------------------------------------------------------------------------------------------
# faults, each of which would be seen
# ---------------------------------------------------------------------------------------------------------


class SinksLeftBehind(LayeredStream):
    """Every token stays at its position in the stream."""

    def __init__(self, weights: Weights, config: LayerConfig, n_ctx: int, n_keep: int = 4) -> None:
        super().__init__(weights, config, n_ctx, n_keep)
        self.by_position = LayeredStream(weights, config, N_TOKENS).rope[False]

    def _rotation(self, il: int) -> tuple[F64, F64] | None:
        cos, sin = self.by_position
        return (cos[self.cached], sin[self.cached]) if self.config.rotated[il] else None


class StateForgets(LayeredStream):
    """A slide clears the states."""

    def _decode(self, ids: NDArray[np.int64]) -> F64:
        if self.n_past >= N_CTX:
            self.forget()
        return super()._decode(ids)


class StateStands(LayeredStream):
    """What is read once the cache is full leaves no trace in the states."""

    def _decode(self, ids: NDArray[np.int64]) -> F64:
        states = copy.deepcopy(self.recurrences, {id(self.weights): self.weights})
        logits = super()._decode(ids)
        if self.n_past > N_CTX:
            self.recurrences = states
        return logits


def with_config(ref: LayeredReference, **changes: Any) -> LayeredStream:
    """A stream of the same weights, read otherwise."""
    return LayeredReference(ref.weights, replace(ref.config, **changes)).stream(N_CTX, N_KEEP)


# fault -> the variants that have it, and a faulty stream
FAULTS: dict[str, tuple[list[str], Callable[[LayeredReference], LayeredStream]]] = {
    "every layer rotates": (UNROTATED, lambda ref: with_config(ref, rotated=(True,) * ref.config.n_layer)),
    "still pairs turn": (STILL, lambda ref: with_config(ref, sections=())),
    "a slide clears the state": (RECURRENT, lambda ref: StateForgets(ref.weights, ref.config, N_CTX, N_KEEP)),
    "the state stands still": (RECURRENT, lambda ref: StateStands(ref.weights, ref.config, N_CTX, N_KEEP)),
    "sinks are left behind": (
        [name for name in VARIANTS if name != "granitehybrid"],  # without rotation there is nothing to move
        lambda ref: SinksLeftBehind(ref.weights, ref.config, N_CTX, N_KEEP),
    ),
    "sinks are lost": (list(VARIANTS), lambda ref: ref.stream(N_CTX, 0)),
}


@pytest.mark.parametrize(
    ("fault", "name"),
    [pytest.param(fault, name, id=f"{name}: {fault}") for fault, (names, _) in FAULTS.items() for name in names],
)
def test_a_fault_would_be_seen(fault: str, name: str, tiny: Get) -> None:
    """Each moves a logit after the first slide by 20 times what the engine may differ."""
    model = tiny(name)
    got = FAULTS[fault][1](model.ref).feed(TOKENS)
    found = difference(got[N_CTX:], model.expected[N_CTX:])
    print(f"{name}, {fault}: {found:.2f}")
    assert found > VISIBLE
    if fault not in ("every layer rotates", "still pairs turn"):  # the others are faults of sliding
        assert difference(got[:N_CTX], model.expected[:N_CTX]) < 1e-9
