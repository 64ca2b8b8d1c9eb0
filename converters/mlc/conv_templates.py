"""MLC's conversation template, derived from the model's own chat template and checked against it.

MLC builds a prompt from fixed strings (mlc-llm, python/mlc_llm/protocol/conversation_protocol.py): the system template,
then for each message role + role_content_sep + content + separator, and at the end the assistant's role +
role_empty_sep. A Jinja template is a program, so these strings are found by rendering conversations of marked messages
and splitting at the marks. The result is used only if it reproduces the template's output.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_stream.converters.mlc.jinja_template import ChatTemplate
from edge_stream.errors import EdgeStreamError
from edge_stream.text import parse_json

_SYSTEM, _USER, _ANSWER = "Sys7tem1", "Us3er{}q", "Ans5wer{}w"
_PLACES = {"user": "{user_message}", "assistant": "{assistant_message}", "tool": "{tool_message}"}


@dataclass(frozen=True)
class ConvTemplate:
    """A conversation template for mlc-chat-config.json. value: an object, or one of MLC's names."""

    value: dict[str, Any] | str
    notes: tuple[str, ...] = ()


class _NoSystemError(EdgeStreamError):
    """The template does not place a system message as MLC does."""


def choose(
    given: str | None, template: str | None, tokens: dict[str, str], ids: dict[str, int], *, add_bos: bool
) -> ConvTemplate:
    """The template for mlc-chat-config.json.

    given: --conv-template, a name of mlc_llm's registry or a JSON file with a template object. template: the model's
    own (Jinja). tokens: bos and eos as text; ids: as numbers. add_bos: plain text begins with bos. Raises
    EdgeStreamError in one sentence.
    """
    if given is not None:
        return _given(given)
    if template is None:
        plain = _template("completion", {"user": "", "assistant": ""}, [""], ids)
        if add_bos and "bos" in ids:
            plain["system_prefix_token_ids"] = [ids["bos"]]
        return ConvTemplate(plain, ("the model has no chat template: text is completed as given",))
    return derive(template, tokens, ids)


def _given(given: str) -> ConvTemplate:
    path = Path(given)
    if path.suffix != ".json":
        note = f"conversation template {given} is written as a name, which only mlc_llm's Python package resolves"
        return ConvTemplate(given, (note,))
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EdgeStreamError(f"cannot read conversation template {given}: {error}") from error
    if (
        not isinstance(value, dict)
        or not isinstance(value.get("roles"), dict)
        or not isinstance(value.get("seps"), list)
    ):
        raise EdgeStreamError(f"{given} is not a conversation template: it needs an object with roles and seps")
    return ConvTemplate(value)


def derive(template: str, tokens: dict[str, str], ids: dict[str, int]) -> ConvTemplate:
    """Find a Conversation that reproduces the Jinja template. Raises EdgeStreamError if there is none."""
    bos = _written_bos(template, tokens)
    jinja = ChatTemplate(template, bos_token=tokens.get("bos", ""), eos_token=tokens.get("eos", ""))
    notes: list[str] = []
    try:
        conv = _strings(jinja, bos, ids, system=True)
        _check(jinja, conv, bos, [_SYSTEM])
    except EdgeStreamError as first:
        try:
            conv = _strings(jinja, bos, ids, system=False)
            _check(jinja, conv, bos, [None])
        except EdgeStreamError as second:
            reason = second if isinstance(first, _NoSystemError) else first
            raise EdgeStreamError(
                f"the model's chat template cannot be written as MLC's: {reason}; give one with --conv-template"
            ) from second
        notes.append(_put_system_in_question(jinja, conv, bos))
    else:
        try:
            _check(jinja, conv, bos, [None])
        except EdgeStreamError:
            notes.append(
                "the model's chat template writes no system message if none is given; "
                "MLC always writes one, here an empty one"
            )
    return ConvTemplate(conv, tuple(notes))


def _put_system_in_question(jinja: ChatTemplate, conv: dict[str, Any], bos: str) -> str:
    """Let a template without a place for the system message begin the first question with it; returns a note.

    MLC's system template is written without a system message, too, so it cannot hold a separator.
    """
    before = dict(conv)
    conv["system_template"] += conv["roles"]["user"] + "{system_message}"
    conv["add_role_after_system_message"] = False
    try:
        _check(jinja, conv, bos, [None, _SYSTEM], in_question=True)
    except EdgeStreamError:
        conv.update(before)
        return "the chat template takes no system message in a way that MLC can express: it is left out"
    return (
        "the chat template has no place for a system message: MLC will begin the first question with it, and with "
        "nothing between them, so end it with a blank line"
    )


def as_prompt(conv: dict[str, Any], messages: Sequence[tuple[str, str | None]]) -> str:
    """The prompt that MLC's runtime builds. messages: (role, content), content None for the answer to come.

    A system message, if any, comes first and replaces the template's own.
    """
    system = conv["system_message"]
    if messages and messages[0][0] == "system":
        system, messages = messages[0][1] or "", messages[1:]
    head = conv["system_template"].replace("{system_message}", system)
    seps = conv["seps"] * 2 if len(conv["seps"]) == 1 else conv["seps"]
    out = [head]
    for i, (role, content) in enumerate(messages):
        if content is None:
            out.append(conv["roles"][role] + conv["role_empty_sep"])
            continue
        skipped = i == 0 and head and not conv["add_role_after_system_message"]
        out.append("" if skipped else conv["roles"][role] + conv["role_content_sep"])
        out.append(conv["role_templates"][role].replace(_PLACES[role], content) + seps[role == "assistant"])
    return "".join(out)


