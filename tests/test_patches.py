"""Patches are applied by their content (native/apply_patches.py), and llama.cpp's folder follows its archive."""

from __future__ import annotations

import os
from pathlib import Path

import apply_patches
import fetch_llama
import pytest

CONTENT = "one\ntwo\nthree\nfour\nfive\n"
PATCH = """\
--- a/src/x.c
+++ b/src/x.c
@@ -2,3 +2,4 @@
 two
-three
+3
+3.5
 four
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "root"
    (folder / "src").mkdir(parents=True)
    (folder / "src" / "x.c").write_text(CONTENT)
    return folder


def apply(root: Path, *texts: str) -> list[apply_patches.Hunk]:
    """Patches 0.patch, 1.patch, ... of these texts."""
    paths = [root.parent / f"{i}.patch" for i in range(len(texts))]
    for path, text in zip(paths, texts, strict=True):
        path.write_text(text)
    return apply_patches.apply(paths, root)


def test_where_it_was(root: Path) -> None:
    (hunk,) = apply(root, PATCH)
    assert (root / "src" / "x.c").read_text() == "one\ntwo\n3\n3.5\nfour\nfive\n"
    assert hunk.found == hunk.line == 2


def test_lines_that_moved(root: Path) -> None:
    (root / "src" / "x.c").write_text("new\n" * 100 + CONTENT)
    (hunk,) = apply(root, PATCH)
    assert (root / "src" / "x.c").read_text() == "new\n" * 100 + "one\ntwo\n3\n3.5\nfour\nfive\n"
    assert hunk.found - hunk.line == 100


def test_hunks_that_changed_places(root: Path) -> None:
    """The second hunk's lines stand before the first one's."""
    (root / "src" / "x.c").write_text("a\nb\n" + CONTENT)
    apply(root, PATCH + "@@ -90,2 +91,2 @@\n a\n-b\n+B\n")
    assert (root / "src" / "x.c").read_text() == "a\nB\none\ntwo\n3\n3.5\nfour\nfive\n"


def test_other_lines_keep_their_endings(root: Path) -> None:
    (root / "src" / "x.c").write_bytes(b"windows\r\n\x0cpage\n" + CONTENT.encode() + b"no end")
    apply(root, PATCH)
    assert (root / "src" / "x.c").read_bytes() == b"windows\r\n\x0cpage\none\ntwo\n3\n3.5\nfour\nfive\nno end"


def test_empty_context_line_without_its_blank(root: Path) -> None:
    (root / "src" / "x.c").write_text("\na\n")
    apply(root, "--- a/src/x.c\n+++ b/src/x.c\n@@ -1,2 +1,3 @@\n\n+new\n a\n")
    assert (root / "src" / "x.c").read_text() == "\nnew\na\n"


@pytest.mark.parametrize(
    ("content", "places"), [("one\ntwo\nfour\n", 0), (CONTENT + CONTENT, 2), ("two\nthree\nfour\n" * 3, 3)]
)
def test_not_one_place(content: str, places: int, root: Path) -> None:
    (root / "src" / "x.c").write_text(content)
    with pytest.raises(apply_patches.PatchError) as error:
        apply(root, PATCH)
    sentence = f"0.patch, hunk 1 of src/x.c: the 3 lines that it expects (two) stand in {places} places, not 1"
    assert str(error.value) == sentence
    assert (root / "src" / "x.c").read_text() == content


def test_insertion_without_context_has_no_place(root: Path) -> None:
    with pytest.raises(apply_patches.PatchError, match=r"the 0 lines that it expects \(\) stand in 7 places, not 1"):
        apply(root, "--- a/src/x.c\n+++ b/src/x.c\n@@ -2,0 +3 @@\n+new\n")


@pytest.mark.parametrize(
    "hunk",
    [
        "@@ -2,3 +2,4 @@\n two\n-three\n+3\n+3.5\n four\n",
        "@@ -1,3 +1,2 @@\n one\n-two\n three\n",
        # what it expects is still there after it was applied
        "@@ -2,1 +2,2 @@\n two\n+2.5\n",
    ],
)
def test_applied_already(hunk: str, root: Path) -> None:
    patch = "--- a/src/x.c\n+++ b/src/x.c\n" + hunk
    apply(root, patch)
    once = (root / "src" / "x.c").read_text()
    assert once != CONTENT
    with pytest.raises(apply_patches.PatchError, match=r"^0\.patch, hunk 1 of src/x\.c: already applied$"):
        apply(root, patch)
    assert (root / "src" / "x.c").read_text() == once


def test_new_file(root: Path) -> None:
    patch = "--- /dev/null\n+++ b/docs/new.txt\n@@ -0,0 +1,2 @@\n+first\n+second\n"
    apply(root, patch)
    assert (root / "docs" / "new.txt").read_text() == "first\nsecond\n"
    with pytest.raises(apply_patches.PatchError, match=r"hunk 1 of docs/new\.txt: the file is already there"):
        apply(root, patch)


def test_a_later_patch_sees_the_earlier_one(root: Path) -> None:
    apply(root, PATCH, "--- a/src/x.c\n+++ b/src/x.c\n@@ -3,2 +3,2 @@\n 3\n-3.5\n+3.6\n")
    assert (root / "src" / "x.c").read_text() == "one\ntwo\n3\n3.6\nfour\nfive\n"


def test_all_or_nothing(root: Path) -> None:
    """Every hunk that does not fit is named, and none of the others is applied."""
    new = "--- /dev/null\n+++ b/new.txt\n@@ -0,0 +1 @@\n+new\n"
    with pytest.raises(apply_patches.PatchError) as error:
        apply(root, PATCH, new, PATCH.replace("x.c", "y.c"), PATCH + "@@ -9,1 +9,0 @@\n-nine\n")
    assert str(error.value).split("\n") == [
        "2.patch, hunk 1 of src/y.c: the file is not there",
        "3.patch, hunk 1 of src/x.c: already applied",
        "3.patch, hunk 2 of src/x.c: the 1 lines that it expects (nine) stand in 0 places, not 1",
    ]
    assert [path.name for path in root.rglob("*")] == ["src", "x.c"]
    assert (root / "src" / "x.c").read_text() == CONTENT


@pytest.mark.parametrize(
    ("patch", "match"),
    [
        ("", "no hunk in it"),
        (PATCH.replace("-2,3", "-2,2"), "its lines are not as many as its header says"),
        (PATCH.replace("+2,4", "+2,5"), "its lines are not as many as its header says"),
    ],
)
def test_a_patch_that_is_none(patch: str, match: str, root: Path) -> None:
    with pytest.raises(apply_patches.PatchError, match=match):
        apply(root, patch)
    assert (root / "src" / "x.c").read_text() == CONTENT


def test_ours_can_be_read() -> None:
    hunks = [hunk for path in sorted(fetch_llama.PATCHES.glob("*.patch")) for hunk in apply_patches.parse(path)]
    assert {hunk.patch for hunk in hunks} == {path.name for path in fetch_llama.PATCHES.glob("*.patch")}
    assert all(hunk.old for hunk in hunks)  # none without context


def test_another_archive_replaces_the_folder(tmp_path: Path) -> None:
    """Files that are gone are not compiled any more; changed ones are newer than what was built from them."""
    old, new = tmp_path / "old", tmp_path / "new"
    for folder, files in (
        (old, {"a/gone.cpp": "x", "same.cpp": "x", "b.cpp": "x"}),
        (new, {"same.cpp": "x", "b.cpp": "y"}),
    ):
        for name, text in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
            os.utime(folder / name, (1_000_000_000, 1_000_000_000))  # archives have one time for all
    fetch_llama.sync(new, old)
    assert sorted(path.name for path in old.rglob("*")) == ["b.cpp", "same.cpp"]
    assert (old / "b.cpp").read_text() == "y" and (old / "b.cpp").stat().st_mtime > 1_000_000_000
    assert (old / "same.cpp").stat().st_mtime == 1_000_000_000
