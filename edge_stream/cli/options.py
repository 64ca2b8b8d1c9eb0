"""Flags that the subcommands share, with llama.cpp's names, defaults and environment variables; loading a model."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from edge_stream.backends import MAX_THREADS
from edge_stream.cache_types import CACHE_TYPES, choose_flash_attn
from edge_stream.cli.llama_flags import Option, Switch
from edge_stream.cli.meter import Meter

if TYPE_CHECKING:
    from edge_stream.engine import Engine
    from edge_stream.stream import Stream

F = TypeVar("F", bound=Callable[..., Any])

SINKS_DEFAULT = 4
N_CTX_DEFAULT = 4096
DEMO_MODEL = "demo"
_MAX_LAYERS = 4096
_LOAD_SECONDS = 1  # a load that takes longer shows how far it is
_NO_ROOM = "with --slide 1 a full cache has no room for drafts: nothing is drafted once it is full"
_NO_FIT = "nothing is fitted by itself; `info -m MODEL` shows the memory that -c, -ngl and -ctk need"


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
            number = int(value)
        except ValueError:
            number = -2
        if number < -1:
            self.fail(f"{value!r} is neither a number of layers nor auto nor all.", param, ctx)
        return number


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
    defaults = {"cls": Option, "envvar": envvar, "show_envvar": env is not None, "show_default": True}
    return click.option(*names, **{**defaults, **settings})


def rare(*names: str, env: str | None = None, **settings: Any) -> Callable[[F], F]:
    """A flag of llama.cpp that the help leaves out; docs/flags.md has them all."""
    return option(*names, env=env, hidden=True, **settings)


def recall_option(text: str, default: int = 0) -> Callable[[F], F]:
    """`--recall N`, as flags["n_recall"]. text: what it does."""
    return option("--recall", "n_recall", type=Count(min=0), default=default, metavar="N", help=text)


def only(accepted: str, reason: str) -> Callable[[click.Context, click.Parameter, str | None], None]:
    """A callback for a flag that has no effect and takes only some values (separated by spaces); `reason` says why."""

    def check(_ctx: click.Context, _param: click.Parameter, value: str | None) -> None:
        if value is not None and value not in accepted.split():
            raise click.BadParameter(f"{reason}.")

    return check


def model_option(*, required: bool = True, default: str | None = None) -> Callable[[F], F]:
    """The flags that name a model; they become flags["model"], as edge_stream.models.names takes it."""

    def named(ctx: click.Context, param: click.Parameter, model: str | None) -> str | None:
        """-m, unless -hf or -mu names the model. -hft and --offline act through the hub's own variables."""
        flags = {name: ctx.params.pop(name) for name in ("hf_repo", "hf_file", "model_url", "hf_token", "offline")}
        os.environ.update({"HF_TOKEN": flags["hf_token"]} if flags["hf_token"] else {})
        os.environ.update({"HF_HUB_OFFLINE": "1"} if flags["offline"] else {})
        if flags["hf_file"] and not flags["hf_repo"]:
            raise click.UsageError("-hff names a file of a repository: give -hf USER/REPO as well.")
        if flags["hf_repo"]:
            repo = str(flags["hf_repo"]).removeprefix("hf:")
            flags["hf_repo"] = "hf:" + (f"{repo.partition(':')[0]}:{flags['hf_file']}" if flags["hf_file"] else repo)
        names: dict[str, str | None] = {"model": model, "hf_repo": flags["hf_repo"], "model_url": flags["model_url"]}
        for source in (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT):
            given = [name for name in names if names[name] and ctx.get_parameter_source(name) is source]
            if len(given) > 1:
                raise click.UsageError("Give only one of -m, -hf and -mu.")
            if given:
                return names[given[0]]
        if required and not model:
            raise click.MissingParameter(ctx=ctx, param=param)
        return model

    return compose(
        option(
            "-hf", "-hfr", "--hf-repo", env="HF_REPO", metavar="USER/REPO[:QUANT]", is_eager=True, help="As -m hf:..."
        ),
        rare("-hff", "--hf-file", env="HF_FILE", is_eager=True),
        rare("-hft", "--hf-token", envvar="HF_TOKEN", is_eager=True),
        rare("-mu", "--model-url", env="MODEL_URL", is_eager=True),
        rare("--offline", env="OFFLINE", is_flag=True, is_eager=True),
        option(
            "-m",
            "--model",
            env="MODEL",
            metavar="MODEL",
            callback=named,
            default=default,
            help="A GGUF file, an MLC folder, hf:user/repo[:quant], or demo.",
        ),
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
            help="How the first tokens follow when old text leaves the cache. bank: their kept copies are turned, at "
            "no cost; redecode: they are computed again, for other builds of llama.cpp. auto: bank if possible.",
        ),
        option(
            "--no-proof",
            "proof",
            is_flag=True,
            flag_value=False,
            default=True,
            show_default=False,
            help="Skip the check, at a model's first load, that it answers the same however long the text is.",
        ),
        option(
            "--slide",
            "n_slide",
            type=Count(min=0),
            default=0,
            help="When the cache is full, drop at least the oldest N tokens at once. 0: one (bank), 16 (bank, with "
            "drafts), or a sixteenth of the cache (redecode).",
        ),
    )


