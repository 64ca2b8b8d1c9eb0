"""`edge-stream train` without torch, and what `convert` and `info` make of a checkpoint that it wrote.

tests/transformers/test_training.py has the training itself, which needs torch.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_checkpoints as tiny
from click.testing import CliRunner, Result

from edge_stream.cli import cli
from edge_stream.converters import mlc, to_gguf
from edge_stream.errors import EdgeStreamError
from edge_stream.models.conversion import open_source
from edge_stream.models.defaults import read_model_defaults


def run(*args: Any) -> Result:
    return CliRunner().invoke(cli, [str(arg) for arg in args])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama that was trained with a sink token, as far as its config.json says."""
    folder = tiny.write_tiny(tmp_path_factory.mktemp("train") / "hf", "llama2")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"attention_sink": "token"}), encoding="utf-8")
    return folder


def convert(source: Path, out: Path, **options: Any) -> Path:
    return to_gguf.convert(open_source(str(source)), out, to_gguf.GgufOptions(**options), lambda _: None)[0]


def test_one_sink_is_the_default_of_a_model_trained_with_it(checkpoint: Path, tmp_path: Path) -> None:
    first = convert(checkpoint, tmp_path / "a.gguf")
    assert read_model_defaults(first)["n_keep"] == 1
    again = convert(first, tmp_path / "b.gguf", outtype="q8_0")
    assert read_model_defaults(again)["n_keep"] == 1
    assert read_model_defaults(convert(checkpoint, tmp_path / "c.gguf", n_keep=3))["n_keep"] == 3
    shown = run("info", "-m", again, "--json")
    assert shown.exit_code == 0, shown.output
    assert json.loads(shown.stdout)["model"]["trained_with_sink"] == "token"
    assert "trained with      a sink token" in run("info", "-m", again).stdout


def test_one_sink_is_the_default_in_an_mlc_folder(checkpoint: Path, tmp_path: Path) -> None:
    mlc.convert(open_source(str(checkpoint)), tmp_path / "mlc", mlc.MlcOptions(), lambda _: None)
    config = json.loads((tmp_path / "mlc" / "mlc-chat-config.json").read_text(encoding="utf-8"))
    assert (config["attention_sink_size"], config["attention_sink"]) == (1, "token")


def test_an_unknown_sink_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    folder.mkdir()
    for file in checkpoint.iterdir():
        os.link(file, folder / file.name)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config | {"attention_sink": 2}), encoding="utf-8")
    with pytest.raises(EdgeStreamError, match=r"attention_sink = 2 is neither token nor softmax1"):
        open_source(str(folder))


def test_bad_flags(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("text", encoding="utf-8")
    done = run("train", text, "--freeze", "all-but-sink", "-o", tmp_path / "out")
    assert done.exit_code == 2 and "needs --base MODEL and --sink token" in done.output
    done = run("train", tmp_path / "missing.txt", "-o", tmp_path / "out")
    assert done.exit_code == 1 and done.output.startswith("error: cannot read") and done.output.count("\n") == 1
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    done = run("train", text, "--overwrite", "-o", tmp_path / "mine")
    assert done.exit_code == 1 and "was not written by train" in done.output
    assert (tmp_path / "mine" / "file").exists()


@pytest.mark.skipif(importlib.util.find_spec("torch") is not None, reason="torch is installed")
def test_without_torch_a_sentence_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("text", encoding="utf-8")
    done = run("train", tmp_path / "text.txt", "-o", tmp_path / "out")
    assert done.exit_code == 1
    assert done.output == "error: train needs torch: pip install 'edge-stream[train]'\n"


def test_the_help_imports_nothing_large() -> None:
    code = (
        "import sys, edge_stream.cli.train; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
