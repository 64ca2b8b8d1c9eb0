"""`edge-stream convert`: from a Hugging Face checkpoint or a GGUF file to a GGUF file or an MLC model."""

from __future__ import annotations

import dataclasses
import importlib
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import click

from edge_stream.cli import options
from edge_stream.cli.llama_flags import Command
from edge_stream.cli.meter import Meter
from edge_stream.errors import EdgeStreamError, cannot_import

OUTTYPES = ["f32", "f16", "bf16", "q8_0", "auto"]
MLC_QUANTIZATIONS = ["q0f16", "q0f32", "q3f16_1", "q4f16_0", "q4f16_1", "q4f32_1"]
DEVICES = ["none", "cpu", "macos", "iphone", "metal", "cuda", "android"]


class Size(click.ParamType):  # type: ignore[type-arg]
    """Bytes, as in llama.cpp's tools: a number with K, M or G (powers of 1000)."""

    name = "N(M|G)"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Bytes."""
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+)([KMG])", str(value), re.IGNORECASE)
        if match is None or int(match[1]) == 0:
            self.fail(f"{value!r} is not a size such as 500M or 2G.", param, ctx)
        return int(match[1]) * {"K": 10**3, "M": 10**6, "G": 10**9}[match[2].upper()]


@click.command("convert", cls=Command)
@click.argument("src", metavar="SRC")
@click.option("--to", "target", type=click.Choice(["gguf", "mlc"]), required=True, help="What to write.")
@click.option(
    "-o",
    "--outfile",
    "--output",
    "out",
    type=click.Path(path_type=Path),
    metavar="OUT",
    help="A GGUF file, where {ftype} stands for the type, or the folder of an MLC model. Default: a name after SRC in "
    "this folder.",
)
@click.option(
    "--outtype",
    type=click.Choice(OUTTYPES),
    default="auto",
    show_default=True,
    help="GGUF: type of the weights. auto: f16 if SRC is f16, else bf16.",
)
@click.option("--quantize", metavar="TYPE", help="GGUF: quantise with libllama, e.g. to Q4_K_M, Q4_0, Q5_K_M or Q6_K.")
@click.option(
    "--imatrix",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="GGUF: importance matrix for --quantize, made by llama-imatrix.",
)
@click.option("--split-max-size", type=Size(), default=0, metavar="N(M|G)", help="GGUF: split into files of this size.")
@click.option(
    "--quantization",
    type=click.Choice(MLC_QUANTIZATIONS),
    default="q4f16_1",
    show_default=True,
    help="MLC: quantisation of the weights.",
)
@click.option(
    "--conv-template", metavar="NAME", help="MLC: conversation template. Default: the one that matches the model's."
)
@click.option(
    "--device",
    type=click.Choice(DEVICES),
    default="none",
    show_default=True,
    help="MLC: also compile the model library for this device.",
)
@click.option(
    "-c",
    "--ctx-size",
    "n_ctx",
    type=click.IntRange(min=2),
    metavar="N",
    help="Cache capacity (sinks and window) to store as the model's default. Without it, one that suits the model.",
)
@click.option(
    "--keep",
    "--attention-sink-size",
    "n_keep",
    type=click.IntRange(min=0),
    metavar="N",
    help=f"Sinks to store as the model's default; {options.SINKS_DEFAULT} without it.",
)
@click.option("--model-name", metavar="NAME", help="GGUF: name to store in the model. Default: SRC's.")
@click.option(
    "--base",
    type=click.Path(exists=True, path_type=Path),
    metavar="MODEL",
    help="GGUF, where SRC is a LoRA adapter: its base model, a folder with config.json or a GGUF file. Default: the "
    "folder that adapter_config.json names.",
)
@click.option(
    "-t", "--threads", "n_threads", type=click.IntRange(min=1), metavar="N", help="CPU threads of the quantiser."
)
@click.option(
    "--verify", is_flag=True, help="Load the result and compare its logits with the checkpoint's, in float64."
)
@click.option("--overwrite", "--force", "overwrite", is_flag=True, help="Replace OUT if it exists.")
@click.option("--dry-run", is_flag=True, help="Print the plan, sizes and memory, and write nothing.")
@click.option("-v", "--verbose", is_flag=True, help="List all tensors, and show libllama's messages.")
@click.option(
    "--print-supported-models",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=lambda ctx, _param, value: _print_supported(ctx, value),
    help="List the architectures and exit.",
)
@click.pass_context
def main(ctx: click.Context, /, src: str, target: str, out: Path | None, **flags: Any) -> None:
    """Convert SRC (a Hugging Face folder, hf:user/repo, a GGUF file or demo) without torch and in little memory.

    Tensors are converted one by one. The output appears under its name only when it is complete. A folder with a LoRA
    adapter (PEFT) becomes a file for --lora.

    \b
    edge-stream convert ./Mistral-7B-v0.1 --to gguf --quantize Q4_K_M -o mistral.gguf
    edge-stream convert hf:user/repo --to gguf --outtype q8_0 --verify
    edge-stream convert demo --to mlc --quantization q4f16_1 --device iphone -o demo-mlc
    edge-stream convert ./my-adapter --to gguf --base ./Mistral-7B-v0.1 -o my-adapter.gguf
    """
    _check_flags(ctx, target, flags)
    try:
        from edge_stream.models.conversion import adapter_folder, open_source, unread_gguf
    except ImportError as error:
        raise _not_installed(error) from error
    try:
        with _ended_by_signals():
            adapter = adapter_folder(src)
            if adapter is not None:
                _convert_adapter(ctx, adapter, target, out, flags)
                return
            if flags["base"]:
                raise click.UsageError("--base is for LoRA adapters.")
            unread = unread_gguf(src) if target == "gguf" else None
            if unread is not None:
                _quantise(ctx, unread, out, flags)
                return
            source = open_source(src)
            try:
                _convert(source, target, out, flags)
            finally:
                source.close()
    except ImportError as error:
        raise _not_installed(error) from error


def _convert(source: Any, target: str, out: Path | None, flags: dict[str, Any]) -> None:
    if flags["verify"]:
        from edge_stream.converters.verify import check

        check(source)
    with Meter(in_bytes=True) as meter:
        written = (_to_gguf if target == "gguf" else _to_mlc)(source, out, flags, meter)
    _report(written)
    if flags["verify"] and written:
        from edge_stream.models.conversion import verify

        verify(source, target, written[0], meter.note)


def _convert_adapter(ctx: click.Context, folder: Path, target: str, out: Path | None, flags: dict[str, Any]) -> None:
    from edge_stream.converters import lora, to_gguf

    if target != "gguf":
        raise click.UsageError("A LoRA adapter converts to GGUF only.")
    others = ("quantize", "imatrix", "split_max_size", "n_ctx", "n_keep", "n_threads", "verify")
    _refuse(ctx, others, "a LoRA adapter")
    if out is None or out.is_dir():
        out = (out or Path()) / f"{_file_name(flags['model_name'] or folder.resolve().name)}-LoRA.gguf"
    with Meter(in_bytes=True) as meter:
        options = _chosen(to_gguf.GgufOptions, flags)
        written = lora.convert(folder, flags["base"], out, options, meter.note, meter.show)
    _report(written)


def _quantise(ctx: click.Context, path: Path, out: Path | None, flags: dict[str, Any]) -> None:
    from edge_stream.converters import to_gguf

    _refuse(ctx, ("outtype", "split_max_size", "model_name", "verify"), "a GGUF file of this architecture")
    if out is None or out.is_dir():
        out = (out or Path()) / f"{_file_name(path.stem)}-{str(flags['quantize']).upper()}.gguf"
    with Meter(in_bytes=True) as meter:
        written = to_gguf.quantise_file(path, out, _chosen(to_gguf.GgufOptions, flags), meter.note, meter.show)
    _report(written)


def _refuse(ctx: click.Context, names: tuple[str, ...], what: str) -> None:
    for name in names:
        if ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            raise click.UsageError(f"{_flag(name)} is not for {what}.")


def _report(written: list[Path]) -> None:
    for path in written:
        click.echo(f"wrote {path} ({_size(path) / 2**20:,.0f} MiB)")


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP unwind the stack as Ctrl-C does, so that unfinished files are removed."""

    def end(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    changed = {number: old for number, old in before.items() if old == signal.SIG_DFL}  # leaves nohup's
    for number in changed:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number, old in changed.items():
            signal.signal(number, old)


def _print_supported(ctx: click.Context, value: bool) -> None:
    if not value or ctx.resilient_parsing:
        return
    from edge_stream.families import families

    for family in families().values():
        click.echo(f"{family.hf_class} (model_type {family.model_type}): {family.models}")
    ctx.exit()


def _check_flags(ctx: click.Context, target: str, flags: dict[str, Any]) -> None:
    """Refuse flags of the other target, which would have no effect."""
    others = {
        "gguf": ("quantization", "conv_template", "device"),
        "mlc": ("outtype", "quantize", "imatrix", "split_max_size", "n_threads", "model_name", "base"),
    }
    _refuse(ctx, others[target], f"--to {target}")
    if flags["verify"] and flags["dry_run"]:
        raise click.UsageError("--verify and --dry-run exclude each other.")


def _flag(name: str) -> str:
    names = {"n_threads": "--threads", "n_ctx": "--ctx-size", "n_keep": "--keep"}
    return names.get(name, f"--{name.replace('_', '-')}")


def _to_gguf(source: Any, out: Path | None, flags: dict[str, Any], meter: Meter) -> list[Path]:
    from edge_stream.converters import gguf_tensors, to_gguf

    kind = (flags["quantize"] or gguf_tensors.choose_outtype(source, flags["outtype"])).upper()
    if out is None or out.is_dir():
        out = (out or Path()) / f"{_file_name(flags['model_name'] or source.name)}-{kind}.gguf"
    out = out.with_name(out.name.replace("{ftype}", kind))
    return to_gguf.convert(source, out, _chosen(to_gguf.GgufOptions, flags), meter.note, meter.show)


def _to_mlc(source: Any, out: Path | None, flags: dict[str, Any], meter: Meter) -> list[Path]:
    mlc = importlib.import_module("edge_stream.converters.mlc")
    out = out or Path(f"{_file_name(source.name)}-{flags['quantization']}-MLC")
    return list(mlc.convert(source, out, _chosen(mlc.MlcOptions, flags), meter.note, meter.show))


def _chosen(kind: Any, flags: dict[str, Any]) -> Any:
    """An object of a dataclass of options, from the flags of the same names that have a value."""
    return kind(**{f.name: flags[f.name] for f in dataclasses.fields(kind) if flags[f.name] is not None})


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "model"


def _size(path: Path) -> int:
    if path.is_dir():
        return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
    return path.stat().st_size


def _not_installed(error: ImportError) -> EdgeStreamError:
    if (error.name or "").startswith("edge_stream.converters"):
        return EdgeStreamError(f"this installation cannot convert to that target: {error.name} is missing")
    extra = "mlc" if (error.name or "").startswith(("tvm", "tvm_ffi")) else "convert"
    return cannot_import(error, "convert", extra)
