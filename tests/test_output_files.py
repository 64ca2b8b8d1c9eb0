"""Files that are replaced: links stay links, pipes and devices are written to or refused."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from edge_stream.errors import EdgeStreamError
from edge_stream.output import files, staging


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    real, link = tmp_path / "there" / "real", tmp_path / "link"
    link.symlink_to("there/real")
    for text in ("new", "newer"):
        files.check_writable(link)
        files.replace_text(link, text)
        assert link.is_symlink() and real.read_text() == text and not real.is_symlink()
    assert [p.name for p in real.parent.iterdir()] == ["real"]


WRITES_FOR_EVER = """
import sys, time
from edge_stream.output.files import replace_file
def write(name):
    open(name, "w").write("half")
    print("writing", flush=True)
    time.sleep(1000)
replace_file(sys.argv[1], write)
"""


def test_what_a_killed_process_was_writing_is_removed_by_the_next_one(tmp_path: Path) -> None:
    target, other = tmp_path / "a.json", tmp_path / "a.json.more"
    processes = []
    for path in (target, target, other):
        command = [sys.executable, "-c", WRITES_FOR_EVER, str(path)]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        assert processes[-1].stdout and processes[-1].stdout.readline() == "writing\n"
    assert len(list(tmp_path.iterdir())) == 3
    processes[0].kill()
    processes[0].wait()
    files.replace_text(target, "whole")
    assert len(list(tmp_path.iterdir())) == 3 and target.read_text() == "whole"  # the other two still write
    for process in processes[1:]:
        process.kill()
        process.wait()
    files.replace_text(target, "again")
    files.replace_text(other, "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "a.json.more"]


def test_a_loop_and_a_link_to_nowhere_are_refused(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "nowhere").symlink_to("none/file")
    for check in (files.check_writable, lambda path: files.replace_text(path, "x")):
        with pytest.raises(EdgeStreamError, match=r"loop: its links form a loop$"):
            check(tmp_path / "loop")
        with pytest.raises(EdgeStreamError, match=r"cannot write .*nowhere: .*(does not exist|No such file)"):
            check(tmp_path / "nowhere")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["loop", "nowhere"]


def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.json"
    os.mkfifo(pipe)
    with pytest.raises(EdgeStreamError, match="it is not a regular file"):
        files.check_writable(pipe)
    files.check_writable(pipe, streams=True)
    got: list[str] = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_text()))
    reader.start()
    files.replace_text(pipe, "through a pipe")
    reader.join()
    assert got == ["through a pipe"] and pipe.is_fifo()
    assert [p.name for p in tmp_path.iterdir()] == ["pipe.json"]


def test_a_terminal_is_written_to() -> None:
    ours, theirs = os.openpty()
    try:
        name = os.ttyname(theirs)
        files.replace_text(name, "shown\n")
        assert os.read(ours, 100) == b"shown\r\n"
        assert Path(name).is_char_device()
    finally:
        os.close(ours)
        os.close(theirs)


def test_standard_output_that_goes_to_a_file_is_written_to(tmp_path: Path) -> None:
    """Replacing that file would lose what was written before."""
    code = "from edge_stream.output import files; print('first'); files.replace_text('/dev/stdout', 'second\\n')"
    with (tmp_path / "out").open("w") as out:
        subprocess.run([sys.executable, "-c", code], stdout=out, check=True)
    assert (tmp_path / "out").read_text() == "first\nsecond\n"


def test_a_folder_and_a_socket_are_refused(tmp_path: Path) -> None:
    import socket

    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(tmp_path / "socket"))
        for path, match in ((tmp_path, "it is a folder"), (tmp_path / "socket", "it is not a regular file")):
            with pytest.raises(EdgeStreamError, match=match):
                files.check_writable(path, streams=True)
            with pytest.raises(EdgeStreamError, match=match):
                files.replace_text(path, "x")
        assert (tmp_path / "socket").is_socket()


def test_a_folder_is_replaced_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is killed has either the old folder or the new one there; elsewhere it is renamed twice."""
    for can_exchange in (True, False):
        root = tmp_path / str(can_exchange)
        new, out = root / "staging" / "model", root / "model"
        for folder, text in ((new, "new"), (out, "old")):
            folder.mkdir(parents=True)
            (folder / "file").write_text(text)
        if can_exchange:
            monkeypatch.setattr(os, "rename", lambda *_: pytest.fail("two steps"))
        else:
            monkeypatch.undo()
            monkeypatch.setattr(staging, "exchange", lambda *_: (_ for _ in ()).throw(OSError(errno.EINVAL, "no")))
        staging.publish_folder(new, out)
        assert (out / "file").read_text() == "new"
        assert [p.read_text() for p in (root / "staging").rglob("file")] == ["old"]


def test_a_name_with_a_tilde_is_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what a user gives as a source stands for a home; a file that is written is named as it is."""
    monkeypatch.chdir(tmp_path)
    files.replace_text(Path("~nobody-of-that-name"), "here")
    assert (tmp_path / "~nobody-of-that-name").read_text() == "here"
