"""Every flag of the pinned llama.cpp's programs is an option of ours, taken for granted, or refused with a reason."""

from __future__ import annotations

import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path

import click
import pytest
from cli_runner import Loader, Run
from click.testing import CliRunner

from edge_stream.chat.options import ChatOptions
from edge_stream.cli import chat, llama_flags, serve
from edge_stream.cli import run as run_command
from edge_stream.cli.chat_flags import make_chat_options
from edge_stream.errors import EdgeStreamError
from edge_stream.models import downloads
from edge_stream.server.settings import Settings

ARG_CPP = Path(__file__).parents[1] / "build" / "llama.cpp" / "llama.cpp" / "common" / "arg.cpp"

# Which programs' flags each of our commands takes.
COMMANDS: dict[str, tuple[click.Command, tuple[str, ...]]] = {
    "serve": (serve.main, ("SERVER",)),
    "chat": (chat.main, ("CLI", "COMPLETION")),
    "run": (run_command.main, ("CLI", "COMPLETION")),
}


@dataclass(frozen=True)
class Flag:
    """One option of arg.cpp: its names, its environment variable, and the programs that take it."""

    names: tuple[str, ...]
    env: str
    examples: frozenset[str]
    excludes: frozenset[str]
    n_values: int

    def is_of(self, programs: tuple[str, ...]) -> bool:
        return any((self.examples & {"COMMON", program}) and program not in self.excludes for program in programs)


def llama_flags_of_source() -> list[Flag]:
    """The options that arg.cpp adds, read off its text."""
    text = re.sub(r"^\s*//.*$", "", ARG_CPP.read_text(encoding="utf-8"), flags=re.MULTILINE)
    found = []
    for block in text.split("add_opt(common_arg(")[1:]:
        names = re.match(r'\s*\{((?:[^}"]|"[^"]*")*)\}\s*,\s*(\{(?:[^}"]|"[^"]*")*\})?', block)
        assert names, block[:80]

        def tags(setter: str, block: str = block) -> frozenset[str]:
            match = re.search(rf"\.{setter}\(\{{([^}}]*)\}}\)", block)
            return frozenset(re.findall(r"LLAMA_EXAMPLE_(\w+)", match[1] if match else ""))

        env = re.search(r'\.set_env\("(\w+)"\)', block)
        handler = re.search(r"\[[&\w]*\]\(common_params ?&[^,)]*((?:,[^,)]*)*)\)", block)
        assert handler, block[:200]
        values = [part for part in handler[1].split(",") if part.strip() and not part.strip().startswith("bool")]
        found.append(
            Flag(
                tuple(re.findall(r'"(-[^"]*)"', names[0])),
                env[1] if env else "",
                tags("set_examples") or frozenset({"COMMON"}),
                tags("set_excludes"),
                len(values),
            )
        )
    return found


FLAGS = llama_flags_of_source() if ARG_CPP.exists() else []
needs_source = pytest.mark.skipif(not FLAGS, reason="the pinned llama.cpp has not been fetched")


def own_names(command: click.Command) -> dict[str, click.Option]:
    options = [p for p in command.params if isinstance(p, click.Option)]
    return {name: option for option in options for name in (*option.opts, *option.secondary_opts)}


@needs_source
def test_the_source_is_read_as_a_whole() -> None:
    names = {name for flag in FLAGS for name in flag.names}
    assert len(FLAGS) == ARG_CPP.read_text(encoding="utf-8").count("add_opt(common_arg(")
    assert {"-m", "-cb", "-nocb", "--no-warmup", "-fa", "--spec-type", "-st", "--slot-save-path", "-hf"} <= names


@needs_source
@pytest.mark.parametrize("name", COMMANDS)
def test_every_flag_is_known(name: str) -> None:
    command, programs = COMMANDS[name]
    known = (
        own_names(command).keys()
        | llama_flags.ALWAYS_FLAGS
        | llama_flags.REASONS.keys()
        | {"-h", "--help", "--usage", "--version"}
    )
    unknown = [n for flag in FLAGS if flag.is_of(programs) for n in flag.names if n not in known]
    assert not unknown


@needs_source
@pytest.mark.parametrize("name", COMMANDS)
def test_flags_take_as_many_values_as_in_llama_cpp(name: str) -> None:
    """One that took fewer would leave a value behind as an argument."""
    command, programs = COMMANDS[name]
    own = own_names(command)
    wrong = []
    for flag in FLAGS:
        for n in flag.names if flag.is_of(programs) else ():
            n_values = 0 if n in llama_flags.ALWAYS_FLAGS else flag.n_values
            if n in own:
                n_values = 0 if own[n].is_flag else own[n].nargs
            if n_values != flag.n_values:
                wrong.append(n)
    assert not wrong


