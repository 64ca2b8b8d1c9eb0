"""An MLC model library from a converted model: tvm.relax.build in a process of its own.

That process may crash (TVM's schedule of matrix products for Metal does, see SCHEDULES_OFF); then the caller gets one
sentence. The library is written for MLC's runtime: its functions take parameters in the order of `_metadata()`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_stream.errors import EdgeStreamError
from edge_stream.families import families

if TYPE_CHECKING:
    from edge_stream.converters.source import Source

# tvm 0.27: these classes of tvm.s_tir.dlight.gpu.matmul crash the process in tensorize; the generic schedule takes over
SCHEDULES_OFF = ("MetalMatmul", "MatmulTensorization", "MatmulInt8Tensorization")


@dataclass(frozen=True)
class Device:
    """What to build for. host: its target triple, None for this machine."""

    target: dict[str, Any]
    host: str | None
    suffix: str  # of the library: .so is linked here, .tar holds object files for the app's own linker
    ran: bool = False  # whether what is built can run on the machine that builds it


_METAL = {"kind": "metal", "max_threads_per_block": 256, "max_shared_memory_per_block": 32768, "thread_warp_size": 1}
DEVICES = {
    "cpu": Device({"kind": "llvm"}, None, ".so", ran=True),
    "macos": Device({"kind": "llvm"}, "arm64-apple-macos", ".tar"),
    "metal": Device(_METAL, "arm64-apple-macos", ".tar"),
    "iphone": Device(_METAL | {"libs": ["iphoneos"]}, "arm64-apple-darwin", ".tar"),
    "cuda": Device({"kind": "cuda", "arch": "sm_80"}, "x86_64-unknown-linux-gnu", ".tar"),
    "android": Device({"kind": "opencl"}, "aarch64-linux-android", ".tar"),
}


def check_supported(source: Source) -> None:
    """Raise EdgeStreamError if the model cannot be compiled here, or TVM is not installed."""
    lacking = what_is_lacking(source)
    if lacking:
        raise EdgeStreamError(f"--device cannot compile this model: {lacking}; use --device none")
    require_tvm()


def what_is_lacking(source: Source) -> str | None:
    """Why TVM's sliding cache (tvm.relax.frontend.nn.llm.kv_cache) cannot compute the model; None if it can."""
    model, family = source.model, source.model.family
    kind = family.model_type
    if model.attn_softcap:
        return f"TVM's attention has no soft cap on scores, which {kind} has"
    if family.own_swa_rope:
        return f"TVM's cache has one rope base for all layers, {kind} has two"
    if not family.compiles:
        return f"the decoder that is compiled is Llama's, from which {kind} differs"
    if model.rope_scaling is not None and model.rope_scaling.kind == "longrope":
        return "TVM's sliding cache has no longrope factors"
    if model.n_rot != model.head_dim:
        return "TVM's sliding cache turns whole heads, this model parts of them"
    return None


def require_tvm() -> None:
    """Raise EdgeStreamError if TVM is not installed."""
    if importlib.util.find_spec("tvm") is None:
        raise EdgeStreamError("compiling and running MLC models needs Apache TVM: pip install 'edge-stream[mlc]'")


def system_lib_prefix(model_type: str, quantization: str) -> str:
    """Prefix of the library's symbols, `<model type>_<quantization>_` as mlc_llm compile makes it."""
    return re.sub(r"\W", "_", f"{model_type}_{quantization}_", flags=re.ASCII)


