"""A conversation on a stream: each turn adds its own tokens, and nothing before it is read again.

A chat template renders whole conversations. A stream needs only what a new turn adds, so the template is
rendered with a placeholder for the last answer; whatever follows the placeholder is what the turn adds.
The ten thousandth turn costs no more than the first.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_stream.chat.templates import ChatTemplate, Message, TurnRenderer, assistant_message, user_message
from edge_stream.errors import EdgeStreamError, SessionError

if TYPE_CHECKING:
    from edge_stream.chat.options import ChatOptions
    from edge_stream.engine import Engine
    from edge_stream.generation import Token
    from edge_stream.sampling import Sampling
    from edge_stream.stream import Stream

_FORMAT = 1
# The transcript serves display, regeneration and sessions; the model's memory is the cache. Like everything in a
# stream, it is bounded.
_TRANSCRIPT_CHARACTERS = 1_000_000


class Conversation:
    """Messages between a user and a model on one stream, with the system prompt pinned.

    `messages` is the transcript without the system prompt. Beyond a million characters the oldest
    messages are dropped (`n_dropped` counts them).
    """

    def __init__(
        self,
        engine: Engine,
        *,
        system: str | None = None,
        n_keep: int = 4,
        chat: ChatOptions | None = None,
        _stream: Stream | None = None,
    ) -> None:
        self.engine = engine
        self.system = system
        self.messages: list[Message] = []
        self.n_dropped = 0
        self._renderer = _renderer(engine, system, chat)
        self._head = _head_tokens(engine, self._renderer)
        self._close = self._tokens(self._renderer.closing)
        #: Tokens read for the last message, up to the first token of its answer.
        self.n_read = 0
        self._n_answer = 0  # cached tokens of the last answer, including the template's markup
        self._answer_start: list[int] = []
        self._cut = False  # the model did not end the last answer itself
        self._ended = False  # the model wrote the end-of-turn token that the template writes with the next message
        if _stream is not None:
            self.stream = _stream
            return
        if system or n_keep < 0:
            n_keep = max(n_keep, len(self._head))
        if n_keep > engine.n_ctx * 3 // 4:
            raise EdgeStreamError(
                f"the {n_keep} pinned tokens leave less than a quarter of the cache ({engine.n_ctx} tokens) "
                "for the conversation: shorten the system prompt or raise --ctx-size"
            )
        # Evict up to an eighth of the window more than needed if the slide then ends between messages.
        self.stream = engine.stream(n_keep=n_keep, n_boundary=(engine.n_ctx - n_keep) // 8)

    @property
    def note(self) -> str | None:
        """A sentence about the template for the user, or None."""
        return self._renderer.note

    def reply(
        self,
        text: str,
        *,
        max_tokens: int = -1,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
        loop_guard: bool = True,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Generator[Token, None, None]:
        """Send a user message; yields the answer token by token.

        loop_guard ends an answer that repeats itself over and over: see Stream.generate.
        Closing the iterator ends the answer; what was generated so far stays, as a closed turn. If reading
        the message fails or is interrupted, the conversation is unchanged.
        """
        before = self.stream.stats.n_past
        try:
            message, answer_start = self._turn(text)
            if self._ended:
                message = self._after_end(message)
            self._feed(message, on_progress)
        except BaseException:
            self._take_back(self.stream.stats.n_past - before)
            raise
        self._answer_start = answer_start  # only now: regenerate() needs the last turn's until then
        self.messages.append(user_message(text))
        self.n_read = self.stream.stats.n_past - before + len(self._answer_start)
        yield from self._answer(
            max_tokens=max_tokens, sampling=sampling, stop=stop, ignore_eos=ignore_eos, loop_guard=loop_guard
        )

    def regenerate(
        self,
        *,
        max_tokens: int = -1,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
        loop_guard: bool = True,
    ) -> Generator[Token, None, None]:
        """Replace the last answer with a new one."""
        if not self.messages or self.messages[-1]["role"] != "assistant":
            raise EdgeStreamError("there is no answer to regenerate")
        answer = self.messages.pop()
        self.n_read = len(self._answer_start)
        try:
            self.stream.rewind(self._n_answer)
        except EdgeStreamError:
            # The stream slid past the start of the answer: re-read as much as the cache holds.
            try:
                self._refeed()
            except BaseException:
                self.messages.append(answer)
                raise
        yield from self._answer(
            max_tokens=max_tokens, sampling=sampling, stop=stop, ignore_eos=ignore_eos, loop_guard=loop_guard
        )

    def continue_answer(
        self,
        *,
        max_tokens: int = -1,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
    ) -> Generator[Token, None, None]:
        """Go on with an answer that was cut by max_tokens or by closing its iterator."""
        if not self.messages or self.messages[-1]["role"] != "assistant":
            raise EdgeStreamError("there is no answer to continue")
        if not self._cut:
            raise EdgeStreamError("the last answer is complete: it was not cut")
        start = self.stream.stats.n_past - self._n_answer
        # what came after the answer's last token is taken back; that token is read again, for its logits
        n_back = len(self._close) + 1
        last = self.stream.tokens()[-n_back]
        self.stream.rewind(n_back)
        self.n_read = 1
        text = self.messages.pop()["content"]
        options = {"max_tokens": max_tokens, "sampling": sampling, "stop": stop, "ignore_eos": ignore_eos}
        yield from self._write(start, [text], [last], **options)

    def clear(self) -> None:
        """Forget everything but the system prompt."""
        self.stream.reset()
        self.messages, self.n_dropped, self._n_answer, self._ended, self._cut = [], 0, 0, False, False

    def save(self, path: str | Path) -> None:
        """Write the cache and the transcript to one file, atomically."""
        user = {
            "format": _FORMAT,
            "system": self.system,
            "messages": self.messages,
            "n_dropped": self.n_dropped,
            "n_answer": self._n_answer,
            "answer_start": self._answer_start,
            "ended": self._ended,
            "cut": self._cut,
        }
        self.stream.save(str(path), user=json.dumps(user).encode())

    @classmethod
    def resume(cls, engine: Engine, path: str | Path, *, chat: ChatOptions | None = None) -> Conversation:
        """Continue a saved conversation. The file is only read."""
        stream = engine.restore(str(path))
        try:
            user = _read_user(stream.user, path)
            self = cls(engine, system=user["system"], chat=chat, _stream=stream)
        except BaseException:
            stream.close()
            raise
        self.messages, self.n_dropped = user["messages"], user["n_dropped"]
        self._n_answer, self._answer_start = user["n_answer"], user["answer_start"]
        self._ended, self._cut = user["ended"], bool(user.get("cut"))
        return self

    def close(self) -> None:
        """Free the stream."""
        self.stream.close()

    def _tokens(self, text: str) -> list[int]:
        return self.engine.tokenize(text, special=True) if text else []

    def _turn(self, text: str, first: bool | None = None) -> tuple[list[int], list[int]]:
        """Tokens of a user message and of the start of its answer."""
        if first is None:
            first = self.stream.stats.n_past == 0
        message, start = self._renderer.first(text) if first else self._renderer.next(text)
        tokens, answer = (self._head if first else []) + self._tokens(message), self._tokens(start)
        if not answer:
            # Regenerating must feed at least one token: if the template starts no answer, the message's last one.
            tokens, answer = tokens[:-1], tokens[-1:]
        return tokens, answer

    def _feed(self, tokens: list[int], on_progress: Callable[[int, int], None] | None = None) -> None:
        """Feed the tokens of a message and mark its start."""
        if self.stream.stats.n_past:
            self.stream.mark()
        elif tokens[: len(self._head)] == self._head:
            self.stream.feed(self._head)
            self.stream.mark()
            tokens = tokens[len(self._head) :]
        if tokens:
            self.stream.feed(tokens, on_progress=on_progress)

    def _answer(self, **options: Any) -> Generator[Token, None, None]:
        yield from self._write(self.stream.stats.n_past, [], self._answer_start, **options)

    def _write(
        self, start: int, pieces: list[str], before: Sequence[int], **options: Any
    ) -> Generator[Token, None, None]:
        """Feed the tokens before, generate, and close the turn, of an answer that began at n_past `start`."""
        sampling = options.pop("sampling")
        if sampling is not None:
            options["sampling"] = sampling
        finish = None
        try:
            if len(before) > 1:  # a single token may be the end of the user's message
                self.stream.mark()
            self.stream.feed(before)
            with closing(self.stream.generate(**options)) as tokens:  # type: ignore[type-var]
                for token in tokens:
                    pieces.append(token.text)
                    finish = token.finish_reason
                    yield token
        finally:
            self._close_turn(finish == "eos")
            self._cut = finish in (None, "length")
            self.stream.rebase()  # while the user thinks, rather than within an answer
            self._n_answer = self.stream.stats.n_past - start
            self.messages.append(assistant_message("".join(pieces)))
            self._trim()

    def _close_turn(self, closed: bool) -> None:
        """End the answer as the template would: with its end-of-turn token, unless the model wrote it."""
        rest = self._after_end(self._close) if closed else self._close
        # Some templates end an answer only with the next message, which must then not end it a second time.
        self._ended = closed and rest == self._close
        if rest:
            self.stream.feed(rest)

    def _after_end(self, tokens: list[int]) -> list[int]:
        """The tokens without a leading end-of-turn token, if there is one."""
        ends = [i for i, token in enumerate(tokens[:4]) if self.engine.is_eog(token)]
        return tokens[ends[0] + 1 :] if ends else tokens

    def _take_back(self, n: int) -> None:
        """Undo a partly read message."""
        if n == 0:
            return
        try:
            self.stream.rewind(n)
        except EdgeStreamError:
            self._refeed()

    def _refeed(self) -> None:
        """Restart the stream with as many of the newest turns as the cache holds without a slide."""
        room = self.engine.n_ctx - len(self._head) - 1
        turns: list[list[int]] = []
        for i in reversed([i for i, m in enumerate(self.messages) if m["role"] == "user"]):
            message, start = self._turn(self.messages[i]["content"], first=False)
            answers = self.messages[i + 1 : i + 2]
            if answers:
                message += start + self._tokens(answers[0]["content"]) + self._close
            room -= len(message)
            if room < 0 and turns:
                break
            turns.insert(0, message)
            if not answers:
                self._answer_start = start
        self.stream.reset()
        self._ended = False
        if not turns:
            return
        # The oldest turn kept is now the first, and templates render the first turn differently.
        oldest = [i for i, m in enumerate(self.messages) if m["role"] == "user"][-len(turns)]
        message, start = self._turn(self.messages[oldest]["content"], first=True)
        answers = self.messages[oldest + 1 : oldest + 2]
        if answers:
            message += start + self._tokens(answers[0]["content"]) + self._close
        else:
            self._answer_start = start
        turns[0] = message
        for tokens in turns:
            self._feed(tokens)

    def _trim(self) -> None:
        size = sum(len(m["content"]) for m in self.messages)
        while size > _TRANSCRIPT_CHARACTERS and len(self.messages) > 2:
            size -= len(self.messages.pop(0)["content"])
            self.n_dropped += 1


def count_pinned(engine: Engine, system: str | None, chat: ChatOptions | None = None) -> int:
    """Tokens of a system prompt with the template's markup, all of which are pinned."""
    return len(_head_tokens(engine, _renderer(engine, system, chat)))


