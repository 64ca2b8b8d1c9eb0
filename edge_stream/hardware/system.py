"""What is installed: versions, libraries, devices and what each can do."""

from __future__ import annotations

import ctypes
from importlib import metadata
from typing import Any

from edge_stream._version import __version__
from edge_stream.cache_types import CACHE_TYPES
from edge_stream.hardware import bank_ops, devices
from edge_stream.native import bindings, libraries


def system_facts() -> dict[str, Any]:
    """Versions, devices, the way sinks are moved, and whose attention and products the CPU computes with."""
    llama = libraries.llama()
    library = ctypes.CDLL(str(libraries.llama_dir() / libraries._lib_name("llama")))
    llama.llama_backend_init()
    commit = _string(library, "ggml_commit")
    return {
        "edge_stream": __version__,
        "llama_cpp_python": _installed("llama-cpp-python"),
        "llama_cpp": commit or "unknown",
        "ggml": _string(library, "ggml_version") or "unknown",
        "libraries": str(libraries.llama_dir()),
        "sink_move": "bank" if bindings.library().es_bank_available() else "redecode",
        "attention": _string(library, "es_attention_name") or "stock",
        "products": _string(library, "es_products_name") or "stock",
        "devices": _devices(),
        "system": llama.llama_print_system_info().decode(errors="replace").strip(),
    }


def _installed(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _string(library: ctypes.CDLL, function: str) -> str | None:
    """The result of a `const char * f(void)` of ggml; None if this build has no such function."""
    try:
        call = getattr(library, function)
    except AttributeError:
        return None
    call.restype, call.argtypes = ctypes.c_char_p, []
    answer = call()
    return answer.decode(errors="replace") if answer else None


def _devices() -> list[dict[str, Any]]:
    """All devices, and the types of K with which each moves sinks, and rebases, without the CPU."""

    def missing(handle: int, cache_type: str) -> dict[str, list[str]]:
        return bank_ops.unsupported(lambda op: devices.ggml().ggml_backend_dev_supports_op(handle, op), cache_type)

    found = []
    for device in devices.devices():
        steps = {name: missing(device.handle, name) for name in CACHE_TYPES}
        found.append(
            {
                "name": device.name,
                "description": device.description,
                "kind": device.kind,
                "backend": device.backend,
                "memory_mib": device.total // 2**20,
                "free_mib": device.free // 2**20,
                "moves_sinks": [name for name, step in steps.items() if not step["slide"] and not step["capture"]],
                "rebases": [name for name, step in steps.items() if not step["rebase"]],
            }
        )
    return found
