"""Convert to GGUF: plan, write, and have libllama quantise."""

from __future__ import annotations

import glob
import re
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
from numpy.typing import NDArray

from edge_stream.converters import gguf_metadata, gguf_tensors, quantize
from edge_stream.converters.imatrix import read_imatrix
from edge_stream.converters.progress import Progress, counter, silent
from edge_stream.converters.streaming_defaults import StreamingDefaults, recommend
from edge_stream.errors import EdgeStreamError
from edge_stream.hardware.memory import check_obtainable
from edge_stream.output.files import target_of
from edge_stream.output.staging import check_absent, check_space, publish, staging_folder

if TYPE_CHECKING:
    from edge_stream.converters.source import Source

Say = Callable[[str], None]
_METADATA_BYTES = 32 << 20  # generous estimate of the vocabulary, for the disk space check


@dataclass(frozen=True)
class GgufOptions:
    """The user's options. quantize: None or a name of quantize.file_types(). split_max_size: bytes, 0 for one file."""

    outtype: str = "auto"
    quantize: str | None = None
    imatrix: Path | None = None
    split_max_size: int = 0
    n_keep: int | None = None
    n_ctx: int | None = None
    n_threads: int = 0
    model_name: str | None = None
    overwrite: bool = False
    dry_run: bool = False
    verbose: bool = False


@dataclass(frozen=True)
class GgufPlan:
    """What will be written. Sizes in bytes."""

    outtype: str
    tensors: list[gguf_tensors.PlannedTensor]
    defaults: StreamingDefaults
    size: int  # of the file, or of the intermediate one that is quantised
    disk: int
    memory: int  # this process's peak, beyond Python and libllama themselves


def make_plan(source: Source, options: GgufOptions) -> GgufPlan:
    """Plan a conversion without writing. Raises EdgeStreamError for what cannot be converted."""
    gguf_metadata.check_supported(source.model)
    if options.outtype not in gguf_tensors.OUTTYPES:
        raise EdgeStreamError(f"outtype {options.outtype} is unknown: use one of {', '.join(gguf_tensors.OUTTYPES)}")
    if options.quantize is not None:
        quantize.file_type(options.quantize)
        if options.outtype == "q8_0":
            raise EdgeStreamError("--outtype q8_0 and --quantize exclude each other: quantising twice loses accuracy")
    elif options.imatrix is not None:
        raise EdgeStreamError("--imatrix works with --quantize only")
    outtype = gguf_tensors.choose_outtype(source, options.outtype, exact=options.quantize is not None)
    tensors = gguf_tensors.plan_tensors(source, outtype)
    size = sum(t.nbytes for t in tensors) + _METADATA_BYTES
    largest = max(t.n_elements for t in source.tensors.values())
    # converting holds one tensor of the output and a block of it in float32; libllama one in float32 and in both types
    memory = max(t.nbytes for t in tensors) + 6 * 4 * min(largest, gguf_tensors.BLOCK_ELEMENTS)
    if options.quantize:
        memory = max(memory, 2 * min(largest * 4, quantize.MAX_BUFFER))
    disk = size + (size if options.quantize else 0)
    defaults = recommend(source.model, options.n_keep, options.n_ctx)
    return GgufPlan(outtype, tensors, defaults, size, disk, memory)