def compile_library(folder: Path, device: str, say: Callable[[str], None], out: Path | None = None) -> Path:
    """Compile for `device` what mlc-chat-config.json in `folder` describes, to lib.so or lib.tar in `out` or `folder`.

    Raises EdgeStreamError with the last line of the compiler's output if it fails, and with the signal if it crashes.
    """
    made = DEVICES[device]
    library = (out or folder) / f"lib{made.suffix}"
    # the other process must find this very package; not resolved, since converters may be a link
    path = os.pathsep.join(filter(None, [str(Path(__file__).absolute().parents[3]), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path}
    command = _command(folder.resolve(), device, library.resolve())
    done = subprocess.run(
        command, capture_output=True, encoding="utf-8", errors="replace", env=environment, stdin=subprocess.DEVNULL
    )
    if done.returncode < 0:
        try:
            name = signal.Signals(-done.returncode).name
        except ValueError:
            name = f"signal {-done.returncode}"
        raise EdgeStreamError(f"TVM crashed ({name}) while compiling for {device}; convert without --device")
    if done.returncode or not library.exists():
        lines = (done.stderr or done.stdout).strip().splitlines() or ["it gave no reason"]
        raise EdgeStreamError(f"TVM cannot compile this model for {device}: {lines[-1].strip()}")
    say(f"compiled {library.name} for {device}" + ("" if made.ran else ": compiled, not run"))
    return library


def _command(folder: Path, device: str, library: Path) -> list[str]:
    return [sys.executable, "-m", "edge_stream.converters.mlc.compile", str(folder), device, str(library)]


def build(folder: Path, device: str, library: Path) -> None:
    """Do it, in this process."""
    import tvm
    from tvm import relax
    from tvm.target import Target

    from edge_stream.converters.mlc.model import Decoder, DecoderConfig
    from edge_stream.converters.mlc.quantization import find_quantization

    config = json.loads((folder / "mlc-chat-config.json").read_text(encoding="utf-8"))
    q = find_quantization(config["quantization"])
    made = DEVICES[device]
    host = {"kind": "llvm"} | ({"mtriple": made.host} if made.host else {"mcpu": _host_cpu()})
    target = Target(made.target | host if made.target["kind"] == "llvm" else made.target | {"host": host})
    rename = families()[config["model_type"]].mlc.rename
    decoder = Decoder(DecoderConfig.read(config), q, target)
    with target:
        module, parameters, _ = decoder.export_tvm(spec=decoder.spec(), allow_extern=True)
    parameters = [(rename(name), parameter) for name, parameter in parameters]
    module = _with_metadata(module, parameters, config)
    system_lib = device == "iphone"
    if system_lib:
        module = module.with_attr("system_lib_prefix", system_lib_prefix(config["model_type"], q.name))
    if made.target["kind"] != "llvm":
        for name in SCHEDULES_OFF:
            getattr(tvm.s_tir.dlight.gpu.matmul, name).apply = lambda *_args, **_kwargs: None
    with target:
        built = relax.build(module, target=target, system_lib=system_lib)
    built.export_library(str(library))


def _host_cpu() -> str:
    import tvm

    return str(tvm.get_global_func("target.llvm_get_system_cpu")())


def _with_metadata(module: Any, parameters: Any, config: dict[str, Any]) -> Any:
    """Add `_metadata`, which returns the JSON that MLC's runtime reads first (mlc-llm, cpp/metadata/model.cc)."""
    import tvm
    from tvm import relax

    m = config["model_config"]
    text = json.dumps(
        {
            "model_type": config["model_type"],
            "quantization": config["quantization"],
            "context_window_size": config["context_window_size"],
            "sliding_window_size": config["sliding_window_size"],
            "attention_sink_size": config["attention_sink_size"],
            "prefill_chunk_size": config["prefill_chunk_size"],
            "tensor_parallel_shards": 1,
            "pipeline_parallel_stages": 1,
            "disaggregation": False,
            "kv_state_kind": "kv_cache",
            "model_task": "chat",
            "max_batch_size": m["max_batch_size"],
            "kv_cache": {
                "num_hidden_layers": m["num_hidden_layers"],
                "num_attention_heads": m["num_attention_heads"],
                "num_key_value_heads": m["num_key_value_heads"],
                "head_dim": m["head_dim"],
            },
            "params": [
                {
                    "name": name,
                    "shape": [int(n) for n in parameter.shape],
                    "dtype": str(parameter.dtype),
                    "preprocs": [],
                    "pipeline_stages": [0],
                }
                for name, parameter in parameters
            ],
            "memory_usage": {},
        }
    )
    builder = relax.BlockBuilder(module)
    with builder.function("_metadata", params=[]):
        builder.emit_func_output(tvm.ir.StringImm(text))
    return builder.finalize()


if __name__ == "__main__":
    build(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
