"""What `-fa auto` becomes: by the cache's types, and by where the layers are, with a made-up list of devices."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from edge_stream.backends import llama, tvm
from edge_stream.cache_types import CACHE_TYPES, choose_flash_attn
from edge_stream.cli.serve import main as serve
from edge_stream.errors import EdgeStreamError
from edge_stream.hardware import devices

CPU = devices.Device("CPU", "a processor", "CPU", "CPU", 0, 0, 1)
GPU = devices.Device("GPU0", "a card", "GPU", "CUDA", 2**34, 2**34, 2)


@pytest.mark.parametrize(
    ("wanted", "type_k", "type_v", "independent", "chosen", "said"),
    [
        ("auto", "f16", "f16", False, "auto", ""),
        ("auto", "q8_0", "q8_0", False, "auto", ""),
        ("auto", "q8_0", "f16", True, "off", "does not depend on its neighbours"),
        ("auto", "f16", "q8_0", True, "on", "may depend on its neighbours (-ctv f16 avoids it)"),
        ("auto", "f32", "f16", False, "off", "would round f32 keys to f16"),
        ("auto", "f32", "f32", True, "off", "would round f32 keys and values to f16"),
        ("auto", "f32", "q8_0", False, "on", "f32 keys are rounded to f16 (-ctv f16 avoids it)"),
        ("on", "f16", "f32", False, "on", "f32 values are rounded to f16"),
        ("on", "f16", "q8_0", True, "on", ""),
        ("off", "f32", "f32", True, "off", ""),
    ],
)
def test_what_auto_means(wanted: str, type_k: str, type_v: str, independent: bool, chosen: str, said: str) -> None:
    got, note = choose_flash_attn(wanted, type_k, type_v, independent=independent)
    assert got == chosen
    assert said in note and bool(said) == bool(note)


def test_a_contradiction_says_how_to_resolve_it() -> None:
    with pytest.raises(EdgeStreamError, match=r"^a q8_0 V cache needs flash attention: use -fa auto, or -ctv f16$"):
        choose_flash_attn("off", "f16", "q8_0")


def test_there_is_one_list_of_cache_types() -> None:
    assert list(llama.CAPABILITIES.cache_types) == list(CACHE_TYPES)
    assert set(tvm.CAPABILITIES.cache_types) <= set(CACHE_TYPES)


@pytest.mark.parametrize(
    ("there", "n_gpu_layers", "names", "held_by"),
    [
        ([CPU], None, None, []),
        ([CPU, GPU], None, None, ["GPU0"]),
        ([CPU, GPU], 0, None, []),
        ([CPU, GPU], 7, None, ["GPU0"]),
        ([CPU, GPU], -1, ["none"], []),
        ([CPU, GPU], -1, ["GPU0"], ["GPU0"]),
    ],
)
def test_who_holds_the_layers(
    there: list[devices.Device],
    n_gpu_layers: int | None,
    names: list[str] | None,
    held_by: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(devices, "devices", lambda: there)
    monkeypatch.setattr(devices, "_registered", {})
    assert [d.name for d in devices.layer_devices(n_gpu_layers, names)] == held_by


@pytest.mark.parametrize(
    ("flags", "there", "chosen", "said"),
    [
        (["-np", "2"], [CPU], "off", "-fa auto: off, so that"),
        (["-np", "2"], [CPU, GPU], "auto", ""),
        (["-np", "2", "-ngl", "0"], [CPU, GPU], "off", "-fa auto: off, so that"),
        (["-np", "2", "-ctv", "q8_0"], [CPU], "on", "-fa auto: on, which a q8_0 V cache needs"),
        (["-np", "2", "-ctv", "q8_0"], [CPU, GPU], "auto", ""),
        (["-np", "1"], [CPU], "auto", ""),
        (["-np", "1", "-ctk", "f32"], [CPU, GPU], "off", "-fa auto: off, because"),
    ],
)
def test_serve(
    flags: list[str],
    there: list[devices.Device],
    chosen: str,
    said: str,
    tiny: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The real engine is loaded with what was chosen. (Its layers are on the CPU of this machine.)"""
    served: list[str] = []
    monkeypatch.setattr(devices, "devices", lambda: there)
    monkeypatch.setattr(devices, "_registered", {})
    monkeypatch.setattr(
        "edge_stream.server.serve.serve", lambda made, _settings: served.append(made.backend.options.flash_attn)
    )
    done = CliRunner().invoke(serve, ["-m", str(tiny("head64")), "-c", "64", "-t", "1", "--no-sessions", *flags])
    assert done.exit_code == 0, done.output
    assert served == [chosen]
    assert said in done.stderr and bool(said) == ("-fa auto" in done.stderr)


def test_flash_attention_rounds_an_f32_cache_to_f16(load: Callable[..., Any], draw: Callable[..., list[int]]) -> None:
    """Why `auto` is off there. A llama.cpp that no longer rounds fails here: then the rule and its notes can go."""

    def logits(cache_type: str, flash_attn: str) -> Any:
        options = {"cache_type_k": cache_type, "cache_type_v": cache_type, "flash_attn": flash_attn}
        with load("head64", n_ctx=64, **options).stream() as stream:
            stream.feed(draw(40))
            return np.array(stream.logits)

    exact, flash = logits("f32", "off"), logits("f32", "on")
    assert np.array_equal(flash, logits("f16", "on"))
    assert np.abs(flash - exact).max() > 1e-5
