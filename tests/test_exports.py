"""What libedge_stream shows to the programs that load it: llama.cpp's code inside it stays inside."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import edge_stream

LIB = (
    Path(edge_stream.__file__).parent
    / "lib"
    / ("libedge_stream.dylib" if sys.platform == "darwin" else "libedge_stream.so")
)


@pytest.mark.skipif(shutil.which("nm") is None or not LIB.exists(), reason="needs nm and the library")
def test_every_exported_name_is_of_the_c_api() -> None:
    options = ["-gU"] if sys.platform == "darwin" else ["-D", "--defined-only"]
    lines = subprocess.run(["nm", *options, LIB], capture_output=True, text=True, check=True).stdout.splitlines()
    names = {line.split()[-1].removeprefix("_") if sys.platform == "darwin" else line.split()[-1] for line in lines}
    assert len(names) > 50
    assert not [name for name in names if not name.startswith("es_")]
