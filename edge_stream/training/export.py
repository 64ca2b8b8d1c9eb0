"""A trained model as a Hugging Face folder that appears when it is complete."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedModel

from edge_stream.output.staging import publish_folder, staging_folder
from edge_stream.training.checkpoint import write

LOG = "training.json"
# of a new model; the sink token is bos_token
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def folder(
    out: Path, model: PreTrainedModel, tokenizer: Tokenizer, tokenizer_config: dict[str, Any], log: dict[str, Any]
) -> None:
    """Write the folder, or replace it. Raises EdgeStreamError, and changes nothing, if the disk is full."""
    out = Path(os.path.realpath(out))
    with staging_folder(out) as staging:
        new = staging / out.name
        new.mkdir()
        tied = set(model.all_tied_weights_keys)
        write(
            {n: t.detach() for n, t in model.state_dict().items() if n not in tied},
            new / "model.safetensors",
            {"format": "pt"},
        )
        model.config.architectures = [type(model).__name__]
        for name, value in (("config", model.config), ("generation_config", model.generation_config)):
            (new / f"{name}.json").write_text(value.to_json_string(), encoding="utf-8")
        (new / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
        for name, value in (("tokenizer_config.json", tokenizer_config), (LOG, log)):
            (new / name).write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        publish_folder(new, out)