def convert(source: Source, out: Path, options: GgufOptions, say: Say, progress: Progress = silent) -> list[Path]:
    """Write `out` (several files if it is split) and return what was written; nothing with --dry-run.

    say: called with messages for the user, one line each. progress: called with bytes. On EdgeStreamError nothing is
    left behind.
    """
    plan = make_plan(source, options)
    vocab = source.vocab()
    for line in describe(source, plan, options, out):
        say(line)
    for note in [*gguf_metadata.notes(source.model), *vocab.notes]:
        say(f"note: {note}")
    if options.dry_run:
        return []
    out = target(out, options, getattr(source, "path", None))
    check_space(out, plan.disk)
    check_obtainable(plan.memory)
    with staging_folder(out) as folder:
        if options.quantize is None:
            files = _write(source, plan, folder / out.name, options, progress)
        else:
            inner = folder / "intermediate"
            inner.mkdir()
            unquantised = _write(source, plan, inner / out.name, options, progress)
            say(f"quantising to {options.quantize} (libllama)")
            sizes = {t.name: t.nbytes for t in plan.tensors}
            for warning in _quantise(sizes, unquantised, folder / out.name, options, progress):
                say(f"note: {warning}")
            files = sorted(p for p in folder.iterdir() if p.is_file())
        return publish(files, out.parent, options.overwrite)


def target(out: Path, options: GgufOptions, original: Path | None = None) -> Path:
    """The regular file to write. Raises EdgeStreamError if it may not be replaced. original: the source's file."""
    if out.is_dir() or out.suffix != ".gguf":
        raise EdgeStreamError(f"{out} is not the name of a GGUF file: it must end in .gguf")
    if original is not None and out.exists() and out.samefile(original):
        raise EdgeStreamError(f"{out} is the source: choose another name for the result")
    parts = out.parent.glob(f"{glob.escape(out.stem)}-[0-9]*-of-[0-9]*.gguf") if options.split_max_size else ()
    for path in (out, *parts):
        check_absent(path, options.overwrite)
    return target_of(out)


def describe(source: Source, plan: GgufPlan, options: GgufOptions, out: Path) -> list[str]:
    """The plan in words."""
    n_params = sum(t.n_elements for t in source.tensors.values())
    lines = [
        f"source            {source.name} ({source.model.family.model_type}), {n_params / 1e6:,.1f} M parameters, "
        f"{len(source.tensors)} tensors",
        f"converts to       {out}, {plan.outtype}" + (f", then {options.quantize}" if options.quantize else ""),
        f"streaming         n_keep {plan.defaults.n_keep}, n_ctx {plan.defaults.n_ctx} (defaults of run and chat)",
        f"chat template     {', '.join(source.chat_templates) or 'none'}",
        f"size              {plan.size / 2**20:,.0f} MiB" + (" before quantising" if options.quantize else ""),
        f"needs             {plan.disk / 2**20:,.0f} MiB of disk, about {plan.memory / 2**20:,.0f} MiB of memory",
    ]
    if source.left_out:
        lines.append(f"left out          {len(source.left_out)} tensors, e.g. {source.left_out[0]}")
    odd = [t.name for t in plan.tensors if len(t.shape) > 1 and t.type.name.lower() != plan.outtype]
    if odd:
        lines.append(f"kept as f16       {len(odd)} tensors with rows that are not a multiple of 32, e.g. {odd[0]}")
    if options.verbose:
        lines += [f"  {t.source or '(computed)'} -> {t.name} {list(t.shape)} {t.type.name}" for t in plan.tensors]
    return lines


def _write(source: Source, plan: GgufPlan, path: Path, options: GgufOptions, progress: Progress) -> list[Path]:
    def metadata(writer: gguf.GGUFWriter) -> None:
        gguf_metadata.add_metadata(writer, source, plan.outtype, plan.defaults, options.model_name)

    writer = gguf.GGUFWriter(path, source.model.arch, split_max_size=options.split_max_size)
    write(writer, plan.tensors, lambda tensor: gguf_tensors.encode(source, tensor), metadata, progress)
    return sorted(path.parent.glob("*.gguf"))


