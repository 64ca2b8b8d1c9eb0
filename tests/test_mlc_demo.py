"""The demo model on both engines, and memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from memory_growth import growth
from mlc_models import write_mlc

from edge_stream import Engine, Sampling
from edge_stream.converters import to_gguf
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


def test_memory_is_flat(tiny_mlc: Callable[..., Path]) -> None:
    """From 2 to 50 cache lengths nothing is allocated that stays."""
    mib, _ = growth(tiny_mlc("gqa"), 64, (2, 48), n_at_once=32, cache_type_k="f32", cache_type_v="f32")
    assert mib < 2.0
