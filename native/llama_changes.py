"""What differs for us between two source distributions of llama-cpp-python, as Markdown."""

from __future__ import annotations

import difflib
import re
import tarfile
from pathlib import Path

OURS = Path(__file__).resolve().parent / "src"
ACCESS = OURS / "llama" / "es-llama-access.h"
API = "include/llama.h"
_VENDOR = "vendor/llama.cpp/"


def read(archive: Path) -> dict[str, str]:
    """Text of llama.cpp's headers and of its list of architectures, by path; `HEAD`: the commit."""
    wanted = re.compile(rf"[^/]+/{_VENDOR}((?:include|src)/[^/]+\.h|src/llama-arch\.cpp)")
    head = re.compile(r"[^/]+/\.git/modules/vendor/llama\.cpp/(HEAD)")
    found = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            if match := wanted.fullmatch(member.name) or head.fullmatch(member.name):
                found[match[1]] = tar.extractfile(member).read().decode("utf-8")
    if "HEAD" not in found:
        raise SystemExit(f"{archive.name} does not say which commit of llama.cpp is in it")
    return found


def _architectures(files: dict[str, str]) -> set[str]:
    return set(re.findall(r'\{ LLM_ARCH_\w+, +"([^"(]+)"', files["src/llama-arch.cpp"]))


def _code(text: str) -> list[str]:
    """The lines of a header without comments and blank lines."""
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
    return [line for line in (re.sub(r"//.*", "", line).rstrip() for line in text.split("\n")) if line]


def _diff(old: dict[str, str], new: dict[str, str], header: str) -> list[str]:
    lines = difflib.unified_diff(_code(old.get(header, "")), _code(new.get(header, "")), n=0, lineterm="")
    return [line for line in lines if not line.startswith(("---", "+++", "@@"))]


def private_headers(files: dict[str, str]) -> list[str]:
    """Headers inside llama.cpp's `src` that files of ours include."""
    names: set[str] = set()
    for path in OURS.rglob("*"):
        if path.suffix in (".h", ".cpp"):
            names |= {f"src/{name}" for name in re.findall(r'^#include "([^"]+)"', path.read_text(), re.MULTILINE)}
    return sorted(names & files.keys())


def members_in_use() -> set[str]:
    """Names of llama.cpp's members that es-llama-access.h asserts."""
    text = ACCESS.read_text() if ACCESS.exists() else ""
    return set(re.findall(r"ES_EXPECT\(&?(?:\w+::)*(\w\w+),", text))


def report(old: dict[str, str], new: dict[str, str]) -> str:
    """Commit, architectures, API, and the private headers that we include; `old` and `new` are from `read`."""
    before, after, used = _architectures(old), _architectures(new), members_in_use()
    lines = [
        f"- llama.cpp: {old['HEAD'][:9]} -> {new['HEAD'][:9]}",
        f"- architectures added: {', '.join(sorted(after - before)) or 'none'}",
        f"- architectures removed: {', '.join(sorted(before - after)) or 'none'}",
    ]
    for header in [API, *private_headers(old | new)]:
        changed = _diff(old, new, header)
        named = sorted(used & set(re.findall(r"\w+", "\n".join(changed)))) if header != API else []
        lines.append(f"- {header}: {len(changed) or 'no'} lines changed{', with: ' * bool(named)}{', '.join(named)}")
        if changed:
            lines += ["", "  ```diff", *(f"  {line}" for line in changed), "  ```", ""]
    return "\n".join(lines)
