"""MLC's conversation templates, derived from Jinja ones of the field's shapes (written for these tests)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edge_stream.converters.mlc import conv_templates
from edge_stream.converters.mlc.conv_templates import as_prompt, derive
from edge_stream.converters.mlc.jinja_template import ChatTemplate
from edge_stream.errors import EdgeStreamError

TOKENS = {"bos": "<s>", "eos": "</s>"}
IDS = {"bos": 1, "eos": 2}
_ROLES = "{% for m in messages %}"
_ASK = "{% if add_generation_prompt %}"

TEMPLATES = {
    "chatml": _ROLES
    + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    + _ASK
    + "<|im_start|>assistant\n{% endif %}",
    "chatml-default-system": "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    + _ROLES
    + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    + _ASK
    + "<|im_start|>assistant\n{% endif %}",
    "llama-3": "{{ bos_token }}"
    + _ROLES
    + "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}"
    + _ASK
    + "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
    "mistral": "{{ bos_token }}"
    + _ROLES
    + "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% elif m.role == 'assistant' %}"
    + " {{ m.content }}{{ eos_token }}"
    + "{% else %}{{ raise_exception('Only user and assistant roles are supported') }}{% endif %}{% endfor %}",
    "system-in-first-question": "{{ bos_token }}{% if messages[0].role == 'system' %}"
    + "{% set system = messages[0].content %}"
    + "{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}{% for m in rest %}"
    + "{% if m.role == 'user' %}[INST] {% if loop.first and system is defined %}{{ system }}\n\n{% endif %}"
    + "{{ m.content }}[/INST]"
    + "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}",
    "gemma": "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    + _ROLES
    + "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    + "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    + _ASK
    + "<start_of_turn>model\n{% endif %}",
    "ignores-system": _ROLES
    + "{% if m.role != 'system' %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    + _ASK
    + "<|assistant|>{% endif %}",
    # as Mistral's of July 2024
    "system-in-last-question": "{{ bos_token }}{% if messages[0].role == 'system' %}"
    + "{% set system = messages[0].content %}"
    + "{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}{% for m in rest %}"
    + "{% if m.role == 'user' %}[INST] {% if loop.last and system is defined %}{{ system }}\n\n{% endif %}"
    + "{{ m.content }}[/INST]"
    + "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}",
    "phi-3": _ROLES
    + "<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    + _ASK
    + "<|assistant|>\n{% else %}</s>{% endif %}",
    "thinks-first": _ROLES
    + "<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    + _ASK
    + "<|assistant|><think>\n{% endif %}",
}
NO_SYSTEM = {"mistral", "gemma", "ignores-system", "system-in-last-question"}


def conversation(turns: int, system: str | None) -> list[tuple[str, str]]:
    messages = [("system", system)] if system is not None else []
    for i in range(turns):
        messages += [("user", f"question {i}"), ("assistant", f"answer {i}")]
    return messages[:-1]


@pytest.mark.parametrize("name", TEMPLATES)
def test_derived_template_writes_the_same(name: str) -> None:
    found = derive(TEMPLATES[name], TOKENS, IDS)
    conv = found.value
    assert isinstance(conv, dict)
    jinja = ChatTemplate(TEMPLATES[name], bos_token="<s>", eos_token="</s>")
    for turns in (1, 2, 3):
        messages = conversation(turns, None if name in NO_SYSTEM else "You know much.")
        text = jinja.render([{"role": r, "content": c} for r, c in messages])
        prefix = "<s>" if conv.get("system_prefix_token_ids") == [1] else ""
        assert prefix + as_prompt(conv, [*messages, ("assistant", None)]) == text
    assert bool(conv.get("system_prefix_token_ids")) == TEMPLATES[name].startswith("{{ bos_token }}")
    assert conv["stop_token_ids"] == [2]


def test_the_pieces_have_their_usual_places() -> None:
    conv = derive(TEMPLATES["llama-3"], TOKENS, IDS).value
    assert isinstance(conv, dict)
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    assert conv["roles"]["user"] == header.format("user")
    assert conv["roles"]["assistant"] == header.format("assistant")
    assert conv["seps"] == ["<|eot_id|>", "<|eot_id|>"]
    assert conv["system_template"] == header.format("system") + "{system_message}<|eot_id|>"


def test_default_system_message_is_found_and_said_otherwise() -> None:
    found = derive(TEMPLATES["chatml-default-system"], TOKENS, IDS)
    assert isinstance(found.value, dict) and found.value["system_message"] == "Be kind." and not found.notes
    assert "writes no system message" in derive(TEMPLATES["chatml"], TOKENS, IDS).notes[0]


@pytest.mark.parametrize("name", sorted(NO_SYSTEM))
def test_a_system_message_without_a_place_begins_the_first_question(name: str) -> None:
    found = derive(TEMPLATES[name], TOKENS, IDS)
    conv = found.value
    assert isinstance(conv, dict)
    assert "no place for a system message: MLC will begin the first question with it" in found.notes[0]
    jinja = ChatTemplate(TEMPLATES[name], bos_token="<s>", eos_token="</s>")
    prefix = "<s>" if conv.get("system_prefix_token_ids") == [1] else ""
    for turns in (1, 2, 3):
        messages = conversation(turns, "Be brief.\n\n")
        merged = [("user", "Be brief.\n\nquestion 0"), *messages[2:]]
        text = jinja.render([{"role": r, "content": c} for r, c in merged])
        assert prefix + as_prompt(conv, [*messages, ("assistant", None)]) == text


def test_gemmas_and_mistrals_system_templates() -> None:
    gemma, mistral = (derive(TEMPLATES[name], TOKENS, IDS).value for name in ("gemma", "mistral"))
    assert isinstance(gemma, dict) and isinstance(mistral, dict)
    assert gemma["system_template"] == "<start_of_turn>user\n{system_message}"
    assert mistral["system_template"] == "[INST] {system_message}"
    assert not gemma["add_role_after_system_message"] and not mistral["add_role_after_system_message"]


def test_a_template_that_looks_at_the_first_question_leaves_the_system_message_out() -> None:
    """It is another template for questions that are longer than any here."""
    template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        + "{% if messages[0].content | length > 25 %}LONG{% endif %}"
        + _ROLES
        + "<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
        + _ASK
        + "<|assistant|>{% endif %}"
    )
    found = derive(template, TOKENS, IDS)
    assert isinstance(found.value, dict) and "{system_message}" not in found.value["system_template"]
    assert found.value["add_role_after_system_message"]
    assert found.notes == ("the chat template takes no system message in a way that MLC can express: it is left out",)


def test_answers_begin_where_the_template_begins_them() -> None:
    conv = derive(TEMPLATES["thinks-first"], TOKENS, IDS).value
    assert isinstance(conv, dict)
    assert conv["role_empty_sep"] == "<think>\n" and conv["roles"]["assistant"] == "<|assistant|>"


@pytest.mark.parametrize(
    "template",
    [
        _ROLES + "{{ loop.index }} {{ m.role }}: {{ m.content }}\n{% endfor %}",  # numbered turns
        _ROLES + "{{ m.role }}: {{ m.content | upper }}\n{% endfor %}",
        "{{ messages[-1].role }}: {{ messages[-1].content }}",  # forgets the past
        _ROLES + "{{ m.content | length }}{{ m.content }}{% endfor %}",
        "{{ messages.nothing.here }}",
        "{% for %}",
    ],
)
def test_templates_beyond_fixed_strings_are_refused(template: str) -> None:
    with pytest.raises(EdgeStreamError):
        derive(template, TOKENS, IDS)


def test_a_given_template_wins(tmp_path: Path) -> None:
    chosen = conv_templates.choose("llama-3", TEMPLATES["chatml"], TOKENS, IDS, add_bos=False)
    assert chosen.value == "llama-3" and "Python package" in chosen.notes[0]
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"roles": {"user": "U:"}, "seps": ["\n"], "stop_token_ids": []}))
    assert conv_templates.choose(str(path), None, TOKENS, IDS, add_bos=False).value == json.loads(path.read_text())
    for bad in ("{", "[]", '{"roles": 1, "seps": []}'):
        path.write_text(bad)
        with pytest.raises(EdgeStreamError, match="conversation template"):
            conv_templates.choose(str(path), None, TOKENS, IDS, add_bos=False)
    with pytest.raises(EdgeStreamError, match="cannot read conversation template"):
        conv_templates.choose(str(tmp_path / "none.json"), None, TOKENS, IDS, add_bos=False)


def test_a_model_without_template_completes() -> None:
    found = conv_templates.choose(None, None, TOKENS, IDS, add_bos=True)
    assert isinstance(found.value, dict) and "no chat template" in found.notes[0]
    assert as_prompt(found.value, [("user", "Once"), ("assistant", None)]) == "Once"
    assert found.value["system_prefix_token_ids"] == [1]
