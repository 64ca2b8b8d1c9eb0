"""Tool calls: the formats that templates teach, finding calls in a text, forcing one by a grammar."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edge_stream.errors import EdgeStreamError
from edge_stream.text import sendable


@dataclass(frozen=True)
class ToolFormat:
    """How calls are written: start, JSON, end. arguments: the JSON's name for them. is_list: a list of calls."""

    start: str
    end: str
    arguments: str = "arguments"
    is_list: bool = False


HERMES = ToolFormat("<tool_call>\n", "\n</tool_call>")  # Qwen, Hermes, many others
MISTRAL = ToolFormat("[TOOL_CALLS]", "", is_list=True)
LLAMA3 = ToolFormat("", "", arguments="parameters")  # the answer begins with the call

_MAX_CALL = 64 << 10  # characters


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
    """Separates text from calls as an answer is written. Text that may become a call is held back.

    Text around calls is kept as it is. What looks like a call but is none, or is longer than _MAX_CALL characters, is
    text.
    """

    def __init__(self, form: ToolFormat, names: Sequence[str]) -> None:
        self.form, self.names = form, tuple(names)
        self._start, self._end = form.start.strip(), form.end.strip()
        self._held = ""
        self.shown = ""
        self.calls: list[dict[str, Any]] = []

    def fresh(self) -> ToolParser:
        """One for another answer."""
        return ToolParser(self.form, self.names)

    def push(self, text: str, *, last: bool = False) -> tuple[str, list[dict[str, Any]]]:
        """Returns (text to show now, calls that are complete now). last: nothing comes after it."""
        n_shown, n_calls = len(self.shown), len(self.calls)
        self._held += text
        while self._held:
            self._show(self._n_text())
            n = self._n_call()
            calls = self._parse(self._held[len(self._start) : n - len(self._end)]) if n else None
            if calls:
                self.calls += [{"index": len(self.calls) + i, **call} for i, call in enumerate(calls)]
                self._held = self._held[n:]
            elif n or last or len(self._held) > _MAX_CALL:
                self._show(n or len(self._held))
            else:
                break
        return self.shown[n_shown:], self.calls[n_calls:]

    def flush(self) -> tuple[str, list[dict[str, Any]]]:
        """At the end of the answer."""
        return self.push("", last=True)

    def _show(self, n: int) -> None:
        self.shown += self._held[:n]
        self._held = self._held[n:]

    def _n_text(self) -> int:
        """How many of the characters held are before a call, or what may become one."""
        held, start = self._held, self._start
        if not start:  # a call is the answer, or begins it
            n = len(held) - len(held.lstrip())
            begins = held[n : n + 1] in ("", "{") and (not self.shown or self.shown.isspace())
            return n if begins else len(held)
        at = held.find(start)
        if at >= 0:
            return at
        return len(held) - next((n for n in range(len(start) - 1, 0, -1) if held.endswith(start[:n])), 0)

    def _n_call(self) -> int:
        """Length of the call that what is held begins with; 0 while it is not complete."""
        if not self._held.startswith(self._start):
            return 0
        n = len(self._start)
        if self._end:
            at = self._held.find(self._end, n)
            return at + len(self._end) if at >= 0 else 0
        n = len(self._held) - len(self._held[n:].lstrip())
        try:
            return json.JSONDecoder().raw_decode(self._held, n)[1]
        except (ValueError, RecursionError):
            return 0

    def _parse(self, text: str) -> list[dict[str, Any]] | None:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return None
        out = []
        for call in value if isinstance(value, list) else [value]:
            if not isinstance(call, dict) or call.get("name") not in self.names:
                return None
            arguments = json.dumps(call.get(self.form.arguments, {}), ensure_ascii=False)
            out.append(
                {
                    "id": "call_" + secrets.token_hex(12),
                    "type": "function",
                    "function": {"name": call["name"], "arguments": sendable(arguments)},
                }
            )
        return out or None
