"""A Jinja sandbox with a deadline and a budget, for templates that come with downloaded files.

Jinja's own sandbox keeps a template from Python's internals and from modifying its input. This one also
ends endless loops, and stops templates that build far more text than they were given.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from types import FrameType
from typing import Any, TypeVar

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

T = TypeVar("T")

_MAX_WIDTH = 1000
_MAX_BITS = 4096

# The methods of str that templates use; others can build long text from short (translate, zfill, ...).
_STR_METHODS = frozenset(
    [
        "capitalize",
        "casefold",
        "count",
        "endswith",
        "find",
        "format",
        "index",
        "isalnum",
        "isalpha",
        "isascii",
        "isdecimal",
        "isdigit",
        "islower",
        "isnumeric",
        "isspace",
        "istitle",
        "isupper",
        "join",
        "lower",
        "lstrip",
        "partition",
        "removeprefix",
        "removesuffix",
        "replace",
        "rfind",
        "rindex",
        "rpartition",
        "rsplit",
        "rstrip",
        "split",
        "splitlines",
        "startswith",
        "strip",
        "swapcase",
        "title",
        "upper",
    ]
)
_UNUSED_FILTERS = ("urlize", "striptags", "wordwrap", "xmlattr", "pprint", "filesizeformat", "random")


class DeadlineError(BaseException):
    """Out of time. A BaseException, so that no `except Exception` on the way catches it."""


class TooBigError(Exception):
    """Out of characters."""


class RefusedError(Exception):
    """The template called raise_exception."""


class Budget:
    """How many characters one rendering may still build."""

    def __init__(self, left: int) -> None:
        self.left = left

    def spend(self, n: int) -> None:
        self.left -= n
        if self.left < 0:
            raise TooBigError

    def weigh(self, value: Any) -> int:
        """Approximate characters of value when printed. Raises TooBigError as soon as it exceeds the budget."""
        total, stack = 0, [value]
        while stack:
            item = stack.pop()
            if isinstance(item, (str, bytes)):
                total += len(item)
            elif isinstance(item, Mapping):
                stack.extend(item.keys())
                stack.extend(item.values())
            elif isinstance(item, (list, tuple, set, frozenset)):
                stack.extend(item)
            elif isinstance(item, int):
                total += 1 + item.bit_length() // 3
            total += 1
            if total + len(stack) > self.left:
                raise TooBigError
        return total


class _Generator(CodeGenerator):
    """Compiles `a ~ b` into a call that the environment meters."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.tilde((")
        for item in node.nodes:
            self.visit(item, frame)
            self.write(", ")
        self.write("))")


