"""The commands as a user runs them, in processes of their own, on a tiny model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from memory_growth import growth
from tiny_models import write_tiny_gpt2, write_tiny_llama

from edge_stream import EdgeStreamError, Engine
from edge_stream.models import names

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("m") / "tiny.gguf"
    return write_tiny_llama(path, head_dim=16, chat_template=CHATML, special_tokens=("<|im_start|>", "<|im_end|>"))


def run(*args: str, stdin: str | None = None, ok: bool = True) -> subprocess.CompletedProcess[str]:
    """edge-stream ARGS."""
    result = subprocess.run(
        [sys.executable, "-m", "edge_stream.cli", *args], input=stdin, capture_output=True, text=True, timeout=120
    )
    assert not ok or result.returncode == 0, result.stderr
    return result


def test_run_reads_many_times_the_cache(model: Path, tmp_path: Path) -> None:
    text, stats = tmp_path / "text", tmp_path / "stats.json"
    text.write_text("All work and no play makes Jack a dull boy.\n" * 100)
    run("run", "-m", str(model), "-f", str(text), "-n", "50", "-c", "128", "--ignore-eos", "--stats", str(stats))
    got = json.loads(stats.read_text())
    assert got["tokens_seen"] > 20 * 128 + 50
    assert got["n_ctx"] == 128
    assert got["n_keep"] == 4
    assert got["slides"] >= 50 + 20
    assert {"rss_start_mib", "rss_end_mib", "tok_per_s", "p50_ms", "p99_ms", "max_ms"} <= set(got)


def test_run_is_reproducible_and_sessions_continue_it(model: Path, tmp_path: Path) -> None:
    session = str(tmp_path / "s")
    base = ["-m", str(model), "-c", "128", "--ignore-eos", "-s", "5"]
    whole = run("run", *base, "-p", "Hello", "-n", "300").stdout
    first = run("run", *base, "-", "-n", "200", "--save", session, stdin="Hello").stdout
    rest = run("run", *base, "--load", session, "-n", "100").stdout
    assert first + rest == whole
    assert whole == run("run", *base, "-p", "Hello", "-n", "300").stdout


def test_interrupt_ends_cleanly(model: Path, tmp_path: Path) -> None:
    stats = tmp_path / "stats.json"
    command = [sys.executable, "-m", "edge_stream.cli", "run", "-m", str(model), "-p", "Hi", "-n", "-1", "-c", "128"]
    command += ["--ignore-eos", "--stats", str(stats)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.read(500)
        process.send_signal(signal.SIGINT)
        process.stdout.read()
    assert process.returncode == 130
    assert json.loads(stats.read_text())["tokens_seen"] > 100


def test_chat_pins_the_system_prompt_and_resumes_after_kill(model: Path, tmp_path: Path) -> None:
    session = tmp_path / "chat.session"
    args = ["chat", "-m", str(model), "-c", "256", "-n", "40", "-sys", "Be kind.", "--session", str(session)]
    run(*args, stdin="one\ntwo\nthree\nfour\nfive\nsix\n")
    with Engine.load(model, n_ctx=256) as engine, engine.restore(session) as stream:
        before = stream.stats
        user = json.loads(stream.user)
        pinned = engine.detokenize(stream.tokens()[: before.n_sinks])
    assert before.n_slides == 0  # counters are of this process
    assert before.n_evicted > 0
    assert b"Be kind." in pinned
    assert [m["content"] for m in user["messages"] if m["role"] == "user"][-1] == "six"

    # a turn that is killed half-way is lost; everything before it is there
    with subprocess.Popen(
        [sys.executable, "-m", "edge_stream.cli", *args[:5], "-n", "-1", "--ignore-eos", *args[7:]],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"seven\n")
        process.stdin.flush()
        process.stdout.read(100)
        os.kill(process.pid, signal.SIGKILL)
    with Engine.load(model, n_ctx=256) as engine, engine.restore(session) as stream:
        assert stream.stats.n_past == before.n_past
        assert json.loads(stream.user) == user
    assert "resumed" in run(*args, stdin="/stats\n").stderr


def test_info_and_refusal(model: Path, tmp_path: Path) -> None:
    facts = json.loads(run("info", "--json", "-m", str(model), "-c", "128").stdout)
    assert facts["model"]["can_stream"] is True
    assert facts["model"]["kv_bytes_per_token"] == 2 * 2 * 2 * 16 * 2  # layers, K and V, kv heads, head, f16
    refused = run("info", "-m", str(write_tiny_gpt2(tmp_path / "gpt2.gguf")), ok=False)
    assert refused.returncode == 1
    assert "no rotary positions" in refused.stderr
    assert refused.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (["run", "-m", "none.gguf", "-p", "x"], 1),
        (["run", "-m", "demo"], 2),
        (["run", "-p", "x"], 2),
        (["run", "-m", "demo", "-p", "x", "-c", "-3"], 2),
        (["run", "-m", "demo", "-p", "x", "-ctk", "q9"], 2),
        (["nonsense"], 2),
        (["chat", "-m", "none.gguf"], 1),
    ],
)
def test_exit_codes(args: list[str], code: int) -> None:
    result = run(*args, stdin="", ok=False)
    assert result.returncode == code
    assert result.stderr
    assert "Traceback" not in result.stderr


def test_memory_is_constant(tiny: Callable[[str], Path]) -> None:
    """Between 2 and 20 cache lengths, one eviction per token, rebases included."""
    mib, n_rebases = growth(tiny("head64"), 512, (2, 18))
    assert mib <= 1.0 and n_rebases > 0


def test_hub_models_come_through_huggingface_hub(model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A stand-in for the hub at its client's boundary: which file is asked for, and what its failures become."""
    import huggingface_hub

    asked: list[str] = []

    def download(repo: str, file: str) -> str:
        asked.append(f"{repo}/{file}")
        return str(model)

    def info(self: Any, repo: str, timeout: float) -> Any:
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=f"a-{quant}.gguf") for quant in ("Q8_0", "Q4_K_M")])

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", info)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert names.resolve("hf:me/a") == model
    assert names.resolve("hf:me/a:q8_0") == model
    assert asked == ["me/a/a-Q4_K_M.gguf", "me/a/a-Q8_0.gguf"]

    def offline(self: Any, repo: str, timeout: float) -> Any:
        raise OSError("no network\nsecond line")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", offline)
    with pytest.raises(EdgeStreamError, match=r"cannot download hf:me/a: no network$"):
        names.resolve("hf:me/a")


def test_generation_ends_where_it_should(load: Callable[..., Any], draw: Callable[..., list[int]]) -> None:
    with load("gqa", n_ctx=64).stream() as stream:
        stream.feed(draw(100))
        tokens = list(stream.generate(10, ignore_eos=True, logprobs=True))
        assert len(tokens) == 10
        assert tokens[-1].finish_reason == "length"
        assert all(t.finish_reason is None for t in tokens[:-1])
        assert all(t.logprob is not None and t.logprob <= 0 for t in tokens)
        assert tokens[-1].n_past == 110
        assert tokens[-1].n_cached == 64


def test_help_imports_nothing_heavy() -> None:
    code = "import sys; sys.argv = ['edge-stream', '--help']\n"
    code += "from edge_stream.cli import main\ntry: main()\nexcept SystemExit: pass\n"
    code += "print(sorted({'numpy', 'llama_cpp', 'rich', 'jinja2', 'prompt_toolkit'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.startswith("Usage: edge-stream")
    assert out.endswith("[]\n")
