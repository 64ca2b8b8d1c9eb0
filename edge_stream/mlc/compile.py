"""The decoder's library for this machine: built once and cached on disk under a hash of everything it depends on.

Folder: $EDGE_STREAM_CACHE, else $XDG_CACHE_HOME/edge-stream, else ~/.cache/edge-stream; in it `mlc/<hash>.so` with its
SHA-256 beside it. A truncated library would crash the process that loads it, so it is rebuilt.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_stream.converters import mlc as converters
from edge_stream.errors import EdgeStreamError
from edge_stream.hardware.processor import cpu_flags, cpu_name
from edge_stream.mlc.kernels import Lanes
from edge_stream.models import names
from edge_stream.output.files import replace_text

if TYPE_CHECKING:
    from edge_stream.converters.mlc.decoder_config import DecoderConfig
    from edge_stream.converters.mlc.quantization import Quantization

# only these two versions fit each other: others fail at import, or later
VERSIONS = {"apache-tvm": "0.27.0.post1", "apache-tvm-ffi": "0.1.15.post2"}


def require_tvm() -> None:
    """Raise EdgeStreamError unless TVM is installed, in the version that this code needs."""
    if importlib.util.find_spec("tvm") is None:
        raise EdgeStreamError("MLC models run on Apache TVM, which is not installed: pip install 'edge-stream[mlc]'")
    if importlib.util.find_spec("gguf") is None:
        raise EdgeStreamError("MLC models need the gguf package: pip install 'edge-stream[mlc]'")
    for package, version in VERSIONS.items():
        try:
            found = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found = "none"
        if found != version:
            raise EdgeStreamError(
                f"MLC models need {package} {version}, this is {found}: pip install 'edge-stream[mlc]'"
            )


def _processor() -> tuple[dict[str, str], Lanes]:
    """TVM's target for this machine's processor, and its vector width.

    Only TVM's compiler can tell, which takes a second to load: the answer is kept for this kind of processor.
    """
    path = names.cache_folder() / "mlc" / f"processor-{_key(cpu_name(), cpu_flags())}.json"
    try:
        target, vector, dot = json.loads(path.read_text(encoding="utf-8"))
        return {"kind": target["kind"], "mcpu": target["mcpu"]}, Lanes(int(vector), str(dot))
    except (OSError, ValueError, TypeError, KeyError):
        target = host_target()
        lanes = target_lanes(target)
    with suppress(OSError, EdgeStreamError):  # a folder that cannot be written: asked again next time
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps([target, lanes.vector, lanes.dot]))
    return target, lanes


def host_target() -> dict[str, str]:
    """TVM's target for this machine's processor."""
    import tvm

    return {"kind": "llvm", "mcpu": str(tvm.get_global_func("target.llvm_get_system_cpu")())}


# the first that a processor has; intrinsics of LLVM
_X86 = {
    "avx512vnni": Lanes(16, "llvm.x86.avx512.vpdpwssd.512"),
    "avx512bw": Lanes(16, "llvm.x86.avx512.pmaddw.d.512"),
    "avx512f": Lanes(16),
    "avxvnni": Lanes(8, "llvm.x86.avx512.vpdpwssd.256"),
    "avx2": Lanes(8, "llvm.x86.avx2.pmadd.wd"),
}


def target_lanes(target: dict[str, str]) -> Lanes:
    """A target's vectors: of 512 bits with AVX-512, 256 on other x86, 128 elsewhere (NEON)."""
    import tvm

    features = tvm.get_global_func("target.llvm_get_cpu_features")(tvm.target.Target(target))
    names = {str(name) for name in features}
    if platform.machine().lower() in ("x86_64", "amd64"):
        return next((lanes for name, lanes in _X86.items() if name in names), Lanes(8))
    return Lanes(4)


def library(
    config: DecoderConfig, q: Quantization, dtype: tuple[str, str], say: Callable[[str], None]
) -> tuple[Path, Lanes]:
    """The library for a model shape on this machine, built if it is not cached. Raises EdgeStreamError."""
    target, lanes = _processor()
    if os.environ.get("EDGE_STREAM_PRODUCTS") == "stock":
        lanes = dataclasses.replace(lanes, dot="")
    shape = dataclasses.asdict(config) | {"rope_kinds": config.rope_kinds}
    for name in ("prefill_chunk", "rope_base", "rope_base_swa", "rope_scaling", "temperature", "attn_scale"):
        del shape[name]  # not compiled in
    path = names.cache_folder() / "mlc" / f"{_key(shape, q.bits, dtype, dataclasses.asdict(lanes), target)}.so"
    if not _is_intact(path):
        say("compiling the model's kernels for this processor (once)")
        _build(config, q, dtype, lanes, target, path)
    return path, lanes


def _is_intact(path: Path) -> bool:
    try:
        return path.with_suffix(".sha256").read_text(encoding="ascii") == _sha256(path)
    except (OSError, ValueError):
        return False


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _key(*parts: Any) -> str:
    digest = hashlib.sha256(json.dumps([*parts, VERSIONS], sort_keys=True, default=str).encode())
    here = Path(__file__).parent
    for source in (
        *sorted(here.glob("kernels/*.py")),
        here / "model.py",
        Path(converters.__file__).parent / "model.py",
    ):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:32]


def _build(
    config: DecoderConfig, q: Quantization, dtype: tuple[str, str], lanes: Lanes, target: dict[str, str], path: Path
) -> None:
    from tvm import relax
    from tvm.target import Target

    from edge_stream.mlc.model import StepDecoder

    if not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        raise EdgeStreamError(
            "compiling an MLC model's kernels needs a C++ compiler (g++, clang++ or c++) to link them"
        )
    decoder = StepDecoder(config, q, dtype, lanes, Target(target))
    with Target(target):
        module, _, _ = decoder.export_tvm(spec=decoder.spec(), allow_extern=True)
        built = relax.build(module, target=Target(target))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".building-") as folder:
            made = Path(folder) / "lib.so"
            built.export_library(str(made))
            digest = made.with_suffix(".sha256")
            digest.write_text(_sha256(made), encoding="ascii")
            for file in (made, digest):
                with file.open("rb+") as opened:
                    os.fsync(opened.fileno())
            for file in (made, digest):
                os.replace(file, path.with_suffix(file.suffix))
    except OSError as error:
        raise EdgeStreamError(f"the compiled kernels cannot be kept in {path.parent}: {error.strerror}") from error