# llama.cpp's ways to look drafts up in the text. There is one here, which does what each of them is for.
_LOOKUPS = ("ngram-simple", "ngram-map-k", "ngram-map-k4v", "ngram-mod")
_DRAFT_MODEL = "draft-simple"


def _spec_types(_ctx: click.Context, _param: click.Parameter, value: str) -> list[str]:
    """The kinds of drafts that --spec-type, a comma list, asks for."""
    names = value.split(",")
    for name in names:
        if name not in ("none", _DRAFT_MODEL, *_LOOKUPS):
            have = (
                f"drafts are looked up in the text ({', '.join(_LOOKUPS)}) or a draft model's ({_DRAFT_MODEL} and -md)"
            )
            raise click.BadParameter(f"{name!r} is unknown: {have}.")
    return [name for name in names if name != "none"]


# Flags of drafts: tokens guessed from the text and verified together.
draft_options = compose(
    option(
        "--spec-type",
        "spec_type",
        env="SPEC_TYPE",
        metavar="TYPE",
        default="none",
        callback=_spec_types,
        help="ngram-simple: guess tokens where the text repeats itself and decode them together, where that is faster. "
        "Same answers, up to rounding; old text then leaves the cache 16 tokens at a time. none: one by one.",
    ),
    rare("--spec-default", is_flag=True),
    option(
        "-md",
        "--model-draft",
        "--spec-draft-model",
        "draft_model",
        env="SPEC_DRAFT_MODEL",
        default="",
        help="A smaller model with the same tokens, named as in -m, that guesses as well.",
    ),
    rare("-hfd", "-hfrd", "--hf-repo-draft", "--spec-draft-hf", "hf_draft", env="SPEC_DRAFT_HF_REPO", default=""),
    rare(
        "-ngld",
        "--gpu-layers-draft",
        "--n-gpu-layers-draft",
        "--spec-draft-ngl",
        "n_gpu_layers_draft",
        env="N_GPU_LAYERS_DRAFT",
        type=GpuLayers(),
        default="auto",
    ),
    option(
        "--spec-draft-n-max",
        "--spec-ngram-simple-size-m",
        "--draft",
        "--draft-n",
        "--draft-max",
        "n_draft",
        envvar=["LLAMA_ARG_SPEC_DRAFT_N_MAX", "LLAMA_ARG_DRAFT_MAX"],
        type=Count(1, 64),
        default=8,
        help="Most tokens that are guessed at once.",
    ),
    rare(
        "--spec-draft-n-min",
        "--draft-min",
        "--draft-n-min",
        "n_draft_min",
        envvar=["LLAMA_ARG_SPEC_DRAFT_N_MIN", "LLAMA_ARG_DRAFT_MIN"],
        type=Count(min=0),
        default=0,
    ),
    rare("--spec-ngram-simple-size-n", "n_match", type=Count(1, 64), default=2),
)


log_colors_option = rare(
    "--log-colors",
    env="LOG_COLORS",
    expose_value=False,
    callback=only("off 0 false disabled auto -1", "the log has no colours"),
)


