"""Who may import whom: converters see leaves of edge_stream only, and generic code names no model family."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_stream.families import families

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "edge_stream"
# what converters may import, each of which imports nothing of edge_stream but another of these
LEAVES = {
    "errors",
    "families",
    "hardware.devices",
    "hardware.memory",
    "output.files",
    "output.staging",
    "paths",
    "text",
    "native.libraries",
    "native.scheduling",
}


def files(*folders: Path) -> list[Path]:
    return sorted(path for folder in folders for path in folder.rglob("*.py"))  # follows no links


def nodes(path: Path, *, types_too: bool = True) -> Iterator[ast.AST]:
    """Every node of a file; without those under `if TYPE_CHECKING` if they are not wanted."""
    pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        yield node
        hidden = isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        pending += [] if hidden and not types_too else ast.iter_child_nodes(node)


def imported(path: Path, *, types_too: bool = True) -> set[str]:
    """Full names of what a file imports, `from a import b` as a.b."""
    names: set[str] = set()
    for node in nodes(path, types_too=types_too):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def not_of(allowed: set[str], path: Path, *, types_too: bool = True) -> set[str]:
    """What a file imports of edge_stream but for some modules, which are named without `edge_stream.`."""
    prefixes = tuple(f"edge_stream.{name}." for name in allowed)
    names = imported(path, types_too=types_too)
    return {name for name in names if name.startswith("edge_stream.") and not f"{name}.".startswith(prefixes)}


def test_converters_import_leaves_only() -> None:
    found = files(ROOT / "converters")
    assert len(found) > 30
    for path in found:
        assert not not_of(LEAVES | {"converters"}, path), path


@pytest.mark.parametrize("leaf", sorted(LEAVES))
def test_leaves_import_leaves_only(leaf: str) -> None:
    module = PACKAGE / f"{leaf.replace('.', '/')}.py"
    for path in [module] if module.exists() else files(PACKAGE / leaf):
        allowed = {"errors", "families"} if leaf == "families" else LEAVES
        assert not not_of(allowed, path, types_too=leaf == "families"), path


def test_converters_go_by_one_name() -> None:
    """`converters`, imported from the repository's root, would be a second copy of every module."""
    assert (PACKAGE / "converters").resolve() == ROOT / "converters"
    for path in files(PACKAGE, *(ROOT / name for name in ("converters", "tests", "benchmarks"))):
        assert not {name for name in imported(path) if name.split(".")[0] == "converters"}, path


def test_generic_code_names_no_family() -> None:
    """Outside of edge_stream/families no string is a model_type or an architecture, so nothing compares with one."""
    known = families().values()
    names = {name for f in known for name in (f.model_type, f.gguf.arch, f.hf_class, *f.aliases)}
    names -= {"llama"}  # also a kind of tokenizer, and of file
    for path in files(ROOT / "converters", PACKAGE):
        if path.is_relative_to(PACKAGE / "families") or path.name == "vocab_bpe.py":  # llama.cpp's pre-tokenizers
            continue
        found = {node.value for node in nodes(path) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
        assert not found & names, path


@pytest.mark.parametrize("name", families())
def test_a_family_is_in_the_file_of_its_name(name: str) -> None:
    family = families()[name]
    assert (PACKAGE / "families" / f"{name}.py").exists()
    assert family.hf_class.endswith(("ForCausalLM", "ForConditionalGeneration")) and family.models
