"""Proofs that models stream exactly (es_stream_prove), cached on disk so that each model is proven once."""

from __future__ import annotations

import ctypes as C
import datetime
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_stream.errors import EdgeStreamError
from edge_stream.models import names
from edge_stream.native import bindings, libraries
from edge_stream.output.files import replace_text

if TYPE_CHECKING:
    from edge_stream.backends import Backend
    from edge_stream.stream import Stream


@dataclass(frozen=True)
class Proof:
    """Root-mean-square differences of logits, see es_proof in edge_stream.h. distance 0: nothing needed to move."""

    distance: int
    positions: float
    move: float
    rebase: float
    noise: float
    spread: float
    bound: float
    parallel: bool
    date: str  # ISO 8601

    @property
    def error(self) -> float:
        """The largest of the three differences that must be no more than noise."""
        return max(self.positions, self.move, self.rebase)


def prove(stream: Stream) -> Proof:
    """The cached proof, if it reaches as far as the stream's positions, else a new one.

    Raises UnsupportedModelError if the model does not stream exactly. A proof that cannot be cached is made each time.
    """
    native = bindings.library()
    backend = stream.backend
    key = _key(backend)
    path = names.cache_folder() / "proofs" / f"{backend.facts.weights_tag:016x}-{backend.sink_move}.json"
    wanted = native.es_stream_proof_distance(stream.handle)
    cached = _read(path, key)
    if cached is not None and cached.distance >= wanted:
        return cached
    raw = bindings.Proof()
    stream.call(native.es_stream_prove, stream.handle, C.byref(raw))
    values: dict[str, Any] = {name: getattr(raw, name) for name, *_ in raw._fields_}
    proof = Proof(**values, date=datetime.datetime.now().astimezone().isoformat(timespec="seconds"))
    if proof.distance:
        _write(path, key, proof)
    return proof


def _key(backend: Backend) -> list[Any]:
    """What a proof depends on besides the weights: the libraries, and the devices that hold layers."""
    folder = libraries.llama_dir()
    files = sorted(f for f in folder.iterdir() if f.is_file() and "lib" in f.name)
    return [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files] + [d.name for d in backend.devices]


def _read(path: Path, key: list[Any]) -> Proof | None:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return Proof(**data["proof"]) if data["key"] == key else None
    except (OSError, ValueError, TypeError, KeyError):
        return None  # missing or not ours: prove again


def _write(path: Path, key: list[Any], proof: Proof) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps({"key": key, "proof": asdict(proof)}))
    except (OSError, EdgeStreamError):
        pass  # a read-only home: the next load proves again
