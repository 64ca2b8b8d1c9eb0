"""The aims for speed beside what the sections of docs/results.md have measured, those that are missed too.

    python benchmarks/speed_aims.py

Each ratio is from one run of its section, whose engines or settings took turns.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from edge_stream.measure.table import markdown

DOC = Path(__file__).resolve().parents[1] / "docs" / "results.md"
Row = dict[str, str]


def tables(text: str, section: str) -> list[list[Row]]:
    """The tables of a section, their rows by column. Raises SystemExit if it has none."""
    body = re.search(rf"<!-- begin {section} -->(.*?)<!-- end {section} -->", text, re.DOTALL)
    found: list[list[Row]] = []
    names: list[str] = []
    for line in body[1].splitlines() if body else ():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if not cells:
            names = []
        elif not names:
            names = cells
            found.append([])
        elif not set("".join(cells)) <= set("-:"):
            found[-1].append(dict(zip(names, cells, strict=True)))
    if not found:
        raise SystemExit(f"docs/results.md has no section {section}: make results SECTION={section}")
    return found


def number(text: str) -> float:
    return float(text.removesuffix(" %"))


def one(rows: list[Row], column: str, **wanted: str) -> float:
    """The number in a column of the row whose cells begin with what is wanted."""
    return next(
        number(row[column]) for row in rows if all(row[name].startswith(value) for name, value in wanted.items())
    )


@dataclass
class Aim:
    """at_least: the aim is a lower bound."""

    what: str
    value: float
    aim: float
    at_least: bool
    section: str

    def row(self) -> dict[str, object]:
        met = self.value >= self.aim if self.at_least else self.value <= self.aim
        sign = "at least" if self.at_least else "at most"
        return {
            "what": self.what,
            "measured": f"{self.value:g}",
            "aim": f"{sign} {self.aim:g}",
            "met": "yes" if met else "no",
            "section": self.section,
        }


def aims(text: str) -> list[Aim]:
    peers = tables(text, "peers")[0]
    small, large, streams = tables(text, "speed")
    slides = [row for table in tables(text, "slide") for row in table]
    drafts = tables(text, "drafts")
    (seven,) = tables(text, "mistral")[0]
    # f16 keys and values of 8 heads of 128, in 32 layers
    kept = number(seven["size"].removesuffix(" MiB")) + int(seven["n_ctx"]) * 2 * 2 * 8 * 128 * 32 / 2**20
    decode, prefill, first = "ours / it, decode", "ours / it, prefill", "first token ms"
    ours = one(peers, first, engine="edge-stream, Q4_0")
    return [
        Aim("decode of the demo in 4 bits: ours / ik_llama.cpp", one(peers, decode, engine="ik"), 1.2, True, "peers"),
        Aim("decode: ours / OpenVINO GenAI", one(peers, decode, engine="OpenVINO"), 1.6, True, "peers"),
        Aim("decode: ours / stock llama.cpp", one(peers, decode, engine="stock"), 2.5, True, "peers"),
        Aim("decode: llama.cpp engine / MLC engine", one(peers, decode, engine="edge-stream, MLC"), 1.0, True, "peers"),
        Aim("prefill: ours / OpenVINO GenAI", one(peers, prefill, engine="OpenVINO"), 1.0, True, "peers"),
        Aim(
            "prefill: MLC engine / llama.cpp engine",
            round(1 / one(peers, prefill, engine="edge-stream, MLC"), 2),
            0.9,
            True,
            "peers",
        ),
        Aim("process to first token, ms", ours, 300, False, "peers"),
        Aim("the same / llama-completion", round(ours / one(peers, first, engine="stock"), 2), 1.0, False, "peers"),
        Aim(
            "% of the memory's read bandwidth, demo Q4_0, n_ctx 4096, f16",
            one(small, "of memory's", kernels="ours", n_ctx="4096", cache="f16"),
            50,
            True,
            "speed",
        ),
        Aim(
            "the same, a 1.1B in Q4_0, n_ctx 1024",
            one(large, "of memory's", kernels="ours", n_ctx="1024"),
            65,
            True,
            "speed",
        ),
        Aim(
            "ms per token, n_ctx 4096 / 512, f16",
            one(small, "/ n_ctx 512", kernels="ours", n_ctx="4096", cache="f16"),
            1.7,
            False,
            "speed",
        ),
        Aim(
            "q8_0 cache / f16 cache, n_ctx 4096",
            one(small, "/ f16", kernels="ours", n_ctx="4096", cache="q8_0"),
            0.8,
            False,
            "speed",
        ),
        Aim(
            "resident memory of a 7B in Q4_0, a million tokens deep / file and cache",
            round(number(seven["rss_end_mib"]) / kept, 3),
            1.1,
            False,
            "mistral",
        ),
        Aim("8 conversations / 1", one(streams, "tok/s / one's", conversations="8"), 3.0, True, "speed"),
        Aim(
            "sliding / plain decode, n_ctx 512 to 4096, f16 and q8_0: the largest",
            max(number(row["sliding/plain"]) for row in slides if row["n_keep"] == "4"),
            1.02,
            False,
            "slide",
        ),
        Aim(
            "copying with drafts / without, Q4_1 and Q4_0: the smaller",
            min(one(table, "plain/drafts", text="copy") for table in drafts),
            1.8,
            True,
            "drafts",
        ),
        Aim(
            "ordinary chat with drafts / without: the smallest",
            min(number(row["plain/drafts"]) for table in drafts for row in table if row["text"].startswith("chat")),
            0.98,
            True,
            "drafts",
        ),
    ]


def main() -> None:
    rows = [aim.row() for aim in aims(DOC.read_text(encoding="utf-8"))]
    print(markdown(rows, list(rows[0])))


if __name__ == "__main__":
    main()
