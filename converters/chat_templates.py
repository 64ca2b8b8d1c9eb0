"""A model's chat templates by name: `default` for conversations, others for special uses (tool_use, rag).

Checkpoints name them in three places. As in transformers (PreTrainedTokenizerBase.from_pretrained), chat_template.jinja
and additional_chat_templates/NAME.jinja replace what tokenizer_config.json says; chat_template.json, a processor's, is
read only where the tokenizer has none, as in the gguf package.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_stream.converters.text import quoted
from edge_stream.errors import EdgeStreamError
from edge_stream.text import parse_json

if TYPE_CHECKING:
    import gguf

DEFAULT = "default"
FILES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja")
_KEY = "tokenizer.chat_template"


def of_folder(folder: Path, text: Callable[[str], str | None], tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """The templates of a checkpoint. text: a file's content by its name in the folder, None if there is none."""
    extra = {path.stem: text(f"{path.parent.name}/{path.name}") for path in sorted(folder.glob(FILES[2]))}
    named = {name: template for name, template in extra.items() if template}
    if main := text(FILES[0]):
        return named | {DEFAULT: main}
    return (of_config(tokenizer_config, "tokenizer_config.json") or _of_processor(text(FILES[1]))) | named


def _of_processor(content: str | None) -> dict[str, str]:
    try:
        found = parse_json(content or "{}")
    except ValueError as error:
        raise EdgeStreamError(f"{FILES[1]} is not valid JSON") from error
    if not isinstance(found, dict):
        raise EdgeStreamError(f"{FILES[1]} is not a JSON object")
    return of_config(found, FILES[1])


def of_config(config: Mapping[str, Any], file: str) -> dict[str, str]:
    """What a configuration's `chat_template` holds: one template, or several, as a list of names or by name."""
    value = config.get("chat_template")
    if isinstance(value, list) and all(isinstance(t, dict) for t in value):
        value = {t.get("name"): t.get("template") for t in value}
    named = value if isinstance(value, dict) else {DEFAULT: "" if value is None else value}
    for name, template in named.items():
        if not isinstance(name, str) or not isinstance(template, str):
            raise EdgeStreamError(f"{file}: chat_template is neither text nor a list of names and templates")
    return {name: template for name, template in named.items() if template}


def as_config(templates: Mapping[str, str]) -> str | list[dict[str, str]]:
    """The value of tokenizer_config.json's `chat_template`."""
    if list(templates) == [DEFAULT]:
        return templates[DEFAULT]
    return [{"name": name, "template": template} for name, template in templates.items()]


def of_gguf(metadata: Mapping[str, Any]) -> dict[str, str]:
    """The templates of a GGUF file."""
    names = {key: key.removeprefix(f"{_KEY}.") for key in metadata if key.startswith(f"{_KEY}.")}
    found = {name: metadata[key] for key, name in ({_KEY: DEFAULT} | names).items() if key in metadata}
    return {name: template for name, template in found.items() if isinstance(template, str)}


def write(writer: gguf.GGUFWriter, templates: Mapping[str, str]) -> None:
    """Add the templates to a GGUF writer under the keys of the gguf package, in a fixed order.

    Raises EdgeStreamError for names that differ only in letters that keys cannot have.
    """
    keys: dict[str, str] = {}
    for name in sorted(templates.keys() - {DEFAULT}):
        key = re.sub(r"[^A-Za-z0-9]", "_", name)
        if key in keys:
            raise EdgeStreamError(f"the chat templates {quoted(keys[key])} and {quoted(name)} have one name in GGUF")
        keys[key] = name
        writer.add_string(f"{_KEY}.{key}", templates[name])
    if keys:
        writer.add_array(f"{_KEY}s", list(keys))
    if DEFAULT in templates:
        writer.add_chat_template(templates[DEFAULT])
