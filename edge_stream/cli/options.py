"""Flags that the subcommands share, with llama.cpp's names, defaults and environment variables; loading a model."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from edge_stream.cache_types import CACHE_TYPES, choose_flash_attn

if TYPE_CHECKING:
    from edge_stream.engine import Engine

F = TypeVar("F", bound=Callable[..., Any])

SINKS_DEFAULT = 4
N_CTX_DEFAULT = 4096
DEMO_MODEL = "demo"


class Count(click.IntRange):
    """An integer of a range, shown as N in the help."""

    name = "N"


class GpuLayers(click.ParamType):  # type: ignore[type-arg]
    """A number of layers, `auto` (None) or `all` (-1)."""

    name = "N|auto|all"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        if value is None or value == "auto":
            return None
        if value == "all":
            return -1
        try:
            return max(-1, int(value))
        except ValueError:
            self.fail(f"{value!r} is neither a number nor auto nor all.", param, ctx)


class Names(click.ParamType):  # type: ignore[type-arg]
    """Names, separated by commas."""

    name = "NAME,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[str]:
        return value if isinstance(value, list) else [name.strip() for name in value.split(",") if name.strip()]


def compose(*options: Callable[[F], F]) -> Callable[[F], F]:
    """One decorator that applies several, in the order of the help text."""

    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def option(*names: str, env: str | None = None, **settings: Any) -> Callable[[F], F]:
    """click.option with llama.cpp's environment variable LLAMA_ARG_<env>, which an argument overrides."""
    envvar = f"LLAMA_ARG_{env}" if env else None
    return click.option(*names, envvar=envvar, show_envvar=env is not None, **{"show_default": True, **settings})


def model_option(*, required: bool = True, default: str | None = None) -> Callable[[F], F]:
    """The `-m/--model` flag."""
    return option(
        "-m",
        "--model",
        env="MODEL",
        required=required,
        metavar="MODEL",
        help="A GGUF file, an MLC folder, hf:user/repo[:quant], or demo.",
        # with any default, None included, click requires nothing
        **({} if default is None else {"default": default}),
    )


def context_options(n_ctx: int = N_CTX_DEFAULT) -> Callable[[F], F]:
    """Flags of the cache and its sinks."""
    return compose(
        option(
            "-c",
            "--ctx-size",
            "n_ctx",
            env="CTX_SIZE",
            type=Count(min=0),
            default=n_ctx,
            help="Cache capacity in tokens (sinks and window). 0: the model's training length.",
        ),
        option(
            "--keep",
            "--attention-sink-size",
            "n_keep",
            type=Count(min=-1),
            default=SINKS_DEFAULT,
            help="Sinks: the first N tokens, which stay in the cache (llama.cpp: 0). -1: the whole prompt.",
        ),
        option(
            "-ctk",
            "--cache-type-k",
            "cache_type_k",
            env="CACHE_TYPE_K",
            type=click.Choice(list(CACHE_TYPES)),
            default="f16",
            help="Type of cached keys.",
        ),
        option(
            "-ctv",
            "--cache-type-v",
            "cache_type_v",
            env="CACHE_TYPE_V",
            type=click.Choice(list(CACHE_TYPES)),
            default="f16",
            help="Type of cached values.",
        ),
        option(
            "--sink-move",
            type=click.Choice(["auto", "bank", "redecode"]),
            default="auto",
            help="How sinks move with the window: rotated copies (bank), or decoded again (redecode).",
        ),
        option(
            "--no-proof",
            "proof",
            is_flag=True,
            flag_value=False,
            default=True,
            show_default=False,
            help="Do not require the model to prove, at its first load, that it streams exactly.",
        ),
        option(
            "--slide",
            "n_slide",
            type=Count(min=0),
            default=0,
            help="Evict at least N tokens at a time. 0: depends on --sink-move.",
        ),
    )


# Flags of batches, threads and devices.
compute_options = compose(
    option(
        "-b", "--batch-size", "n_batch", env="BATCH", type=Count(min=1), default=512, help="Maximum tokens per decode."
    ),
    option(
        "-ub",
        "--ubatch-size",
        "n_ubatch",
        env="UBATCH",
        type=Count(min=1),
        default=512,
        help="Maximum tokens computed at once.",
    ),
    option(
        "-t",
        "--threads",
        "n_threads",
        env="THREADS",
        type=Count(min=-1),
        default=-1,
        help="CPU threads for generation. -1: chosen for this machine.",
    ),
    option(
        "-tb",
        "--threads-batch",
        "n_threads_batch",
        type=Count(min=-1),
        default=-1,
        help="CPU threads for prompts. -1: as --threads.",
    ),
    option(
        "-ngl",
        "--gpu-layers",
        "--n-gpu-layers",
        "n_gpu_layers",
        env="N_GPU_LAYERS",
        type=GpuLayers(),
        default="auto",
        help="Layers to offload to GPUs.",
    ),
    option(
        "-dev",
        "--device",
        "devices",
        env="DEVICE",
        type=Names(),
        default=None,
        help="Devices to offload to, as listed by `edge-stream info` (default: all). none: only the CPU.",
    ),
    option(
        "-sm",
        "--split-mode",
        "split_mode",
        env="SPLIT_MODE",
        type=click.Choice(["none", "layer", "row"]),
        default="layer",
        help="How to spread layers over several devices.",
    ),
    option(
        "--rpc",
        env="RPC",
        type=Names(),
        default="",
        show_default=False,
        help="HOST:PORT,... of machines that run `edge-stream rpc-server`, whose devices are used too.",
    ),
    option(
        "-fa",
        "--flash-attn",
        "flash_attn",
        env="FLASH_ATTN",
        type=click.Choice(["on", "off", "auto"]),
        default="auto",
        help="Flash attention. auto: where the device has it, except with an f32 cache, which it rounds.",
    ),
    option("--mmap/--no-mmap", "use_mmap", default=True, help="Map the model file into memory instead of reading it."),
    option("-v", "--verbose", is_flag=True, help="Show llama.cpp's messages."),
)