class _GenerationTag(Extension):
    """`{% generation %}` marks the assistant's text for training; here only its body is rendered."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


_WIDE_FORMAT = re.compile(r"%[^a-zA-Z%]*(\d{4,}|\*)|\{[^{}]*:[^{}]*(\d{4,}|\{)")


def _check_format(text: Any) -> None:
    """Raise TooBigError for widths such as {:>1000000} and %1000000d, and for widths taken from an argument."""
    if isinstance(text, str) and _WIDE_FORMAT.search(text):
        raise TooBigError


class Sandbox(ImmutableSandboxedEnvironment):
    code_generator_class = _Generator
    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        self.budget = Budget(0)  # replaced for each rendering
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[loopcontrols, _GenerationTag],
            finalize=self._printable,
        )
        for name in _UNUSED_FILTERS:
            del self.filters[name]
        for name, function in list(self.filters.items()):
            self.filters[name] = self._metered(name, function)
        self.filters["tojson"] = self._tojson
        self.filters["join"] = self._join
        self.filters["replace"] = self._replace
        self.globals.pop("lipsum")
        self.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
        self.concat = self._concat  # type: ignore[method-assign]

    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        raise SecurityError(f"it reaches for the attribute {attribute!r} of a {type(obj).__name__}")

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str) and attr not in _STR_METHODS:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            _check_format(left)
            self.budget.spend(len(left) + self.budget.weigh(right))
        elif operator == "*":
            for many, times in ((left, right), (right, left)):
                if isinstance(many, _SIZED) and isinstance(times, int):
                    self.budget.spend(len(many) * max(times, 0))
        elif operator == "+" and isinstance(left, _SIZED) and isinstance(right, _SIZED):
            self.budget.spend(len(left) + len(right))
        if isinstance(left, int) and isinstance(right, int):
            power = operator == "**"
            bits = left.bit_length() * abs(right) if power else left.bit_length() + right.bit_length()
            if bits > _MAX_BITS:
                raise TooBigError
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        method = getattr(__obj, "__wrapped__", __obj)  # jinja2 wraps str.format
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(owner, str):
            if name == "format":
                _check_format(owner)
                __self.budget.spend(len(owner) + __self.budget.weigh([args, kwargs]) * (1 + owner.count("{")))
            elif name == "join":
                return __self._join(args[0] if args else (), owner)
            elif name == "replace":
                return __self._replace(owner, *args)
            else:
                __self.budget.spend(len(owner))
        return super().call(__context, __obj, *args, **kwargs)

    def tilde(self, items: Sequence[Any]) -> str:
        """What `a ~ b` means."""
        return self._concat([self._print(item) for item in items])

    def _printable(self, value: Any) -> Any:
        self.budget.spend(self.budget.weigh(value))
        return value

    def _print(self, value: Any) -> str:
        return str(self._printable(value))

    def _concat(self, items: Any) -> str:
        items = list(items)
        self.budget.spend(sum(map(len, items)))
        return "".join(items)

    def _metered(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def metered(*args: Any, **kwargs: Any) -> Any:
            # Filters may get jinja2's context or environment first, which does not count as input.
            values = [a for a in (*args, *kwargs.values()) if not isinstance(a, _INTERNAL)]
            if any(isinstance(v, int) and abs(v) > _MAX_WIDTH for v in values[1:]):
                raise TooBigError
            if name == "format":
                _check_format(values[0])
            cost = self.budget.weigh(values)
            if name == "indent":  # the only remaining filter that multiplies: lines times width
                width = next((v for v in values[1:] if isinstance(v, (int, str))), 4)
                cost += str(values[0]).count("\n") * (width if isinstance(width, int) else len(width))
            if name not in ("length", "count", "string", "first", "last", "default", "d"):
                self.budget.spend(cost)
            return function(*args, **kwargs)

        # jinja2 marks there whether a filter takes the context or environment first.
        metered.__dict__.update(getattr(function, "__dict__", {}))
        return metered

    def _join(self, value: Any, d: Any = "", attribute: Any = None) -> str:
        items: list[str] = []
        for item in value:
            if items and d:
                items.append(str(d))
                self.budget.spend(len(items[-1]))
            items.append(self._print(item if attribute is None else self.getitem(item, attribute)))
        return self._concat(items)

    def _replace(self, text: Any, old: Any, new: Any, count: int = -1) -> str:
        text, old, new = self._print(text), str(old), str(new)
        self.budget.spend(text.count(old) * len(new))
        return str(text.replace(old, new, -1 if count is None else count))

    def _tojson(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # As in Hugging Face transformers: jinja2's own filter escapes <, > and & for HTML.
        wide = indent if isinstance(indent, int) else len(indent or "")
        if not 0 <= wide <= 16:
            raise TooBigError
        self.budget.spend(self.budget.weigh(value) * (1 + wide))
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


_SIZED = (str, list, tuple)
_INTERNAL = (jinja2.Environment, jinja2.runtime.Context, jinja2.nodes.EvalContext)


def _raise_exception(message: Any = "") -> None:
    raise RefusedError(str(message))


def _strftime_now(form: str) -> str:
    _check_format(form)
    return datetime.now().strftime(form)


def within(seconds: float, work: Callable[[], T]) -> T:
    """Do the work; raise DeadlineError in it if it takes longer than `seconds`.

    A trace function runs at every line of Python and every loop iteration, so nothing escapes it, and
    unlike a signal it works in any thread. A debugger's trace function is restored afterwards.
    """
    end = time.monotonic() + seconds

    def trace(_frame: FrameType, _event: str, _arg: Any) -> Any:
        if time.monotonic() > end:
            raise DeadlineError
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        return work()
    finally:
        sys.settrace(before)
