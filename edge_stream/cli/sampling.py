"""Flags of the sampler, with llama.cpp's names, defaults and environment variables."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_stream.cli.options import Count, F, compose, option
from edge_stream.errors import EdgeStreamError
from edge_stream.text import parse_json

if TYPE_CHECKING:
    from edge_stream.sampling import Sampling


class Number(click.ParamType):  # type: ignore[type-arg]
    """A finite float within bounds; click's FloatRange accepts nan."""

    name = "number"

    def __init__(self, low: float = -math.inf, high: float = math.inf) -> None:
        self.low, self.high = low, high

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number; fails unless it is finite and in range."""
        try:
            number = float(value)
        except ValueError:
            self.fail(f"{value!r} is not a number.", param, ctx)
        if not math.isfinite(number) or not self.low <= number <= self.high:
            self.fail(f"{value} is not between {self.low:g} and {self.high:g}.", param, ctx)
        return number


class SamplerOrder(click.ParamType):  # type: ignore[type-arg]
    """Names of samplers separated by semicolons, or llama.cpp's letters."""

    def __init__(self, letters: bool) -> None:
        self.name, self.letters = ("SEQUENCE", True) if letters else ("SAMPLERS", False)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        """The names, in order."""
        if isinstance(value, tuple):
            return value
        if not self.letters:
            return tuple(name for name in value.split(";") if name)
        from edge_stream.sampling import samplers_of

        try:
            return samplers_of(value)
        except EdgeStreamError as error:
            self.fail(str(error), param, ctx)


class LogitBias(click.ParamType):  # type: ignore[type-arg]
    """TOKEN+BIAS or TOKEN-BIAS, as in 15043+1 or 15043-inf."""

    name = "TOKEN(+/-)BIAS"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, float]:
        """(token, bias)."""
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


def predict_option(default: int = -1) -> Callable[[F], F]:
    """The `-n/--predict` flag."""
    return option(
        "-n",
        "--predict",
        "--n-predict",
        "--max-tokens",
        "n_predict",
        env="N_PREDICT",
        type=Count(min=-1),
        default=default,
        help="Tokens to generate. -1: until the model ends its text.",
    )


def loop_guard_option(default: bool) -> Callable[[F], F]:
    """The `--loop-guard/--no-loop-guard` flag."""
    return option(
        "--loop-guard/--no-loop-guard",
        default=default,
        help="End an answer in which the model repeats the same tokens over and over.",
    )


_LAST_N = Count(min=-1, max=2**20)


def _number(
    *names: str, default: float, help: str, kind: click.ParamType[Any] | None = None, env: bool = False
) -> Callable[[F], F]:
    """A flag with a number, named after its first name unless a name is given for it."""
    named = next(name for name in names if name.startswith("--")).lstrip("-").replace("-", "_")
    kind = kind or Number()
    return option(*names, env=named.upper() if env else None, type=kind, default=default, help=help)


