"""Chat templates: the Jinja programs inside model files that turn messages into text."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jinja2
from jinja2.exceptions import SecurityError

from edge_stream.chat.sandbox import Budget, DeadlineError, RefusedError, Sandbox, T, TooBigError, within
from edge_stream.errors import EdgeStreamError

if TYPE_CHECKING:
    from edge_stream.chat.options import ChatOptions
    from edge_stream.engine import Engine

Message = dict[str, str]

# Used only for a model without a template.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MAX_SECONDS = 5.0
# Characters that a template may build, in addition to a multiple of its input.
MAX_CHARACTERS = 8_000_000
_PER_INPUT_CHARACTER = 64

_PLACEHOLDER = "Answer-7f3a91."


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

    @classmethod
    def of(cls, engine: Engine, options: ChatOptions | None = None) -> ChatTemplate:
        """The template of a loaded model, or the one that the options have in its place."""

        def text(token: int) -> str:
            return engine.token_to_piece(token, special=True).decode(errors="replace") if token >= 0 else ""

        source = options.template if options and options.template else engine.chat_template
        if source == "chatml":
            source = CHATML
        elif source and "{{" not in source and "{%" not in source:
            raise EdgeStreamError(
                f"--chat-template {source[:40]!r} is no Jinja template, and the only one known by name is chatml: give "
                "its source"
            )
        return cls(source, bos_token=text(engine.bos), eos_token=text(engine.eos))

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


def user_message(text: str) -> Message:
    """A user's message."""
    return {"role": "user", "content": text}


def assistant_message(text: str) -> Message:
    """A model's answer."""
    return {"role": "assistant", "content": text}


class TurnRenderer:
    """Finds the text that a turn adds, for one model's template and one system prompt.

    `variables` are passed to the template (tools, say). `note` is a sentence for the user if the template only partly
    suits a stream, else None.
    """

    def __init__(
        self, template: ChatTemplate, system: str | None = None, variables: Mapping[str, Any] | None = None
    ) -> None:
        self._template = template
        self._variables = dict(variables or {})
        self._system: list[Message] = [{"role": "system", "content": system}] if system else []
        self.note = (
            "the model has no chat template: using ChatML, which it may not know" if template.is_fallback else None
        )
        self.head = self._find_head()
        #: What the template writes after an answer: the end-of-turn token, often a newline.
        self.closing = self._find_closing()

    def first(self, text: str) -> tuple[str, str]:
        """What the first user message adds after the head: (message, start of the answer)."""
        return self.first_messages([user_message(text)])

    def first_messages(self, messages: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
        """What the messages before the first answer add after the head: (messages, start of the answer)."""
        return self._split([*self._system, *messages], lambda whole: whole[len(self.head) :])

    def next(self, text: str) -> tuple[str, str]:
        """What a later user message adds after a closed answer: (message, start of the answer)."""
        return self.next_messages([user_message(text)])

    def next_messages(self, messages: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
        """What the messages between two answers add after a closed answer: (messages, start of the answer)."""

        def added(whole: str) -> str:
            ambiguous = any(_PLACEHOLDER in str(m.get("content")) for m in messages)
            after = whole.rpartition(_PLACEHOLDER)[2] if not ambiguous else None
            if after is None or not after.startswith(self.closing):
                raise EdgeStreamError(
                    "the chat template of this model cannot be used on a stream: what it writes "
                    "between two turns depends on the text of the turns"
                )
            return after[len(self.closing) :]

        return self._split([user_message("Hello"), assistant_message(_PLACEHOLDER), *messages], added)

    def answer(self, message: Mapping[str, Any]) -> str:
        """An assistant's message with the template's markup (for messages that are more than text)."""
        question = self._render([user_message("Hello")], add_generation_prompt=False)
        whole = self._render([user_message("Hello"), message], add_generation_prompt=False)
        if not whole.startswith(question):
            raise EdgeStreamError(
                "the chat template of this model cannot be used on a stream: it rewrites a question once it is answered"
            )
        return whole[len(question) :]

    def _render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        return self._template.render(messages, add_generation_prompt=add_generation_prompt, **self._variables)

    def _split(self, messages: Sequence[Mapping[str, Any]], added: Callable[[str], str]) -> tuple[str, str]:
        both = added(self._render(messages, add_generation_prompt=True))
        alone = added(self._render(messages, add_generation_prompt=False))
        message = _common_prefix(alone, both)
        return message, both[len(message) :]

    def _find_head(self) -> str:
        """The text before the first user message: the rendered system prompt."""
        one, two = (self._render([*self._system, user_message(text)]) for text in ("One", "two"))
        if self._system:
            try:
                alone = self._render(self._system, add_generation_prompt=False)
            except EdgeStreamError:
                alone = ""  # some templates insist on a user message
            if self._system[0]["content"].strip() in alone and one.startswith(alone):
                return alone
        return _common_prefix(one, two).rstrip(" ")  # a space belongs to the token of the word after it

    def _find_closing(self) -> str:
        past = [*self._system, user_message("Hello"), assistant_message(_PLACEHOLDER)]
        before = self._render(past, add_generation_prompt=False)
        after = self._render([*past, user_message("Good")], add_generation_prompt=True)
        if _PLACEHOLDER not in before or _PLACEHOLDER not in after:
            raise EdgeStreamError(
                "the chat template of this model cannot be used on a stream: it does not keep "
                "the assistant's answers as they were written"
            )
        question = self._render(past[:-1], add_generation_prompt=False)
        stable = before.startswith(question) and after.startswith(before)
        if not stable and self.note is None:
            self.note = (
                "the chat template of this model rewrites earlier turns when a turn is added; "
                "on a stream every turn stays as first read"
            )
        # Without the system prompt, which some templates repeat in the last user message.
        past = past[len(self._system) :]
        before = self._render(past, add_generation_prompt=False)
        after = self._render([*past, user_message("Good")], add_generation_prompt=True)
        return _common_prefix(before.rpartition(_PLACEHOLDER)[2], after.rpartition(_PLACEHOLDER)[2])


def _common_prefix(one: str, two: str) -> str:
    """The common beginning, without a trailing partial control token such as <|end|>."""
    n = 0
    while n < min(len(one), len(two)) and one[n] == two[n]:
        n += 1
    return one if n == len(one) else re.sub(r"[<\[][^\s<>\[\]]*$", "", one[:n])
