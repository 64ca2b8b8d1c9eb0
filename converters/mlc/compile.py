"""Compile a converted model to an MLC model library: tvm.relax.build in a separate process.

That process may crash (TVM's matmul schedule for Metal does, see SCHEDULES_OFF); the caller gets an error of one
sentence. The library is for MLC's runtime: its functions take parameters in the order of `_metadata()`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_stream.converters.mlc.decoder_config import DecoderConfig
from edge_stream.errors import EdgeStreamError
from edge_stream.families import families

# tvm 0.27: these classes of tvm.s_tir.dlight.gpu.matmul crash the process in tensorize; the generic schedule takes over
SCHEDULES_OFF = ("MetalMatmul", "MatmulTensorization", "MatmulInt8Tensorization")


@dataclass(frozen=True)
class Device:
    """A build target. host: its target triple, None for this machine."""

    target: dict[str, Any]
    host: str | None
    suffix: str  # of the library: .so is linked here, .tar holds object files for the app's own linker
    ran: bool = False  # the library can run on the machine that builds it


_METAL = {"kind": "metal", "max_threads_per_block": 256, "max_shared_memory_per_block": 32768, "thread_warp_size": 1}
DEVICES = {
    "cpu": Device({"kind": "llvm"}, None, ".so", ran=True),
    "macos": Device({"kind": "llvm"}, "arm64-apple-macos", ".tar"),
    "metal": Device(_METAL, "arm64-apple-macos", ".tar"),
    "iphone": Device(_METAL | {"libs": ["iphoneos"]}, "arm64-apple-darwin", ".tar"),
    "cuda": Device({"kind": "cuda", "arch": "sm_80"}, "x86_64-unknown-linux-gnu", ".tar"),
    "android": Device({"kind": "opencl"}, "aarch64-linux-android", ".tar"),
}


def check_supported(config: Mapping[str, Any]) -> None:
    """Raise EdgeStreamError if an mlc-chat-config.json's model cannot be compiled here, or TVM is not installed."""
    lacking = unsupported_reason(config)
    if lacking:
        raise EdgeStreamError(f"--device cannot compile this model: {lacking}; use --device none")
    require_tvm()


def unsupported_reason(config: Mapping[str, Any]) -> str | None:
    """Why TVM's sliding cache (tvm.relax.frontend.nn.llm.kv_cache) cannot compute the model; None if it can."""
    c, m, kind = DecoderConfig.read(config), config["model_config"], config["model_type"]
    n_ctx, scaling = config["sliding_window_size"], c.rope_scaling
    if m.get("attn_logit_softcapping"):
        return f"TVM's attention has no soft cap on scores, which {kind} has"
    if m.get("final_logit_softcapping"):
        return f"the decoder has no soft cap on logits, which {kind} has"
    if {"sliding", "none"} <= set(c.rope_kinds):
        return f"the library knows two kinds of layers, {kind} has three"
    if scaling is not None and scaling.kind not in ("linear", "llama3", "yarn"):
        return f"TVM's sliding cache has no {scaling.kind} factors"
    if m.get("partial_rotary_factor", 1.0) != 1.0:
        return "TVM's sliding cache rotates whole heads, this model parts of them"
    # it evicts after attention, so that a whole chunk more is in view
    if c.temperature and scaling is not None and n_ctx + c.prefill_chunk > scaling.n_ctx_orig:
        largest = scaling.n_ctx_orig * 4 // 5
        return f"TVM's cache has no attention temperature, which {kind} needs above -c {largest}"
    return None


def require_tvm() -> None:
    """Raise EdgeStreamError if TVM is not installed."""
    if importlib.util.find_spec("tvm") is None:
        raise EdgeStreamError("compiling and running MLC models needs Apache TVM: pip install 'edge-stream[mlc]'")


def system_lib_prefix(model_type: str, quantization: str) -> str:
    """Prefix of the library's symbols, `<model type>_<quantization>_` as in mlc_llm compile."""
    return re.sub(r"\W", "_", f"{model_type}_{quantization}_", flags=re.ASCII)


def compile_library(folder: Path, device: str, say: Callable[[str], None], out: Path | None = None) -> Path:
    """Compile the model in `folder` for `device`, to lib.so or lib.tar in `out`, or else in `folder`.

    Raises EdgeStreamError with the last line of the compiler's output if it fails, and with the signal if it crashes.
    """
    check_supported(json.loads((folder / "mlc-chat-config.json").read_text(encoding="utf-8")))
    spec = DEVICES[device]
    library = (out or folder) / f"lib{spec.suffix}"
    # the subprocess must import this same package; not resolved, since converters may be a link
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
    say(f"compiled {library.name} for {device}" + ("" if spec.ran else ": compiled, not run"))
    return library


def _command(folder: Path, device: str, library: Path) -> list[str]:
    return [sys.executable, "-m", "edge_stream.converters.mlc.compile", str(folder), device, str(library)]


def build(folder: Path, device: str, library: Path) -> None:
    """Compile in this process."""
    import tvm
    from tvm import relax
    from tvm.target import Target

    from edge_stream.converters.mlc import layer_kinds
    from edge_stream.converters.mlc.model import Decoder
    from edge_stream.converters.mlc.quantization import find_quantization
    from edge_stream.converters.mlc.rope import correct_yarn

    correct_yarn()
    config = json.loads((folder / "mlc-chat-config.json").read_text(encoding="utf-8"))
    q = find_quantization(config["quantization"])
    spec = DEVICES[device]
    host = {"kind": "llvm"} | ({"mtriple": spec.host} if spec.host else {"mcpu": _host_cpu()})
    target = Target(spec.target | host if spec.target["kind"] == "llvm" else spec.target | {"host": host})
    rename = families()[config["model_type"]].mlc.rename
    shape = DecoderConfig.read(config)
    decoder = Decoder(shape, q, target)
    with target, layer_kinds.masks(shape):
        module, parameters, _ = decoder.export_tvm(spec=decoder.spec(), allow_extern=True)
    module = layer_kinds.specialise(module, shape)
    parameters = [(rename(name), parameter) for name, parameter in parameters]
    module = _with_metadata(module, parameters, config)
    system_lib = device == "iphone"
    if system_lib:
        module = module.with_attr("system_lib_prefix", system_lib_prefix(config["model_type"], q.name))
    if spec.target["kind"] != "llvm":
        for name in SCHEDULES_OFF:
            getattr(tvm.s_tir.dlight.gpu.matmul, name).apply = lambda *_args, **_kwargs: None
        module = _schedule_rank(module, target)
    with target:
        built = relax.build(module, target=target, system_lib=system_lib)
    built.export_library(str(library))


def _schedule_rank(module: Any, target: Any) -> Any:
    """Bind the ranking of experts to threads here: TVM 0.27's rule for sums fails if a buffer is read at two places."""
    from tvm.s_tir.dlight.gpu import Fallback

    for name, function in module.functions_items():
        if name.name_hint.startswith("rank"):
            scheduled = Fallback().apply(function, target, False).mod["main"]
            opaque = scheduled.with_attr("tirx.is_scheduled", True).with_attr("op_pattern", 8)  # not fused any more
            module.update_func(name, opaque)
    return module


def _host_cpu() -> str:
    import tvm

    return str(tvm.get_global_func("target.llvm_get_system_cpu")())


def _with_metadata(module: Any, parameters: Any, config: dict[str, Any]) -> Any:
    """Add `_metadata`, which returns the JSON that MLC's runtime reads first (mlc-llm, cpp/metadata/model.cc)."""
    import tvm
    from tvm import relax

    m = config["model_config"] | config["model_config"].get("text_config", {})
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
