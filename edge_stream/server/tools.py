"""Tool calls: what a template teaches the model to write, found in its text, and forced by a grammar."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edge_stream.errors import EdgeStreamError


@dataclass(frozen=True)
class ToolFormat:
    """How calls are written: start, JSON, end. arguments: the JSON's name for them. is_list: a list of calls."""

    start: str
    end: str
    arguments: str = "arguments"
    is_list: bool = False


HERMES = ToolFormat("<tool_call>\n", "\n</tool_call>")  # Qwen, Hermes, many others
MISTRAL = ToolFormat("[TOOL_CALLS]", "", is_list=True)
LLAMA3 = ToolFormat("", "", arguments="parameters")  # the whole answer is the call


def format_of(template: str) -> ToolFormat | None:
    """The format that a chat template defines, None if it knows no tools."""
    if "tools" not in template:
        return None
    if "<tool_call>" in template:
        return HERMES
    if "[TOOL_CALLS]" in template:
        return MISTRAL
    if '"parameters"' in template:
        return LLAMA3
    return None


def call_schema(tools: Sequence[Mapping[str, Any]], form: ToolFormat) -> dict[str, Any]:
    """JSON schema of one call to one of the tools."""
    options = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool["function"]["name"]},
                form.arguments: tool["function"].get("parameters") or {"type": "object"},
            },
            "required": ["name", form.arguments],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    return options[0] if len(options) == 1 else {"oneOf": options}


def forcing_grammar(schema_grammar: str, form: ToolFormat) -> str:
    """A grammar of one call out of the grammar of its JSON."""
    body = schema_grammar.replace("root ::=", "call ::=", 1)
    if body == schema_grammar:
        raise EdgeStreamError("the tools' schema cannot be used")
    start, end = (
        json.dumps(form.start + ("[" if form.is_list else "")),
        json.dumps(("]" if form.is_list else "") + form.end),
    )
    parts = [quoted for quoted in (start, "call", end) if quoted != '""']
    return f"root ::= {' '.join(parts)}\n{body}"


class ToolParser:
    """Separates text from calls as an answer is written. Text that may become a call is held back."""

    def __init__(self, form: ToolFormat, names: Sequence[str]) -> None:
        self.form, self.names = form, tuple(names)
        self._held = ""
        self.shown = ""
        self.calls: list[dict[str, Any]] = []

    def fresh(self) -> ToolParser:
        """One for another answer."""
        return ToolParser(self.form, self.names)

    def push(self, text: str) -> tuple[str, list[dict[str, Any]]]:
        """Returns (text to show now, calls that are complete now)."""
        self._held += text
        start, end = self.form.start.strip(), self.form.end.strip()
        if not start:  # the whole answer is the call, or none of it
            if not self._held.strip() or self._held.lstrip().startswith("{"):
                return "", []
            text, self._held = self._held, ""
            self.shown += text
            return text, []
        shown, new = "", []
        while True:
            at = self._held.find(start)
            if at < 0:
                keep = next((n for n in range(len(start) - 1, 0, -1) if self._held.endswith(start[:n])), 0)
                shown += self._held[: len(self._held) - keep]
                self._held = self._held[len(self._held) - keep :]
                break
            shown += self._held[:at]
            self._held = self._held[at:]
            stop = self._held.find(end, len(start)) if end else -1
            if stop < 0:
                break  # the call goes on
            calls = self._parse(self._held[len(start) : stop])
            if calls is None:
                shown += self._held[: stop + len(end)]
            else:
                new += calls
            self._held = self._held[stop + len(end) :]
        self.calls += new
        shown = shown.strip() if self.calls else shown
        self.shown += shown
        return shown, new

    def flush(self) -> tuple[str, list[dict[str, Any]]]:
        """At the end of the answer."""
        held, self._held = self._held, ""
        calls = self._parse(held.removeprefix(self.form.start.strip())) if held and not self.form.end else None
        if calls is None:
            self.shown += held
            return held, []
        self.calls += calls
        return "", calls

    def _parse(self, text: str) -> list[dict[str, Any]] | None:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return None
        out = []
        for call in value if isinstance(value, list) else [value]:
            if not isinstance(call, dict) or call.get("name") not in self.names:
                return None
            arguments = call.get(self.form.arguments, {})
            out.append(
                {
                    "id": "call_" + secrets.token_hex(12),
                    "type": "function",
                    "function": {"name": call["name"], "arguments": json.dumps(arguments, ensure_ascii=False)},
                }
            )
        return out or None
