"""The pin of llama-cpp-python, and what `make bump` does with it."""

from __future__ import annotations

import io
import re
import shutil
import tarfile
from pathlib import Path

import bump
import llama_changes
import llama_pin
import pytest

ROOT = Path(__file__).resolve().parent.parent
NEW = llama_pin.Pin("9.8.7", "f" * 64, "123456789")


@pytest.fixture
def pyproject(tmp_path: Path) -> Path:
    return Path(shutil.copy(ROOT / "pyproject.toml", tmp_path))


def test_the_pin_is_written_and_read(pyproject: Path) -> None:
    before, old = pyproject.read_text(), llama_pin.read(pyproject)
    assert re.fullmatch(r"[\d.]+", old.version) and re.fullmatch(r"[0-9a-f]{64}", old.sha256)
    llama_pin.write(NEW, pyproject)
    assert llama_pin.read(pyproject) == NEW
    changed = [line for line in pyproject.read_text().split("\n") if line not in before.split("\n")]
    assert changed == [
        '    "llama-cpp-python==9.8.7",',
        f'llama-cpp-python-sha256 = "{"f" * 64}"',
        'llama-cpp-commit = "123456789"',
    ]
    llama_pin.write(old, pyproject)
    assert pyproject.read_text() == before
    assert [path.name for path in pyproject.parent.iterdir()] == ["pyproject.toml"]


def test_half_a_pin(pyproject: Path) -> None:
    pyproject.write_text(re.sub("llama-cpp-commit.*", "", pyproject.read_text()))
    with pytest.raises(ValueError, match="the commit of llama-cpp-python stands there 0 times, not once"):
        llama_pin.write(NEW, pyproject)


def test_one_place_names_the_version() -> None:
    """Programs, builds and the README take it from pyproject.toml; what was measured keeps its own."""
    pin = llama_pin.read()
    named = re.compile(rf"llama[-_]cpp[-_]python(==| |-)v?\d|{pin.sha256}|{pin.commit}")
    files = [
        ROOT / name
        for name in ("Makefile", "CMakeLists.txt", "README.md", "CONTRIBUTING.md", "edge_stream/native/libraries.py")
    ]
    for folder in ("native", ".github", ".ci", "edge_stream", "converters"):
        files += [
            path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".txt", ".yml", ".sh", ".cpp", ".h")
        ]
    assert len(files) > 100
    assert [str(path) for path in files if named.search(path.read_text())] == []


def archive(path: Path, commit: str, files: dict[str, str]) -> Path:
    """A source distribution with these files of llama.cpp."""
    paths = {f"vendor/llama.cpp/{name}": text for name, text in files.items()}
    paths[".git/modules/vendor/llama.cpp/HEAD"] = commit
    with tarfile.open(path, "w:gz") as tar:
        for name, text in paths.items():
            member = tarfile.TarInfo(f"llama_cpp_python-1/{name}")
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text.encode()))
    return path


def test_what_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    access = tmp_path / "access.h"
    access.write_text("ES_EXPECT(&llama_kv_cache::get_size, int);\nES_EXPECT(llama_kv_cache::layers, int);\n")
    monkeypatch.setattr(llama_changes, "ACCESS", access)
    old = {
        "src/llama-arch.cpp": '    { LLM_ARCH_A,   "a"  },\n    { LLM_ARCH_GONE, "gone" },\n',
        "include/llama.h": "// about f\nint f(void);\nint g(void);\n",
        "src/llama-kv-cache.h": "uint32_t get_size() const;\nstd::vector<int> layers; // per layer\n",
    }
    new = {
        "src/llama-arch.cpp": '    { LLM_ARCH_A,   "a"  },\n    { LLM_ARCH_NEW, "new" },\n',
        "include/llama.h": "// rather about\n// f\nint f(void);\nlong g(void);\n",
        "src/llama-kv-cache.h": "size_t get_size() const;\nstd::vector<int> layers;\n",
    }
    read = [
        llama_changes.read(archive(tmp_path / f"{commit[0]}.tar.gz", commit, files))
        for commit, files in (("a" * 40, old), ("b" * 40, new))
    ]
    assert [line.strip() for line in llama_changes.report(*read).split("\n") if line] == [
        "- llama.cpp: aaaaaaaaa -> bbbbbbbbb",
        "- architectures added: new",
        "- architectures removed: gone",
        "- include/llama.h: 2 lines changed",
        "```diff",
        "-int g(void);",
        "+long g(void);",
        "```",
        "- src/llama-kv-cache.h: 2 lines changed, with: get_size",
        "```diff",
        "-uint32_t get_size() const;",
        "+size_t get_size() const;",
        "```",
    ]


STEPS = ("copy", "fetch", "compare", "patch", "build", "test")


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch, pyproject: Path) -> list[str]:
    """The steps of a bump that only note that they ran; the pin is the copy's."""
    ran: list[str] = []
    for name in STEPS:
        result = {"fetch": NEW, "test": "all passed"}.get(name)
        action = lambda *_, name=name, result=result: (ran.append(name), result)[1]  # noqa: E731
        target = (bump, "changes") if name == "compare" else (bump.Stage, name)
        monkeypatch.setattr(*target, action)
    monkeypatch.setattr(llama_pin.read, "__defaults__", (pyproject,))
    monkeypatch.setattr(llama_pin.write, "__defaults__", (pyproject,))
    return ran


def test_the_pin_changes_when_all_has_passed(steps: list[str], pyproject: Path, capsys: pytest.CaptureFixture) -> None:
    bump.bump("9.8.7")
    assert steps == list(STEPS)
    assert llama_pin.read(pyproject) == NEW
    assert "all passed" in capsys.readouterr().out


@pytest.mark.parametrize("failing", STEPS)
def test_a_step_that_fails(failing: str, steps: list[str], pyproject: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = pyproject.read_text()

    def fail(*_: object) -> None:
        raise bump.StepFailed("error: it is what it is")

    monkeypatch.setattr(*((bump, "changes") if failing == "compare" else (bump.Stage, failing)), fail)
    with pytest.raises(SystemExit) as stopped:
        bump.bump("9.8.7")
    pinned = llama_pin.read(pyproject).version
    assert str(stopped.value) == f"{failing} failed; the pin stays at {pinned}\nerror: it is what it is"
    assert steps == list(STEPS[: STEPS.index(failing)])
    assert pyproject.read_text() == before


@pytest.mark.parametrize("args", [[], ["latest"], ["0.3.36", "x"], ["../0.3.36"]])
def test_which_version(args: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["bump.py", *args])
    with pytest.raises(SystemExit, match="which version"):
        bump.main()
