"""`edge-stream info`: what is installed, and whether and at what cost a model can stream."""

from __future__ import annotations

import ctypes
import json
from importlib import metadata
from typing import Any

import click

from edge_stream.cli import options, package_version

_DEVICE_KINDS = {0: "CPU", 1: "GPU", 2: "integrated GPU", 3: "accelerator"}


@click.command("info")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@options.model_option(required=False)
@options.context_options()
@options.compute_options()
def main(**flags: Any) -> None:
    """Show versions and devices; with -m also whether the model can stream, and the memory it takes at -c."""
    facts = system_facts()
    if flags["model"]:
        with options.load_engine(flags) as engine:
            facts |= {"model": model_facts(engine)}
    click.echo(json.dumps(facts, indent=2) if flags["as_json"] else _text(facts))


def system_facts() -> dict[str, Any]:
    """Versions, devices and the way sinks will move."""
    from edge_stream import _libs, _native

    llama = _libs.llama()
    library = ctypes.CDLL(str(_libs.llama_dir() / _libs._lib_name("llama")))
    llama.llama_backend_init()
    commit = _string(library, "ggml_commit")
    return {
        "edge_stream": package_version(),
        "llama_cpp_python": _installed("llama-cpp-python"),
        "llama_cpp": commit or "unknown",
        "ggml": _string(library, "ggml_version") or "unknown",
        "libraries": str(_libs.llama_dir()),
        "sink_move": "bank" if _native.library().es_bank_available() else "redecode",
        "devices": _devices(library),
        "system": llama.llama_print_system_info().decode(errors="replace").strip(),
    }


def model_facts(engine: Any) -> dict[str, Any]:
    """What matters for streaming about a model that can."""
    return {
        "path": str(engine.model_path),
        "description": engine.desc,
        "architecture": engine.architecture,
        "can_stream": True,  # Engine.load refuses the others, and says why
        "sink_move": engine.sink_move,
        "chat_template": engine.chat_template is not None,
        "n_ctx_train": engine.n_ctx_train,
        "n_ctx": engine.n_ctx,
        "n_keep": engine.n_keep,
        "kv_bytes_per_token": engine.kv_bytes_per_token,
        "kv_mib": round(engine.kv_bytes_per_token * engine.n_ctx / 2**20, 2),
        "file_mib": round(engine.n_bytes / 2**20, 2),
    }


def _installed(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _string(library: ctypes.CDLL, function: str) -> str | None:
    """Call a `const char * f(void)` of ggml, which libllama brings along; None if this build has none."""
    try:
        call = getattr(library, function)
    except AttributeError:
        return None
    call.restype, call.argtypes = ctypes.c_char_p, []
    answer = call()
    return answer.decode(errors="replace") if answer else None


def _devices(library: ctypes.CDLL) -> list[dict[str, Any]]:
    """The devices that ggml's backends offer; empty where the library does not export the registry."""
    try:
        count, get = library.ggml_backend_dev_count, library.ggml_backend_dev_get
        texts = {"name": library.ggml_backend_dev_name, "description": library.ggml_backend_dev_description}
        kind, memory = library.ggml_backend_dev_type, library.ggml_backend_dev_memory
    except AttributeError:
        return []
    count.restype, get.restype, get.argtypes = ctypes.c_size_t, ctypes.c_void_p, [ctypes.c_size_t]
    for function in texts.values():
        function.restype, function.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
    kind.restype, kind.argtypes = ctypes.c_int, [ctypes.c_void_p]
    size = ctypes.POINTER(ctypes.c_size_t)
    memory.restype, memory.argtypes = None, [ctypes.c_void_p, size, size]
    devices = []
    for index in range(count()):
        device = get(index)
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        memory(device, ctypes.byref(free), ctypes.byref(total))
        devices.append(
            {
                **{key: (function(device) or b"").decode(errors="replace") for key, function in texts.items()},
                "kind": _DEVICE_KINDS.get(kind(device), "other"),
                "memory_mib": total.value // 2**20,
                "free_mib": free.value // 2**20,
            }
        )
    return devices


def _how(sink_move: str) -> str:
    return "on TVM: no sink has to move" if sink_move == "none" else f"moving sinks by {sink_move}"


def _text(facts: dict[str, Any]) -> str:
    moves = {
        "bank": "bank (libllama carries the sink bank patch)",
        "redecode": "redecode (a stock libllama: sinks are decoded again, in larger slides)",
    }
    lines = [
        f"edge-stream       {facts['edge_stream']}",
        f"llama-cpp-python  {facts['llama_cpp_python']}",
        f"llama.cpp         {facts['llama_cpp']} (ggml {facts['ggml']})",
        f"libraries         {facts['libraries']}",
        f"sinks move by     {moves[facts['sink_move']]}",
    ]
    lines += [
        f"device            {d['name']}: {d['description']} ({d['kind']}, {d['free_mib']:,} of "
        f"{d['memory_mib']:,} MiB free)"
        for d in facts["devices"]
    ]
    if not facts["devices"]:
        lines.append(f"system            {facts['system']}")
    if "model" in facts:
        m = facts["model"]
        lines += [
            "",
            f"model             {m['path']}",
            f"                  {m['description']} ({m['architecture']}), {m['file_mib']:,.0f} MiB",
            f"can stream        yes, {_how(m['sink_move'])}",
            f"chat template     {'its own' if m['chat_template'] else 'none (ChatML would be used)'}",
            f"trained length    {m['n_ctx_train']:,} tokens",
            f"KV cache          {m['kv_bytes_per_token']:,} bytes per token, {m['kv_mib']:,.1f} MiB for "
            f"{m['n_ctx']:,} tokens however long the stream",
        ]
    return "\n".join(lines)
