"""The `edge-stream` command: a dispatcher that imports one module per subcommand, and only when it runs."""

from __future__ import annotations

import importlib
import os
import sys
from contextlib import suppress
from typing import Any

import click

# Name -> the line `--help` shows. A subcommand lives in the module of its name, as a click command `main`.
COMMANDS = {
    "run": "Complete a prompt of any length, for as long as you like.",
    "chat": "Talk with a model; the system prompt stays pinned for ever.",
    "serve": "Serve endless conversations over the OpenAI API.",
    "demo": "See a stream outgrow its cache, in under two minutes.",
    "convert": "Make a GGUF file or an MLC model of a Hugging Face checkpoint.",
    "export-ios": "Pack a model for the iOS app, with the cache that fits a phone.",
    "bench": "Measure speed, latency and memory against other methods.",
    "eval": "Measure perplexity and recall along a stream, or soak for hours.",
    "inspect": "Look inside: where the attention goes.",
    "rpc-server": "Lend this machine's devices to an edge-stream on another.",
    "info": "Show versions, devices, and whether a model can stream.",
}


class EdgeStreamFailure(click.ClickException):
    """An error of the library, shown as one line on stderr."""

    exit_code = 1

    def show(self, file: Any = None) -> None:
        """Print `error: ...`."""
        click.echo(f"error: {self.format_message()}", file=file, err=file is None)


class Dispatcher(click.Group):
    """A click group whose subcommands are imported on use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of COMMANDS."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the module that holds the subcommand."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"edge_stream.cli.{cmd_name.replace('-', '_')}").main
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List subcommands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        """Run a subcommand and turn what goes wrong into a line and an exit status."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise click.exceptions.Exit(130) from None
        except BrokenPipeError:
            # The reader has gone (`| head`): nobody is left to tell. Python flushes stdout at exit,
            # which would fail once more.
            _silence_stdout()
            raise click.exceptions.Exit(0) from None
        except Exception as error:
            from edge_stream.errors import EdgeStreamError

            if isinstance(error, EdgeStreamError):
                raise EdgeStreamFailure(str(error)) from error
            raise


def _silence_stdout() -> None:
    with suppress(OSError, ValueError):  # a test's buffer has no file to silence
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _print_version(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        click.echo(f"edge-stream {package_version()}")
        ctx.exit()


def package_version() -> str:
    """The version of edge-stream."""
    from edge_stream._version import __version__

    return __version__


@click.command(cls=Dispatcher, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_print_version,
    help="Show the version and exit.",
)
def cli() -> None:
    """Stream a language model for ever at constant memory."""


def main() -> None:
    """Entry point of the `edge-stream` command."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a model may write what an old terminal cannot show
    cli(prog_name="edge-stream")
