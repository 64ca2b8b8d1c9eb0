"""The command line: flags, files, exit statuses; with an engine that needs no model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from cli_runner import Loader, Run
from click.testing import Result

from edge_stream.cli import COMMANDS
from edge_stream.cli.eval import COMMANDS as EVAL_COMMANDS
from edge_stream.errors import EdgeStreamError, UnsupportedModelError
from edge_stream.session_file import peek_session


def is_one_line_error(result: Result) -> bool:
    return result.exit_code == 1 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


#
# the dispatcher
#


def test_help_names_every_command_and_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom edge_stream.cli import main\n"
        "try:\n    main()\nexcept SystemExit as e:\n    assert not e.code\n"
        "heavy = {'numpy', 'llama_cpp', 'rich', 'prompt_toolkit', 'jinja2', 'edge_stream.engine'}\n"
        "heavy &= set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name, line in COMMANDS.items():
        assert name in done.stdout
        assert line[:40] in done.stdout


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_command_has_help(run: Run, name: str) -> None:
    result = run(name, "--help")
    assert result.exit_code == 0
    assert "Usage:" in result.output


@pytest.mark.parametrize("name", list(EVAL_COMMANDS))
def test_every_subcommand_of_eval_has_help(run: Run, name: str) -> None:
    result = run("eval", name, "--help")
    assert result.exit_code == 0
    assert f"eval {name} [OPTIONS]" in result.output
    assert run("eval", "nonsense").exit_code == 2


def test_version(run: Run) -> None:
    from edge_stream import __version__

    assert run("--version").output == f"edge-stream {__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["run"],
        ["run", "-m", "demo"],
        ["run", "-m", "demo", "-p", "x", "-f", "y"],
        ["run", "-m", "demo", "-p", "x", "-"],
        ["run", "-m", "demo", "-p", "x", "-c", "-5"],
        ["run", "-m", "demo", "-p", "x", "-c", "many"],
        ["run", "-m", "demo", "-p", "x", "--keep", "-2"],
        ["run", "-m", "demo", "-p", "x", "-n", "-2"],
        ["run", "-m", "demo", "-p", "x", "-b", "0"],
        ["run", "-m", "demo", "-p", "x", "-ctk", "q3_k"],
        ["run", "-m", "demo", "-p", "x", "--temp", "nan"],
        ["run", "-m", "demo", "-p", "x", "--temp", "-1"],
        ["run", "-m", "demo", "-p", "x", "--top-p", "1.5"],
        ["run", "-m", "demo", "-p", "x", "--seed", "99999999999"],
        ["run", "-m", "demo", "-p", "x", "-ngl", "some"],
        ["run", "-m", "demo", "-p", "x", "-fa", "maybe"],
        ["run", "-m", "demo", "-p", "x", "--sink-move", "walk"],
        ["run", "-m", "demo", "-p", "x", "--logit-bias", "hello"],
        ["run", "-m", "demo", "-p", "x", "--logit-bias", "5+nan"],
        ["run", "-m", "demo", "-p", "x", "-j", "{"],
        ["run", "-m", "demo", "-p", "x", "-j", "[1]"],
        ["run", "-m", "demo", "-p", "x", "-j", "{}", "--grammar", "root ::= x"],
        ["chat", "-m", "demo", "-sys", "a", "-sysf", "b"],
    ],
)
def test_usage_errors_exit_2_before_a_model_is_loaded(run: Run, loader: Loader, arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert "Error" in result.stderr
    assert loader.n_loads == 0


@pytest.mark.parametrize("command", [["run", "-p", "x"], ["chat"], ["demo"]])
def test_errors_of_the_library_are_one_line(run: Run, loader: Loader, command: list[str]) -> None:
    loader.error = UnsupportedModelError("gpt2.gguf cannot stream: it has learned positions")
    result = run(*command, "-m", "gpt2.gguf")
    assert is_one_line_error(result)
    assert "it has learned positions" in result.stderr


#
# flags
#


def test_flags_reach_the_engine_under_llama_cpp_names(run: Run, loader: Loader) -> None:
    loader.engine.answers.append("ok")
    flags = (
        "-c 99 --attention-sink-size 7 -b 32 -ub 16 -t 3 -tb 5 -ngl all -dev Vulkan0,CUDA1 -sm row "
        "--rpc one:1,two:2 -fa on -ctk q8_0 -ctv f32 "
        "--sink-move bank --slide 9 --no-proof --no-mmap -v -s 42 --temp 0.5 --top-k 3 --top-p 0.9 --min-p 0.1 "
        "--repeat-penalty 1.2 --repeat-last-n 32 --frequency-penalty 0.3 --presence-penalty 0.4 "
        "--logit-bias 5+1.5 --logit-bias 6-inf"
    )
    run("run", "-m", "x.gguf", "-p", "hi", *flags.split(), "-j", '{"type": "object"}')
    assert loader.asked == {
        **{"model": "x.gguf", "n_ctx": 99, "n_keep": 7, "n_batch": 32, "n_ubatch": 16, "n_threads": 3},
        **{"n_threads_batch": 5, "n_gpu_layers": -1, "flash_attn": "on", "cache_type_k": "q8_0"},
        **{"devices": ["Vulkan0", "CUDA1"], "split_mode": "row", "rpc": ["one:1", "two:2"]},
        **{"cache_type_v": "f32", "sink_move": "bank", "n_slide": 9, "verbose": True, "proof": False},
        **{"load_mode": "none", "lora": [], "tensor_split": [], "override_tensor": [], "model_params": {}},
    }
    sampling = loader.engine.samplings[0]
    assert (sampling.seed, sampling.temp, sampling.top_k, sampling.top_p, sampling.min_p) == (
        42,
        0.5,
        3,
        0.9,
        0.1,
    )
    assert (sampling.repeat_penalty, sampling.repeat_last_n) == (1.2, 32)
    assert (sampling.frequency_penalty, sampling.presence_penalty) == (0.3, 0.4)
    assert sampling.logit_bias == {5: 1.5, 6: float("-inf")}
    assert sampling.json_schema == {"type": "object"}


def test_environment_is_read_and_an_argument_beats_it(run: Run, loader: Loader) -> None:
    loader.engine.answers += ["ok", "ok"]
    env = {"LLAMA_ARG_MODEL": "env.gguf", "LLAMA_ARG_CTX_SIZE": "77", "LLAMA_ARG_TOP_K": "9"}
    run("run", "-p", "hi", env=env)
    assert (loader.asked["model"], loader.asked["n_ctx"]) == ("env.gguf", 77)
    assert loader.engine.samplings[0].top_k == 9
    run("run", "-p", "hi", "-c", "88", env=env)
    assert loader.asked["n_ctx"] == 88


def test_ctx_size_0_is_the_trained_length_and_said(run: Run, loader: Loader) -> None:
    loader.engine.answers.append("ok")
    result = run("run", "-m", "x", "-p", "hi", "-c", "0")
    assert "8192" in result.stderr
    assert result.stdout == "ok"


def test_keep_minus_1_pins_the_whole_prompt(run: Run, loader: Loader) -> None:
    loader.engine.answers.append("ok")
    run("run", "-m", "x", "-p", "h" * 50, "-c", "100", "--keep", "-1")
    assert loader.engine.streams[0].n_keep == 50
    assert is_one_line_error(run("run", "-m", "x", "-p", "h" * 90, "-c", "100", "--keep", "-1"))


def test_redecoding_makes_room_for_a_long_pinned_prompt(run: Run, loader: Loader) -> None:
    loader.engine.sink_move = "redecode"
    loader.engine.answers.append("ok")
    run("run", "-m", "x", "-p", "h" * 50, "-c", "100", "--keep", "-1")
    assert (loader.n_loads, loader.asked["n_keep"]) == (2, 50)


#
# run
#


def test_run_prints_the_answer_only_or_the_prompt_too(run: Run, loader: Loader) -> None:
    loader.engine.answers += ["there", "there", "abc"]
    assert run("run", "-m", "x", "-p", "hi ").stdout == "there"
    assert run("run", "-m", "x", "-p", "hi ", "--echo").stdout == "hi there"
    assert run("run", "-m", "x", "-p", "hi", "-n", "5", "--ignore-eos").stdout == "abc a"


def test_run_stops_at_a_reverse_prompt(run: Run, loader: Loader) -> None:
    loader.engine.answers.append("yes User: no")
    assert run("run", "-m", "x", "-p", "hi", "-r", "User:").stdout == "yes "


def test_run_reads_files_and_stdin(run: Run, loader: Loader, tmp_path: Path) -> None:
    file = tmp_path / "prompt"
    file.write_bytes(b"\xef\xbb\xbfh\xc3\xa9\r\n")
    loader.engine.answers += ["1", "2", "3"]
    assert run("run", "-m", "x", "-f", str(file)).stdout == "1"
    assert run("run", "-m", "x", "-", input="hé").stdout == "2"
    assert run("run", "-m", "x", "-f", "-", input="hé").stdout == "3"
    fed = [stream.text for stream in loader.engine.streams]
    assert fed == ["hé\r\n1<|im_end|>", "hé2<|im_end|>", "hé3<|im_end|>"]


def test_run_takes_a_prompt_much_longer_than_the_cache(run: Run, loader: Loader) -> None:
    loader.engine.answers.append("ok")
    result = run("run", "-m", "x", "-c", "64", "-", input="x" * 100_000)
    assert result.stdout == "ok"
    assert loader.engine.streams[0].n_past == 100_003


@pytest.mark.parametrize("arguments", [["-p", ""], ["-"]])
def test_empty_prompt(run: Run, loader: Loader, arguments: list[str]) -> None:
    result = run("run", "-m", "x", *arguments, input="")
    assert is_one_line_error(result)
    assert "empty" in result.stderr
    assert loader.n_loads == 0


def test_invalid_utf8_names_the_byte(run: Run, loader: Loader, tmp_path: Path) -> None:
    file = tmp_path / "prompt"
    file.write_bytes(b"abcd\xff\xfeef")
    result = run("run", "-m", "x", "-f", str(file))
    assert is_one_line_error(result)
    assert "0xff at offset 4" in result.stderr
    assert loader.n_loads == 0


def test_unreadable_files(run: Run, loader: Loader, tmp_path: Path) -> None:
    for path in (tmp_path / "missing", tmp_path):
        assert is_one_line_error(run("run", "-m", "x", "-f", str(path)))
        assert is_one_line_error(run("run", "-m", "x", "-p", "a", "--grammar-file", str(tmp_path / "missing")))
        assert is_one_line_error(run("chat", "-m", "x", "-sysf", str(path)))
    assert loader.n_loads == 0


STATS = [
    "tokens_seen",
    "n_ctx",
    "n_keep",
    "slides",
    "rebases",
    "rss_start_mib",
    "rss_end_mib",
    "tok_per_s",
    "p50_ms",
    "p99_ms",
    "max_ms",
    "sink_move",
]


def test_stats_file(run: Run, loader: Loader, tmp_path: Path) -> None:
    file = tmp_path / "stats.json"
    file.write_text("old")
    loader.engine.answers.append("x" * 200)
    assert run("run", "-m", "x", "-p", "hello", "-c", "64", "--stats", str(file)).exit_code == 0
    stats = json.loads(file.read_text())
    assert set(STATS) <= set(stats)
    assert (stats["tokens_seen"], stats["tokens_generated"], stats["prompt_tokens"]) == (206, 201, 5)
    assert (stats["n_ctx"], stats["n_keep"]) == (64, 4)
    assert stats["slides"] > 0
    assert 0 < stats["p50_ms"] <= stats["p99_ms"] <= stats["max_ms"]
    assert list(tmp_path.iterdir()) == [file]


def test_stats_that_cannot_be_written_fail_before_the_work(
    run: Run, loader: Loader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "pipe")
    result = run("run", "-m", "x", "-p", "a", "--save", str(tmp_path / "pipe"))  # --stats would be written to it
    assert is_one_line_error(result) and "it is not a regular file" in result.stderr
    targets = [tmp_path / "none" / "stats", tmp_path]
    for target in targets:
        assert is_one_line_error(run("run", "-m", "x", "-p", "a", "--stats", str(target)))
    folder = tmp_path / "readonly"
    folder.mkdir(mode=0o500)
    # Root may write anywhere: say what the system would say to others.
    monkeypatch.setattr(os, "access", lambda path, _mode: Path(path) != folder)
    result = run("run", "-m", "x", "-p", "a", "--stats", str(folder / "stats"))
    assert is_one_line_error(result)
    assert "no permission" in result.stderr
    assert loader.n_loads == 0


def test_a_failed_write_keeps_the_old_file(
    run: Run, loader: Loader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "stats.json"
    file.write_text("old")
    loader.engine.answers.append("x")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    result = run("run", "-m", "x", "-p", "a", "--stats", str(file))
    assert "No space left" in result.stderr
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_ctrl_c_ends_cleanly_with_stats_and_session(run: Run, loader: Loader, tmp_path: Path) -> None:
    stats, saved = tmp_path / "stats.json", tmp_path / "saved"
    loader.engine.answers.append("abcdefgh")
    loader.engine.on_token = lambda n: signal.raise_signal(signal.SIGINT) if n == 3 else None
    handler = signal.getsignal(signal.SIGINT)
    result = run("run", "-m", "x", "-p", "hi", "--stats", str(stats), "--save", str(saved))
    assert result.exit_code == 130
    assert result.stdout == "abc"
    assert json.loads(stats.read_text())["tokens_generated"] == 3
    assert peek_session(saved)[0].n_past == 5
    assert loader.engine.closed
    assert signal.getsignal(signal.SIGINT) is handler


def test_save_and_load(run: Run, loader: Loader, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    loader.engine.answers += ["one", "two", "three"]
    run("run", "-m", "x", "-p", "hi", "--save", str(saved))
    assert run("run", "-m", "x", "-p", " and", "--load", str(saved)).stdout == "two"
    assert loader.engine.streams[-1].text == "hione<|im_end|> andtwo<|im_end|>"
    assert run("run", "-m", "x", "--load", str(saved)).stdout == "three"
    assert loader.engine.streams[-1].text == "hione<|im_end|>three<|im_end|>"
    saved.write_text("damaged")
    assert is_one_line_error(run("run", "-m", "x", "--load", str(saved)))


def test_a_reader_that_went_away_is_no_error(run: Run, loader: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    loader.engine.answers.append("abc")

    def gone(_n: int) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    loader.engine.on_token = gone
    result = run("run", "-m", "x", "-p", "hi")
    assert result.exit_code == 0
    assert result.stderr == ""


#
# chat
#


def test_chat_with_piped_lines(run: Run, loader: Loader) -> None:
    loader.engine.answers += ["one", "two"]
    result = run("chat", "-m", "x", "-sys", "Be brief.", input="first\n\nsecond\n")
    assert result.exit_code == 0
    assert result.stdout == "one\ntwo\n"
    assert "Be brief.<|im_end|>" in loader.engine.streams[0].text
    assert loader.engine.streams[0].closed


def test_chat_messages_of_several_lines(run: Run, loader: Loader) -> None:
    loader.engine.answers += ["one", "two"]
    run("chat", "-m", "x", input='"""\na\n/exit\n"""\n"""b"""\n')
    text = loader.engine.streams[0].text
    assert "user\na\n/exit<|im_end|>" in text
    assert "user\nb<|im_end|>" in text


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/usr/bin/env is a path", "/usr/bin/env is a path"),
        ("/nonsense", "/nonsense"),
        ("//exit", "/exit"),
        ("///", "//"),
        ('"""/exit"""', "/exit"),
        ('"""\n/clear\n"""', "/clear"),
    ],
)
def test_what_is_no_command_in_piped_lines_is_text(run: Run, loader: Loader, line: str, said: str) -> None:
    loader.engine.answers += ["one", "two"]
    assert run("chat", "-m", "x", input=f"{line}\nnext\n").stdout == "one\ntwo\n"
    assert f"user\n{said}<|im_end|>" in loader.engine.streams[0].text


def on_a_terminal(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    """Have a chat read these lines as if a user typed them."""
    from edge_stream.cli.lines import Lines

    left = list(lines)

    def read(self: Lines, _prompt: str) -> str:
        self.interactive = True
        if not left:
            raise EOFError
        return left.pop(0)

    monkeypatch.setattr(Lines, "_read_line", read)


def test_an_unknown_command_on_a_terminal_is_not_sent(
    run: Run, loader: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader.engine.answers.append("one")
    on_a_terminal(monkeypatch, "/usr/bin/env", "//usr/bin/env")
    result = run("chat", "-m", "x")
    assert "unknown command /usr/bin/env" in result.stderr
    assert result.stdout == "one\n"
    assert "user\n/usr/bin/env<|im_end|>" in loader.engine.streams[0].text


def test_chat_messages_of_several_lines_with_mli(run: Run, loader: Loader) -> None:
    loader.engine.answers += ["one", "two"]
    run("chat", "-m", "x", "-mli", input="a\nb\\\n/stats\nc\nd")
    text = loader.engine.streams[0].text
    assert "user\na\nb<|im_end|>" in text
    assert "user\nc\nd<|im_end|>" in text


def test_chat_answers_the_message_of_its_command_line_first(run: Run, loader: Loader, tmp_path: Path) -> None:
    file = tmp_path / "message"
    file.write_text("from\\na file")
    loader.engine.answers += ["one", "two", "three", "four"]
    assert run("chat", "-m", "x", "-p", "/exit\\nnow", "-st", input="never").stdout == "one\n"
    assert "user\n/exit\nnow<|im_end|>" in loader.engine.streams[-1].text
    assert run("chat", "-m", "x", "-f", str(file), input="more").stdout == "two\nthree\n"
    assert "user\nfrom\\na file<|im_end|>" in loader.engine.streams[-1].text
    assert run("chat", "-m", "x", "-st", input="/stats\nhi\nnever").stdout == "four\n"


def test_escapes_in_a_prompt(run: Run, loader: Loader) -> None:
    loader.engine.answers += ["one\ntwo", "one"]
    flags = ["-r", "\\n", "--echo"]
    assert run("run", "-m", "x", "-p", r"a\tb\x41\q\\n ", *flags).stdout == "a\tbA\\q\\n one"
    assert run("run", "-m", "x", "-p", r"a\tb ", "--no-escape", "--echo").stdout == r"a\tb one"


def test_chat_continues_an_answer_that_was_cut(run: Run, loader: Loader) -> None:
    loader.engine.answers += ["abcdef", "def", "more"]
    result = run("chat", "-m", "x", "-n", "3", input="hi\n/continue\n/set predict -1\nyes\n")
    assert result.stdout == "abc\ndef\nmore\n"
    text = loader.engine.streams[0].text
    assert "assistant\nabcdef<|im_end|>\n<|im_start|>user\nyes<|im_end|>" in text
    assert run("chat", "-m", "x", input="/continue\n").stderr == "error: there is no answer to continue\n"


def test_chat_does_not_continue_a_whole_answer(run: Run, loader: Loader) -> None:
    loader.engine.answers.append("abc")
    assert "the last answer is complete" in run("chat", "-m", "x", input="hi\n/continue\n").stderr


def test_chat_shows_thoughts_or_hides_them(run: Run, loader: Loader) -> None:
    loader.engine.n_thinking = 3
    loader.engine.answers += ["hm.yes"] * 3
    assert run("chat", "-m", "x", "-p", "a", "-st").stdout == "[Start thinking]\nhm.\n[End thinking]\n\nyes\n"
    assert run("chat", "-m", "x", "-p", "a", "-st", "--hide-thinking").stdout == "yes\n"
    shown = run("chat", "-m", "x", "-p", "a", "-st", "-co", "on", color=True).stdout
    assert shown == "\033[2m[Start thinking]\nhm.\n[End thinking]\033[0m\n\nyes\n"


def test_a_resumed_session_says_which_flags_it_ignores(run: Run, loader: Loader, tmp_path: Path) -> None:
    path = tmp_path / "session"
    loader.engine.answers += ["one", "two", "three", "four"]
    run("chat", "-m", "x", "--session", str(path), "-p", "a", "-st")
    quiet = run("chat", "-m", "x", "--session", str(path), "-p", "a", "-st", "--keep", "4")
    assert "ignored" not in quiet.stderr
    said = run("chat", "-m", "x", "--session", str(path), "-p", "a", "-st", "--keep", "9")
    assert "the session keeps its own --keep 4; --keep 9 is ignored" in said.stderr


def test_chat_commands(run: Run, loader: Loader, tmp_path: Path) -> None:
    file = tmp_path / "text"
    file.write_text("from a file")
    saved = tmp_path / "saved"
    loader.engine.answers += ["one", "uno", "two", "three"]
    lines = ["/help", "hi", "/regen", f"/save {saved}", "/set temp 0.25", f"/read {file}", "/clear"]
    lines += [f"/load {saved}", "/set predict=2", "more", "/stats", "/bye", "never"]
    result = run("chat", "-m", "x", input="\n".join(lines))
    assert result.exit_code == 0, result.output
    assert result.stdout == "one\nuno\ntwo\nth\n"
    assert "/regen" in result.stderr
    assert "tokens seen" in result.stderr
    assert [s.temp for s in loader.engine.samplings] == [0.8, 0.8, 0.25, 0.25]
    last = loader.engine.streams[-1].text
    assert "uno<|im_end|>\n<|im_start|>user\nmore" in last
    assert "from a file" not in last


BAD = [
    "/set temp hot",
    "/set temp -1",
    "/set colour 3",
    "/read",
    "/regen",
    "/read none",
    "/load none",
]


@pytest.mark.parametrize("line", BAD)
def test_chat_with_piped_lines_fails_on_a_bad_command(run: Run, line: str) -> None:
    assert run("chat", "-m", "x", input=line).exit_code == 1


def test_chat_session_is_saved_after_each_turn_and_resumed(run: Run, loader: Loader, tmp_path: Path) -> None:
    path = tmp_path / "session"
    loader.engine.answers += ["one", "two"]
    run("chat", "-m", "x", "--session", str(path), "-sys", "S", input="first\n")
    result = run("chat", "-m", "x", "--session", str(path), input="second\n")
    assert "resumed" in result.stderr
    messages = json.loads(peek_session(path)[1])["messages"]
    assert [m["content"] for m in messages] == ["first", "one", "second", "two"]


def test_chat_with_a_damaged_session_leaves_it_alone(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "session"
    path.write_bytes(b"damaged")
    result = run("chat", "-m", "x", "--session", str(path), input="hi\n")
    assert is_one_line_error(result)
    assert "untouched" in result.stderr
    assert path.read_bytes() == b"damaged"


def test_chat_session_follows_clear_and_load(run: Run, loader: Loader, tmp_path: Path) -> None:
    path, other = tmp_path / "session", tmp_path / "other"
    loader.engine.answers.append("one")
    run("chat", "-m", "x", "--session", str(path), input=f"first\n/save {other}\n/clear\n")
    assert peek_session(path)[0].n_past == 0
    run("chat", "-m", "x", "--session", str(path), input=f"/load {other}\n")
    assert path.read_bytes() == other.read_bytes()


def test_chat_goes_on_after_a_failed_load(
    run: Run, loader: Loader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edge_stream.cli.lines import Lines, Message

    lines = iter([Message("first", True), Message(f"/load {tmp_path / 'none'}", False), Message("second", True)])

    def read(self: Lines) -> Message:
        self.interactive = True  # on a terminal an error does not end the chat
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(Lines, "read_message", read)
    loader.engine.answers += ["one", "two"]
    result = run("chat", "-m", "x")
    assert result.exit_code == 0
    assert "cannot open session" in result.stderr
    assert "first<|im_end|>\n<|im_start|>assistant\none<|im_end|>" in loader.engine.streams[-1].text
    assert "second" in loader.engine.streams[-1].text


def test_chat_ctrl_c_ends_the_answer_not_the_program(run: Run, loader: Loader) -> None:
    loader.engine.answers += ["abcdef", "next"]
    presses = iter([2])
    when = next(presses)
    seen: list[int] = []

    def press(n: int) -> None:
        if n == when and not seen:
            seen.append(n)
            signal.raise_signal(signal.SIGINT)

    loader.engine.on_token = press
    result = run("chat", "-m", "x", input="first\nsecond\n")
    assert result.exit_code == 0
    assert result.stdout == "ab\nnext\n"
    assert "ab<|im_end|>\n<|im_start|>user\nsecond" in loader.engine.streams[0].text


def test_chat_ctrl_c_twice_quits(run: Run, loader: Loader) -> None:
    loader.engine.answers.append("abcdef")
    loader.engine.on_token = lambda n: [signal.raise_signal(signal.SIGINT) for _ in range(2)] and None
    assert run("chat", "-m", "x", input="first\nsecond\n").exit_code == 130


def test_chat_timings(run: Run, loader: Loader) -> None:
    loader.engine.answers.append("abcdef")
    result = run("chat", "-m", "x", "--show-timings", input="hi\n")
    assert result.stderr.startswith("[ Prompt: ")
    assert "Generation: " in result.stderr


#
# demo and info
#


def test_demo_prints_one_json_object(run: Run, loader: Loader) -> None:
    loader.engine.answers.append("text ")
    result = run("demo", "--json", "-c", "64")
    found = json.loads(result.stdout)
    assert result.stdout.count("\n") == 1
    for key in ("tokens_seen", "n_ctx", "n_keep", "slides", "rss_start_mib", "rss_end_mib", "tok_per_s"):
        assert isinstance(found[key], (int, float)), key
    assert found["tokens_seen"] == 64 * 7
    assert (found["ppl_sinks"], found["ppl_no_sinks"]) == (2.0, 4.0)
    assert [(stream.n_keep, stream.closed) for stream in loader.engine.streams] == [
        (4, True),
        (4, True),
        (0, True),
    ]


def test_demo_for_people(run: Run, loader: Loader) -> None:
    loader.engine.answers.append("text ")
    result = run("demo", "-c", "64")
    assert "Perplexity" in result.stdout
    assert "448 tokens" in result.stdout


def test_model_facts(loader: Loader) -> None:
    from edge_stream.cli.info import model_facts

    facts = model_facts(loader.load("x", n_ctx=2048, n_keep=4))
    assert facts["kv_mib"] == 2.0
    assert json.dumps(facts)


def test_error_classes_are_caught_at_the_edge_only(run: Run, loader: Loader) -> None:
    loader.error = EdgeStreamError("one clear sentence")
    assert run("run", "-m", "x", "-p", "hi").stderr == "error: one clear sentence\n"