def write(
    writer: gguf.GGUFWriter,
    tensors: list[gguf_tensors.PlannedTensor],
    encode: Callable[[gguf_tensors.PlannedTensor], Iterable[NDArray[Any]]],
    add_metadata: Callable[[gguf.GGUFWriter], None],
    progress: Progress,
) -> None:
    """Write unquantised tensors one by one, each in the parts that `encode` makes of it."""
    try:
        for tensor in tensors:
            dtype, shape = _stored_as(tensor)
            writer.add_tensor_info(tensor.name, shape, dtype, tensor.nbytes, raw_dtype=tensor.type)
        try:
            add_metadata(writer)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
        except (TypeError, ValueError, KeyError, IndexError, AttributeError, OverflowError, struct.error) as error:
            # a name or number of a kind that the package does not expect
            raise EdgeStreamError(f"the model's metadata cannot be written as GGUF: {error}") from error
        writer.write_ti_data_to_file()
        advance = counter(progress, "converting", sum(t.nbytes for t in tensors))
        for tensor in tensors:
            data = np.empty(tensor.nbytes, dtype=np.uint8)
            done = 0
            for part in encode(tensor):
                flat = np.ascontiguousarray(part).reshape(-1).view(np.uint8)
                data[done : done + flat.size] = flat
                done += flat.size
            assert done == tensor.nbytes, tensor.name
            writer.write_tensor_data(data)
            del data
            advance(tensor.nbytes)
    finally:
        writer.close()


def _stored_as(tensor: gguf_tensors.PlannedTensor) -> tuple[np.dtype[np.uint8], tuple[int, ...]]:
    """The tensor as described to the writer: bytes, so that the last dimension counts bytes."""
    block, size = gguf.GGML_QUANT_SIZES[tensor.type]
    return np.dtype(np.uint8), (*tensor.shape[:-1], tensor.shape[-1] // block * size)


def quantise_file(path: Path, out: Path, options: GgufOptions, say: Say, progress: Progress = silent) -> list[Path]:
    """Have libllama quantise a GGUF file of an architecture that is not read here; all else stays as it is."""
    from edge_stream.converters.gguf_source import open_parts

    if options.quantize is None:
        raise EdgeStreamError(f"{path.name} is of an architecture that can only be quantised: use --quantize")
    quantize.file_type(options.quantize)
    readers = open_parts(path)
    sizes = {str(t.name): int(t.n_bytes) for _, reader in readers for t in reader.tensors}
    say(f"source            {path.name}, {len(sizes)} tensors, {sum(sizes.values()) / 2**20:,.0f} MiB")
    say(f"converts to       {out}, {options.quantize} (libllama)")
    if options.dry_run:
        return []
    out = target(out, options, path)
    check_space(out, sum(sizes.values()))
    defaults = {gguf_metadata.KEY_N_KEEP: options.n_keep, gguf_metadata.KEY_N_CTX: options.n_ctx}
    with staging_folder(out) as folder:
        given = {key: value for key, value in defaults.items() if value is not None}
        parts = [part for part, _ in readers]
        for warning in _quantise(sizes, parts, folder / out.name, options, progress, given):
            say(f"note: {warning}")
        return publish(sorted(p for p in folder.iterdir() if p.is_file()), out.parent, options.overwrite)


def _quantise(
    sizes: dict[str, int],
    parts: list[Path],
    target: Path,
    options: GgufOptions,
    progress: Progress,
    integers: dict[str, int] | None = None,
) -> list[str]:
    """integers: further metadata of a file that may be quantised already; None: it is an intermediate one of ours."""
    assert options.quantize is not None
    imatrix = read_imatrix(options.imatrix) if options.imatrix else None
    if len(parts) > 1:  # libllama appends the part numbers
        target = target.with_name(re.sub(r"\.gguf$", "", target.name))
    advance = counter(progress, "quantising", sum(sizes.values()))
    last: list[str] = []

    def started(tensor: str) -> None:  # so the previous one is done
        advance(sum(sizes.get(name, 0) for name in last))
        last[:] = [tensor]

    return quantize.quantize(
        parts[0],
        target,
        options.quantize,
        imatrix=imatrix,
        keep_split=len(parts) > 1,
        n_threads=options.n_threads,
        verbose=options.verbose,
        started=started,
        integers=integers or {},
        allow_requantize=integers is not None,
    )
