"""When, where and with which software something was measured."""

from __future__ import annotations

import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any


def stamp() -> dict[str, Any]:
    """llama-bench's build_commit (of llama.cpp), cpu_info, gpu_info, backends and test_time, and more of ours."""
    from edge_stream.backends.loading import default_threads
    from edge_stream.cli.info import system_facts

    facts = system_facts()
    devices = facts["devices"]
    gpus = [d["description"] for d in devices if "GPU" in d["kind"]]
    return {
        "build_commit": facts["llama_cpp"],
        "edge_stream": facts["edge_stream"],
        "edge_stream_commit": source_commit(),
        "llama_cpp_python": facts["llama_cpp_python"],
        "ggml": facts["ggml"],
        "attention": facts["attention"],
        "products": facts["products"],
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu_info": cpu_name(),
        "n_cores": default_threads(),
        "gpu_info": ", ".join(gpus),
        "backends": ",".join(sorted({d["name"] for d in devices})) or "CPU",
        "test_time": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def cpu_name() -> str:
    """The processor's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    if platform.system() == "Darwin":
        answer = _output("sysctl", "-n", "machdep.cpu.brand_string")
        if answer:
            return answer
    return platform.processor() or platform.machine()


def cpu_flags() -> list[str]:
    """The instruction sets that Linux names for the first processor; elsewhere none."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith(("flags", "Features")):
                return line.split(":", 1)[1].split()
    except OSError:
        pass
    return []


def source_commit() -> str:
    """The git commit of this source tree, with `+` if files differ; "" outside of one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return ""
    commit = _output("git", "-C", str(root), "rev-parse", "--short", "HEAD")
    dirty = _output("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no")
    return commit + ("+" if commit and dirty else "")


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
