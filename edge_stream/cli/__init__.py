"""The `edge-stream` command. One module per subcommand, imported when it is used."""

from __future__ import annotations

import errno
import os
import sys
from contextlib import suppress
from typing import Any

import click

from edge_stream.cli.dispatch import Dispatcher
from edge_stream.errors import EdgeStreamError, not_utf8, one_line
from edge_stream.paths import shown

# Name -> its line in `--help`. A subcommand is the click command `main` of the module of its name.
COMMANDS = {
    "run": "Complete a prompt of any length.",
    "chat": "Chat with a model; the system prompt stays in the cache.",
    "serve": "Serve conversations of any length over the OpenAI API.",
    "recall": "Search the log that chat --recall keeps, or delete from it.",
    "demo": "Watch a stream outgrow its cache, in under two minutes.",
    "convert": "Convert a Hugging Face checkpoint to a GGUF file or an MLC model.",
    "train": "Train a small model, or continue one, so that one sink is enough.",
    "export-ios": "Package a model for the iOS app, with a cache that fits the phone.",
    "bench": "Measure speed, latency and memory, beside other methods.",
    "eval": "Measure perplexity and recall along a stream, or run a soak test.",
    "inspect": "Show where the attention of a model goes.",
    "rpc-server": "Let an edge-stream on another machine use this one's devices.",
    "info": "Show versions and devices, and whether a model can stream.",
}


# What writing to stdout may fail with, where it is a file.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
# What any call may fail with while the machine has no more of something.
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


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
        except BrokenPipeError:  # the reader has gone (`| head`): no error
            _silence_stdout()
            raise click.exceptions.Exit(0) from None
        except EdgeStreamError as error:
            raise EdgeStreamFailure(str(error)) from error
        except MemoryError as error:
            what = str(error).splitlines()[:1]  # numpy says how much it was
            raise EdgeStreamFailure(one_line(": ".join(["there is not enough memory", *what]))) from error
        except UnicodeEncodeError as error:  # of an argument, or a name
            raise EdgeStreamFailure(one_line(not_utf8(error))) from error
        except OSError as error:
            if error.errno not in _EXHAUSTED and error.filename is None:
                raise
            where = [shown(error.filename)] if error.filename else []
            raise EdgeStreamFailure(one_line(": ".join([*where, error.strerror or str(error)]))) from error


def _silence_stdout() -> None:
    with suppress(OSError, ValueError):  # stdout may be a buffer without a file
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
    """Run a language model on text of any length, at constant memory."""


def main() -> None:
    """Entry point of the `edge-stream` command."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # an old terminal may lack what a model writes
    try:
        try:
            cli(prog_name="edge-stream")
        finally:
            sys.stdout.flush()  # at exit a failure would be a traceback
    except BrokenPipeError:
        _silence_stdout()
        sys.exit(0)
    except OSError as error:
        if error.filename is not None or error.errno not in _FULL:
            raise
        _silence_stdout()
        click.echo(f"error: the output cannot be written: {error.strerror}", err=True)
        sys.exit(1)