# Flags of the sampler.
sampling_options = compose(
    option("-s", "--seed", type=Count(min=-1, max=2**32 - 1), default=-1, help="Seed of the sampler. -1: random."),
    option(
        "--samplers",
        type=SamplerOrder(letters=False),
        default="penalties;dry;top_n_sigma;top_k;typ_p;top_p;min_p;xtc;temperature",
        help="Samplers in order. There are also infill and adaptive_p.",
    ),
    option(
        "--sampler-seq",
        "--sampling-seq",
        "sampler_seq",
        type=SamplerOrder(letters=True),
        default=None,
        help="The same in letters: e d s k y p m x t, i and a. It wins over --samplers.",
    ),
    option(
        "--temp",
        "--temperature",
        "temp",
        env="TEMPERATURE",
        type=Number(0),
        default=0.8,
        help="Temperature. 0: always the most likely token.",
    ),
    _number("--top-k", env=True, kind=Count(min=-1), default=40, help="Sample from the N most likely tokens. 0: off."),
    _number(
        "--top-p",
        env=True,
        kind=Number(0, 1),
        default=0.95,
        help="Sample from the most likely tokens whose probabilities add up to this. 1: off.",
    ),
    _number(
        "--min-p",
        env=True,
        kind=Number(0, 1),
        default=0.05,
        help="Drop tokens below this fraction of the best token's probability. 0: off.",
    ),
    _number(
        "--top-n-sigma",
        "--top-nsigma",
        default=-1.0,
        help="Drop tokens more than this many standard deviations of the logits below the best. -1: off.",
    ),
    _number(
        "--xtc-probability", kind=Number(0, 1), default=0.0, help="How often XTC drops the likeliest tokens. 0: off."
    ),
    _number("--xtc-threshold", kind=Number(0), default=0.1, help="Probability of tokens that XTC drops. > 0.5: off."),
    _number("--typical-p", "--typical", kind=Number(0), default=1.0, help="Locally typical sampling. 1: off."),
    _number("--min-keep", kind=Count(min=0), default=0, help="Tokens that each of these samplers leaves at least."),
    _number("--dynatemp-range", default=0.0, help="Dynamic temperature: temp - range to temp + range. 0: off."),
    _number("--dynatemp-exp", "dynatemp_exponent", default=1.0, help="How the temperature follows the entropy."),
    _number("--repeat-penalty", env=True, kind=Number(0), default=1.0, help="Penalise repeated tokens. 1: off."),
    _number(
        "--repeat-last-n",
        kind=_LAST_N,
        default=64,
        help="Tokens that the penalties look back on. 0: off. -1: the context's size.",
    ),
    _number("--frequency-penalty", env=True, default=0.0, help="Penalty per use of a token."),
    _number("--presence-penalty", env=True, default=0.0, help="Penalty for tokens that were used."),
    _number("--dry-multiplier", default=0.0, help="DRY: penalty of tokens that continue a repetition. 0: off."),
    _number("--dry-base", kind=Number(1), default=1.75, help="By how much it grows with each repeated token."),
    _number("--dry-allowed-length", kind=Count(min=0), default=2, help="Repeated tokens without a penalty."),
    _number(
        "--dry-penalty-last-n",
        kind=_LAST_N,
        default=64,
        help="Tokens that are searched for repetitions. 0: off. -1: the context's size.",
    ),
    option(
        "--dry-sequence-breaker",
        "dry_sequence_breakers",
        metavar="TEXT",
        multiple=True,
        default=("\n", ":", '"', "*"),
        show_default=False,
        help='Text that ends a repetition, instead of newline, : " and *. Repeatable; none: no text.',
    ),
    _number("--mirostat", kind=Count(0, 2), default=0, help="Mirostat 1 or 2, instead of the other samplers. 0: off."),
    _number("--mirostat-lr", "mirostat_eta", default=0.1, help="Mirostat's learning rate."),
    _number("--mirostat-ent", "mirostat_tau", default=5.0, help="The entropy that mirostat aims at."),
    _number(
        "--adaptive-target",
        kind=Number(high=1),
        default=-1.0,
        help="The probability that adaptive_p, if among the samplers, aims at. Negative: off.",
    ),
    _number("--adaptive-decay", kind=Number(0, 0.99), default=0.9, help="How slowly adaptive_p forgets."),
    option(
        "-l",
        "--logit-bias",
        type=LogitBias(),
        multiple=True,
        help="Make a token more (15043+1) or less (15043-1) likely. Repeatable.",
    ),
    option("--grammar", metavar="GBNF", help="Grammar that the text must match."),
    option("--grammar-file", metavar="FILE", type=click.Path(dir_okay=False), help="A file with a grammar."),
    option("-j", "--json-schema", metavar="SCHEMA", help="JSON schema that the text must match."),
    option("-jf", "--json-schema-file", metavar="FILE", type=click.Path(dir_okay=False), help="A file with a schema."),
    option(
        "-r",
        "--reverse-prompt",
        "stop",
        multiple=True,
        metavar="TEXT",
        help="Stop when the model writes TEXT. Repeatable.",
    ),
    option("--ignore-eos", is_flag=True, help="Continue when the model ends its text."),
)


def make_sampling(flags: dict[str, Any]) -> Sampling:
    """The sampler that the flags describe. Raises UsageError or EdgeStreamError."""
    from edge_stream.sampling import NUMBERS, Sampling

    grammar, schema = flags["grammar"], flags["json_schema"]
    if sum(bool(given) for given in (grammar, flags["grammar_file"], schema, flags["json_schema_file"])) > 1:
        raise click.UsageError("Give only one of --grammar, --grammar-file, --json-schema and --json-schema-file.")
    if flags["grammar_file"] or flags["json_schema_file"]:
        from edge_stream.cli.console import read_text

        text = read_text(Path(flags["grammar_file"] or flags["json_schema_file"]))
        grammar, schema = (text, None) if flags["grammar_file"] else (None, text)
    if schema is not None:
        try:
            schema = parse_json(schema)
        except ValueError as error:
            raise click.BadParameter(f"not valid JSON: {error}", param_hint="'--json-schema'") from None
        if not isinstance(schema, dict):
            raise click.BadParameter("a schema must be a JSON object.", param_hint="'--json-schema'")
    breakers = flags["dry_sequence_breakers"]
    return Sampling(
        **{name: flags[name] for name in ("seed", *NUMBERS)},
        samplers=flags["sampler_seq"] if flags["sampler_seq"] is not None else flags["samplers"],
        dry_sequence_breakers=() if "none" in breakers else breakers,
        logit_bias=dict(flags["logit_bias"]),
        grammar=grammar,
        json_schema=schema,
    )
