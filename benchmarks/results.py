"""Regenerate the measured sections of docs/results.md: `make results`, `make results QUICK=1`.

    python benchmarks/results.py [--quick] [SECTION ...]

Each section between `<!-- begin NAME -->` and `<!-- end NAME -->` is replaced by the command it ran, a stamp and the
command's output; text outside of them is left alone. --quick runs smaller versions in minutes and writes
build/results/results.md, so that docs hold the full ones only.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from edge_stream.measure.stamp import stamp

ROOT = Path(__file__).resolve().parents[1]
DOC = ROOT / "docs" / "results.md"


@dataclass(frozen=True)
class Section:
    """A command of edge-stream (or a script of ours). {images} is the folder of the pictures."""

    title: str
    command: str
    quick: str
    picture: str | None = None


SECTIONS = {
    "startup": Section("Startup", "bench -m demo --startup -r 9", "bench -m demo --startup -r 2"),
    "latency": Section(
        "Latency by cache size (the paper's figure 10, on this machine)",
        "bench -m demo --mode stream,dense,shift,recompute -p 0 -n 48 -d full -c 256,512,1024,2048,4096 -r 3 "
        "--recompute-gen 1 --plot {images}/latency.png",
        "bench -m demo --mode stream,dense,shift,recompute -p 0 -n 16 -d full -c 256,512 -r 1 --recompute-gen 1 "
        "--plot {images}/latency.png",
        "latency.png",
    ),
    "dense": Section(
        "Sliding beside plain decode at equal fill",
        "bench -m demo --mode stream,dense -p 0 -n 128 -d full -c 512,1024,2048,4096 -ctk f16,q8_0 -r 5",
        "bench -m demo --mode stream,dense -p 0 -n 32 -d full -c 512 -ctk f16,q8_0 -r 1",
    ),
    "shift": Section(
        "Beside llama.cpp's context shift",
        "bench -m demo --mode stream,shift -p 0 -n 3000 -d full -c 768,1024 -r 1",
        "bench -m demo --mode stream,shift -p 0 -n 300 -d full -c 256 -r 1",
    ),
    "depth": Section(
        "Speed does not depend on depth (every token of the depth was fed)",
        "bench -m demo --mode stream -p 0 -n 128 -d 1000,10000,100000 -c 512 -r 5",
        "bench -m demo --mode stream -p 0 -n 32 -d 1000,4000 -c 256 -r 1",
    ),
    "perplexity": Section(
        "Perplexity along 60,000 tokens",
        "eval ppl -m demo --mode stream,window,dense,shift,recompute -c 512 --max-tokens 60000 --chunk 8 "
        "--recompute-every 400 --plot {images}/perplexity.png",
        "eval ppl -m demo --mode stream,window,dense,shift,recompute -c 128 --max-tokens 1000 --chunk 8 "
        "--recompute-every 100 --plot {images}/perplexity.png",
        "perplexity.png",
    ),
    "sinks": Section(
        "How many sinks (the paper's table 2)",
        "eval sinks -m demo -c 512 --max-tokens 8000 --chunk 8",
        "eval sinks -m demo -c 128 --max-tokens 600 --chunk 8",
    ),
    "streameval": Section(
        "StreamEval: facts inside the cache and beyond it",
        "eval streameval -m demo --mode stream,window,shift -c 512 --plot {images}/streameval.png",
        "eval streameval -m demo --mode stream -c 256 --questions 3 --plot {images}/streameval.png",
        "streameval.png",
    ),
    "qa": Section(
        "Streaming question answering",
        "eval qa-stream -m demo --mode stream,window,one-shot -c 512 --rounds 2",
        "eval qa-stream -m demo --mode stream -c 256",
    ),
    "attention": Section(
        "Where the attention goes",
        "inspect attention -m demo --max-tokens 256 -o {images}/attention.png",
        "inspect attention -m demo --max-tokens 64 -o {images}/attention.png",
        "attention.png",
    ),
    "million": Section(
        "A million tokens",
        "eval ppl -m demo --mode stream -c 512 --max-tokens 1000000 --chunk 64 -f {text}",
        "eval ppl -m demo --mode stream -c 128 --max-tokens 4000 --chunk 64",
    ),
}


def run(name: str, quick: bool, images: Path, text: str | None) -> str:
    """The section's Markdown."""
    section = SECTIONS[name]
    template = section.quick if quick else section.command
    if "{text}" in template and text is None:
        raise SystemExit(f"{name}: give a long English text with --text (Debian's bible-kjv-text has one)")
    images.mkdir(parents=True, exist_ok=True)
    shown = template.format(images="docs/images", text="TEXT")
    command = template.format(images=images, text=shlex.quote(text or ""))
    print(f"== {name}: edge-stream {shown}", file=sys.stderr)
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "edge_stream.cli", *shlex.split(command)], stdout=subprocess.PIPE, text=True
    )
    if done.returncode != 0:
        raise SystemExit(f"{name} failed (status {done.returncode})")
    facts = stamp()
    lines = [
        f"## {section.title}",
        "",
        f"`edge-stream {shown}`",
        "",
        f"{facts['test_time'][:10]}, {facts['cpu_info']}, {facts['n_cores']} threads, {facts['system']}; edge-stream "
        f"{facts['edge_stream']} ({facts['edge_stream_commit']}), llama.cpp {facts['build_commit']}; "
        f"{time.monotonic() - began:.0f} s.",
        "",
    ]
    if section.picture:
        lines += [f"![{section.title}](images/{section.picture})", ""]
    return "\n".join([*lines, done.stdout.strip()])


def replace(document: str, name: str, body: str) -> str:
    """The document with the section's text replaced, or put at its end if it is not there yet."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    block = f"{begin}\n{body}\n{end}"
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    if pattern.search(document):
        return pattern.sub(lambda _match: block, document)
    return document.rstrip("\n") + f"\n\n{block}\n"


def main() -> None:
    """Run the sections, each written as soon as it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"any of {', '.join(SECTIONS)}; default: all")
    parser.add_argument("--quick", action="store_true", help="minutes instead of hours, into build/results")
    parser.add_argument("--text", help="a long text for the section million")
    args = parser.parse_args()
    unknown = sorted(set(args.sections) - set(SECTIONS))
    if unknown:
        parser.error(f"no section {', '.join(unknown)}: use any of {', '.join(SECTIONS)}")
    target, images = DOC, DOC.parent / "images"
    if args.quick:
        target = ROOT / "build" / "results" / "results.md"
        images = target.parent / "images"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(DOC, target)
    names = args.sections or [n for n in SECTIONS if args.quick or n != "million" or args.text]
    if not args.sections and "million" not in names:
        print("million is left out: give it a text with --text", file=sys.stderr)
    for name in names:
        body = run(name, args.quick, images, args.text)
        temporary = target.with_suffix(f".tmp-{os.getpid()}")
        temporary.write_text(replace(target.read_text(encoding="utf-8"), name, body), encoding="utf-8")
        os.replace(temporary, target)
    print(f"wrote {target.relative_to(ROOT)}", file=sys.stderr)


if __name__ == "__main__":
    main()
