"""What the machine's processor is called, and its instruction sets."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path


def cpu_name() -> str:
    """The processor's name."""
    name = _cpuinfo("model name")
    if name:
        return name
    if platform.system() == "Darwin":
        answer = output_of("sysctl", "-n", "machdep.cpu.brand_string")
        if answer:
            return answer
    return platform.processor() or platform.machine()


def cpu_flags() -> list[str]:
    """The instruction sets that Linux names for the first processor; elsewhere none."""
    return _cpuinfo("flags", "Features").split()


def _cpuinfo(*keys: str) -> str:
    """The first processor's line of Linux's list that begins with one of the keys; "" without."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith(keys)), "")


def output_of(*command: str) -> str:
    """What a program of the system prints; "" if it fails, is not there or takes 10 s."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