@needs_source
@pytest.mark.parametrize("name", COMMANDS)
def test_environment_variables_are_those_of_llama_cpp(name: str) -> None:
    command, programs = COMMANDS[name]
    own = own_names(command)
    for flag in FLAGS:
        for n in flag.names if flag.env and flag.is_of(programs) else ():
            if n in own and n not in ("-h", "--help") and own[n].expose_value:
                given = own[n].envvar
                assert flag.env in ([given] if isinstance(given, str) else given or ()), n


@needs_source
def test_the_tables_hold_only_flags_of_llama_cpp() -> None:
    names = {n for flag in FLAGS for n in flag.names}
    envs = {e for flag in FLAGS if flag.env for e in (flag.env, flag.env.replace("LLAMA_ARG_", "LLAMA_ARG_NO_"))}
    assert (llama_flags.ALWAYS_FLAGS | llama_flags.REASONS.keys()) - names - envs == set()


def test_reasons_are_sentences() -> None:
    for names, reason in llama_flags.REFUSED.items():
        assert reason[0].islower() or reason[0] in "-PR`", names
        assert not reason.endswith("."), names
        assert 10 < len(reason) < 160, names


@needs_source
def test_every_hidden_flag_is_documented() -> None:
    text = (Path(__file__).parents[1] / "docs" / "flags.md").read_text(encoding="utf-8")
    for command, _ in COMMANDS.values():
        for name, flag in own_names(command).items():
            assert not flag.hidden or f"`{name}`" in text, name


#
# how a command line is read
#


