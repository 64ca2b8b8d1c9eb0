"""A conversation on a stream, in Python. The native core (edge_stream_chat.h) decides what a turn reads."""

from __future__ import annotations

import ctypes as C
import dataclasses
import json
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_stream.chat.core import ChatCore, Message
from edge_stream.chat.options import ChatOptions
from edge_stream.errors import SessionError
from edge_stream.native import chat_bindings
from edge_stream.sampling import Sampling
from edge_stream.text import sendable

if TYPE_CHECKING:
    from edge_stream.engine import Engine
    from edge_stream.generation import Token
    from edge_stream.recall import Log
    from edge_stream.stream import Stream

Answer = Generator["Token", None, None]
Progress = Callable[[int, int], None]
_ENDS: dict[str | None, int] = {
    "eos": chat_bindings.WHOLE,
    "repetition": chat_bindings.WHOLE,
    "length": chat_bindings.CUT,
}


class Conversation:
    """Messages between a user and a model on one stream, with the system prompt and the tools pinned.

    chat: the template and how thinking is treated. tools: what the model may call, as in OpenAI's requests. recall: a
    log, see use_log. Raises EdgeStreamError if the template is broken, or if more than three quarters of the cache
    would be pinned. `n_read`: tokens read for the newest answer, up to its first. `recalled`: the entry of the log that
    was read with the newest message ("text", "role", "turn", "when", "coverage"), or None. `recall_error`: why the log
    is used no longer.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        system: str | None = None,
        n_keep: int = 4,
        chat: ChatOptions | None = None,
        tools: Sequence[dict[str, Any]] = (),
        recall: Log | None = None,
        _stream: Stream | None = None,
    ) -> None:
        self.engine = engine
        self.n_read = 0
        self.recalled: dict[str, Any] | None = None
        self.recall_error: str | None = None
        self._log: Log | None = None
        self._core = _core(engine, chat)
        self._native = chat_bindings.library()
        self._note: str | None = None
        options = _options(system, chat, tools)
        if _stream is None:
            n_keep = self._core.n_keep(options, engine.n_ctx, n_keep)
            # Evict up to an eighth of the window more than needed if the slide then ends between messages.
            _stream = engine.stream(n_keep=n_keep, n_boundary=(engine.n_ctx - n_keep) // 8)
        self.stream = _stream
        self._handle = C.c_void_p()
        self._call("init", self._core.handle, self.stream.handle, options, C.byref(self._handle))
        self._free = weakref.finalize(self, self._native.es_conversation_free, self._handle)
        if recall is not None:
            self.use_log(recall)

    def use_log(self, log: Log | None, n_tokens: int = 64) -> None:
        """Keep what is said in a log as well, and read a message with what belongs to it and has left the window.

        n_tokens: of an entry that may come back; 0: none does. log: open as long as the conversation is; None: none.
        Raises EdgeStreamError while an answer is open, SessionError if the log is of another conversation: it is left
        as it is then, and none is used.
        """
        try:
            self._call("set_log", None if log is None else log.handle, n_tokens)
        except SessionError:
            self._log = None
            raise
        self._log = log  # kept alive

    #
    # turns
    #

    def reply(
        self,
        text: str,
        *,
        max_tokens: int = -1,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
        loop_guard: bool = True,
        on_progress: Progress | None = None,
    ) -> Answer:
        """Send a user message; yields the answer token by token: see `say`."""
        message = {"role": "user", "content": text}
        yield from self.say(
            [message],
            max_tokens=max_tokens,
            sampling=sampling,
            stop=stop,
            ignore_eos=ignore_eos,
            loop_guard=loop_guard,
            on_progress=on_progress,
        )

    def say(
        self,
        messages: Sequence[Message],
        *,
        max_tokens: int = -1,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
        loop_guard: bool = True,
        on_progress: Progress | None = None,
    ) -> Answer:
        """Send messages, which may answer tool calls; yields the answer token by token.

        Tokens have no text where they are markup of thinking or of tool calls; these are in `messages` afterwards.
        loop_guard ends an answer that repeats itself over and over: see Stream.generate. Closing the iterator ends the
        answer; what was generated so far stays. If reading the messages fails or is
        interrupted, the conversation is unchanged.
        """
        data = sendable(json.dumps(list(messages), ensure_ascii=False)).encode()
        yield from self._answer("say", data, max_tokens, sampling, stop, ignore_eos, loop_guard, on_progress)

    def regenerate(
        self,
        *,
        max_tokens: int = -1,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
        loop_guard: bool = True,
    ) -> Answer:
        """Replace the last answer with a new one."""
        yield from self._answer("regenerate", None, max_tokens, sampling, stop, ignore_eos, loop_guard)

    def continue_answer(
        self,
        *,
        max_tokens: int = -1,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
        loop_guard: bool = True,
    ) -> Answer:
        """Go on with an answer that was cut by max_tokens or by closing its iterator."""
        yield from self._answer("continue", None, max_tokens, sampling, stop, ignore_eos, loop_guard)

    def _answer(
        self,
        how: str,
        messages: bytes | None,
        max_tokens: int,
        sampling: Sampling | None,
        stop: Sequence[str],
        ignore_eos: bool,
        loop_guard: bool,
        on_progress: Progress | None = None,
    ) -> Answer:
        sampling = sampling or Sampling()
        options: dict[str, Any] = {"stop": list(stop)}
        # a grammar of the caller's gets its place among the rules of the template
        if sampling.grammar and not sampling.json_schema:
            options["grammar"], sampling = sampling.grammar, dataclasses.replace(sampling, grammar=None)
        arguments = (sendable(json.dumps(options)).encode(), self._watched(on_progress), None)
        callbacks = self.stream.backend.callbacks
        self._call(how, *(() if messages is None else (messages,)), *arguments, late=True)
        try:
            callbacks.deliver()  # Ctrl-C
            info = self._json("info")
            self.n_read, self._note = info["n_read"], info["note"]
            self.recalled, self.recall_error = info["recalled"], info["recall_error"]
            if info["sampling"]:
                sampling = dataclasses.replace(sampling, chat=info["sampling"])
            writer = self.stream.writer(
                max_tokens,
                sampling=sampling,
                ignore_eos=ignore_eos,
                special=info["is_parsed"],
                loop_guard=loop_guard,
            )
        except BaseException:
            self._call("end", chat_bindings.TAKEN_BACK)
            raise
        try:
            while not writer.finished:
                token = writer.next()
                end = _ENDS.get(token.finish_reason, chat_bindings.OPEN)
                piece = b"" if token.finish_reason == "eos" else writer.piece
                delta = self._json("push", piece, len(piece), end, late=True)
                try:
                    yield from _shown(token, delta)
                finally:
                    callbacks.deliver()  # Ctrl-C while the token was computed, which the stream has seen
                if delta.get("is_ended"):
                    return
        finally:
            self._call("end", chat_bindings.CUT)  # unless the model ended it

    def _watched(self, on_progress: Progress | None) -> Any:
        if on_progress is None:
            return chat_bindings.Progress()

        def report(_user: object, done: int, total: int) -> bool:
            on_progress(done, total)
            return True

        return self.stream.backend.callbacks.guard(chat_bindings.Progress, report, failed=False)

    #
    # the whole conversation
    #

    @property
    def note(self) -> str | None:
        """A sentence about the template for the user, or None."""
        if self._core.info["is_fallback"]:
            return "the model has no chat template: ChatML is used"
        return self._note

    @property
    def messages(self) -> list[Message]:
        """The transcript without the system prompt. Beyond a million bytes the oldest turns are dropped."""
        return list(self._json("messages")["messages"])

    @property
    def n_dropped(self) -> int:
        """Messages that the transcript no longer has."""
        return int(self._json("messages")["n_dropped"])

    @property
    def system(self) -> str | None:
        """The system prompt."""
        system: str | None = self._json("messages")["system"]
        return system

    def clear(self) -> None:
        """Forget everything but the system prompt and the tools."""
        self._call("clear")
        self.stream.forget_sampling()

    def save(self, path: str | Path) -> None:
        """Write the cache and the transcript to one file, atomically."""
        self.stream.save(str(path), user=self._text("to_json"))

    @classmethod
    def resume(cls, engine: Engine, path: str | Path, *, chat: ChatOptions | None = None) -> Conversation:
        """Continue a saved conversation. The file is only read. Raises SessionError."""
        stream = engine.restore(str(path))
        try:
            self = cls(engine, chat=chat, _stream=stream)
            self._call("from_json", stream.user, str(path).encode(errors="surrogateescape"))
        except BaseException:
            stream.close()
            raise
        return self

    def close(self) -> None:
        """Free the stream."""
        self._free()
        self._handle = C.c_void_p()
        self.stream.close()

    def _call(self, name: str, *arguments: Any, late: bool = False) -> None:
        handle = () if name == "init" else (self._handle,)
        self.stream.call(getattr(self._native, f"es_conversation_{name}"), *handle, *arguments, late=late)

    def _text(self, name: str, *arguments: Any, late: bool = False) -> bytes:
        out = C.c_char_p()
        self._call(name, *arguments, C.byref(out), late=late)
        return out.value or b""

    def _json(self, name: str, *arguments: Any, late: bool = False) -> dict[str, Any]:
        return dict(json.loads(self._text(name, *arguments, late=late)))


def _shown(token: Token, delta: dict[str, Any]) -> Iterator[Token]:
    """A token's record, or two: its thought, and the text after it."""
    thought, text = delta.get("reasoning_content", ""), delta.get("content", "")
    if delta.get("is_ended") and token.finish_reason not in ("eos", "repetition"):
        token = dataclasses.replace(token, finish_reason="stop")
    if thought:
        finish = None if text else token.finish_reason
        yield dataclasses.replace(token, text=thought, reasoning=True, finish_reason=finish)
    if text or not thought:
        yield dataclasses.replace(token, text=text)


def count_pinned(
    engine: Engine, system: str | None, chat: ChatOptions | None = None, tools: Sequence[dict[str, Any]] = ()
) -> int:
    """Tokens of a system prompt and of tools with the template's markup, all of which are pinned."""
    return _core(engine, chat).n_keep(_options(system, chat, tools), 2**31 - 1, -1)


def _core(engine: Engine, chat: ChatOptions | None) -> ChatCore:
    return ChatCore(engine.backend.vocabulary, chat.template if chat else None)


def _options(system: str | None, chat: ChatOptions | None, tools: Sequence[dict[str, Any]]) -> bytes:
    options = {**(chat or ChatOptions()).request, "system": system}
    if tools:
        options["tools"] = list(tools)
    return sendable(json.dumps(options, ensure_ascii=False)).encode()
