"""How ambiguous is a grammar? llama.cpp follows all parses of a text at once, and short grammars can have billions.

Its parser keeps a stack for every reading (llama_grammar_advance_stack). What is counted here, on the grammar's text,
is how many readings one place can have: one for each alternative, and further ones wherever something that may be
empty lets the next thing begin. Readings of the second kind do not go away as text is written, and the time for a token
grows with their cube: 120 of them took half a second. So those are limited tightly, alternatives generously.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from edge_stream.errors import EdgeStreamError

MAX_READINGS = 20_000
MAX_EMPTY_READINGS = 128
_TOP = 10**9  # more is not counted

_TOKEN = re.compile(
    r"""\s+|\#[^\n]*
    |(?P<rule>[A-Za-z0-9-]+)\s*::=
    |(?P<name>[A-Za-z0-9-]+)
    |(?P<text>"(?:[^"\\\n]|\\.)*")
    |(?P<set>\[(?:[^\]\\]|\\.)*\])
    |(?P<token>!?<[^>]*>)
    |(?P<repeat>[*+?]|\{\s*\d+\s*(?:,\s*\d*\s*)?\})
    |(?P<mark>[()|.])""",
    re.VERBOSE | re.DOTALL,
)


@dataclass
class _Node:
    """A group: alternatives, each a sequence of (item, least, most repeats). An item: a group, a rule's name, None."""

    alternatives: list[list[tuple[_Node | str | None, int, int]]] = field(default_factory=lambda: [[]])


@dataclass(frozen=True)
class _Count:
    """readings: stacks on entry. beyond: those of them past something empty. empty: ways to be empty."""

    readings: int
    beyond: int
    empty: int


def check_ambiguity(grammar: str) -> None:
    """Raise EdgeStreamError if a grammar has too many readings. Faults in it are left to llama.cpp's parser."""
    rules = _parse(grammar)
    known: dict[str, _Count | None] = {}
    for name in rules:
        count = _of_rule(name, rules, known)
        if count.readings > MAX_READINGS or count.beyond > MAX_EMPTY_READINGS:
            raise EdgeStreamError(
                f"the grammar is too ambiguous: rule {name[:40]} can be read in too many ways at once"
            )


def _parse(grammar: str) -> dict[str, _Node]:
    rules: dict[str, _Node] = {}
    groups: list[_Node] = []
    at = 0
    while at < len(grammar):
        match = _TOKEN.match(grammar, at)
        if match is None:
            return rules  # llama.cpp says what is wrong
        at, kind, text = match.end(), match.lastgroup, match.group()
        if kind == "rule":
            rules[match["rule"]] = _Node()
            groups = [rules[match["rule"]]]
        elif kind is None or not groups:
            continue
        elif kind == "repeat":
            if groups[-1].alternatives[-1]:
                item = groups[-1].alternatives[-1].pop()[0]
                groups[-1].alternatives[-1].append((item, *_bounds(text)))
        elif text == "(":
            groups.append(_Node())
            groups[-2].alternatives[-1].append((groups[-1], 1, 1))
        elif text == ")":
            if len(groups) > 1:
                groups.pop()
        elif text == "|":
            groups[-1].alternatives.append([])
        elif text != '""':
            groups[-1].alternatives[-1].append((match["name"], 1, 1))
    return rules


def _bounds(text: str) -> tuple[int, int]:
    if text in "*+?":
        return {"*": (0, _TOP), "+": (1, _TOP), "?": (0, 1)}[text]
    least, comma, most = text.strip("{}").partition(",")
    low = min(int(least), _TOP)
    return low, (min(int(most), _TOP) if most.strip() else _TOP) if comma else low


def _of_rule(name: str, rules: dict[str, _Node], known: dict[str, _Count | None]) -> _Count:
    if name not in known:
        known[name] = None  # being counted
        try:
            known[name] = _of_group(rules[name], rules, known) if name in rules else _Count(1, 0, 0)
        except RecursionError:
            raise EdgeStreamError("the grammar's rules are nested too deeply") from None
    return known[name] or _Count(1, 0, 0)  # a loop: through text it is harmless, without any llama.cpp refuses it


def _of_group(group: _Node, rules: dict[str, _Node], known: dict[str, _Count | None]) -> _Count:
    counts = [_of_sequence(sequence, rules, known) for sequence in group.alternatives]
    return _Count(
        min(_TOP, sum(c.readings for c in counts)),
        min(_TOP, sum(c.beyond for c in counts)),
        min(_TOP, sum(c.empty for c in counts)),
    )


def _of_sequence(
    sequence: list[tuple[_Node | str | None, int, int]], rules: dict[str, _Node], known: dict[str, _Count | None]
) -> _Count:
    total = _Count(0, 0, 1)
    for i, (item, least, most) in enumerate(sequence):
        if isinstance(item, _Node):
            one = _of_group(item, rules, known)
        else:
            one = _Count(1, 0, 0) if item is None else _of_rule(item, rules, known)
        if one.empty and most < _TOP:  # x{n} is n times x, each of which may be passed over; x* is a loop
            more = one.readings * max(most - 1, 0)
            one = _Count(one.readings + more, one.beyond + more, 1)
        elif least == 0:
            one = _Count(one.readings, one.beyond, 1)
        begun = total.empty * one.readings
        total = _Count(
            min(_TOP, total.readings + begun),
            min(_TOP, total.beyond + (begun if i else one.beyond)),
            min(_TOP, total.empty * one.empty),
        )
    return total