_ENGINE = (
    "n_batch",
    "n_ubatch",
    "cache_type_k",
    "cache_type_v",
    "flash_attn",
    "n_gpu_layers",
    "devices",
    "split_mode",
    "rpc",
    "sink_move",
    "n_slide",
    "use_mmap",
    "proof",
    "verbose",
)


def engine_settings(flags: dict[str, Any]) -> dict[str, Any]:
    """The arguments of Engine.load that do not depend on the command; prints what `-fa auto` became, and why."""
    settings = {name: flags[name] for name in _ENGINE}
    settings["flash_attn"], note = flash_attn(flags)
    if note:
        click.echo(note, err=True)
    for name in ("n_threads", "n_threads_batch"):
        settings[name] = flags[name] if flags[name] > 0 else None
    return settings


def flash_attn(flags: dict[str, Any]) -> tuple[str, str]:
    """What -fa means for the flags' model, cache types, devices and streams, and a note: see choose_flash_attn."""
    wanted: str = flags["flash_attn"]
    if os.path.isdir(str(flags["model"])):  # MLC has no flash attention
        return wanted, ""
    independent = wanted == "auto" and flags.get("n_parallel", 1) > 1
    if independent:
        from edge_stream.hardware.devices import layer_devices

        # on a GPU a batch runs other kernels than a lone token in any case
        independent = not layer_devices(flags["n_gpu_layers"], flags["devices"], flags["rpc"])
    return choose_flash_attn(wanted, flags["cache_type_k"], flags["cache_type_v"], independent=independent)


def load_engine(flags: dict[str, Any], pinned: Callable[[Engine], int] | None = None) -> Engine:
    """Load the model that the flags name; with `-c 0`, print the training length that is used.

    Streaming defaults of the model take the place of ours where the user gave no flag; that is printed too.
    pinned: counts the tokens to pin, where that needs the model's tokenizer.
    """
    from edge_stream.engine import Engine

    _use_model_defaults(flags)
    settings = engine_settings(flags)
    if "n_parallel" in flags:
        _use_possible_parallel(flags)
        settings["n_parallel"] = flags["n_parallel"]
    # the length of a whole prompt (-1) is known only later: its stream is then given an n_keep of its own
    n_keep = SINKS_DEFAULT if flags["n_keep"] < 0 else flags["n_keep"]
    engine = Engine.load(flags["model"], n_ctx=flags["n_ctx"], n_keep=n_keep, **settings)
    n_pinned = pinned(engine) if pinned else 0
    if engine.sink_move == "redecode" and n_keep < n_pinned < engine.n_ctx:
        # redecoding needs room for the sinks beside the cache, which is set aside at load
        engine.close()
        engine = Engine.load(flags["model"], n_ctx=flags["n_ctx"], n_keep=n_pinned, **settings)
    if flags["n_ctx"] == 0:
        click.echo(f"ctx-size 0: using the model's training length, {engine.n_ctx} tokens", err=True)
    return engine


def _use_possible_parallel(flags: dict[str, Any]) -> None:
    """As many streams as the model's backend holds, where nobody chose a number, and say so."""
    if _is_given("n_parallel"):
        return  # Engine.load refuses what is too much
    from edge_stream import backends
    from edge_stream.models import names

    can = backends.capabilities(names.resolve(str(flags["model"])))
    if flags["n_parallel"] > can.max_parallel:
        flags["n_parallel"] = can.max_parallel
        click.echo(f"--parallel {can.max_parallel}: {can.name} holds no more streams at a time", err=True)


def _is_given(name: str) -> bool:
    """True if the user chose a flag's value."""
    ctx = click.get_current_context(silent=True)
    given = (click.core.ParameterSource.COMMANDLINE, click.core.ParameterSource.ENVIRONMENT)
    return ctx is None or ctx.get_parameter_source(name) in given


def _use_model_defaults(flags: dict[str, Any]) -> None:
    """Put the model's streaming defaults into `flags` where the user gave no value, and print them.

    A command with a default cache size of its own (demo) keeps that.
    """
    ours = {"n_ctx": N_CTX_DEFAULT, "n_keep": SINKS_DEFAULT}
    free = [n for n in ours if not _is_given(n) and flags[n] == ours[n]]
    if not free:
        return
    from edge_stream.errors import EdgeStreamError
    from edge_stream.models import names
    from edge_stream.models.defaults import read_model_defaults

    try:
        path = names.resolve(str(flags["model"]))
    except EdgeStreamError:
        return  # Engine.load says what is wrong
    flags["model"] = str(path)
    found = {n: v for n, v in read_model_defaults(path).items() if n in free and v != flags[n]}
    if not found:
        return
    values = ", ".join(f"{n} {v}" for n, v in found.items())
    chosen = flags | found
    if 0 < chosen["n_ctx"] <= chosen["n_keep"]:
        click.echo(f"not using the model's {values}: the sinks would fill the cache", err=True)
        return
    flags.update(found)
    click.echo(f"using the model's {values}", err=True)
