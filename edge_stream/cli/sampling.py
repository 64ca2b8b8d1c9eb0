"""Flags of the sampler, with llama.cpp's names, defaults and environment variables."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_stream.cli.options import Count, F, compose, option

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


# Flags of the sampler.
sampling_options = compose(
    option("-s", "--seed", type=Count(min=-1, max=2**32 - 1), default=-1, help="Seed of the sampler. -1: random."),
    option(
        "--temp",
        "--temperature",
        "temp",
        env="TEMPERATURE",
        type=Number(0),
        default=0.8,
        help="Temperature. 0: always the most likely token.",
    ),
    option("--top-k", env="TOP_K", type=Count(min=0), default=40, help="Sample from the N most likely tokens. 0: off."),
    option(
        "--top-p",
        env="TOP_P",
        type=Number(0, 1),
        default=0.95,
        help="Sample from the most likely tokens whose probabilities add up to this. 1: off.",
    ),
    option(
        "--min-p",
        env="MIN_P",
        type=Number(0, 1),
        default=0.05,
        help="Drop tokens below this fraction of the best token's probability. 0: off.",
    ),
    option(
        "--repeat-penalty", env="REPEAT_PENALTY", type=Number(0), default=1.0, help="Penalise repeated tokens. 1: off."
    ),
    option(
        "--repeat-last-n",
        type=Count(min=0, max=4096),
        default=64,
        help="Tokens that the penalties look back on. 0: off.",
    ),
    option(
        "--frequency-penalty", env="FREQUENCY_PENALTY", type=Number(), default=0.0, help="Penalty per use of a token."
    ),
    option(
        "--presence-penalty",
        env="PRESENCE_PENALTY",
        type=Number(),
        default=0.0,
        help="Penalty for tokens that were used.",
    ),
    option(
        "--logit-bias",
        type=LogitBias(),
        multiple=True,
        help="Make a token more (15043+1) or less (15043-1) likely. Repeatable.",
    ),
    option("--grammar", metavar="GBNF", help="Grammar that the text must match."),
    option("--grammar-file", metavar="FILE", type=click.Path(dir_okay=False), help="A file with a grammar."),
    option("-j", "--json-schema", metavar="SCHEMA", help="JSON schema that the text must match."),
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
    """The sampler that the flags describe. Raises UsageError or EdgeStreamError."""
    from edge_stream.sampling import Sampling

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
            raise click.BadParameter("a schema must be a JSON object.", param_hint="'--json-schema'")
    return Sampling(
        **{name: flags[name] for name in _SAMPLING},
        logit_bias=dict(flags["logit_bias"]),
        grammar=grammar,
        json_schema=schema,
    )
