"""From the units of a history to tokens: each unit on its own, so that a turn costs only what it adds.

The template is rendered around stand-ins, as in `edge_stream.chat.conversation`; nothing before the new units is
rendered or tokenised again.
"""

from __future__ import annotations

import json
from array import array
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from edge_stream.chat.templates import ChatTemplate, TurnRenderer
from edge_stream.server.history.prefix_matching import Entry, History, Message, Unit, flat_content

if TYPE_CHECKING:
    from edge_stream.chat.options import ChatOptions
    from edge_stream.engine import Engine

_FRAMES = 64  # system prompts and tool lists whose frames are remembered


@dataclass
class Piece:
    """Tokens to feed, after which the history can be continued.

    key, kind, pending, ended, n_bytes: see prefix_matching.Entry. mark: a message starts here, where a slide may end.
    """

    tokens: list[int]
    key: bytes
    kind: str
    pending: list[int] = field(default_factory=list)
    ended: bool = False
    n_bytes: int = 0
    mark: bool = False


@dataclass
class Rendered:
    """What is to be fed for a request.

    answer_start: what comes between the last piece and the first generated token. close: what the template writes
    after the answer. n_dropped: messages left out, the oldest of the history. n_head: tokens of the head, if it is fed.
    """

    pieces: list[Piece]
    answer_start: list[int]
    close: list[int] = field(default_factory=list)
    n_dropped: int = 0
    n_head: int = 0

    @property
    def n_tokens(self) -> int:
        """Tokens to feed in all."""
        return sum(len(piece.tokens) for piece in self.pieces) + len(self.answer_start)


def template_message(message: Message) -> dict[str, Any]:
    """A message as templates expect it: text as a string, arguments of calls as objects."""
    out: dict[str, Any] = {"role": message["role"], "content": flat_content(message.get("content"))}
    if out["role"] == "developer":
        out["role"] = "system"
    for name in ("name", "tool_call_id"):
        if message.get(name) is not None:
            out[name] = message[name]
    if message.get("tool_calls"):
        out["tool_calls"] = [_template_call(call) for call in message["tool_calls"]]
    return out


def _template_call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = dict(call["function"])
    try:
        function["arguments"] = json.loads(function["arguments"])
    except ValueError:
        pass  # some clients send back what the model wrote, JSON or not
    return {"id": call.get("id") or "", "type": "function", "function": function}


@dataclass(frozen=True)
class _Frame:
    """What a template writes around the messages, for one system prompt and one list of tools."""

    turns: TurnRenderer
    head: list[int]
    close: list[int]
    answer_start: list[int]


