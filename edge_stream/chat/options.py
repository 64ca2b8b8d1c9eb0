"""What a user chooses about chats: the template, what it is given, and how thinking is treated."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from edge_stream.errors import EdgeStreamError

REASONING_FORMATS = ("none", "deepseek", "deepseek-legacy", "auto")  # llama.cpp's, see common_reasoning_format


@dataclass(frozen=True)
class ChatOptions:
    """Options of a conversation.

    template: Jinja source, or the name of one of llama.cpp's templates, in place of the model's. template_kwargs:
    variables of the template. reasoning_format: where thoughts appear, as in llama.cpp. reasoning_budget: tokens of
    thinking at most; -1: no limit, 0: none. reasoning_budget_message: what is written when the budget is spent.
    enable_thinking: what templates are told; None: nothing. Raises EdgeStreamError for values out of range.
    """

    template: str | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    reasoning_format: str = "auto"
    reasoning_budget: int = -1
    reasoning_budget_message: str = ""
    enable_thinking: bool | None = None

    def __post_init__(self) -> None:
        if self.reasoning_format not in REASONING_FORMATS:
            raise EdgeStreamError(f"reasoning_format = {self.reasoning_format} is not one of {REASONING_FORMATS}")
        if self.reasoning_budget < -1:
            raise EdgeStreamError(f"reasoning_budget = {self.reasoning_budget} must be at least -1")

    @property
    def variables(self) -> dict[str, Any]:
        """What the template is given beside the messages."""
        thinking = {} if self.enable_thinking is None else {"enable_thinking": self.enable_thinking}
        return {**self.template_kwargs, **thinking}

    @property
    def request(self) -> dict[str, Any]:
        """The same as part of a request: see edge_stream_chat.h."""
        return {
            "chat_template_kwargs": dict(self.template_kwargs),
            "enable_thinking": self.enable_thinking,
            "reasoning_format": self.reasoning_format,
            "thinking_budget_tokens": self.reasoning_budget,
            "reasoning_budget_message": self.reasoning_budget_message,
        }

    @property
    def tag(self) -> str:
        """Identifies what conversations are rendered with; "" for the model's own template without variables."""
        if self.template is None and not self.variables:
            return ""
        text = json.dumps([self.template, self.variables], sort_keys=True)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
