"""The demo model on both engines, and memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlc_models import write_mlc

from edge_stream import Engine, Sampling
from edge_stream.converters import to_gguf
from edge_stream.measure.metrics import resident_mib
from edge_stream.models.conversion import open_source


@pytest.mark.slow
def test_both_engines_write_the_same_text(tiny_mlc: Any, tmp_path: Path) -> None:
    """The demo model in float32: the same 200 greedy tokens over three cache lengths."""
    del tiny_mlc  # its folder for libraries
    source = open_source("demo")
    try:
        to_gguf.convert(source, tmp_path / "demo.gguf", to_gguf.GgufOptions(outtype="f32"), lambda _line: None)
    finally:
        source.close()
    folder = write_mlc(tmp_path / "demo.gguf", tmp_path / "mlc")
    options = {"n_ctx": 64, "cache_type_k": "f32", "cache_type_v": "f32"}
    found: list[str] = []
    for model, more in ((tmp_path / "demo.gguf", {"flash_attn": "off"}), (folder, {})):
        with Engine.load(model, **options, **more) as engine, engine.stream() as stream:
            stream.feed("The lighthouse keeper wrote in her log that")
            sampling = Sampling(temp=0, repeat_penalty=1.3)  # without a penalty it repeats itself: an easier test
            found.append("".join(t.text for t in stream.generate(200, sampling=sampling, ignore_eos=True)))
            assert stream.stats.n_slides > 140
    assert found[0] == found[1]
    assert len(found[0]) > 400


def test_memory_is_flat(load_mlc: Callable[..., Any], draw: Callable[..., list[int]]) -> None:
    """From 2 to 50 cache lengths nothing is allocated that stays."""
    n_ctx = 64
    with load_mlc("gqa", n_ctx=n_ctx) as engine, engine.stream() as stream:
        sizes = []
        for lengths in (2, 48):
            for start in range(lengths):
                stream.feed(draw(n_ctx // 2, seed=start))
                for token in draw(n_ctx // 2, seed=start):
                    stream.feed([token])
            sizes.append(resident_mib())
        assert stream.stats.n_past == 50 * n_ctx
    assert sizes[0] is not None and sizes[1] is not None
    assert sizes[1] - sizes[0] < 2.0
