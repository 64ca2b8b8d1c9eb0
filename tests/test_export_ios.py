"""edge-stream export-ios: what it chooses, what it refuses, and that the app imports what it wrote."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from tiny_models import write_tiny_llama

from edge_stream.cli import cli
from edge_stream.errors import EdgeStreamError
from edge_stream.ios import export
from edge_stream.ios.export import ExportRequest, choose
from edge_stream.ios.mlc_package import memory_plan
from edge_stream.ios.phones import PHONES
from edge_stream.mlc.folder import MlcFolder
from edge_stream.models import names

ROOT = Path(__file__).parent.parent
Run = Callable[..., Result]


@pytest.fixture
def run() -> Run:
    def invoke(*arguments: str) -> Result:
        return CliRunner().invoke(cli, ["export-ios", *arguments], prog_name="edge-stream")

    return invoke


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("m") / "tiny.gguf")


def test_the_largest_cache_that_fits(tiny: Path) -> None:
    request = ExportRequest(chat_template="chatml", n_ctx=None)
    roomy = choose(tiny, request, 10**12)
    assert (roomy.cache_type_k, roomy.cache_type_v) == ("f16", "f16")
    assert roomy.n_ctx >= 1024 and roomy.n_keep == 4
    # a byte less than that: smaller keys before a smaller window
    tighter = choose(tiny, request, roomy.peak - 1)
    assert (tighter.n_ctx, tighter.cache_type_k) == (roomy.n_ctx, "q8_0")
    assert tighter.peak < roomy.peak and tighter.memory["cache"] < roomy.memory["cache"]
    with pytest.raises(EdgeStreamError, match="does not fit: with n_ctx = "):
        choose(tiny, request, 1000)


def test_the_window_is_halved_before_it_is_refused() -> None:
    demo = names.resolve("demo")
    whole = choose(demo, ExportRequest(), 10**12)
    q8 = choose(demo, ExportRequest(), whole.peak - 1)
    half = choose(demo, ExportRequest(), q8.peak - 1)
    assert (whole.n_ctx, q8.n_ctx, half.n_ctx) == (8192, 8192, 4096)
    assert q8.cache_type_k == "q8_0"
    # what the user asks for is not made smaller
    with pytest.raises(EdgeStreamError, match="n_ctx = 8192"):
        choose(demo, ExportRequest(n_ctx=8192), q8.peak - 1)
    assert choose(demo, ExportRequest(n_ctx=2048, cache_type_k="q4_0"), 10**12).cache_type_k == "q4_0"


def test_memory_adds_up() -> None:
    choice = choose(names.resolve("demo"), ExportRequest(n_ctx=1024), 10**12)
    memory = choice.memory
    assert memory["cache"] == 1024 * 30 * 2 * 3 * 64 * 2  # 30 layers, keys and values, 3 heads of 64, float16
    assert memory["total"] == sum(memory[part] for part in ("weights", "cache", "sinks", "compute"))
    assert choice.peak == memory["total"] + memory["cache"] + export.RESERVE


def test_export(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "new" / "phone"
    result = run("-m", "demo", "-o", str(out), "--device", "iphone-13", "--name", "Démo")
    assert result.exit_code == 0, result.output
    assert "n_ctx 8192" in result.output and "iPhone 13" in result.output
    demo = names.resolve("demo")
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    assert (out / "model.gguf").read_bytes() == demo.read_bytes()
    assert manifest["sha256"] == hashlib.sha256(demo.read_bytes()).hexdigest()
    assert manifest["bytes"] == demo.stat().st_size and manifest["name"] == "Démo"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["manifest.json", "model.gguf", "new", "phone"]
    again = run("-m", "demo", "-o", str(out))
    assert again.exit_code == 1 and again.stderr == f"error: {out} exists already\n"


def test_nothing_half_written(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_source: Path, target: Path, _progress: object) -> str:
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    choice = choose(tiny, ExportRequest(chat_template="chatml"), 10**12)
    monkeypatch.setattr(export, "_copy", full)
    with pytest.raises(EdgeStreamError, match="No space left"):
        export.export(tiny, tmp_path / "out", choice, name="tiny", device="x")
    assert list(tmp_path.iterdir()) == []


def test_refusals(run: Run, tiny: Path, tmp_path: Path) -> None:
    def sentence(*arguments: str) -> str:
        result = run("-o", str(tmp_path / "out"), *arguments)
        assert result.exit_code == 1 and result.stderr.count("\n") == 1, result.output
        assert not (tmp_path / "out").exists()
        return result.stderr

    part = tmp_path / "m-00001-of-00002.gguf"
    assert "pigeon" in sentence("-m", str(tiny), "--chat-template", "pigeon")
    assert "--chat-template" not in sentence("-m", str(tiny), "--chat-template", "{% for %}")
    assert "does not fit" in sentence("-m", "demo", "--memory", "100M")
    assert "does not exist" in sentence("-m", "nothing.gguf")
    shutil.copy(tiny, part)
    assert "merge" in sentence("-m", str(part))


def test_without_a_template_it_says_what_is_used(run: Run, tiny: Path, tmp_path: Path) -> None:
    result = run("-m", str(tiny), "-o", str(tmp_path / "out"))
    assert result.exit_code == 0, result.output
    assert "no chat template: ChatML is used; --chat-template gives another" in result.stderr


def test_every_figure_has_a_source(run: Run) -> None:
    listed = run("--list-devices")
    assert listed.exit_code == 0
    for phone in PHONES.values():
        assert phone.title in listed.output and phone.source in listed.output and phone.limit.source in listed.output
        assert phone.limit.n_bytes <= phone.ram * 1_000_000_000


@pytest.mark.skipif(shutil.which("swift") is None, reason="the Swift toolchain is not on PATH")
def test_the_app_imports_it(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "phone"
    assert run("-m", "demo", "-o", str(out), "-c", "512", "-ctk", "q8_0", "-ctv", "q8_0").exit_code == 0
    package = ["--package-path", str(ROOT / "ios_demo/EdgeStreamKit"), "-Xswiftc", "-warnings-as-errors"]
    done = subprocess.run(
        ["swift", "test", *package, "--filter", "whatExportIOSWroteIsImportedAndRuns"],
        env={**os.environ, "EDGE_STREAM_EXPORT": str(out)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Test whatExportIOSWroteIsImportedAndRuns() passed" in done.stdout


@pytest.mark.parametrize("name", ["ministral3", "llama2", "gemma3"])
def test_an_mlc_folder_becomes_a_package(name: str, run: Run, tmp_path: Path) -> None:
    """What `mlc_llm package` reads: the model, the library under the name that its symbols have, and the memory."""
    pytest.importorskip("tvm")
    from tiny_checkpoints import write_tiny

    checkpoint, folder, out = write_tiny(tmp_path / "hf", name), tmp_path / "mlc", tmp_path / "package"
    result = CliRunner().invoke(cli, ["convert", str(checkpoint), "--to", "mlc", "-c", "128", "-o", str(folder)])
    assert result.exit_code == 0, result.output
    result = run("-m", str(folder), "-o", str(out), "--name", "Tiny")
    assert result.exit_code == 0, result.output
    library = {"ministral3": "ministral3", "llama2": "llama", "gemma3": "gemma3_text"}[name] + "_q4f16_1"
    assert f"Tiny, library {library}" in result.output and "compiled, not run" in result.stderr
    config = json.loads((out / "mlc-package-config.json").read_text())
    (model,) = config["model_list"]
    assert (out / model["model"] / "mlc-chat-config.json").exists() and model["bundle_weight"] is True
    # mlc_llm package looks for the symbol `<model_lib>___tvm_ffi__library_bin`, and the prefix ends in one underscore
    assert (
        config["model_lib_path_for_prepare_libs"] == {model["model_lib"]: "lib.tar"} and model["model_lib"] == library
    )
    with tarfile.open(out / "lib.tar") as archive:
        assert set(archive.getnames()) == {"lib0.o", f"{library}_devc.o"}
    plan = memory_plan(MlcFolder(folder))
    n_layer, n_head_kv, head = {"ministral3": (2, 2, 32), "llama2": (2, 2, 16), "gemma3": (4, 2, 32)}[name]
    assert plan["cache"] == (128 + 31) * 2 * n_layer * n_head_kv * head * 2  # keys and values, float16
    assert plan["weights"] == sum(p.stat().st_size for p in folder.glob("params_shard_*"))
    assert model["estimated_vram_bytes"] == sum(plan.values()) - plan["app"]
    again = run("-m", str(folder), "-o", str(out))
    assert again.exit_code == 1 and again.stderr == f"error: {out} exists already\n"
    for arguments, message in (
        (("--memory", "100M"), "does not fit: it takes "),
        (("-c", "64"), "-c is not for an MLC folder"),
        (("-ctk", "q8_0"), "--cache-type-k is not for an MLC folder"),
    ):
        result = run("-m", str(folder), "-o", str(tmp_path / "other"), *arguments)
        assert result.exit_code == 1 and message in result.stderr and result.stderr.count("\n") == 1
        assert not (tmp_path / "other").exists()


def test_an_mlc_folder_that_no_library_can_compute(run: Run, tmp_path: Path) -> None:
    """In a cache this long yarn's original length, 512 here, is exceeded."""
    pytest.importorskip("tvm")
    from tiny_checkpoints import write_tiny

    folder, out = tmp_path / "mlc", tmp_path / "package"
    checkpoint = write_tiny(tmp_path / "hf", "ministral3")
    arguments = ["convert", str(checkpoint), "--to", "mlc", "-c", "480", "-o", str(folder)]
    assert CliRunner().invoke(cli, arguments).exit_code == 0
    result = run("-m", str(folder), "-o", str(out))
    assert result.exit_code == 1 and "TVM's cache has no attention temperature, which ministral3" in result.stderr
    assert not out.exists()