def _messages(system: str | None, turns: int) -> list[tuple[str, str]]:
    found = [("system", system)] if system is not None else []
    for i in range(turns):
        found += [("user", _USER.format(i)), ("assistant", _ANSWER.format(i))]
    return found


def _written_bos(template: str, tokens: dict[str, str]) -> str:
    """The bos token if the template begins with it, else "": MLC has a separate field for it, by id."""
    bos = tokens.get("bos", "")
    question = [{"role": "user", "content": _USER}]
    mark = ChatTemplate(template, bos_token="B0s", eos_token=tokens.get("eos", "")).render(question)
    text = ChatTemplate(template, bos_token=bos, eos_token=tokens.get("eos", "")).render(question)
    # a token that begins every message (SmolLM) is not the sequence's bos
    alone = bool(bos) and text.startswith(bos) and text.count(bos) == 1
    return bos if mark.startswith("B0s") or alone else ""


def _render(jinja: ChatTemplate, messages: Sequence[tuple[str, str]], bos: str, *, prompt: bool = True) -> str:
    text = jinja.render([{"role": r, "content": c} for r, c in messages], add_generation_prompt=prompt)
    return text.removeprefix(bos) if bos else text


def _strings(jinja: ChatTemplate, bos: str, ids: dict[str, int], *, system: bool) -> dict[str, Any]:
    """Split renderings at the marks into a Conversation's strings."""
    full = _messages(_SYSTEM if system else None, 2)
    text = _render(jinja, full[:-1], bos)
    marks = [content for _, content in full[:-1]]
    pieces = _cut(text, marks)
    before, after_system = (pieces[0], pieces[1]) if system else ("", pieces[0])
    after_user, after_answer, at_end = pieces[-3:]
    closed = _render(jinja, full[:-2], bos, prompt=False).rpartition(_ANSWER.format(0))[2]
    separator = os.path.commonprefix([closed, after_answer])
    user = after_answer[len(separator) :]
    asked = _render(jinja, full[: len(full) - 3], bos, prompt=False).rpartition(_USER.format(0))[2]
    user_end = os.path.commonprefix([asked, after_user, at_end])
    answer, to_come = after_user[len(user_end) :], at_end[len(user_end) :]
    role = os.path.commonprefix([answer, to_come])
    conv = _template("derived", {"user": user, "assistant": role, "tool": user}, [user_end, separator], ids)
    conv["role_templates"]["assistant"] = answer[len(role) :] + _PLACES["assistant"]
    conv["role_empty_sep"] = to_come[len(role) :]
    if bos and "bos" in ids:
        conv["system_prefix_token_ids"] = [ids["bos"]]
    if not system:
        conv["system_template"] = after_system.removesuffix(user)
        if user and not after_system.endswith(user):
            raise _NoSystemError("what it writes before a question depends on the question's place")
        return conv
    if after_system.endswith(user):
        conv["system_template"] = before + "{system_message}" + after_system[: len(after_system) - len(user)]
    else:  # the system message is inside the first question
        conv["system_template"] = before + "{system_message}" + after_system
        conv["add_role_after_system_message"] = False
    conv["system_message"] = _default_system(jinja, bos, before, after_system)
    return conv


def _default_system(jinja: ChatTemplate, bos: str, before: str, after: str) -> str:
    """The template's default system message, used if none is given."""
    try:
        head = _render(jinja, _messages(None, 1)[:1], bos).partition(_USER.format(0))[0]
    except EdgeStreamError:
        return ""
    inside = head.startswith(before) and head.endswith(after) and len(head) > len(before) + len(after)
    return head[len(before) : len(head) - len(after)] if inside else ""


def _cut(text: str, marks: Sequence[str]) -> list[str]:
    pieces = []
    for mark in marks:
        piece, found, text = text.partition(mark)
        if not found:
            kind = _NoSystemError if mark == _SYSTEM else EdgeStreamError
            raise kind("it leaves out a message, or moves it")
        pieces.append(piece)
    if any(mark in text for mark in marks):
        raise EdgeStreamError("it repeats a message")
    return [*pieces, text]


def _check(
    jinja: ChatTemplate, conv: dict[str, Any], bos: str, systems: Sequence[str | None], *, in_question: bool = False
) -> None:
    """Compare with the Jinja template on conversations of one to four questions, with other texts than the marks.

    in_question: the Jinja template gets the system message as the beginning of the first question.
    """
    for system in systems:
        for turns in range(1, 5):
            marked = _messages(system, turns)[:-1]
            messages = [(role, (f"Text {i}, {role}. " * (i + 1)).strip()) for i, (role, _) in enumerate(marked)]
            got = as_prompt(conv, [*messages, ("assistant", None)])
            if system is not None and in_question:
                (_, text), (_, question), *rest = messages
                messages = [("user", text + question), *rest]
            if got != _render(jinja, messages, bos):
                raise EdgeStreamError(f"its text for {turns} question(s) is not made of fixed strings")


def _template(name: str, roles: dict[str, str], seps: list[str], ids: dict[str, int]) -> dict[str, Any]:
    return {
        "name": name,
        "system_template": "{system_message}",
        "system_message": "",
        "add_role_after_system_message": True,
        "roles": {"tool": "", **roles},
        "role_templates": dict(_PLACES),
        "messages": [],
        "seps": seps,
        "role_content_sep": "",
        "role_empty_sep": "",
        "stop_str": [],
        "stop_token_ids": [ids["eos"]] if "eos" in ids else [],
        "function_string": "",
        "use_function_calling": False,
    }
