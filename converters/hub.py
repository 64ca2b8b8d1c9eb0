"""Download checkpoints from the Hugging Face hub, only the files that a conversion reads."""

from __future__ import annotations

import re
from pathlib import Path

from edge_stream.converters import chat_templates
from edge_stream.converters.hf_source import TOKENIZER_FILES
from edge_stream.errors import EdgeStreamError

_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
_PATTERNS = ("config.json", "generation_config.json", *_ADAPTER, *chat_templates.FILES, *TOKENIZER_FILES)


def download(src: str) -> Path:
    """Download `hf:user/repo` and return its local folder. Raises EdgeStreamError."""
    repo = src.removeprefix("hf:")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise EdgeStreamError(f"{src} is not of the form hf:user/repo")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise EdgeStreamError("hf: checkpoints need huggingface_hub: pip install 'edge-stream[hf]'") from error
    try:
        weights = ["model.safetensors", "model.safetensors.index.json", "model-*.safetensors"]
        return Path(snapshot_download(repo, allow_patterns=[*_PATTERNS, *weights]))
    except Exception as error:  # the hub client raises many types; the user needs one sentence
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise EdgeStreamError(f"cannot download {src}: {reason[0]}") from error