def _renderer(engine: Engine, system: str | None, chat: ChatOptions | None) -> TurnRenderer:
    return TurnRenderer(ChatTemplate.of(engine, chat), system, chat.variables if chat else None)


def _head_tokens(engine: Engine, renderer: TurnRenderer) -> list[int]:
    tokens = engine.tokenize(renderer.head, special=True) if renderer.head else []
    return [engine.bos, *tokens] if engine.add_bos and tokens[:1] != [engine.bos] else tokens


def _read_user(data: bytes, path: str | Path) -> dict[str, Any]:
    """The conversation's part of a session file, validated."""
    try:
        user = json.loads(data)
        if user["format"] > _FORMAT:
            raise SessionError(f"{path} was written by a newer edge-stream")
        fits = (
            (user["system"] is None or isinstance(user["system"], str))
            and all(isinstance(m["role"], str) and isinstance(m["content"], str) for m in user["messages"])
            and all(isinstance(user[name], int) and user[name] >= 0 for name in ("n_dropped", "n_answer"))
            and all(isinstance(token, int) for token in user["answer_start"])
            and isinstance(user["ended"], bool)
        )
    except (ValueError, KeyError, TypeError, RecursionError):
        fits = False
    if not fits:
        raise SessionError(f"{path} is a session, but not of a conversation")
    return user  # type: ignore[no-any-return]
