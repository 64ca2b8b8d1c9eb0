"""The `edge-stream` command. One module per subcommand, imported when it is used."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import Any

import click

from edge_stream.cli.dispatch import Dispatcher
from edge_stream.errors import EdgeStreamError

# Name -> its line in `--help`. A subcommand is the click command `main` of the module of its name.
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


class Main(Dispatcher):
    """Turns what goes wrong in a subcommand into a line on stderr and an exit status."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run a subcommand."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise click.exceptions.Exit(130) from None
        except BrokenPipeError:
            # the reader has gone (`| head`): no error. Python flushes stdout at exit, which would fail once more
            _silence_stdout()
            raise click.exceptions.Exit(0) from None
        except EdgeStreamError as error:
            raise EdgeStreamFailure(str(error)) from error


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


@click.group(cls=Main, package=__name__, commands=COMMANDS, context_settings={"help_option_names": ["-h", "--help"]})
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
