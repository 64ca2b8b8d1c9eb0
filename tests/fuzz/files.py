"""Model files that may be anything, through what reads them in Python: each is read, or refused in one sentence."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import mutate
import tiny_checkpoints as tiny
from mlc_models import write_mlc
from tiny_models import write_tiny_llama

from edge_stream.converters import to_gguf
from edge_stream.converters.mlc.tensor_cache import TensorCacheReader
from edge_stream.errors import LONGEST, EdgeStreamError
from edge_stream.mlc.folder import MlcFolder
from edge_stream.models.conversion import open_source

Attempt = Callable[[random.Random], str]


def refused_well(error: EdgeStreamError) -> str:
    """The message of an error, which must be a line that a person can read."""
    text = str(error)
    assert text and text.isprintable() and "Traceback" not in text and len(text) <= LONGEST, repr(text[:2000])
    return "refused"


def convert(src: Path, out: Path) -> str:
    """Convert to GGUF and remove the result; nothing else may be left."""
    try:
        source = open_source(str(src))
        try:
            to_gguf.convert(source, out / "m.gguf", to_gguf.GgufOptions(), lambda _line: None)
        finally:
            source.close()
    except EdgeStreamError as error:
        said = refused_well(error)
    else:
        (out / "m.gguf").unlink()
        said = "read"
    assert not list(out.iterdir()), f"something is left behind: {said}"
    return said


@contextmanager
def checkpoints(root: Path) -> Iterator[Attempt]:
    """Hugging Face folders: config.json, tokenizers, safetensors and their index."""
    out = root / "out"
    out.mkdir()
    folders: list[tuple[Path, list[str], dict[str, bytes]]] = []
    for i, (name, options) in enumerate(
        (("llama-linear", {}), ("llama3", {}), ("llama-linear", {"shards": 3}), ("gemma3", {}), ("phi3", {}))
    ):
        folder = tiny.write_tiny(root / f"model{i}", name, **options)
        good = {p.name: p.read_bytes() for p in folder.iterdir()}
        folders.append((folder, sorted(good), good))

    def attempt(rng: random.Random) -> str:
        folder, names, good = rng.choice(folders)
        mutate.change_folder(rng, folder, names, good)
        return convert(folder, out)

    yield attempt


@contextmanager
def gguf_sources(root: Path) -> Iterator[Attempt]:
    """GGUF files as the converters read them, in Python."""
    out = root / "out"
    out.mkdir()
    good = write_tiny_llama(root / "good.gguf", n_layer=1, head_dim=16, chat_template="{{ messages }}").read_bytes()
    import gguf

    header = int(gguf.GGUFReader(root / "good.gguf").data_offset)
    bad = root / "bad.gguf"

    def attempt(rng: random.Random) -> str:
        # mostly the few hundred bytes in front of the vocabulary and behind it
        part = rng.choice((slice(0, 900), slice(header - 1200, header), slice(0, header)))
        start, stop, _ = part.indices(len(good))
        changed = mutate.change_bytes(rng, good[start:stop])
        if rng.random() < 0.7:  # of the same length, so that what follows stays in its place
            changed = changed[: stop - start].ljust(stop - start, b"\x01")
        bad.write_bytes(good[:start] + changed + good[stop:])
        return convert(bad, out)

    yield attempt


@contextmanager
def mlc_folders(root: Path) -> Iterator[Attempt]:
    """MLC folders: what is known before the weights are loaded, and the weights' index."""
    source = write_tiny_llama(root / "good.gguf", n_layer=1, head_dim=16)
    folder = write_mlc(source, root / "mlc", "q4f16_1")
    good = {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix != ".so"}
    names = sorted(good)

    def attempt(rng: random.Random) -> str:
        mutate.change_folder(rng, folder, names, good)
        try:
            opened = MlcFolder(folder)
            _ = opened.n_ctx_train, opened.tag(), opened.quantization
            opened.expected_tensors()
            opened.write_vocab(root / "vocab.gguf")
            reader = TensorCacheReader(folder)
            reader.verify()
            for name in reader.records:
                reader.read(name)
        except EdgeStreamError as error:
            return refused_well(error)
        return "read"

    yield attempt