def _list_devices(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from edge_stream.hardware import devices

        click.echo("Available devices:")
        for d in devices.devices():
            click.echo(f"  {d.name}: {d.description} ({d.total >> 20:,} MiB, {d.free >> 20:,} MiB free)")
        ctx.exit()


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
        type=Count(-1, MAX_THREADS),
        default=-1,
        help="CPU threads for generation. -1: chosen for this machine.",
    ),
    option(
        "-tb",
        "--threads-batch",
        "n_threads_batch",
        type=Count(-1, MAX_THREADS),
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
        type=Switch(),
        default="auto",
        help="Flash attention. auto: where the device has it, except with an f32 cache, which it rounds.",
    ),
    option(
        "--mmap/--no-mmap",
        "mmap",
        env="MMAP",
        default=None,
        help="Map the model file into memory, or read it.",
        show_default=False,
        show_envvar=False,
    ),
    option("--mlock", env="MLOCK", is_flag=True, show_envvar=False, help="Keep the model in memory: no swapping."),
    option(
        "--lora",
        "lora",
        multiple=True,
        metavar="FILE,...",
        help="GGUF files of LoRA adapters, which become part of the model: a session needs the same ones.",
    ),
    rare("--lora-scaled", multiple=True),
    rare("-dio", "--direct-io", env="DIO", is_flag=True),
    rare(
        "-lm", "--load-mode", env="LOAD_MODE", type=click.Choice(["auto", "none", "mmap", "mlock", "mmap+mlock", "dio"])
    ),
    rare("-ts", "--tensor-split", env="TENSOR_SPLIT", default=""),
    rare("-mg", "--main-gpu", env="MAIN_GPU", type=Count(min=0)),
    rare("-ot", "--override-tensor", env="OVERRIDE_TENSOR", multiple=True),
    rare("-cmoe", "--cpu-moe", env="CPU_MOE", is_flag=True),
    rare("-ncmoe", "--n-cpu-moe", env="N_CPU_MOE", type=Count(0, _MAX_LAYERS), default=0),
    rare("-ncffn", "--n-cpu-ffn", env="N_CPU_FFN", type=Count(0, _MAX_LAYERS), default=0),
    rare("--repack/-nr", " /--no-repack", "repack", env="REPACK", default=True),
    rare("--no-host", env="NO_HOST", is_flag=True),
    rare("--check-tensors", is_flag=True),
    rare("-fit", "--fit", env="FIT", expose_value=False, callback=only("off 0 false disabled", _NO_FIT)),
    rare("-dt", "--defrag-thold", env="DEFRAG_THOLD", expose_value=False),  # llama.cpp ignores it as well
    option("-v", "--verbose", "--log-verbose", "verbose", is_flag=True, help="Show llama.cpp's messages."),
    rare("-lv", "--verbosity", "--log-verbosity", env="LOG_VERBOSITY", type=Count(), default=3),
    rare("--list-devices", is_flag=True, is_eager=True, expose_value=False, callback=_list_devices),
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
    "proof",
)


def engine_settings(flags: dict[str, Any]) -> dict[str, Any]:
    """The arguments of Engine.load that do not depend on the command; prints what `-fa auto` became, and why."""
    settings = {name: flags[name] for name in _ENGINE}
    settings["verbose"] = flags["verbose"] or flags["verbosity"] > 3  # llama.cpp's 4 and 5: trace and debug
    settings["load_mode"] = _load_mode(flags)
    settings["lora"] = _adapters(flags)
    settings["tensor_split"] = _proportions(flags["tensor_split"])
    settings["override_tensor"] = _tensor_places(flags)
    changed = {"main_gpu": flags["main_gpu"] or 0, "use_extra_bufts": flags["repack"], "no_host": flags["no_host"]}
    changed["check_tensors"] = flags["check_tensors"]
    usual = {"main_gpu": 0, "use_extra_bufts": True, "no_host": False, "check_tensors": False}
    settings["model_params"] = {name: value for name, value in changed.items() if value != usual[name]}
    settings["flash_attn"], note = flash_attn(flags)
    if note:
        click.echo(note, err=True)
    for name in ("n_threads", "n_threads_batch"):
        settings[name] = flags[name] if flags[name] > 0 else None
    kinds = flags.get("spec_type")
    draft_model = flags.get("draft_model") or (flags.get("hf_draft") and "hf:" + flags["hf_draft"].removeprefix("hf:"))
    if kinds == [_DRAFT_MODEL] and not draft_model:
        raise click.UsageError(f"--spec-type {_DRAFT_MODEL} needs a draft model: -md FILE.")
    if kinds or flags.get("spec_default") or draft_model:
        settings |= {name: flags[name] for name in ("n_draft", "n_draft_min", "n_match", "n_gpu_layers_draft")}
        settings["draft_model"] = draft_model or ""
        if settings["n_slide"] == 1:
            click.echo(_NO_ROOM, err=True)
    return settings


def _load_mode(flags: dict[str, Any]) -> str:
    """llama.cpp's name for how the file is read: -lm, or what the older flags say."""
    older = flags["mmap"] is not None or flags["mlock"] or flags["direct_io"]
    if flags["load_mode"]:
        if older:
            raise click.UsageError("Give --load-mode or --mmap, --mlock and --direct-io, not both.")
        return str(flags["load_mode"])
    if flags["direct_io"]:
        return "dio"
    if flags["mlock"]:
        return "mlock" if flags["mmap"] is False else "mmap+mlock"
    return {None: "auto", True: "mmap", False: "none"}[flags["mmap"]]


