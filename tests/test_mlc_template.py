"""Chat templates: what honest ones write, and that hostile ones are stopped."""

from __future__ import annotations

import sys
import threading

import pytest

from edge_stream.converters.mlc.jinja_template import ChatTemplate
from edge_stream.errors import EdgeStreamError

HI = [{"role": "user", "content": "hi"}]


def render(source: str, messages: list[dict[str, str]] = HI, **settings: float) -> str:
    return ChatTemplate(source, bos_token="<s>", eos_token="</s>", **settings).render(messages)


def test_features_that_templates_use() -> None:
    assert render("{%- for m in messages %}\n  {% if m.tool is not defined %}\n{{ m.content|trim }}|"
                  "{{ m['role'].upper() }}\n  {% endif %}\n{% endfor %}") == "hi|USER\n"  # fmt: skip
    assert render("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"
    assert render("{{ {'a': 'é<'}|tojson }}") == '{"a": "é<"}'
    assert render("{{ {'a': 1}|tojson(indent=2) }}") == '{\n  "a": 1\n}'
    assert len(render("{{ strftime_now('%d %b %Y') }}")) == 11
    assert render("{% generation %}{{ bos_token ~ 'x' ~ 1 }}{% endgeneration %}") == "<s>x1"
    assert render("{{ 'a-b'.split('-')|join('+') ~ ', '.join(['c', 'd']) }}") == "a+bc, d"
    assert render("{{ 'ab'.replace('b', 'c') ~ ('x' * 3) ~ '%s 2024' % 7 ~ '{:>3}'.format(1) }}") == "acxxx7 2024  1"
    assert (
        render("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}")
        == "1"
    )
    assert (
        render(
            "{% macro f(x) %}[{{ x }}]{% endmacro %}"
            "{{ messages|map(attribute='role')|map('upper')|list|length }}{{ f(2) }}"
        )
        == "1[2]"
    )
    assert render("{{ nothing }}{{ messages[0].nothing }}") == ""


def test_raise_exception_says_what_the_template_says() -> None:
    with pytest.raises(EdgeStreamError, match="refuses the conversation: roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")


def test_syntax_error_names_the_line() -> None:
    with pytest.raises(EdgeStreamError, match=r"not valid Jinja \(line 2\)"):
        render("\n{% if %}")


LOOPS = [
    "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "{% for i in range(100000) %}{% for j in range(100000) %}{% set x = j %}{% endfor %}{% endfor %}",
    "{{ range(100000)|map('string')|list|length }}" * 2000,
]


@pytest.mark.parametrize("source", LOOPS)
def test_endless_loop_is_stopped(source: str) -> None:
    with pytest.raises(EdgeStreamError, match="was stopped"):
        render(source, max_seconds=0.2)


def test_deadline_works_in_any_thread_and_puts_the_trace_function_back() -> None:
    errors: list[str] = []

    def trace(*_: object) -> None:
        return None

    def work() -> None:
        sys.settrace(trace)
        try:
            render(LOOPS[0], max_seconds=0.2)
        except EdgeStreamError as error:
            errors.append(str(error))
        errors.append("back" if sys.gettrace() is trace else "lost")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    assert len(errors) == 2
    assert "0.2 seconds" in errors[0]
    assert errors[1] == "back"


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__ }}",
        "{{ ''['__class__'] }}",
        "{{ ''|attr('__class__') }}",
        "{{ messages|map('attr', '__class__')|list }}",
        "{{ '{0.__class__}'.format(1) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ self.__init__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{{ 'x'.translate({120: 'y'}) }}",
        "{{ 'x'.encode() }}",
    ],
)
def test_internals_are_out_of_reach(source: str) -> None:
    with pytest.raises(EdgeStreamError, match="reaches for the attribute"):
        render(source)


DOUBLING = "{{% set ns = namespace(s='aaaaaaaa') %}}{{% for i in range(64) %}}{{% set ns.s = {} %}}{{% endfor %}}"


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(10**9) %}{% endfor %}",
        "{% for i in range(100000) %}{{ 'x' * 1000 }}{% endfor %}",
        DOUBLING.format("ns.s ~ ns.s"),
        DOUBLING.format("ns.s + ns.s"),
        DOUBLING.format("ns.s * 2"),
        DOUBLING.format("[ns.s, ns.s]|join"),
        DOUBLING.format("''.join([ns.s, ns.s])"),
        DOUBLING.format("ns.s|replace('a', ns.s)"),
        DOUBLING.format("ns.s.replace('a', ns.s)"),
        DOUBLING.format("'%s%s' % (ns.s, ns.s)"),
        DOUBLING.format("'{0}{0}'.format(ns.s)"),
        DOUBLING.format("[ns.s, ns.s]|tojson"),
        DOUBLING.format("[ns.s, ns.s]|string"),
        "{% set ns = namespace(n=3) %}{% for i in range(64) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
        "{{ 'a' * 10**9 }}",
        "{{ [0] * 10**9 }}",
        "{{ 9 ** (9 ** 9) }}",
        "{{ '%999999999d' % 1 }}",
        "{{ '%*d' % (999999999, 1) }}",
        "{{ '{:>999999999}'.format(1) }}",
        "{{ '{:>{}}'.format(1, 999999999) }}",
        "{{ 'a'|center(10**9) }}",
        "{{ 'a'|indent(10**9) }}",
        "{{ {'a': 1}|tojson(indent=10**9) }}",
        "{{ strftime_now('%999999999d') }}",
        "{{ [[['a' * 100000] * 1000] * 1000] }}",
        "{% set x %}{% for i in range(100000) %}{{ 'x' * 1000 }}{% endfor %}{% endset %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_building_much_from_little_is_stopped(source: str) -> None:
    with pytest.raises(EdgeStreamError, match="was stopped: it builds far more") as caught:
        render(source, max_characters=1_000_000)
    assert "\n" not in str(caught.value)


def test_a_long_honest_conversation_is_within_the_budget() -> None:
    messages = [{"role": "user", "content": "x" * 100_000}] * 20
    assert len(ChatTemplate(None, max_characters=1000).render(messages)) > 2_000_000


def test_an_error_does_not_spoil_the_next_rendering() -> None:
    template = ChatTemplate("{% if messages|length > 1 %}{{ 'x' * 10**8 }}{% endif %}ok")
    with pytest.raises(EdgeStreamError):
        template.render(HI * 2)
    assert template.render(HI) == "ok"


def test_chatml_only_without_a_template_and_it_says_so() -> None:
    assert ChatTemplate(None).is_fallback
    assert not ChatTemplate("x").is_fallback
    assert ChatTemplate(None).render(HI) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
