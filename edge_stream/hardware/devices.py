"""The devices of ggml's backends, including RPC servers on other machines, and which of them a model uses.

Everything here queries the loaded libraries (ggml-backend.h, ggml-rpc.h), ours or stock ones alike.
"""

from __future__ import annotations

import ctypes as C
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

from edge_stream.errors import EdgeStreamError
from edge_stream.native import libraries

KINDS = {0: "CPU", 1: "GPU", 2: "integrated GPU", 3: "accelerator", 4: "several GPUs"}  # ggml_backend_dev_type
SPLIT_MODES = {"none": 0, "layer": 1, "row": 2}  # llama_split_mode
RPC_PORT = 50052  # llama.cpp's
_CONNECT_SECONDS = 5.0

_registered: dict[str, list[str]] = {}  # endpoint -> names of its devices


@dataclass(frozen=True)
class Device:
    """One device. total, free: bytes of its memory, as reported by its backend. handle: ggml_backend_dev_t."""

    name: str
    description: str
    kind: str
    backend: str
    total: int
    free: int
    handle: int

    @property
    def is_gpu(self) -> bool:
        """True if layers can be offloaded to it."""
        return self.kind in ("GPU", "integrated GPU", "several GPUs")

    @property
    def is_rpc(self) -> bool:
        return self.backend == "RPC"

    @property
    def is_local_gpu(self) -> bool:
        """True for a GPU of this machine. RPC servers stay registered once any model has used them."""
        return self.is_gpu and not self.is_rpc


@lru_cache(maxsize=1)
def ggml() -> Any:
    """libggml, which holds the backend registry, with the signatures used here."""
    libraries.llama().llama_backend_init()
    lib = C.CDLL(str(libraries.llama_dir() / libraries._lib_name("ggml")))
    size = C.POINTER(C.c_size_t)
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "ggml_backend_dev_count": (C.c_size_t, []),
        "ggml_backend_dev_get": (C.c_void_p, [C.c_size_t]),
        "ggml_backend_dev_name": (C.c_char_p, [C.c_void_p]),
        "ggml_backend_dev_description": (C.c_char_p, [C.c_void_p]),
        "ggml_backend_dev_type": (C.c_int, [C.c_void_p]),
        "ggml_backend_dev_memory": (None, [C.c_void_p, size, size]),
        "ggml_backend_dev_backend_reg": (C.c_void_p, [C.c_void_p]),
        "ggml_backend_dev_buffer_type": (C.c_void_p, [C.c_void_p]),
        "ggml_backend_buft_name": (C.c_char_p, [C.c_void_p]),
        "ggml_backend_dev_supports_op": (C.c_bool, [C.c_void_p, C.c_void_p]),
        "ggml_backend_reg_name": (C.c_char_p, [C.c_void_p]),
        "ggml_backend_reg_by_name": (C.c_void_p, [C.c_char_p]),
        "ggml_backend_reg_dev_count": (C.c_size_t, [C.c_void_p]),
        "ggml_backend_reg_dev_get": (C.c_void_p, [C.c_void_p, C.c_size_t]),
        "ggml_backend_reg_get_proc_address": (C.c_void_p, [C.c_void_p, C.c_char_p]),
        "ggml_backend_register": (None, [C.c_void_p]),
    }
    for name, (restype, argtypes) in signatures.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = restype, argtypes
    return lib


def devices() -> list[Device]:
    """Every device, in backend order."""
    lib = ggml()
    return [device(lib.ggml_backend_dev_get(i)) for i in range(lib.ggml_backend_dev_count())]


def buffer_types() -> dict[str, int]:
    """Name -> ggml_backend_buffer_type_t of the memory of every device."""
    lib = ggml()
    found = [lib.ggml_backend_dev_buffer_type(d.handle) for d in devices()]
    return {_text(lib.ggml_backend_buft_name(buffer)): buffer for buffer in found if buffer}


def device(handle: int) -> Device:
    """What a device (ggml_backend_dev_t) is, and how much of its memory is free now."""
    lib = ggml()
    free, total = C.c_size_t(), C.c_size_t()
    lib.ggml_backend_dev_memory(handle, C.byref(free), C.byref(total))
    return Device(
        name=_text(lib.ggml_backend_dev_name(handle)),
        description=_text(lib.ggml_backend_dev_description(handle)),
        kind=KINDS.get(lib.ggml_backend_dev_type(handle), "other"),
        backend=_text(lib.ggml_backend_reg_name(lib.ggml_backend_dev_backend_reg(handle))),
        total=total.value,
        free=free.value,
        handle=handle,
    )


def _text(value: bytes | None) -> str:
    return (value or b"").decode(errors="replace")


