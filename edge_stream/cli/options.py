"""Flags shared by the subcommands: llama.cpp's names, defaults and environment variables."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from edge_stream.engine import Engine
    from edge_stream.stream import Sampling

F = TypeVar("F", bound=Callable[..., Any])

CACHE_TYPES = ["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1"]
SINKS_DEFAULT = 4
DEMO_MODEL = "demo"


class Number(click.ParamType):  # type: ignore[type-arg]
    """A finite float within bounds; click's FloatRange lets nan through."""

    name = "number"

    def __init__(self, low: float = -math.inf, high: float = math.inf) -> None:
        self.low, self.high = low, high

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Parse and check."""
        try:
            number = float(value)
        except ValueError:
            self.fail(f"{value!r} is not a number.", param, ctx)
        if not math.isfinite(number) or not self.low <= number <= self.high:
            self.fail(f"{value} is not between {self.low:g} and {self.high:g}.", param, ctx)
        return number


class LogitBias(click.ParamType):  # type: ignore[type-arg]
    """TOKEN(+/-)BIAS, as in 15043+1 or 15043-inf."""

    name = "TOKEN(+/-)BIAS"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, float]:
        """Parse into (token, bias)."""
        if isinstance(value, tuple):
            return value
        for sign in "+-":
            token, found, bias = value.partition(sign)
            if found and token.isascii() and token.isdigit():
                try:
                    number = float(sign + bias)
                except ValueError:
                    break
                if not math.isnan(number):
                    return int(token), number
        self.fail(f"{value!r} is not of the form 15043+1 or 15043-1.", param, ctx)


class GpuLayers(click.ParamType):  # type: ignore[type-arg]
    """A number of layers, `auto` or `all`."""

    name = "N|auto|all"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        """None means auto, -1 all."""
        if value is None or value == "auto":
            return None
        if value == "all":
            return -1
        try:
            return max(-1, int(value))
        except ValueError:
            self.fail(f"{value!r} is neither a number nor auto nor all.", param, ctx)


def _compose(options: Sequence[Callable[[F], F]]) -> Callable[[F], F]:
    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def _option(*names: str, env: str | None = None, **settings: Any) -> Callable[[F], F]:
    envvar = f"LLAMA_ARG_{env}" if env else None
    return click.option(*names, envvar=envvar, show_envvar=env is not None, **settings)


def model_option(*, required: bool = True, default: str | None = None) -> Callable[[F], F]:
    """The `-m/--model` flag."""
    return _option(
        "-m",
        "--model",
        env="MODEL",
        required=required,
        default=default,
        show_default=default is not None,
        metavar="MODEL",
        help="A GGUF file, or the name of a known model such as `demo`.",
    )


def context_options(n_ctx: int = 4096) -> Callable[[F], F]:
    """Flags of the cache: its size, its sinks, how they move."""
    return _compose(
        [
            _option(
                "-c",
                "--ctx-size",
                "n_ctx",
                env="CTX_SIZE",
                type=click.IntRange(min=0),
                default=n_ctx,
                show_default=True,
                metavar="N",
                help="Cache capacity in tokens: sinks + window. 0: the length the model was trained on. "
                "The stream itself has no limit.",
            ),
            _option(
                "--keep",
                "--attention-sink-size",
                "n_keep",
                type=click.IntRange(min=-1),
                default=SINKS_DEFAULT,
                show_default=True,
                metavar="N",
                help="Sinks: the first N tokens stay in the cache for ever (llama.cpp's default is 0). "
                "-1: the whole prompt.",
            ),
            _option(
                "-ctk",
                "--cache-type-k",
                "cache_type_k",
                env="CACHE_TYPE_K",
                type=click.Choice(CACHE_TYPES),
                default="f16",
                show_default=True,
                help="Type of the cached keys.",
            ),
            _option(
                "-ctv",
                "--cache-type-v",
                "cache_type_v",
                env="CACHE_TYPE_V",
                type=click.Choice(CACHE_TYPES),
                default="f16",
                show_default=True,
                help="Type of the cached values.",
            ),
            _option(
                "--sink-move",
                type=click.Choice(["auto", "bank", "redecode"]),
                default="auto",
                show_default=True,
                help="How sinks follow the window: from pristine copies (bank), or decoded again (redecode).",
            ),
            _option(
                "--slide",
                "n_slide",
                type=click.IntRange(min=0),
                default=0,
                metavar="N",
                help="Evict at least N tokens per slide. 0: chosen to suit --sink-move.",
            ),
        ]
    )


def compute_options() -> Callable[[F], F]:
    """Flags of speed: batches, threads, devices."""
    return _compose(
        [
            _option(
                "-b",
                "--batch-size",
                "n_batch",
                env="BATCH",
                type=click.IntRange(min=1),
                default=512,
                show_default=True,
                metavar="N",
                help="Most tokens per decode.",
            ),
            _option(
                "-ub",
                "--ubatch-size",
                "n_ubatch",
                env="UBATCH",
                type=click.IntRange(min=1),
                default=512,
                show_default=True,
                metavar="N",
                help="Most tokens computed at once.",
            ),
            _option(
                "-t",
                "--threads",
                "n_threads",
                env="THREADS",
                type=click.IntRange(min=-1),
                default=-1,
                metavar="N",
                help="CPU threads for generation. -1: chosen for this machine.",
            ),
            _option(
                "-tb",
                "--threads-batch",
                "n_threads_batch",
                type=click.IntRange(min=-1),
                default=-1,
                metavar="N",
                help="CPU threads for prompts. -1: as --threads.",
            ),
            _option(
                "-ngl",
                "--gpu-layers",
                "--n-gpu-layers",
                "n_gpu_layers",
                env="N_GPU_LAYERS",
                type=GpuLayers(),
                default="auto",
                show_default=True,
                help="Layers to hold on the GPU.",
            ),
            _option(
                "-fa",
                "--flash-attn",
                "flash_attn",
                env="FLASH_ATTN",
                type=click.Choice(["on", "off", "auto"]),
                default="auto",
                show_default=True,
                help="Flash attention.",
            ),
            _option(
                "--mmap/--no-mmap",
                "use_mmap",
                default=True,
                show_default=True,
                help="Map the model file instead of reading it.",
            ),
            _option("-v", "--verbose", is_flag=True, help="Show llama.cpp's own messages."),
        ]
    )


def predict_option(default: int = -1) -> Callable[[F], F]:
    """The `-n/--predict` flag."""
    return _option(
        "-n",
        "--predict",
        "--n-predict",
        "--max-tokens",
        "n_predict",
        env="N_PREDICT",
        type=click.IntRange(min=-1),
        default=default,
        show_default=True,
        metavar="N",
        help="Tokens to generate. -1: until the model ends its text.",
    )


def sampling_options() -> Callable[[F], F]:
    """Flags of the sampler."""
    return _compose(
        [
            _option(
                "-s",
                "--seed",
                type=click.IntRange(min=-1, max=2**32 - 1),
                default=-1,
                show_default=True,
                metavar="N",
                help="Seed of the sampler. -1: a new one each time.",
            ),
            _option(
                "--temp",
                "--temperature",
                "temp",
                env="TEMPERATURE",
                type=Number(0),
                default=0.8,
                show_default=True,
                help="Temperature. 0: always the likeliest token.",
            ),
            _option(
                "--top-k",
                env="TOP_K",
                type=click.IntRange(min=0),
                default=40,
                show_default=True,
                metavar="N",
                help="Sample from the N likeliest tokens. 0: off.",
            ),
            _option(
                "--top-p",
                env="TOP_P",
                type=Number(0, 1),
                default=0.95,
                show_default=True,
                help="Sample from the likeliest tokens of this total probability. 1: off.",
            ),
            _option(
                "--min-p",
                env="MIN_P",
                type=Number(0, 1),
                default=0.05,
                show_default=True,
                help="Drop tokens below this share of the best one's probability. 0: off.",
            ),
            _option(
                "--repeat-penalty",
                env="REPEAT_PENALTY",
                type=Number(0),
                default=1.0,
                show_default=True,
                help="Penalise repeated tokens. 1: off.",
            ),
            _option(
                "--repeat-last-n",
                type=click.IntRange(min=0, max=4096),
                default=64,
                show_default=True,
                metavar="N",
                help="Tokens that penalties look back on. 0: off.",
            ),
            _option(
                "--frequency-penalty",
                env="FREQUENCY_PENALTY",
                type=Number(),
                default=0.0,
                show_default=True,
                help="Penalty that grows with each use of a token.",
            ),
            _option(
                "--presence-penalty",
                env="PRESENCE_PENALTY",
                type=Number(),
                default=0.0,
                show_default=True,
                help="Penalty for any token used already.",
            ),
            _option(
                "--logit-bias",
                type=LogitBias(),
                multiple=True,
                help="Make a token likelier (15043+1) or rarer (15043-1). May be repeated.",
            ),
            _option("--grammar", metavar="GBNF", help="Grammar that the text must follow."),
            _option(
                "--grammar-file", metavar="FILE", type=click.Path(dir_okay=False), help="File with a grammar."
            ),
            _option("-j", "--json-schema", metavar="SCHEMA", help="JSON schema that the text must follow."),
            _option(
                "-r",
                "--reverse-prompt",
                "stop",
                multiple=True,
                metavar="TEXT",
                help="Stop when the model writes TEXT. May be repeated.",
            ),
            _option("--ignore-eos", is_flag=True, help="Go on when the model wants to end its text."),
        ]
    )


_SAMPLING = (
    "seed",
    "temp",
    "top_k",
    "top_p",
    "min_p",
    "repeat_penalty",
    "repeat_last_n",
    "frequency_penalty",
    "presence_penalty",
)


def make_sampling(flags: dict[str, Any]) -> Sampling:
    """The sampler that the flags describe."""
    from edge_stream.stream import Sampling

    grammar, schema = flags["grammar"], flags["json_schema"]
    if sum(bool(given) for given in (grammar, flags["grammar_file"], schema)) > 1:
        raise click.UsageError("Give only one of --grammar, --grammar-file and --json-schema.")
    if flags["grammar_file"]:
        from edge_stream.cli.console import read_text

        grammar = read_text(Path(flags["grammar_file"]))
    if schema is not None:
        try:
            schema = json.loads(schema)
        except ValueError as error:
            raise click.BadParameter(f"not valid JSON: {error}", param_hint="'--json-schema'") from None
        if not isinstance(schema, dict):
            raise click.BadParameter("a schema is a JSON object.", param_hint="'--json-schema'")
    return Sampling(
        **{name: flags[name] for name in _SAMPLING},
        logit_bias=dict(flags["logit_bias"]),
        grammar=grammar,
        json_schema=schema,
    )


_ENGINE = (
    "n_batch",
    "n_ubatch",
    "cache_type_k",
    "cache_type_v",
    "flash_attn",
    "n_gpu_layers",
    "sink_move",
    "n_slide",
    "use_mmap",
    "verbose",
)


def load_engine(flags: dict[str, Any], pinned: Callable[[Engine], int] | None = None) -> Engine:
    """Load the model that the flags name; `-c 0` is resolved to the model's training length and said.

    pinned: counts the tokens that will be pinned, if that takes the model's tokenizer to know.
    """
    from edge_stream.engine import Engine

    settings = {name: flags[name] for name in _ENGINE}
    for name in ("n_threads", "n_threads_batch"):
        settings[name] = flags[name] if flags[name] > 0 else None
    # -1 (the whole prompt) is known only once the prompt is: the stream is given its own n_keep then.
    n_keep = SINKS_DEFAULT if flags["n_keep"] < 0 else flags["n_keep"]
    engine = Engine.load(flags["model"], n_ctx=flags["n_ctx"], n_keep=n_keep, **settings)
    n_pinned = pinned(engine) if pinned else 0
    if engine.sink_move == "redecode" and n_keep < n_pinned < engine.n_ctx:
        # Redecoding needs room beside the cache for the sinks, which is set aside when the model is loaded.
        engine.close()
        engine = Engine.load(flags["model"], n_ctx=flags["n_ctx"], n_keep=n_pinned, **settings)
    if flags["n_ctx"] == 0:
        click.echo(f"ctx-size 0: using the model's training length, {engine.n_ctx} tokens", err=True)
    return engine
