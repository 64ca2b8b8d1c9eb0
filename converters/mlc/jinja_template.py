"""Chat templates in Jinja2, for a converter that needs no native library. Chats are rendered by the native core."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2
from jinja2.exceptions import SecurityError

from edge_stream.converters.mlc.sandbox import Budget, DeadlineError, RefusedError, Sandbox, T, TooBigError, within
from edge_stream.errors import EdgeStreamError

# Used only for a model without a template.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MAX_SECONDS = 5.0
# Characters that a template may build, in addition to a multiple of its input.
MAX_CHARACTERS = 8_000_000
_PER_INPUT_CHARACTER = 64


class ChatTemplate:
    """A model's chat template.

    `is_fallback`: the model has none, and ChatML is used instead.
    """

    def __init__(
        self,
        source: str | None,
        *,
        bos_token: str = "",
        eos_token: str = "",
        max_seconds: float = MAX_SECONDS,
        max_characters: int = MAX_CHARACTERS,
    ) -> None:
        self.is_fallback = not source
        self.source = source or CHATML
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        self._max_seconds = max_seconds
        self._max_characters = max_characters
        self._sandbox = Sandbox()
        self._template = self._guarded(0, lambda: self._sandbox.from_string(self.source))

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """A conversation as the text that the model was trained on.

        Raises EdgeStreamError if the template is faulty, rejects the messages, or violates the sandbox.
        """
        given = Budget(sys.maxsize).weigh([[dict(m) for m in messages], variables])
        values = {
            "messages": [dict(m) for m in messages],
            "add_generation_prompt": add_generation_prompt,
            **self._tokens,
            **variables,
        }

        def work() -> str:
            pieces = []
            for piece in self._template.generate(values):
                self._sandbox.budget.spend(len(piece))
                pieces.append(piece)
            return "".join(pieces)

        return self._guarded(given, work)

    def _guarded(self, given: int, work: Callable[[], T]) -> T:
        """Do the work within limits; any failure becomes an EdgeStreamError of one sentence."""
        self._sandbox.budget = Budget(self._max_characters + _PER_INPUT_CHARACTER * given)
        subject = "the model's chat template"
        try:
            return within(self._max_seconds, work)
        except DeadlineError:
            raise EdgeStreamError(f"{subject} was stopped: not done after {self._max_seconds:g} seconds") from None
        except (TooBigError, OverflowError, MemoryError, RecursionError):
            raise EdgeStreamError(f"{subject} was stopped: it builds far more text than it was given") from None
        except SecurityError as error:
            raise EdgeStreamError(f"{subject} was stopped: {str(error).rstrip('.')}") from error
        except RefusedError as error:
            raise EdgeStreamError(f"{subject} refuses the conversation: {error}") from error
        except jinja2.TemplateSyntaxError as error:
            raise EdgeStreamError(f"{subject} is not valid Jinja (line {error.lineno}): {error.message}") from error
        except Exception as error:  # a template can raise anything
            raise EdgeStreamError(f"{subject} failed: {error}") from error
