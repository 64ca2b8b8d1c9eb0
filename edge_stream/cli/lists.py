"""Flags that take several values, as in llama-bench: comma lists and ranges."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import click

_RANGE = re.compile(r"(\d+)-(\d+)(?:([+*])(\d+))?")
_MAX_VALUES = 10_000


class IntList(click.ParamType):  # type: ignore[type-arg]
    """`512`, `128,256`, `64-512+64` (steps) or `64-512*2` (factors). words: allowed beside numbers."""

    name = "N,..."

    def __init__(self, least: int = 0, words: Sequence[str] = ()) -> None:
        self.least, self.words = least, tuple(words)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[Any]:
        """The numbers and words, in the order given."""
        if isinstance(value, list):
            return value
        out: list[Any] = []
        for part in str(value).split(","):
            part = part.strip()
            if part in self.words:
                out.append(part)
            elif re.fullmatch(r"-?\d+", part):
                out.append(int(part))
            elif match := _RANGE.fullmatch(part):
                out += self._range(match, param, ctx)
            else:
                self.fail(f"{part!r} is neither a number nor a range like 64-512+64.", param, ctx)
        low = [n for n in out if isinstance(n, int) and n < self.least]
        if low:
            self.fail(f"{low[0]} is less than {self.least}.", param, ctx)
        return out

    def _range(self, match: re.Match[str], param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        first, last = int(match[1]), int(match[2])
        kind, step = match[3] or "+", int(match[4] or 1)
        if last < first or (kind == "+" and step < 1) or (kind == "*" and (step < 2 or first < 1)):
            self.fail(f"{match[0]!r} is not a range: it never ends.", param, ctx)
        out = []
        at = first
        while at <= last:
            out.append(at)
            at = at + step if kind == "+" else at * step
            if len(out) > _MAX_VALUES:
                self.fail(f"{match[0]!r} has more than {_MAX_VALUES} values.", param, ctx)
        return out


class FloatList(click.ParamType):  # type: ignore[type-arg]
    """`0.5,10`: different numbers from least to most."""

    name = "X,..."

    def __init__(self, least: float, most: float) -> None:
        self.least, self.most = least, most

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[float]:
        """The numbers, in the order given, without duplicates."""
        if isinstance(value, list):
            return value
        try:
            numbers = [float(part) for part in str(value).split(",")]
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers.", param, ctx)
        for number in numbers:
            if not self.least <= number <= self.most:
                self.fail(f"{number:g} is not between {self.least:g} and {self.most:g}.", param, ctx)
        return list(dict.fromkeys(numbers))


class ChoiceList(click.ParamType):  # type: ignore[type-arg]
    """A comma list of words of a set."""

    name = "A,..."

    def __init__(self, choices: Sequence[str]) -> None:
        self.choices = tuple(choices)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[str]:
        """The words, in the order given, without duplicates."""
        if isinstance(value, list):
            return value
        words = [part.strip() for part in str(value).split(",")]
        for word in words:
            if word not in self.choices:
                self.fail(f"{word!r} is not one of {', '.join(self.choices)}.", param, ctx)
        return list(dict.fromkeys(words))
