"""What each model has shown of itself (es_stream_prove), kept on disk so that it is shown once per weights."""

from __future__ import annotations

import ctypes as C
import datetime
import json
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_stream.models import names
from edge_stream.native import bindings, libraries

if TYPE_CHECKING:
    from edge_stream.backends import Backend
    from edge_stream.stream import Stream


@dataclass(frozen=True)
class Proof:
    """Differences of logits (root mean square), see es_proof in edge_stream.h; distance 0: nothing had to be moved."""

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
        """The largest of the three differences that must be noise."""
        return max(self.positions, self.move, self.rebase)


def prove(stream: Stream) -> Proof:
    """The kept proof that reaches as far as the stream's positions, or a new one.

    Raises UnsupportedModelError if the model does not stream exactly. A proof that cannot be kept is made each time.
    """
    native = bindings.library()
    backend = stream.backend
    key = _key(backend)
    path = names.cache_folder() / "proofs" / f"{backend.facts.weights_tag:016x}-{backend.sink_move}.json"
    wanted = native.es_stream_proof_distance(stream.handle)
    kept = _read(path, key)
    if kept is not None and kept.distance >= wanted:
        return kept
    raw = bindings.Proof()
    stream.call(native.es_stream_prove, stream.handle, C.byref(raw))
    values: dict[str, Any] = {name: getattr(raw, name) for name, *_ in raw._fields_}
    proof = Proof(**values, date=datetime.datetime.now().astimezone().isoformat(timespec="seconds"))
    if proof.distance:
        _write(path, key, proof)
    return proof


def _key(backend: Backend) -> list[Any]:
    """What else a proof depends on: the libraries, and where the layers are."""
    folder = libraries.llama_dir()
    files = sorted(f for f in folder.iterdir() if f.is_file() and "lib" in f.name)
    return [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files] + [d.name for d in backend.devices]


def _read(path: Path, key: list[Any]) -> Proof | None:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return Proof(**data["proof"]) if data["key"] == key else None
    except (OSError, ValueError, TypeError, KeyError):
        return None  # none, or not ours: it is made again


def _write(path: Path, key: list[Any], proof: Proof) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump({"key": key, "proof": asdict(proof)}, file)
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError:
        pass  # a read-only home: the next load proves it again
