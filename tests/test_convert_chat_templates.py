"""Chat templates on their way: from a checkpoint's files to GGUF's keys, from GGUF to GGUF, and into an MLC folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import tiny_checkpoints as tiny

from edge_stream import Engine
from edge_stream.converters import chat_templates, mlc, to_gguf
from edge_stream.errors import EdgeStreamError
from edge_stream.mlc.folder import MlcFolder
from edge_stream.models.conversion import open_source
from edge_stream.native import libraries

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOLS = CHATML.replace("\n{{", " with tools\n{{")
RAG = CHATML.replace("\n{{", " with sources\n{{")
NAMED = [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": TOOLS}]
JINJA, PROCESSOR, MORE = "chat_template.jinja", "chat_template.json", "additional_chat_templates"

# tokenizer_config.json's chat_template, other files, the templates found
SOURCES: dict[str, tuple[Any, dict[str, str], dict[str, str]]] = {
    "none": (None, {}, {}),
    "empty": ("", {}, {}),
    "a text": (CHATML, {}, {"default": CHATML}),
    "a list": (NAMED, {}, {"default": CHATML, "tool_use": TOOLS}),
    "by name": ({"default": CHATML, "rag": RAG}, {}, {"default": CHATML, "rag": RAG}),
    "a list without a default": (NAMED[1:], {}, {"tool_use": TOOLS}),
    "jinja": (None, {JINJA: CHATML}, {"default": CHATML}),
    "jinja comes before the config": (NAMED, {JINJA: RAG}, {"default": RAG}),
    "several jinja files": (
        RAG,
        {JINJA: CHATML, f"{MORE}/tool_use.jinja": TOOLS, f"{MORE}/rag.jinja": RAG, f"{MORE}/note.txt": "no"},
        {"default": CHATML, "tool_use": TOOLS, "rag": RAG},
    ),
    "additional jinja beside the config": (
        CHATML,
        {f"{MORE}/tool_use.jinja": TOOLS},
        {"default": CHATML, "tool_use": TOOLS},
    ),
    "a processor's": (None, {PROCESSOR: json.dumps({"chat_template": CHATML})}, {"default": CHATML}),
    "the config comes before a processor's": (
        CHATML,
        {PROCESSOR: json.dumps({"chat_template": RAG})},
        {"default": CHATML},
    ),
    "jinja comes before a processor's": (
        None,
        {PROCESSOR: json.dumps({"chat_template": RAG}), JINJA: TOOLS},
        {"default": TOOLS},
    ),
    "a processor's list": (
        None,
        {PROCESSOR: json.dumps({"chat_template": NAMED})},
        {"default": CHATML, "tool_use": TOOLS},
    ),
}


def checkpoint(folder: Path, config: Any, files: dict[str, str]) -> Path:
    """A tiny checkpoint with these chat templates."""
    tiny.write_tiny(folder, "smollm")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    settings |= {} if config is None else {"chat_template": config}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


def convert(source: Path, out: Path, **options: Any) -> list[str]:
    """To GGUF, or to MLC if the name has no suffix; what was said."""
    said: list[str] = []
    opened = open_source(str(source))
    if out.suffix:
        to_gguf.convert(opened, out, to_gguf.GgufOptions(**options), said.append)
    else:
        mlc.convert(opened, out, mlc.MlcOptions(**options), said.append)
    opened.close()
    return said


def of_file(path: Path) -> dict[str, str]:
    """The templates of a GGUF file by the gguf package's keys, all of which must agree with the list of names."""
    fields = {k: f.contents() for k, f in gguf.GGUFReader(path).fields.items() if "chat_template" in k}
    names = fields.pop(gguf.Keys.Tokenizer.CHAT_TEMPLATES, [])
    found = {name: fields.pop(gguf.Keys.Tokenizer.CHAT_TEMPLATE_N.format(name=name)) for name in names}
    if gguf.Keys.Tokenizer.CHAT_TEMPLATE in fields:
        found["default"] = fields.pop(gguf.Keys.Tokenizer.CHAT_TEMPLATE)
    assert not fields
    return found


@pytest.mark.parametrize("name", SOURCES)
def test_the_templates_of_a_checkpoint(name: str, tmp_path: Path) -> None:
    config, files, expected = SOURCES[name]
    said = convert(checkpoint(tmp_path / "hf", config, files), tmp_path / "m.gguf")
    assert of_file(tmp_path / "m.gguf") == expected
    line = next(line for line in said if line.startswith("chat template"))
    assert set(line.removeprefix("chat template").strip().split(", ")) == (set(expected) or {"none"})


