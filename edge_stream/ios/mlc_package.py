"""Package an MLC folder for MLC's own app: the model, its iPhone library, and mlc-package-config.json."""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_stream.errors import EdgeStreamError
from edge_stream.ios.export import RESERVE
from edge_stream.output.staging import check_space, publish_folder, staging_folder

if TYPE_CHECKING:
    from edge_stream.mlc.folder import MlcFolder

CONFIG = "mlc-package-config.json"  # mlc-llm, python/mlc_llm/interface/package.py
LIBRARY = "lib.tar"


def memory_plan(folder: MlcFolder) -> dict[str, int]:
    """Bytes on the phone: weights; the cache and one chunk, which TVM evicts after; scratch: a chunk's activations and
    the largest matrix, which our libraries dequantise whole; the app itself."""
    c = folder.decoder_config
    f16 = folder.quantization.dtype == "float16"
    size, chunk = 2 if f16 else 4, c.prefill_chunk
    n_ctx = int(folder.config["sliding_window_size"])
    row = 2 * c.n_layer * c.n_head_kv * c.head_dim
    n_ff = c.n_expert_used * c.n_ff_expert if c.n_expert else c.n_ff  # experts are not dequantised whole
    widest = max(c.n_vocab * c.n_embd, 0 if c.n_expert else 2 * n_ff * c.n_embd, c.n_head * c.head_dim * c.n_embd)
    heads = (c.n_head + 2 * c.n_head_kv) * c.head_dim
    return {
        "weights": sum(path.stat().st_size for path in folder.path.glob("params_shard_*.bin")),
        "cache": (n_ctx + chunk) * row * size,
        "scratch": (chunk * (3 * n_ff + 4 * c.n_embd + heads) + (widest if folder.quantization.bits else 0)) * size,
        "app": RESERVE,
    }


def package(
    folder: MlcFolder, out: Path, name: str, limit: int, say: Callable[[str], None]
) -> tuple[dict[str, Any], dict[str, int]]:
    """Write the folder `out`; returns the configuration and the memory plan. Its library is compiled if it has none.

    Raises EdgeStreamError in one sentence if it exists, does not fit, or cannot be written or compiled.
    """
    from edge_stream.converters.mlc.compile import compile_library, require_tvm, system_lib_prefix

    plan = memory_plan(folder)
    if sum(plan.values()) > limit:
        raise EdgeStreamError(
            f"{folder.path.name} does not fit: it takes {sum(plan.values()) / 2**20:,.0f} MiB, an app may take "
            f"{limit / 2**20:,.0f} MiB there; convert it with a smaller -c"
        )
    if out.exists():
        raise EdgeStreamError(f"{out} exists already")
    check_space(out, sum(path.stat().st_size for path in folder.path.iterdir()) + (32 << 20))
    prefix = system_lib_prefix(folder.config["model_type"], folder.config["quantization"])
    with staging_folder(out) as staged:
        target = staged / out.name
        shutil.copytree(folder.path, target / "model", ignore=shutil.ignore_patterns("lib.*"))
        if is_for_iphone(folder.path / LIBRARY, prefix):
            shutil.copy(folder.path / LIBRARY, target / LIBRARY)
        else:
            require_tvm()
            compile_library(target / "model", "iphone", say, out=target)
        library = prefix.removesuffix("_")
        config = {
            "device": "iphone",
            "model_list": [
                {
                    "model": "model",
                    "model_id": name,
                    "model_lib": library,
                    "bundle_weight": True,  # asked for where the model is a local folder
                    "estimated_vram_bytes": sum(plan.values()) - plan["app"],
                }
            ],
            "model_lib_path_for_prepare_libs": {library: LIBRARY},
        }
        (target / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        publish_folder(target, out, overwrite=False)
    return config, plan


def is_for_iphone(library: Path, prefix: str) -> bool:
    """Whether a lib.tar is a system library with these symbols, as --device iphone makes it."""
    try:
        with tarfile.open(library) as archive:
            return f"{prefix}devc.o" in archive.getnames()
    except (OSError, tarfile.TarError):
        return False
