"""Export a model for the iOS app: a folder with a GGUF file and a manifest of settings for a phone."""

from __future__ import annotations

import ctypes as C
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_stream._version import __version__
from edge_stream.errors import EdgeStreamError
from edge_stream.models.defaults import read_model_defaults
from edge_stream.native import app_bindings, bindings
from edge_stream.output.staging import check_space, publish_folder, staging_folder

FORMAT = 1  # of the manifest; ModelManifest.swift reads it
RESERVE = 256 << 20  # bytes for the app itself, as in MemoryBudget.swift
MIN_N_CTX = 1024
MAX_N_CTX = 8192  # a larger window costs time per token and, past the trained length, quality


@dataclass(frozen=True)
class ExportRequest:
    """The user's settings; None: chosen here."""

    n_ctx: int | None = None
    n_keep: int | None = None
    cache_type_k: str | None = None
    cache_type_v: str | None = None
    chat_template: str | None = None


@dataclass(frozen=True)
class Choice:
    """Cache settings and the memory they take, in bytes (es_app_memory, for this machine's backend).

    note: a sentence about the chat template, or "".
    """

    n_ctx: int
    n_keep: int
    cache_type_k: str
    cache_type_v: str
    memory: dict[str, int]
    note: str = ""

    @property
    def peak(self) -> int:
        """Bytes while a session is saved, which takes a second copy of the cache, including the app itself."""
        return self.memory["total"] + self.memory["cache"] + RESERVE


def choose(path: Path, request: ExportRequest, limit: int) -> Choice:
    """The largest cache that fits into `limit` bytes: f16 before q8_0, q8_0 before half the window.

    Raises EdgeStreamError if none fits, or if the model cannot stream or chat.
    """
    info, note = _inspect(path, request.chat_template)
    n_keep = info["n_keep"] if request.n_keep is None else request.n_keep
    smallest: Choice | None = None
    for n_ctx, type_k, type_v in _candidates(info, request):
        memory = _memory(path, n_ctx, n_keep, type_k, type_v, request.chat_template)
        choice = Choice(n_ctx, n_keep, type_k, type_v, memory, note)
        if choice.peak <= limit:
            return choice
        smallest = choice if smallest is None or choice.peak < smallest.peak else smallest
    assert smallest is not None
    raise EdgeStreamError(
        f"{path.name} does not fit: with n_ctx = {smallest.n_ctx} and a {smallest.cache_type_k} cache it takes "
        f"{smallest.peak / 2**20:,.0f} MiB, an app may take {limit / 2**20:,.0f} MiB there"
    )


def _candidates(info: dict[str, int], request: ExportRequest) -> Iterator[tuple[int, str, str]]:
    """Settings in order of preference."""
    n_ctx = request.n_ctx or info["n_ctx"] or max(MIN_N_CTX, min(info["n_ctx_train"], MAX_N_CTX))
    while True:
        for default in ("f16", "q8_0"):
            yield n_ctx, request.cache_type_k or default, request.cache_type_v or default
        n_ctx //= 2
        if request.n_ctx or n_ctx < MIN_N_CTX:
            return


def _inspect(path: Path, chat_template: str | None) -> tuple[dict[str, int], str]:
    """The model's training length and its defaults (n_ctx: 0 if it has none), and a sentence about its template."""
    lib, model, info = app_bindings.library(), C.c_void_p(), app_bindings.ModelInfo()
    bindings.check(lib.es_app_model_load(os.fsencode(path), lib.es_app_model_default_params(), C.byref(model)))
    try:
        reason = C.create_string_buffer(512)
        can = lib.es_app_model_can_chat(model, chat_template and chat_template.encode(), reason, len(reason))
        note = reason.value.decode(errors="replace")
        if not can:
            hint = "" if chat_template else "; --chat-template gives another"
            raise EdgeStreamError(f"the app cannot chat with {path.name}: {note}{hint}")
        bindings.check(lib.es_app_model_get_info(model, C.byref(info)))
    finally:
        lib.es_app_model_free(model)
    asked = read_model_defaults(path).get("n_ctx", 0)  # info.n_ctx would be the facade's default
    return {"n_ctx_train": info.n_ctx_train, "n_ctx": asked, "n_keep": info.n_keep}, note


def _memory(path: Path, n_ctx: int, n_keep: int, type_k: str, type_v: str, template: str | None) -> dict[str, int]:
    lib, need = app_bindings.library(), app_bindings.Memory()
    params = lib.es_app_session_default_params()
    params.n_ctx, params.n_keep = n_ctx, n_keep
    params.cache_type_k, params.cache_type_v = type_k.encode(), type_v.encode()
    params.chat_template = template and template.encode()
    bindings.check(lib.es_app_memory_need(os.fsencode(path), lib.es_app_model_default_params(), params, C.byref(need)))
    return {name: getattr(need, name) for name in ("weights", "cache", "sinks", "compute", "total")}


def export(
    path: Path,
    out: Path,
    choice: Choice,
    *,
    name: str,
    device: str,
    chat_template: str | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write OUT/model.gguf and OUT/manifest.json, both or neither; returns the manifest.

    on_progress(done, total): bytes. Raises EdgeStreamError if OUT exists or cannot be written.
    """
    if out.exists():
        raise EdgeStreamError(f"{out} exists already")
    n_bytes = path.stat().st_size
    check_space(out, n_bytes)
    with staging_folder(out) as staged:
        folder = staged / out.name
        folder.mkdir()
        digest = _copy(path, folder / "model.gguf", on_progress)
        manifest = {
            "format": FORMAT,
            "name": name,
            "file": "model.gguf",
            "bytes": n_bytes,
            "sha256": digest,
            "n_ctx": choice.n_ctx,
            "n_keep": choice.n_keep,
            "cache_type_k": choice.cache_type_k,
            "cache_type_v": choice.cache_type_v,
            "chat_template": chat_template,
            "device": device,
            "memory": choice.memory,
            "written_by": f"edge-stream {__version__}",
        }
        with (folder / "manifest.json").open("w", encoding="utf-8") as file:
            file.write(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
        publish_folder(folder, out, overwrite=False)
    return manifest


def _copy(source: Path, target: Path, on_progress: Callable[[int, int], None] | None) -> str:
    """Copy a file and return its SHA-256."""
    total, done, digest = source.stat().st_size, 0, hashlib.sha256()
    with source.open("rb") as reading, target.open("wb") as writing:
        while piece := reading.read(4 << 20):
            digest.update(piece)
            writing.write(piece)
            done += len(piece)
            if on_progress:
                on_progress(done, total)
    return digest.hexdigest()
