"""Every flag of the pinned llama.cpp's programs is an option of ours, taken for granted, or refused with a reason."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import click
import pytest

from edge_stream.cli import chat, llama_flags, run, serve

ARG_CPP = Path(__file__).parents[1] / "build" / "llama.cpp" / "llama.cpp" / "common" / "arg.cpp"

# Flags of the sampler that another change brings.
EXPECTED_ELSEWHERE = frozenset(
    """
    --samplers --sampler-seq --sampling-seq --top-nsigma --top-n-sigma --xtc-probability --xtc-threshold --typical
    --typical-p --dry-multiplier --dry-base --dry-allowed-length --dry-penalty-last-n --dry-sequence-breaker
    --adaptive-target --adaptive-decay --dynatemp-range --dynatemp-exp --mirostat --mirostat-lr --mirostat-ent
    -l -jf --json-schema-file
    """.split()  # noqa: SIM905
)

# Which programs' flags each of our commands takes.
COMMANDS: dict[str, tuple[click.Command, tuple[str, ...]]] = {
    "serve": (serve.main, ("SERVER",)),
    "chat": (chat.main, ("CLI", "COMPLETION")),
    "run": (run.main, ("CLI", "COMPLETION")),
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
    assert set(unknown) == EXPECTED_ELSEWHERE


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