def choose(names: Sequence[str] | None, rpc: Sequence[str] = ()) -> list[Device] | None:
    """The devices that may hold a model's layers, in llama.cpp's order: RPC servers first, then GPUs.

    names: as in `--device`; ["none"] for no device, None for llama.cpp's choice. rpc: servers as host:port, which are
    queried for their devices. Returns None if llama.cpp is to choose. Raises EdgeStreamError for an unknown name or a
    server that does not answer.
    """
    remote = [name for endpoint in rpc for name in add_rpc_server(endpoint)]
    if names is None and not _registered:
        return None
    there = {d.name: d for d in devices()}
    if names is None:
        # an earlier model's RPC server is still registered, but this model did not name it
        local = [d for d in there.values() if d.is_local_gpu]
        discrete = [d for d in local if d.kind != "integrated GPU"]
        return [there[name] for name in remote] + (discrete or local)
    if list(names) == ["none"]:
        return []
    unknown = [name for name in names if name not in there]
    if unknown:
        usable = ", ".join(d.name for d in there.values() if d.is_gpu) or "no device but the CPU"
        raise EdgeStreamError(f"device {unknown[0]} is unknown: this build and machine offer {usable}")
    wrong = [name for name in names if there[name].kind == "CPU"]
    if wrong:
        raise EdgeStreamError(f"device {wrong[0]} is the CPU: use `none` to keep all layers there")
    return [there[name] for name in names]


def place(params: Any, names: Sequence[str] | None = None, rpc: Sequence[str] = ()) -> None:
    """Set `devices` of a llama_model_params to those that may hold layers. Arguments and errors are `choose`'s.

    To be called before every load: llama.cpp's own choice includes each RPC server that the process ever used, and
    fails with one that has since stopped.
    """
    chosen = choose(names, rpc)
    if chosen is not None:
        params.devices = C.cast(_null_ended(*(d.handle for d in chosen)), C.c_void_p)


@cache  # llama_model_params does not keep the array alive
def _null_ended(*handles: int) -> C.Array[C.c_void_p]:
    return (C.c_void_p * (len(handles) + 1))(*handles, None)


def layer_devices(n_gpu_layers: int | None, names: Sequence[str] | None, rpc: Sequence[str] = ()) -> list[Device]:
    """The GPUs that would hold a model's layers; [] if they all stay on the CPU. Raises what `choose` does.

    n_gpu_layers: layers to offload, None or negative for all. names, rpc: see `choose`.
    """
    if n_gpu_layers == 0:
        return []
    chosen = choose(names, rpc)
    return [d for d in (devices() if chosen is None else chosen) if d.is_gpu]


def add_rpc_server(endpoint: str) -> list[str]:
    """Register the devices of an RPC server (`host:port`) and return their names. Raises EdgeStreamError."""
    host, _, port = endpoint.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 1 << 16:
        raise EdgeStreamError(f"RPC server {endpoint!r} must be given as host:port")
    lib = ggml()
    registry = lib.ggml_backend_reg_by_name(b"RPC")
    address = registry and lib.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_rpc_add_server")
    if not address:
        raise EdgeStreamError("this build of llama.cpp has no RPC backend (CMAKE_ARGS=-DGGML_RPC=ON)")
    try:
        # llama.cpp would wait for minutes if nothing answers
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()
    except OSError as error:
        raise EdgeStreamError(f"no RPC server answers at {endpoint}: {error.strerror or error}") from error
    if endpoint not in _registered:
        server = C.CFUNCTYPE(C.c_void_p, C.c_char_p)(address)(endpoint.encode())
        if not server:
            raise EdgeStreamError(f"no RPC server of this llama.cpp's version answers at {endpoint}")
        lib.ggml_backend_register(server)
        handles = [lib.ggml_backend_reg_dev_get(server, i) for i in range(lib.ggml_backend_reg_dev_count(server))]
        _registered[endpoint] = [device(handle).name for handle in handles]
    return _registered[endpoint]


def serve_rpc(host: str, port: int, n_threads: int, names: Sequence[str] | None) -> None:
    """Serve devices over RPC, one client at a time, until the process is killed. Raises EdgeStreamError.

    names: devices, as in `--device`; None: the GPUs, or the CPU if there are none. Anyone who can reach the port can
    use this process: llama.cpp's protocol has no authentication.
    """
    lib = ggml()
    registry = lib.ggml_backend_reg_by_name(b"RPC")
    address = registry and lib.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_rpc_start_server")
    if not address:
        raise EdgeStreamError("this build of llama.cpp has no RPC backend (CMAKE_ARGS=-DGGML_RPC=ON)")
    there = devices()
    if names is None:
        lent = [d for d in there if d.is_gpu] or [d for d in there if d.kind == "CPU"]
    else:
        lent = [d for d in there if d.name in names]
        if len(lent) != len(names):
            raise EdgeStreamError(
                f"unknown device ({', '.join(names)}): devices are {', '.join(d.name for d in there)}"
            )
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise EdgeStreamError(f"cannot listen at {host}:{port}: {error.strerror or error}") from error
    handles = (C.c_void_p * len(lent))(*(d.handle for d in lent))
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the call never returns to Python
    sys.stdout.flush()
    signature = C.CFUNCTYPE(None, C.c_char_p, C.c_char_p, C.c_size_t, C.c_size_t, C.POINTER(C.c_void_p))
    signature(address)(f"{host}:{port}".encode(), None, n_threads, len(lent), handles)
    raise EdgeStreamError(f"the RPC server at {host}:{port} ended")
