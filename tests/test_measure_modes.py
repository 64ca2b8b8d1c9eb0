"""The modes that are compared: each does what its name says, and their perplexity is that of a reference."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from reference import Reference

from edge_stream.errors import EdgeStreamError
from edge_stream.measure import ppl, sinks
from edge_stream.measure.modes import Reader, open_reader

EXACT = {"cache_type_k": "f32", "cache_type_v": "f32", "flash_attn": "off", "n_threads": 1}
N_CTX = 48

Tiny = Callable[[str], Path]
Draw = Callable[..., list[int]]
References = Callable[[str], Reference]


def nll_of(logits: NDArray[np.float64], tokens: list[int]) -> NDArray[np.float64]:
    """Item i: NLL of tokens[i + 1]."""
    peak = logits.max(axis=1, keepdims=True)
    log_sum = (peak + np.log(np.exp(logits - peak).sum(axis=1, keepdims=True)))[:, 0]
    return log_sum[:-1] - logits[np.arange(len(tokens) - 1), tokens[1:]]


def opened(tiny: Tiny, mode: str, **settings: Any) -> Reader:
    return open_reader(str(tiny("gqa")), mode, N_CTX, 4, **(EXACT | settings))


@pytest.mark.parametrize(("mode", "n_keep"), [("stream", 4), ("window", 0)])
def test_perplexity_is_the_references(tiny: Tiny, reference: References, draw: Draw, mode: str, n_keep: int) -> None:
    tokens = draw(4 * N_CTX)
    got = ppl.read(str(tiny("gqa")), mode, tokens, n_ctx=N_CTX, n_keep=4, settings=EXACT)
    want = nll_of(reference("gqa").stream(N_CTX, n_keep).feed(tokens, 1), tokens)
    error = np.abs(got.nll - want)
    assert error.mean() < 1e-4
    assert error.max() < 2e-3
    row = got.report()
    assert row["ppl"] == pytest.approx(np.exp(want.mean()), rel=1e-3)
    assert row["ppl_after_fill"] == pytest.approx(np.exp(want[N_CTX:].mean()), rel=1e-3)
    assert (row["n_tokens"], row["n_scored"], row["n_keep"]) == (len(tokens), len(tokens) - 1, n_keep)
    assert row["segments"][0]["start"] == 1
    assert row["segments"][-1]["end"] == len(tokens)


def test_recompute_is_a_fresh_window_for_every_token(tiny: Tiny, reference: References, draw: Draw) -> None:
    tokens = draw(2 * N_CTX)
    with opened(tiny, "recompute") as reader:
        got = reader.score(tokens)
        assert reader.counters == {"recomputed": N_CTX}
    for i in (N_CTX + 1, 2 * N_CTX - 1):
        window = tokens[i - N_CTX : i]
        logits = reference("gqa").dense([*window, tokens[i]])
        assert abs(got[i] - nll_of(logits, [*window, tokens[i]])[-1]) < 2e-3


def test_recompute_may_skip_tokens(tiny: Tiny, draw: Draw) -> None:
    tokens = draw(2 * N_CTX)
    every = [ppl.read(str(tiny("gqa")), "recompute", tokens, n_ctx=N_CTX, n_keep=0, settings=EXACT, every=k)
             for k in (1, 7)]  # fmt: skip
    scored = np.isfinite(every[1].nll)
    assert scored[: N_CTX - 1].all()
    assert 0 < scored[N_CTX:].sum() < N_CTX // 2
    assert np.abs(every[0].nll - every[1].nll)[scored].max() < 1e-4


def test_shift_drops_half_and_keeps_the_first(tiny: Tiny, draw: Draw) -> None:
    with opened(tiny, "shift") as reader:
        reader.feed(draw(N_CTX - 1))
        assert (reader.n_cached, reader.counters) == (N_CTX - 1, {"shifts": 0})
        reader.feed(draw(1))
        kept = N_CTX - 1 - (N_CTX - 1 - 4) // 2
        assert (reader.n_cached, reader.n_past, reader.counters) == (kept + 1, N_CTX, {"shifts": 1})


def test_shift_rotates_what_it_keeps(tiny: Tiny, reference: References, draw: Draw) -> None:
    """One layer's keys do not depend on evicted tokens, so a shifted cache equals that of the kept tokens alone."""
    tokens = draw(N_CTX)
    name = str(tiny("one_layer"))
    with open_reader(name, "shift", N_CTX, 4, **EXACT) as reader:
        reader.feed(tokens[:-1])
        reader.feed(tokens[-1:])
        assert reader.counters == {"shifts": 1}
        got = reader.logits
    n_discard = (N_CTX - 1 - 4) // 2
    rest = [*tokens[:4], *tokens[4 + n_discard :]]
    want = reference("one_layer").dense(rest)[-1]
    assert got is not None
    assert np.abs(got - want).max() < 1e-3


def test_dense_ends_at_its_cache(tiny: Tiny, draw: Draw) -> None:
    with opened(tiny, "dense") as reader:
        reader.feed(draw(N_CTX))
        reader.forget(2)
        reader.feed(draw(2))
        with pytest.raises(EdgeStreamError, match="the dense cache is full: 48 tokens"):
            reader.feed(draw(1))
        assert reader.n_past == N_CTX


def test_modes_agree_until_something_is_evicted(tiny: Tiny, draw: Draw) -> None:
    tokens = draw(N_CTX - 1)
    found = []
    for mode in ("stream", "window", "dense", "recompute", "shift"):
        with opened(tiny, mode) as reader:
            found.append(reader.score(tokens)[1:])
            reader.reset()
            assert (reader.n_past, reader.n_cached) == (0, 0)
            assert np.array_equal(reader.score(tokens)[1:], found[-1])
    assert max(np.abs(other - found[0]).max() for other in found) < 1e-4


def test_unknown_mode_is_refused(tiny: Tiny) -> None:
    with pytest.raises(EdgeStreamError, match="mode fast is unknown"):
        opened(tiny, "fast")


def test_recommended_sinks_are_the_fewest_within_a_hundredth() -> None:
    rows = [{"n_keep": n, "ppl_after_fill": p} for n, p in ((0, 30.0), (1, 12.2), (2, 12.09), (4, 12.0), (8, 12.01))]
    assert sinks.recommend(rows) == 2