class Renderer:
    """A model's template and tokenizer. For one thread at a time."""

    def __init__(self, engine: Engine, chat: ChatOptions) -> None:
        self.engine = engine
        self.template = ChatTemplate.of(engine, chat)
        self._variables = chat.variables  # those of a request go before
        self._frames: OrderedDict[bytes, _Frame] = OrderedDict()

    def tokens(self, text: str) -> list[int]:
        """Tokens of a piece of a template's output."""
        return self.engine.tokenize(text, special=True) if text else []

    def after_end(self, tokens: list[int]) -> list[int]:
        """The tokens without the end-of-turn token among the first four, and what precedes it."""
        ends = [i for i, token in enumerate(tokens[:4]) if self.engine.is_eog(token)]
        return tokens[ends[0] + 1 :] if ends else tokens

    def continued(self, history: History, entry: Entry, n_known: int) -> Rendered:
        """What a history adds after an entry. n_known: the units, or bytes of text, up to there."""
        if history.text is not None:
            return self._text(history, n_known, list(entry.pending))
        return self._chat(history, history.units[n_known:], entry)

    def rebuilt(self, history: History, n_ctx: int) -> Rendered:
        """The head and the newest units, as many as n_ctx tokens hold without a slide; always the last one.

        The first unit kept is a message to the model, not an answer. A text is read whole.
        """
        if history.text is not None:
            # a client's tokens are all there is
            bos = [self.engine.bos] if self.engine.add_bos and not history.is_tokens else []
            out = self._text(history, 0, [])
            out.pieces.insert(0, Piece(bos, history.root, "head"))
            return out
        head = self._frame(history).head
        room = n_ctx - len(head) - 1
        units = history.units
        start, size = len(units), 0
        while start > 0:
            size += self._chat(history, units[start - 1 : start], None).n_tokens
            if size > room and start < len(units):
                break
            start -= 1
        if start > 0:
            start = next((i for i in range(start, len(units)) if units[i].kind == "inputs"), len(units) - 1)
        out = self._chat(history, units[start:], None)
        out.pieces.insert(0, Piece(head, history.root, "head"))
        out.n_dropped = sum(len(unit.messages) for unit in units[:start])
        out.n_head = len(head)
        return out

    def whole(self, messages: Sequence[Message], variables: Mapping[str, Any]) -> str:
        """The text of a whole chat, for /apply-template."""
        return self.template.render([template_message(m) for m in messages], **{**self._variables, **variables})

    def _frame(self, history: History) -> _Frame:
        if history.root not in self._frames:
            turns = TurnRenderer(self.template, history.system, {**self._variables, **history.variables})
            head, bos = self.tokens(turns.head), self.engine.bos
            if self.engine.add_bos and head[:1] != [bos]:
                head = [bos, *head]
            start = self.tokens(turns.first("Hello")[1])
            self._frames[history.root] = _Frame(turns, head, self.tokens(turns.closing), start)
            while len(self._frames) > _FRAMES:
                self._frames.popitem(last=False)
        self._frames.move_to_end(history.root)
        return self._frames[history.root]

    def _chat(self, history: History, units: Sequence[Unit], entry: Entry | None) -> Rendered:
        """Units after an entry (None: after the head)."""
        frame = self._frame(history)
        pending = list(entry.pending) if entry else []
        ended = entry.ended if entry else False
        first = entry is None or entry.kind == "head"
        start = frame.answer_start
        pieces: list[Piece] = []
        for i, unit in enumerate(units):
            if unit.kind == "inputs":
                messages = [template_message(m) for m in unit.messages]
                text, answer = frame.turns.first_messages(messages) if first else frame.turns.next_messages(messages)
                tokens, start = self.tokens(text), self.tokens(answer)
                if ended:
                    tokens = self.after_end(tokens)
                piece = Piece(pending + tokens, unit.key, "inputs", mark=not first)
                if not start:  # logits are not kept: to answer again, the last token is read again
                    piece.pending = [piece.tokens.pop()]
                ended = False
            else:
                message = unit.messages[0]
                if message.get("tool_calls"):
                    tokens, close = self.tokens(frame.turns.answer(template_message(message))), []
                else:
                    tokens, close = start + self.tokens(flat_content(message.get("content"))), frame.close
                if i + 1 == len(units):  # the client wants this answer continued
                    return Rendered(pieces, pending + tokens, frame.close)
                piece = Piece(pending + tokens, unit.key, "assistant", pending=list(close))
            pieces.append(piece)
            pending, first = piece.pending, False
        return Rendered(pieces, pending + start, frame.close)

    def _text(self, history: History, n_known: int, pending: list[int]) -> Rendered:
        """A completion's prompt from a byte on."""
        assert history.text is not None
        data = history.text[n_known:]
        if history.is_tokens:
            tokens = pending + array("i", data).tolist()
        else:
            text = data.decode("utf-8", errors="surrogatepass")
            tokens = pending + self.engine.tokenize(text, special=True)
        if not tokens:
            return Rendered([], [])
        piece = Piece(tokens[:-1], history.text_key(), "text", tokens[-1:], n_bytes=len(history.text))
        return Rendered([piece], tokens[-1:])
