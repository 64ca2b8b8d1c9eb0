"""Commands as programs of their own: terminals, closed and full outputs, Ctrl-C."""

from __future__ import annotations

import json
import os
import pty
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from edge_stream.cli import cli

COMMAND = [sys.executable, "-m", "edge_stream.cli"]


def read_until(terminal: int, wanted: str, text: str = "") -> str:
    """What a program writes to a terminal, up to a text."""
    end = time.monotonic() + 120
    while wanted not in text:
        assert time.monotonic() < end, text
        if select.select([terminal], [], [], 1)[0]:
            text += os.read(terminal, 4096).decode(errors="replace")
    return text


def test_chat_on_a_terminal(tiny: Callable[[str], Path]) -> None:
    ours, theirs = pty.openpty()
    flags = ["chat", "-m", str(tiny("chat")), "-c", "128", "-n", "3", "--ignore-eos", "--simple-io"]
    with subprocess.Popen([*COMMAND, *flags], stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        try:
            read_until(ours, "> ")
            os.write(ours, b"/nonsense\n")
            assert "unknown command /nonsense" in read_until(ours, "// begins a text")
            os.write(ours, b"//nonsense\n")
            read_until(ours, "\n> ")
            os.write(ours, b"/stats\n")
            read_until(ours, "tokens seen")
            os.write(ours, b"/exit\n")
            assert process.wait(60) == 0
        finally:
            process.kill()
    os.close(ours)


def test_a_full_stdout_is_one_sentence(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    def small_files() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (40, 40))

    for arguments in (["run", "-m", str(tiny("gqa")), "-p", "x" * 60, "--echo", "-n", "1", "--no-proof"], ["--help"]):
        (tmp_path / "out").write_text("x" * 40)
        with (tmp_path / "out").open("a") as out:
            done = subprocess.run(
                [*COMMAND, *arguments],
                stdout=out,
                stderr=subprocess.PIPE,
                text=True,
                preexec_fn=small_files,
                check=False,
                env={**os.environ, "EDGE_STREAM_CACHE": str(tmp_path)},
            )
        assert done.returncode == 1
        assert done.stderr == "error: the output cannot be written: File too large\n"


def test_a_reader_that_closes_early_is_no_error(tiny: Callable[[str], Path]) -> None:
    arguments = ["run", "-m", str(tiny("gqa")), "-p", "x", "-n", "400", "--ignore-eos"]
    with subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stderr
        process.stdout.read(1)
        process.stdout.close()
        assert (process.wait(120), process.stderr.read()) == (0, b"")


def test_ctrl_c_keeps_what_a_benchmark_has_done(tiny: Callable[[str], Path]) -> None:
    """The rows of finished tests are there, and no process leaves a traceback."""
    command = ["bench", "-m", str(tiny("gqa")), "-p", "32", "-n", "0", "-pg", "9,9999999", "-r", "1", "-c", "64"]
    with subprocess.Popen(
        [*COMMAND, *command, "-o", "jsonl"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout and process.stderr
        assert json.loads(process.stdout.readline())["n_prompt"] == 32
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(60) == 130
        assert process.stdout.read() == ""
        assert process.stderr.read().splitlines()[-1] == "stopped by Ctrl-C; this was done before:"


def test_ctrl_c_keeps_what_an_evaluation_has_done(monkeypatch: pytest.MonkeyPatch) -> None:
    from edge_stream.cli.eval import ppl

    def measure(mode: str, *_: object) -> tuple[SimpleNamespace, dict[str, str]]:
        if mode == "window":
            raise KeyboardInterrupt
        return SimpleNamespace(every=1), {"mode": mode}

    monkeypatch.setattr(ppl, "_measure", measure)
    monkeypatch.setattr(ppl, "read_tokens", lambda _flags: [1, 2, 3])
    done = CliRunner().invoke(cli, ["eval", "ppl", "-m", "x", "--mode", "stream,window,dense", "-o", "json"])
    assert (done.exit_code, json.loads(done.stdout)) == (130, {"mode": "stream"})
    done = CliRunner().invoke(cli, ["eval", "ppl", "-m", "x", "--mode", "window,dense", "-o", "json"])
    assert (done.exit_code, done.stdout) == (130, "")


LONG = "a" * 300


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["info", "-m", LONG], "File name too long"),
        (["info", "-m", 20 * LONG], "File name too long"),
        (["convert", LONG, "--to", "gguf"], "File name too long"),
        (["convert", "demo", "--to", "gguf", "-o", LONG], "File name too long"),
        (["chat", "-m", "demo", "--session", LONG], "File name too long"),
        (["run", "-m", "demo", "-p", "a", "--lora", LONG], "File name too long"),
        (["export-ios", "-m", "demo", "-o", LONG], "File name too long"),
        (["serve", "-m", "demo", "--session-dir", "~nobody-of-that-name/x"], "no such user"),
        (["run", "-m", "demo", "-p", "a", "--grammar", 'root ::= "\udcff"'], "no text that UTF-8 can carry"),
        (["run", "-m", "demo", "-p", "a", "--override-tensor", "\udcff=CPU"], "no text that UTF-8 can carry"),
    ],
)
def test_names_and_texts_that_cannot_be_are_refused_in_a_sentence(
    arguments: list[str], said: str, tmp_path: Path
) -> None:
    done = subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, cwd=tmp_path, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 1, done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: ") and said in line and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
