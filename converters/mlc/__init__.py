"""Convert to MLC: weights in TVM's tensor cache, mlc-chat-config.json, the tokenizer, optionally a compiled library.

Does what `mlc_llm convert_weight`, `gen_config` and `compile` do, without torch and in little memory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_stream.converters import chat_templates
from edge_stream.converters.mlc import chat_config, conv_templates, tokenizer
from edge_stream.converters.mlc import params as parameters
from edge_stream.converters.mlc.quantization import Quantization, find_quantization
from edge_stream.converters.mlc.tensor_cache import SHARD_CAP, TensorCacheWriter
from edge_stream.converters.progress import Progress, counter, silent
from edge_stream.converters.streaming_defaults import StreamingDefaults, recommend
from edge_stream.errors import EdgeStreamError
from edge_stream.hardware.memory import check_obtainable
from edge_stream.output.staging import check_absent, check_space, publish_folder, put_back, staging_folder

if TYPE_CHECKING:
    from edge_stream.converters.source import Source

Say = Callable[[str], None]
DEVICES = ("none", "cpu", "macos", "iphone", "metal", "cuda", "android")
_OTHER_BYTES = 32 << 20  # generous estimate of tokenizer and library, for the disk space check
# what the converter writes; a folder with any other files is not replaced
_OURS = ("params_shard_*.bin", "tensor-cache*.json", "ndarray-cache*.json", "mlc-chat-config.json", "lib.*")


@dataclass(frozen=True)
class MlcOptions:
    """The user's options. None: decided by the model. conv_template: one of MLC's names, or a JSON file."""

    quantization: str = "q4f16_1"
    conv_template: str | None = None
    device: str = "none"
    n_keep: int | None = None
    n_ctx: int | None = None
    overwrite: bool = False
    dry_run: bool = False
    verbose: bool = False


@dataclass(frozen=True)
class MlcPlan:
    """What will be written. Sizes in bytes."""

    quantization: Quantization
    params: list[parameters.Param]
    tensors: list[parameters.StoredTensor]
    streaming: StreamingDefaults
    config: dict[str, Any]
    tokenizer_files: dict[str, bytes]
    notes: list[str]
    size: int
    memory: int


def make_plan(source: Source, options: MlcOptions) -> MlcPlan:
    """Plan a conversion without writing. Raises EdgeStreamError for what cannot be converted."""
    q = find_quantization(options.quantization)
    if options.device not in DEVICES:
        raise EdgeStreamError(f"device {options.device} is unknown: use one of {', '.join(DEVICES)}")
    if source.model.family.experts and q.transposed:
        raise EdgeStreamError(f"MLC has no {q.name} of models with experts: use q4f16_1")
    streaming = recommend(source.model, options.n_keep, options.n_ctx)
    listed = parameters.list_params(source)
    tensors = [t for p in listed for t in parameters.stored_tensors(p, q)]
    files, notes = tokenizer.collect(source)
    texts, ids = tokenizer.special_tokens(source, files)
    conv = conv_templates.choose(
        options.conv_template,
        source.chat_templates.get(chat_templates.DEFAULT),
        texts,
        ids,
        add_bos=tokenizer.adds_bos(files),
    )
    facts = chat_config.TokenizerFacts(tuple(files), tokenizer.info(files["tokenizer.json"]), ids)
    config = chat_config.build(source, q.name, streaming, facts, conv.value)
    if options.device != "none":
        from edge_stream.converters.mlc.compile import check_supported

        check_supported(config)
    size = sum(t.nbytes for t in tensors) + sum(map(len, files.values()))
    # a parameter as stored, its encoded copy, a shard, and a block being quantised
    largest = max(sum(parameters.stored_bytes(t) for t in parameters.stored_tensors(p, q)) for p in listed)
    memory = 2 * largest + SHARD_CAP + parameters.BLOCK_BYTES
    return MlcPlan(q, listed, tensors, streaming, config, files, [*notes, *conv.notes], size, memory)


def convert(source: Source, out: Path, options: MlcOptions, say: Say, progress: Progress = silent) -> list[Path]:
    """Write the folder `out` and return [out]; nothing with --dry-run. progress: called with bytes.

    The folder appears, or replaces an existing MLC model, only when it is complete. Raises EdgeStreamError in one
    sentence, and leaves nothing behind, if the source, the disk or the compiler fails.
    """
    out = Path(os.path.realpath(out))  # of a link, the folder that it leads to
    if not options.dry_run:
        put_back(out)
    _check_target(out, options.overwrite or options.dry_run)
    plan = make_plan(source, options)
    for line in _describe(source, plan, options):
        say(line)
    if options.dry_run:
        return []
    check_space(out, plan.size + _OTHER_BYTES)
    check_obtainable(plan.memory)
    with staging_folder(out) as folder:
        _write_weights(source, plan, folder, progress)
        for name, content in plan.tokenizer_files.items():
            (folder / name).write_bytes(content)
        text = json.dumps(plan.config, indent=2, ensure_ascii=False)
        (folder / "mlc-chat-config.json").write_text(text + "\n", encoding="utf-8", errors="surrogatepass")
        if options.device != "none":
            from edge_stream.converters.mlc.compile import compile_library

            compile_library(folder, options.device, say)
        folder.chmod(0o755)
        publish_folder(folder, out)
    return [out]


def _describe(source: Source, plan: MlcPlan, options: MlcOptions) -> Iterator[str]:
    yield (
        f"{source.name}: {source.model.family.hf_class}, {len(source.tensors)} tensors -> {len(plan.tensors)} in "
        f"{plan.quantization.name}, {plan.size / 2**20:,.0f} MiB; about {plan.memory / 2**20:,.0f} MiB of memory"
    )
    yield (
        f"sliding_window_size {plan.streaming.n_ctx} (sinks included), attention_sink_size {plan.streaming.n_keep}, "
        f"prefill_chunk_size {plan.config['prefill_chunk_size']}"
    )
    if source.left_out:
        yield f"left out: {len(source.left_out)} tensors that are not part of the language model"
    for note in filter(None, (source.model.family.mlc.note, *plan.notes)):
        yield f"note: {note}"
    if options.verbose:
        for tensor in plan.tensors:
            yield f"  {tensor.name} {list(tensor.shape)} {tensor.dtype}"


def _write_weights(source: Source, plan: MlcPlan, folder: Path, progress: Progress) -> None:
    writer = TensorCacheWriter(folder)
    advance = counter(progress, "converting", sum(t.nbytes for t in plan.tensors))
    for param in plan.params:
        for stored, array in parameters.convert_param(source, param, plan.quantization):
            writer.add(stored.name, array)
            advance(stored.nbytes)
    n_weights = sum(t.n_elements for t in source.tensors.values())
    writer.finish(
        {
            "ParamSize": len(plan.tensors),
            "ParamBytes": float(writer.nbytes),
            "BitsPerParam": writer.nbytes * 8.0 / n_weights,
        }
    )


def _check_target(out: Path, overwrite: bool) -> None:
    """Raise EdgeStreamError if `out` exists, unless it is empty, or an MLC model that may be replaced."""
    if not out.exists() and not out.is_symlink():
        return
    if out.is_symlink() or not out.is_dir():
        raise EdgeStreamError(f"{out} is not a folder")
    files = list(out.iterdir())
    for path in files:
        known = path.name in tokenizer.FILES or any(path.match(pattern) for pattern in _OURS)
        if path.is_dir() or not known:
            raise EdgeStreamError(f"{out} holds {path.name}, which is not part of an MLC model: choose an empty folder")
    if files:
        check_absent(out, overwrite)
