"""Texts that repeat themselves and are no loops: what the loop guard must let pass. Made by code, with a fixed seed.

`legitimate()` yields (kind, text) for 200 of them, most as long as answers get.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator

_WORDS = [
    "river",
    "stone",
    "light",
    "paper",
    "window",
    "garden",
    "silver",
    "market",
    "winter",
    "engine",
    "letter",
    "mountain",
    "orange",
    "shadow",
    "bridge",
    "kitchen",
    "forest",
    "captain",
    "music",
    "island",
    "summer",
    "bottle",
    "yellow",
    "teacher",
    "circle",
    "planet",
    "ladder",
    "basket",
    "harbor",
    "candle",
]


def _line(r: random.Random, n: int) -> str:
    return " ".join(r.choice(_WORDS) for _ in range(n))


def _markdown_table(r: random.Random) -> str:
    """Rows of numbers or of few different words, some columns the same everywhere."""
    n = r.randint(3, 6)
    head = "| " + " | ".join(r.choice(_WORDS).title() for _ in range(n)) + " |\n|" + " --- |" * n + "\n"
    same = r.choice(["yes", "n/a", "0", "-", "pending"])
    rows = [
        f"| {i + 1} | " + " | ".join(r.choice([same, str(r.randint(0, 9))]) for _ in range(n - 1)) + " |"
        for i in range(r.randint(10, 30))
    ]
    return head + "\n".join(rows)


def _empty_table(r: random.Random) -> str:
    """A form to fill in: every row is the same."""
    n = r.randint(2, 5)
    return (
        "| Day |"
        + " Task |" * n
        + "\n|"
        + " --- |" * (n + 1)
        + "\n"
        + ("|" + "   |" * (n + 1) + "\n") * r.randint(7, 20)
    )


def _python(r: random.Random) -> str:
    """Functions that are alike."""
    return "\n\n".join(
        f"def get_{name}(self):\n    return self._{name}\n\ndef set_{name}(self, value):\n    self._{name} = value"
        for name in r.sample(_WORDS, r.randint(8, 16))
    )


def _code_zeros(r: random.Random) -> str:
    """A matrix of zeros, and a table of them."""
    n = r.choice([4, 8, 9, 10])
    row = "    [" + ", ".join("0" for _ in range(n)) + "],\n"
    return (
        "board = [\n"
        + row * n
        + "]\n\nint table[] = {"
        + ", ".join("0" for _ in range(r.choice([16, 32, 64])))
        + "};\n"
    )


def _json_list(r: random.Random) -> str:
    """Objects that differ in a number."""
    items = [{"id": i, "name": "item", "active": True, "tags": []} for i in range(r.randint(12, 30))]
    return json.dumps(items, indent=r.choice([None, 2]))


def _json_same(r: random.Random) -> str:
    """Objects that do not differ."""
    return json.dumps([{"x": 0, "y": 0, "visible": False}] * r.randint(4, 12), indent=2)


def _bullets(r: random.Random) -> str:
    """A list, each item with the same start."""
    return "\n".join(f"- You can visit the {_line(r, 2)}." for _ in range(r.randint(10, 40)))


def _refrain(r: random.Random) -> str:
    """A refrain of 2 to 8 lines, sung 4 to 6 times in a row."""
    refrain = "\n".join(f"Oh, {_line(r, r.randint(4, 7))}," for _ in range(r.randint(2, 8)))
    return "\n\n".join([refrain] * r.randint(4, 6))


def _song(r: random.Random) -> str:
    """Verses, and a refrain after each."""
    refrain = "\n".join(f"Sing {_line(r, 5)}!" for _ in range(4))
    return "\n\n".join("\n".join(_line(r, 6) for _ in range(4)) + "\n\n" + refrain for _ in range(5))


def _chant(r: random.Random) -> str:
    """A few words, shouted 10 to 30 times."""
    return (r.choice(["Olé, ", "We will! ", "Na na na, ", "Hey, hey! ", "Ha"]) * r.randint(10, 30)).strip()


def _rule(r: random.Random) -> str:
    """Text between rules of 80 to 200 characters."""
    rule = r.choice(["-", "=", "*", "_", "~", "#", "- ", "=-", "*  "])
    n = r.randint(80, 200) // len(rule)
    return "\n".join(rule * n + f"\n{_line(r, 4)}" for _ in range(r.randint(2, 6)))


def _csv(r: random.Random) -> str:
    """Rows with many empty or zero fields."""
    rows = [f"{i},{r.choice(_WORDS)}," + ",".join(r.choice(["0", "0", ""]) for _ in range(8)) for i in range(30)]
    return "id,name,a,b,c,d,e,f,g,h\n" + "\n".join(rows)


def _art(r: random.Random) -> str:
    """A box, a filled rectangle, a triangle or a board."""
    w, h = r.randint(10, 40), r.randint(5, 15)
    kind = r.randrange(4)
    if kind == 0:
        return "+" + "-" * w + "+\n" + ("|" + " " * w + "|\n") * h + "+" + "-" * w + "+"
    if kind == 1:
        return ("#" * w + "\n") * h
    if kind == 2:
        return "\n".join(" " * (h - i) + "*" * (2 * i + 1) for i in range(h))
    return "\n".join(" ".join(". " * 8) for _ in range(8))


def _multiplication(r: random.Random) -> str:
    """A multiplication table."""
    n = r.randint(3, 12)
    return "\n".join(f"{n} x {i} = {n * i}" for i in range(1, 31))


def _numbers(r: random.Random) -> str:
    """A sequence, with the same step throughout."""
    start, step = r.randint(0, 50), r.randint(1, 9)
    return ", ".join(str(start + step * i) for i in range(200))


def _hex_dump(r: random.Random) -> str:
    """Lines of zeros, each with its address."""
    rows = []
    for i in range(r.randint(12, 30)):
        data = [0] * 16 if r.random() < 0.8 else [r.randrange(256) for _ in range(16)]
        rows.append(f"{16 * i:08x}  " + " ".join(f"{b:02x}" for b in data) + "  |" + "." * 16 + "|")
    return "\n".join(rows)


def _binary(r: random.Random) -> str:
    """A long number of few digits, or padding."""
    return r.choice(["0", "1", "01", "A", "AAAA", "\\x00", "0, "]) * r.randint(32, 128)


def _html(r: random.Random) -> str:
    """Rows of empty cells."""
    n = r.randint(2, 4)
    row = "  <tr>\n" + "    <td></td>\n" * n + "  </tr>\n"
    return "<table>\n" + row * r.randint(4, 10) + "</table>"


def _worksheet(r: random.Random) -> str:
    """Blanks to fill in."""
    return (
        "\n".join(f"{i + 1}. " + "_" * 40 for i in range(r.randint(10, 20)))
        + "\n"
        + ("_" * 60 + "\n") * r.randint(3, 8)
    )


KINDS: tuple[Callable[[random.Random], str], ...] = (
    _markdown_table,
    _empty_table,
    _python,
    _code_zeros,
    _json_list,
    _json_same,
    _bullets,
    _refrain,
    _song,
    _chant,
    _rule,
    _csv,
    _art,
    _multiplication,
    _numbers,
    _hex_dump,
    _binary,
    _html,
    _worksheet,
)


def legitimate(n: int = 200) -> Iterator[tuple[str, str]]:
    """(kind, text), the kinds in turns."""
    for i in range(n):
        make, r = KINDS[i % len(KINDS)], random.Random(i)
        yield make.__name__[1:], f"Here is the {_line(r, 5)}:\n\n{make(r)}\n"