def _adapters(flags: dict[str, Any]) -> list[tuple[str, float]]:
    """(file, scale) of every --lora and --lora-scaled."""
    found = [(file, 1.0) for value in flags["lora"] for file in value.split(",") if file]
    for item in (item for value in flags["lora_scaled"] for item in value.split(",")):
        file, _, scale = item.rpartition(":")
        try:
            number = float(scale)
        except ValueError:
            number = math.nan
        if not file or not math.isfinite(number):
            raise click.UsageError(f"--lora-scaled {item!r} is not of the form FILE:SCALE.")
        found.append((file, number))
    return [(file, 0.0) for file, _ in found] if flags.get("lora_init_without_apply") else found


def _proportions(text: str) -> list[float]:
    """The numbers of --tensor-split."""
    try:
        found = [float(part) for part in re.split("[,/]+", text)] if text else []
    except ValueError:
        found = [math.nan]
    if not all(math.isfinite(number) and number >= 0 for number in found):
        raise click.UsageError(f"--tensor-split {text!r} is not of the form 3,1.")
    return found


def _tensor_places(flags: dict[str, Any]) -> list[tuple[str, str]]:
    """(pattern of tensor names, buffer type) of -ot, -cmoe, -ncmoe and -ncffn, in llama.cpp's order of precedence."""
    found = []
    for item in (item for value in flags["override_tensor"] for item in value.split(",")):
        pattern, equals, place = item.partition("=")
        if not pattern or not equals or not place:
            raise click.UsageError(f"--override-tensor {item!r} is not of the form PATTERN=BUFFER.")
        found.append((pattern, place))
    # the names are llama.cpp's, as in LLM_FFN_EXPS_REGEX and LLM_FFN_DENSE_REGEX of common.h
    experts, dense = r"\.ffn_(up|down|gate|gate_up)_(ch|)exps", r"\.ffn_(up|down|gate)\."
    if flags["cpu_moe"]:
        found.append((experts, "CPU"))
    for pattern, n_layers in ((experts, flags["n_cpu_moe"]), (dense, flags["n_cpu_ffn"])):
        found += [(rf"blk\.{i}{pattern}", "CPU") for i in range(n_layers)]
    return found


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
    from edge_stream.hardware.memory import return_freed_memory

    return_freed_memory()
    resolve(flags)
    _use_model_defaults(flags)
    settings = engine_settings(flags)
    if "n_parallel" in flags:
        _use_possible_parallel(flags)
        settings["n_parallel"] = flags["n_parallel"]
    # the length of a whole prompt (-1) is known only later: its stream is then given an n_keep of its own
    n_keep = SINKS_DEFAULT if flags["n_keep"] < 0 else flags["n_keep"]

    def load(n_keep: int) -> Engine:
        with Meter(in_percent=True, delay=_LOAD_SECONDS) as meter:
            settings["on_load"] = lambda percent: meter.show("loading", percent, 100)
            return Engine.load(flags["model"], n_ctx=flags["n_ctx"], n_keep=n_keep, **settings)

    engine = load(n_keep)
    n_pinned = pinned(engine) if pinned else 0
    if engine.sink_move == "redecode" and n_keep < n_pinned < engine.n_ctx:
        # redecoding needs room for the sinks beside the cache, which is set aside at load
        engine.close()
        engine = load(n_pinned)
    if flags["n_ctx"] == 0:
        click.echo(f"ctx-size 0: using {length_name(engine)}, {engine.n_ctx} tokens", err=True)
    return engine


def length_name(engine: Engine) -> str:
    """What `-c 0` stands for: an MLC folder states no training length."""
    return "the cache size of the MLC folder" if engine.model_path.is_dir() else "the model's training length"


def resolve(flags: dict[str, Any]) -> None:
    """Replace the model's URL by its file, showing its download; Engine.load takes all other names as they are."""
    if str(flags["model"]).startswith(("http://", "https://")):
        from edge_stream.models import names

        with Meter(in_bytes=True) as meter:
            flags["model"] = str(names.resolve(flags["model"], meter.show))


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
    given = (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT)
    return ctx is None or ctx.get_parameter_source(name) in given


def note_kept_sizes(flags: dict[str, Any], stream: Stream) -> None:
    """Say that a resumed stream keeps its sinks and its cache size, where flags ask for others."""
    stats = stream.stats
    for name, flag in (("n_keep", "--keep"), ("n_ctx", "--ctx-size")):
        kept = getattr(stats, name)
        if _is_given(name) and flags[name] != kept:
            click.echo(f"the session keeps its own {flag} {kept}; {flag} {flags[name]} is ignored", err=True)
    if stats.n_slide == 1 and stream.backend.options.n_draft and flags["n_slide"] != 1:
        click.echo(f"the session keeps its own --slide 1: {_NO_ROOM}", err=True)


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
