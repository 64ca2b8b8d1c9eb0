"""A LoRA adapter as llama.cpp's own converter writes it, tensor by tensor and key by key."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="torch is not installed: make test-transformers")
pytest.importorskip("transformers", reason="transformers is not installed: make test-transformers")

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import families  # noqa: E402
import gguf  # noqa: E402
import llama_cpp_converter  # noqa: E402
import numpy as np  # noqa: E402
import test_convert_lora as lora  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402

SCRIPT = llama_cpp_converter.LLAMA_CPP / "convert_lora_to_gguf.py"


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "phi3-longrope", "gemma4", "glm4"])
def test_equal_to_llama_cpp(name: str, tmp_path: Path) -> None:
    base, folder = tmp_path / "base", tmp_path / "my-adapter"
    families.write(base, name)
    tensors = load_file(base / "model.safetensors")
    lora.adapter(
        folder, base, tensors, lambda n: n.endswith("proj.weight") and ".layers." in n and tensors[n].ndim == 2
    )
    ours, theirs = lora.convert_adapter(folder, tmp_path / "ours.gguf"), tmp_path / "theirs.gguf"
    families.publish(base)
    done = subprocess.run(
        [sys.executable, SCRIPT, folder, "--base", base, "--outfile", theirs],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    a, b = gguf.GGUFReader(ours), gguf.GGUFReader(theirs)
    held, other = ({t.name: t for t in r.tensors} for r in (a, b))
    assert held.keys() == other.keys()
    for tensor in other:
        assert held[tensor].tensor_type == other[tensor].tensor_type, tensor
        assert np.allclose(held[tensor].data, other[tensor].data, rtol=1e-6, atol=0), tensor
    keys, wanted = ({key: field.contents() for key, field in r.fields.items()} for r in (a, b))
    assert keys == wanted
