"""What `eval` and `inspect` share: flags, the text to read, the model's settings, tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_stream.backends import MODES
from edge_stream.cli import options
from edge_stream.cli.console import read_text
from edge_stream.cli.lists import ChoiceList
from edge_stream.cli.options import F
from edge_stream.errors import EdgeStreamError

if TYPE_CHECKING:
    from edge_stream.engine import Engine


# the model, its cache and its speed, as the other commands have them
engine_options = options.compose(options.model_option(), options.context_options(), options.compute_options)


def mode_option(default: str = "stream", choices: Sequence[str] = MODES) -> Callable[[F], F]:
    """The `--mode` flag: a comma list."""
    return click.option(
        "--mode",
        "modes",
        type=ChoiceList(choices),
        default=default,
        show_default=True,
        help=f"Any of {', '.join(choices)}.",
    )


# the text to read
text_options = options.compose(
    click.option("-f", "--file", "text_file", metavar="FILE", help="The text; - is stdin. Default: Python's help."),
    click.option("--tokens", "ids_file", metavar="FILE.npy", help="Token ids to read instead of a text."),
    click.option(
        "--max-tokens", type=click.IntRange(min=0), default=0, metavar="N", help="Read only the first N tokens."
    ),
)
chunk_option = click.option(
    "--chunk", type=click.IntRange(min=1), default=1, show_default=True, help="Tokens per decode."
)
untimed_option = click.option(
    "--untimed", is_flag=True, help="Leave out the speed, when other work shares the machine."
)


def output_option(*names: str) -> Callable[[F], F]:
    """The flag of the table's format."""
    formats = click.Choice(["md", "csv", "json", "jsonl"])
    return click.option(*names, "output", type=formats, default="md", show_default=True, help="Format.")


def prepare(flags: dict[str, Any], ask: Callable[[Engine], Any] = lambda _engine: None) -> Any:
    """Check the flags of the model and return ask(engine), for what takes its tokenizer; the model is closed again.

    Sets flags["settings"], the other arguments of Engine.load; replaces the model's name by its path, and `-c 0` by the
    training length.
    """
    from edge_stream.engine import Engine
    from edge_stream.models import names

    if flags["n_keep"] < 0:
        raise click.UsageError("--keep -1 (the whole prompt) means nothing here: give a number.")
    options.resolve(flags)
    flags["model"] = str(names.resolve(str(flags["model"])))
    if flags["n_ctx"] and flags["n_keep"] >= flags["n_ctx"]:
        raise EdgeStreamError(f"--keep {flags['n_keep']} must be less than --ctx-size {flags['n_ctx']}")
    flags["settings"] = options.engine_settings(flags)
    with Engine.load(flags["model"], n_ctx=64, **flags["settings"] | {"n_slide": 0}) as engine:
        if flags["n_ctx"] == 0:
            flags["n_ctx"] = engine.n_ctx_train
            click.echo(f"ctx-size 0: using {options.length_name(engine)}, {engine.n_ctx_train} tokens", err=True)
        return ask(engine)


def read_tokens(flags: dict[str, Any]) -> list[int]:
    """The tokens that -f, --tokens and --max-tokens name. Calls prepare."""
    from edge_stream.measure import corpus

    if flags["text_file"] and flags["ids_file"]:
        raise click.UsageError("Give only one of -f FILE and --tokens FILE.npy.")
    text = None
    if not flags["ids_file"]:
        text = read_text(Path(flags["text_file"])) if flags["text_file"] else corpus.help_topics()
    n_max = flags["max_tokens"]
    tokens: list[int] = prepare(flags, lambda engine: corpus.read_tokens(engine, text, flags["ids_file"], n_max))
    if len(tokens) < n_max:
        click.echo(f"the text ends after {len(tokens)} tokens", err=True)
    return tokens


class KeepingDone:
    """A block that Ctrl-C ends, after which what is done is shown, and then `finish` ends the command.

    done: what is done so far; with nothing done, Ctrl-C ends the command at once.
    """

    def __init__(self, done: Sized) -> None:
        self._done, self._stopped = done, False

    def __enter__(self) -> KeepingDone:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        self._stopped = kind is KeyboardInterrupt and len(self._done) > 0
        if self._stopped:
            click.echo("stopped by Ctrl-C; this was done before:", err=True)
        return self._stopped

    def finish(self) -> None:
        """End the command if Ctrl-C did."""
        if self._stopped:
            raise KeyboardInterrupt


def emit(rows: list[dict[str, Any]], columns: list[str], output: str) -> None:
    """Print rows; JSON of a single row is an object, of several a list."""
    from edge_stream.measure.table import as_json, render

    click.echo(as_json(rows[0]) if output == "json" and len(rows) == 1 else render(rows, output, columns))
