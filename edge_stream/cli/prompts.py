"""Flags of run and chat for the text to begin with, with llama.cpp's names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click

from edge_stream.cli.console import decode_text, read_text
from edge_stream.cli.options import compose, log_colors_option, only, option, rare

escape_option = option(
    "-e/--no-escape",
    "--escape",
    "escape",
    default=True,
    show_default=False,
    help=r"Read \n, \t, \xHH and so on in -p and -r as what they stand for (the default), or as they are.",
)

prompt_options = compose(
    option("-p", "--prompt", metavar="TEXT", help="The prompt; in a chat the first message."),
    option(
        "-f",
        "--file",
        "-bf",
        "--binary-file",
        "prompt_file",
        metavar="FILE",
        type=click.Path(allow_dash=True),
        help="A file with it; - is stdin.",
    ),
    escape_option,
    rare("--simple-io", is_flag=True),
    option(
        "--show-timings/--no-show-timings",
        env="SHOW_TIMINGS",
        default=False,
        show_default=False,
        help="Print speeds after each answer.",
    ),
    rare(
        "-np",
        "--parallel",
        "one",
        env="N_PARALLEL",
        expose_value=False,
        callback=only("1 -1", "there is one text at a time here; edge-stream serve takes -np N"),
    ),
    rare("--log-disable", is_flag=True, expose_value=False),  # nothing is logged, but what -v asks for
    log_colors_option,
    rare("--log-prefix/--no-log-prefix", env="LOG_PREFIX", expose_value=False),
    rare("--log-timestamps/--no-log-timestamps", env="LOG_TIMESTAMPS", expose_value=False),
)

_ESCAPES = {b"n": b"\n", b"r": b"\r", b"t": b"\t", b"'": b"'", b'"': b'"', b"\\": b"\\"}


def given_prompt(flags: dict[str, Any]) -> str | None:
    """The text of -p or -f; None without them. -r is unescaped as well. Raises UsageError or EdgeStreamError."""
    unescape_stops(flags)
    if flags["prompt"] is not None and flags["prompt_file"] is not None:
        raise click.UsageError("Give only one of -p TEXT and -f FILE.")
    if flags["prompt_file"] is not None:
        return read_text(Path(flags["prompt_file"]))
    if flags["prompt"] is None:
        return None
    # Python turns an argument's bytes that are not UTF-8 into surrogates
    data = flags["prompt"].encode("utf-8", "surrogateescape")
    return decode_text(unescape(data) if flags["escape"] else data, "the prompt")


def unescape_stops(flags: dict[str, Any]) -> None:
    """Unescape the strings of -r, unless --no-escape."""
    if flags["escape"]:
        flags["stop"] = tuple(unescape(text.encode()).decode(errors="replace") for text in flags["stop"])


def unescape(data: bytes) -> bytes:
    r"""A text with \n, \r, \t, \', \", \\ and \xHH as what they stand for; anything else stays."""

    def stands_for(match: re.Match[bytes]) -> bytes:
        return bytes([int(match[2], 16)]) if match[2] else _ESCAPES[match[1]]

    return re.sub(rb"""\\([nrt'"\\]|x([0-9A-Fa-f]{2}))""", stands_for, data)