def test_llama_cpp_finds_them_and_gguf_to_gguf_keeps_them(tmp_path: Path) -> None:
    config, files, expected = SOURCES["several jinja files"]
    convert(checkpoint(tmp_path / "hf", config, files), tmp_path / "a.gguf", outtype="f32")
    convert(tmp_path / "a.gguf", tmp_path / "b.gguf", quantize="Q8_0")
    convert(tmp_path / "b.gguf", tmp_path / "c.gguf", outtype="f16")
    assert of_file(tmp_path / "c.gguf") == expected
    llama = libraries.llama()
    with Engine.load(tmp_path / "c.gguf", n_ctx=64) as engine:
        assert engine.chat_template == CHATML
        for name in ("tool_use", "rag"):
            assert llama.llama_model_chat_template(engine.backend.model, name.encode()).decode() == expected[name]


def test_names_in_gguf_are_those_of_the_gguf_package(tmp_path: Path) -> None:
    """It writes a name's other letters as _. Two names that become one are refused."""
    more = {f"{MORE}/tool-use.jinja": TOOLS}
    convert(checkpoint(tmp_path / "hf", CHATML, more), tmp_path / "m.gguf")
    assert of_file(tmp_path / "m.gguf") == {"default": CHATML, "tool_use": TOOLS}
    folder = checkpoint(tmp_path / "two", CHATML, {**more, f"{MORE}/tool_use.jinja": RAG})
    with pytest.raises(EdgeStreamError, match="the chat templates 'tool-use' and 'tool_use' have one name in GGUF"):
        convert(folder, tmp_path / "n.gguf")


@pytest.mark.parametrize("kind", ["hf", "gguf"])
@pytest.mark.parametrize("name", ["several jinja files", "a processor's", "a list", "a text"])
def test_an_mlc_folder_keeps_them_and_says_what_mlc_does_not_hold(name: str, kind: str, tmp_path: Path) -> None:
    config, files, expected = SOURCES[name]
    source = checkpoint(tmp_path / "hf", config, files)
    if kind == "gguf":
        convert(source, tmp_path / "m.gguf")
        source = tmp_path / "m.gguf"
    said = convert(source, tmp_path / "out")
    chat = json.loads((tmp_path / "out" / "mlc-chat-config.json").read_text())
    assert chat["conv_template"]["roles"]["user"] == "<|im_start|>user\n"
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert chat_templates.of_config(settings, "") == expected
    assert isinstance(settings["chat_template"], str) == (len(expected) == 1)
    assert settings["eos_token"] == "<|im_end|>"  # the rest of the file is as it was
    notes = [line for line in said if "stay in tokenizer_config.json only" in line]
    assert len(notes) == (len(expected) > 1)
    assert all(other in note for note in notes for other in expected if other != "default")
    MlcFolder(tmp_path / "out").write_vocab(tmp_path / "vocab.gguf")
    assert of_file(tmp_path / "vocab.gguf") == expected


def _into_a_link(folder: Path) -> None:
    (folder.parent / "secret").write_text("mine")
    (folder / MORE).mkdir()
    (folder / MORE / "rag.jinja").symlink_to(folder.parent / "secret")


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "a number": (lambda f: checkpoint(f, 5, {}), "tokenizer_config.json: chat_template is neither text nor a list"),
    "a list of texts": (lambda f: checkpoint(f, [CHATML], {}), "tokenizer_config.json: chat_template is neither"),
    "no name": (lambda f: checkpoint(f, [{"template": CHATML}], {}), "tokenizer_config.json: chat_template is neither"),
    "no template": (lambda f: checkpoint(f, [{"name": "a"}], {}), "tokenizer_config.json: chat_template is neither"),
    "a template of numbers": (lambda f: checkpoint(f, {"default": [1]}, {}), "chat_template is neither text nor"),
    "not JSON": (lambda f: checkpoint(f, None, {PROCESSOR: "{"}), "chat_template.json is not valid JSON"),
    "no object": (lambda f: checkpoint(f, None, {PROCESSOR: "[]"}), "chat_template.json is not a JSON object"),
    "a processor's number": (
        lambda f: checkpoint(f, None, {PROCESSOR: '{"chat_template": 1}'}),
        "chat_template.json: chat_template is neither",
    ),
    "not UTF-8": (
        lambda f: (checkpoint(f, None, {}) / JINJA).write_bytes(b"\xff"),
        "chat_template.jinja is not UTF-8 text",
    ),
    "a link out of the folder": (lambda f: _into_a_link(checkpoint(f, CHATML, {})), "is a link out of the folder"),
}


@pytest.mark.parametrize("name", BAD)
def test_templates_of_unknown_form_are_refused(name: str, tmp_path: Path) -> None:
    write, match = BAD[name]
    write(tmp_path / "hf")
    with pytest.raises(EdgeStreamError, match=match) as caught:
        convert(tmp_path / "hf", tmp_path / "m.gguf")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "m.gguf").exists()
