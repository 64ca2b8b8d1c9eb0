"""A group of subcommands, each a module that is imported when it is used."""

from __future__ import annotations

import importlib
from typing import Any

import click


class Dispatcher(click.Group):
    """The subcommands of a package: each is the click command `main` of the module of its name.

    commands: name -> the line that `--help` shows.
    """

    def __init__(self, *args: Any, package: str, commands: dict[str, str], **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._package, self._commands = package, commands

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names, in the order given."""
        return list(self._commands)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the module of a subcommand."""
        if cmd_name not in self._commands:
            return None
        command: click.Command = importlib.import_module(f"{self._package}.{cmd_name.replace('-', '_')}").main
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the subcommands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(self._commands.items()))
