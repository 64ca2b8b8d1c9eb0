"""Flags of chat and serve for templates and thinking, with llama.cpp's names and environment variables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from edge_stream.chat.options import REASONING_FORMATS, ChatOptions
from edge_stream.cli.llama_flags import Switch
from edge_stream.cli.options import Count, compose, option, rare

chat_options = compose(
    option(
        "--chat-template",
        "template",
        env="CHAT_TEMPLATE",
        metavar="TEXT|NAME",
        help="A chat template (Jinja), or the name of one of llama.cpp's, in place of the model's.",
    ),
    option(
        "--chat-template-file",
        "template_file",
        env="CHAT_TEMPLATE_FILE",
        metavar="FILE",
        type=click.Path(dir_okay=False),
        help="A file with a chat template.",
    ),
    option(
        "--chat-template-kwargs",
        "template_kwargs",
        env="CHAT_TEMPLATE_KWARGS",
        metavar="JSON",
        help="Variables for the chat template: a JSON object.",
    ),
    option(
        "-rea",
        "--reasoning",
        "reasoning",
        env="REASONING",
        type=Switch(),
        default="auto",
        help="Whether the model is asked to think. auto: as its template does by itself.",
    ),
    option(
        "--reasoning-format",
        env="THINK",
        type=click.Choice(REASONING_FORMATS),
        default="auto",
        help="Where thoughts go: none leaves them in the text; the others take them apart as llama.cpp does.",
    ),
    option(
        "--reasoning-budget",
        env="THINK_BUDGET",
        type=Count(min=-1),
        default=-1,
        help="Tokens of thinking at most. -1: no limit; 0: none.",
    ),
    rare("--reasoning-budget-message", env="THINK_BUDGET_MESSAGE", default=""),
    rare("--reasoning-effort", env="REASONING_EFFORT", default="default"),
)


def make_chat_options(flags: dict[str, Any]) -> ChatOptions:
    """What the flags say. Raises UsageError or EdgeStreamError."""
    template = flags["template"]
    if flags["template_file"] is not None:
        if template is not None:
            raise click.UsageError("Give only one of --chat-template and --chat-template-file.")
        from edge_stream.cli.console import read_text

        template = read_text(Path(flags["template_file"]))
    if template is not None and not template.strip():
        raise click.UsageError("The chat template is empty.")
    try:
        given = json.loads(flags["template_kwargs"] or "{}")
    except ValueError as error:
        raise click.BadParameter(f"not valid JSON: {error}", param_hint="'--chat-template-kwargs'") from None
    if not isinstance(given, dict):
        raise click.BadParameter("give a JSON object.", param_hint="'--chat-template-kwargs'")
    if flags["reasoning_effort"] != "default":
        given["reasoning_effort"] = flags["reasoning_effort"]
    return ChatOptions(
        template=template,
        template_kwargs=given,
        reasoning_format=flags["reasoning_format"],
        reasoning_budget=flags["reasoning_budget"],
        reasoning_budget_message=flags["reasoning_budget_message"],
        enable_thinking={"on": True, "off": False, "auto": None}[flags["reasoning"]],
    )
