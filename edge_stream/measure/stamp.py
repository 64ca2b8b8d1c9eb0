"""When, where and with which software something was measured."""

from __future__ import annotations

import platform
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from edge_stream.backends.loading import default_threads
from edge_stream.hardware.processor import cpu_name, output_of
from edge_stream.hardware.system import system_facts


def stamp() -> dict[str, Any]:
    """llama-bench's build_commit (of llama.cpp), cpu_info, gpu_info, backends and test_time, and more of ours."""
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


def source_commit() -> str:
    """The git commit of this source tree, with `+` if files differ; "" outside of one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return ""
    commit = output_of("git", "-C", str(root), "rev-parse", "--short", "HEAD")
    dirty = output_of("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no")
    return commit + ("+" if commit and dirty else "")