def fails(run: Run, *arguments: str) -> str:
    """What a command line is refused with, before anything is loaded."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    return result.stderr.splitlines()[-1]


def test_flags_of_several_letters_are_never_split(run: Run, loader: Loader) -> None:
    loader.engine.answers += ["ok", "ok"]
    assert run("run", "-m", "x", "-p", "hi", "-cb", "-st").stdout == "ok"
    assert loader.asked["n_ctx"] == 4096
    assert "No such option '-c5'" in fails(run, "run", "-m", "x", "-p", "hi", "-c5")
    assert "No such option '-vs'" in fails(run, "run", "-m", "x", "-p", "hi", "-vs", "1")
    assert run("run", "-m", "x", "-p", "-cb -md --mmproj", "--echo").stdout == "-cb -md --mmprojok"


def test_underscores_and_equals_signs(run: Run, loader: Loader) -> None:
    loader.engine.answers.append("ok")
    run("run", "-m", "x", "--prompt=hi", "--ctx_size=99", "--batch_size", "7")
    assert (loader.asked["n_ctx"], loader.asked["n_batch"]) == (99, 7)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("chat -m x -md draft.gguf -devd none", "-devd: a draft model (-md) has"),
        ("serve -m x --mmproj p.gguf", "--mmproj: pictures"),
        ("run -m x -p a --rope-freq-scale 0.5", "positions never exceed --ctx-size"),
        ("serve -m x --models_dir d", "--models-dir: one server serves one model"),
        ("chat -m x -no-cnv", "use edge-stream run"),
        ("run -m x -p a -cnv", "use edge-stream chat"),
        ("run -m x -p a -sys b", "use edge-stream chat"),
        ("run -m x -p a -np 4", "edge-stream serve takes -np N"),
        ("run -m x -p a -fit on", "nothing is fitted"),
        ("run -m x -p a --log-colors on", "no colours"),
        ("run -m x -p a -t 513", "513 is not in the range"),
        ("run -m x -p a -ngl -5", "'-5' is neither"),
        ("run -m x -p a -hff f.gguf", "give -hf"),
        ("run -m x -p a -hf u/m", "only one of -m, -hf and -mu"),
        ("run -p a", "Missing option '-m' / '--model'"),
        ("run -m x -p a -ts 1,a", "not of the form 3,1"),
        ("run -m x -p a -ot blk", "PATTERN=BUFFER"),
        ("run -m x -p a --lora-scaled f", "FILE:SCALE"),
        ("run -m x -p a -lm mmap --mlock", "not both"),
        ("run -m x -p a -f b", "only one of -p TEXT and -f FILE"),
        ("chat -m x --chat-template-kwargs [1]", "JSON object"),
        ("chat -m x --chat-template-kwargs {", "not valid JSON"),
        ("chat -m x --reasoning-budget -2", "-2 is not in the range"),
        ("chat -m x --chat-template a --chat-template-file b", "Give only one"),
        ("serve -m x --ssl-key-file pyproject.toml", "https needs both"),
        ("serve -m x --no-sessions --slot-save-path tests", "--no-sessions forbids"),
    ],
)
def test_refusals(run: Run, loader: Loader, arguments: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[1])
    assert said in fails(run, *arguments.split())
    assert loader.n_loads == 0


def test_environment_variables_in_llama_cpps_words(run: Run, loader: Loader) -> None:
    loader.engine.answers += ["ok"] * 4
    env = {"LLAMA_ARG_MODEL": "x", "LLAMA_ARG_NO_MMAP": "", "LLAMA_ARG_FLASH_ATTN": "enabled"}
    run("run", "-p", "a", env=env)
    assert (loader.asked["load_mode"], loader.asked["flash_attn"]) == ("none", "on")
    run("run", "-p", "a", "--mmap", "-fa", "0", env=env)
    assert (loader.asked["load_mode"], loader.asked["flash_attn"]) == ("mmap", "off")
    run("run", "-p", "a", env={"LLAMA_ARG_MODEL": "x", "LLAMA_ARG_MLOCK": "enabled"})
    assert loader.asked["load_mode"] == "mmap+mlock"
    ignored = {"LLAMA_ARG_MMPROJ": "p", "LLAMA_ARG_CONT_BATCHING": "0", "LLAMA_ARG_JINJA": "1", "LLAMA_ARG_MODEL": "x"}
    lines = run("run", "-p", "a", env=ignored).stderr.splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        "LLAMA_ARG_NO_CONT_BATCHING is ignored",
        "LLAMA_ARG_MMPROJ is ignored",
    ]


@pytest.mark.parametrize(
    ("arguments", "model"),
    [
        ("-hf u/m:Q8_0", "hf:u/m:Q8_0"),
        ("--hf-repo u/m", "hf:u/m"),
        ("-hfr u/m:Q4_0 -hff sub/f.gguf", "hf:u/m:sub/f.gguf"),
        ("-m a.gguf", "a.gguf"),
    ],
)
def test_names_of_models(run: Run, loader: Loader, arguments: str, model: str) -> None:
    loader.engine.answers.append("ok")
    # -c and --keep: no defaults are looked for in the file
    run("run", *arguments.split(), "-p", "a", "-c", "99", "--keep", "4", env={"LLAMA_ARG_HF_REPO": "other/one"})
    assert loader.asked["model"] == model


def test_a_token_and_offline_reach_the_hub(run: Run, loader: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "0")
    loader.engine.answers.append("ok")
    run("run", "-m", "x", "-p", "a", "-hft", "secret", "--offline")
    assert (os.environ["HF_TOKEN"], os.environ["HF_HUB_OFFLINE"]) == ("secret", "1")


def test_a_model_from_a_url_is_downloaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "model name.gguf"
    source.write_bytes(b"GGUF" + bytes(3 << 20))
    cache, seen = tmp_path / "cache", []
    url = source.as_uri()
    path = downloads.fetch(url, cache, lambda *progress: seen.append(progress))
    assert path.read_bytes() == source.read_bytes()
    assert path.name == "model_name.gguf"
    assert seen[-1] == ("model_name.gguf", 4 + (3 << 20), 4 + (3 << 20))
    source.unlink()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert downloads.fetch(url, cache) == path
    with pytest.raises(EdgeStreamError, match="--offline downloads nothing"):
        downloads.fetch(url + "x", cache)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    with pytest.raises(EdgeStreamError, match="cannot download"):
        downloads.fetch(url + "x", cache)
    assert len(list(cache.rglob("*.gguf*"))) == 1


def test_where_tensors_go(run: Run, loader: Loader) -> None:
    loader.engine.answers.append("ok")
    flags = "-ts 3,1 -mg 1 -ot a=CPU,b=CUDA0 -cmoe -ncmoe 1 -ncffn 1 -nr --no-host --check-tensors -dio"
    flags += " --lora one,two --lora-scaled three:0.5"
    run("run", "-m", "x", "-p", "a", *flags.split())
    assert loader.asked["tensor_split"] == [3.0, 1.0]
    assert loader.asked["lora"] == [("one", 1.0), ("two", 1.0), ("three", 0.5)]
    assert loader.asked["load_mode"] == "dio"
    assert loader.asked["model_params"] == {
        "main_gpu": 1,
        "use_extra_bufts": False,
        "no_host": True,
        "check_tensors": True,
    }
    assert loader.asked["override_tensor"] == [
        ("a", "CPU"),
        ("b", "CUDA0"),
        (r"\.ffn_(up|down|gate|gate_up)_(ch|)exps", "CPU"),
        (r"blk\.0\.ffn_(up|down|gate|gate_up)_(ch|)exps", "CPU"),
        (r"blk\.0\.ffn_(up|down|gate)\.", "CPU"),
    ]


def test_errors_name_flags(run: Run, loader: Loader) -> None:
    loader.error = EdgeStreamError("n_keep = 64 must be less than n_ctx = 64, in /tmp/n_keep/x")
    said = run("run", "-m", "x", "-p", "a").stderr
    assert said == "error: --keep 64 must be less than --ctx-size 64, in /tmp/n_keep/x\n"


#
# chat and serve
#


def test_chat_options() -> None:
    flags = [
        "--chat-template-kwargs",
        '{"a":1}',
        "-rea",
        "off",
        "--reasoning-format",
        "none",
        "--reasoning-budget",
        "7",
    ]
    with chat.main.make_context("chat", ["-m", "x", *flags, "--reasoning-effort", "low"]) as ctx:
        found = make_chat_options(ctx.params)
    assert found == ChatOptions(
        template_kwargs={"a": 1, "reasoning_effort": "low"},
        reasoning_format="none",
        reasoning_budget=7,
        enable_thinking=False,
    )
    assert found.variables == {"a": 1, "reasoning_effort": "low", "enable_thinking": False}
    assert found.tag and not ChatOptions().tag and found.tag != ChatOptions(template="x").tag


def test_a_template_of_the_users_is_used(run: Run, loader: Loader, tmp_path: Path) -> None:
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ end }}{% endfor %}"
    (tmp_path / "t.jinja").write_text(template + "{% if add_generation_prompt %}<assistant>{% endif %}")
    loader.engine.answers.append("one")
    flags = ["--chat-template-file", str(tmp_path / "t.jinja"), "--chat-template-kwargs", '{"end": ";"}']
    run("chat", "-m", "x", "-p", "hi", "-st", *flags)
    assert loader.engine.streams[0].text.startswith("<user>hi;<assistant>one")
    loader.engine.answers.append("two")
    run("chat", "-m", "x", "--chat-template", "llama2", "-p", "hi", "-st")
    assert "[INST] hi [/INST]two" in loader.engine.streams[-1].text
    refused = run("chat", "-m", "x", "--chat-template", "pigeon", input="hi")
    assert "pigeon is neither a Jinja template nor the name of one of llama.cpp's" in refused.stderr


def test_a_pasted_line_of_llama_server(loader: Loader, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings: list[Settings] = []
    monkeypatch.setattr("edge_stream.server.serve.serve", lambda _engine, given: settings.append(given))
    monkeypatch.setattr("logging.basicConfig", lambda **_: None)
    keys = tmp_path / "keys"
    keys.write_text("# mine\nfour\n")
    line = (
        "-m x --lora one --lora-init-without-apply -a other,name --tags small,chat,small --host 0.0.0.0 --port 9000 "
        "-c 512 -np 2 -cb -fa on --jinja --no-warmup --metrics --props "
        f"--no-slots --slot-save-path {tmp_path} --api-key one,two --api-key three --api-key-file {keys} -to 60 "
        "--threads-http 4 --sse-ping-interval -1 --no-webui --cors-origins https://a,https://b --mlock -ngl 9 -sm row "
        "--reasoning-format deepseek --no-context-shift --cache-prompt -r END\\n --log-disable --swa-full --no-mmproj"
    )
    try:
        result = CliRunner().invoke(serve.main, line.split())
    finally:
        logging.disable(logging.NOTSET)
    assert result.exit_code == 0, result.output
    found = settings[0]
    assert (found.aliases, found.tags) == (("name", "other"), ("chat", "small"))
    assert (found.alias, found.host, found.port) == ("name", "0.0.0.0", 9000)
    assert found.api_keys == ("one", "two", "three", "four")
    assert (found.has_slots, found.has_page, found.slot_save_path) == (False, False, tmp_path)
    assert (found.limits.request_seconds, found.n_http_threads, found.ping_seconds) == (60, 4, 1e9)
    assert found.cors == ("https://a", "https://b")
    assert found.stop == ("END\n",)
    assert found.chat.reasoning_format == "deepseek"
    assert loader.asked["load_mode"] == "mmap+mlock" and loader.asked["lora"] == [("one", 0.0)]
