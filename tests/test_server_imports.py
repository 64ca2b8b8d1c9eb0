"""The server's folders build on each other in one direction: history, scheduling, HTTP."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import edge_stream.server

SERVER = Path(edge_stream.server.__file__).parent
ABOVE = {
    "errors.py": ("history", "scheduling", "http", "serve"),
    "settings.py": ("history", "scheduling", "http", "serve"),
    "history": ("scheduling", "http", "serve"),
    "scheduling": ("http", "serve"),
    "http": ("serve",),
}


def imported(file: Path) -> set[str]:
    """Modules that a file imports, for type checking too."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


@pytest.mark.parametrize("part", ABOVE)
def test_a_part_of_the_server_knows_nothing_of_those_above(part: str) -> None:
    path = SERVER / part
    files = [path] if path.is_file() else sorted(path.rglob("*.py"))
    assert files
    for file in files:
        for above in ABOVE[part]:
            prefix = f"edge_stream.server.{above}"
            assert not {n for n in imported(file) if n == prefix or n.startswith(prefix + ".")}, file
