"""An answer as it is written, and the entry it leaves in its session's log, which matches text, tokens and cache."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from edge_stream.errors import EdgeStreamError
from edge_stream.loop_guard import Loop
from edge_stream.server.history.prefix_matching import History, PrefixLog, canonical, chain

if TYPE_CHECKING:
    from edge_stream.chat.core import AnswerParser
    from edge_stream.engine import Engine
    from edge_stream.stream import Stream

# newest tokens of an answer that can be taken back when it ends inside a token or after a stop string
_MAX_TAKE_BACK = 1024


@dataclass
class Answer:
    """One choice. prefix: what the client wrote of it already. parser: if it holds more than text.

    parts: its text as generated, markup included. n_bytes: of its tokens, the end-of-turn token aside. loop: it ended
    in one; the newest loop.n_taken tokens were taken back, but the client was sent their text.
    """

    prefix: str = ""
    stop_pieces: Mapping[int, bytes] = field(default_factory=dict)  # see Stream.writer
    parser: AnswerParser | None = None
    parts: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    n_bytes: int = 0
    loop: Loop | None = None

    def begin(self, parser: AnswerParser | None) -> None:
        """Start an empty one, with the same prefix."""
        self.parser, self.parts, self.tokens, self.n_bytes, self.loop = parser, [], [], 0, None

    def piece(self, engine: Engine, token: int) -> bytes:
        """What a token adds to the text; control tokens count where it is parsed."""
        return self.stop_pieces.get(token) or engine.token_to_piece(token, special=self.parser is not None)

    @property
    def message(self) -> dict[str, Any]:
        """It as the client will send it back."""
        if self.parser is None:
            return {"role": "assistant", "content": self.prefix + "".join(self.parts)}
        return self.parser.message


def log_answer(answer: Answer, how: str, history: History, stream: Stream, log: PrefixLog, engine: Engine) -> None:
    """Log an answer to a history, as the text that the client was sent.

    how: see Finished; after `repetition` the stream holds less than what was sent. Where tokens that the client was not
    sent cannot be taken back, the log ends before the answer, and a client that continues from it has its text read
    again.
    """
    assert log.last is not None

    def take_back(n: int) -> bool:
        """Take the newest n tokens back; False if the stream cannot."""
        try:
            stream.rewind(n)
        except EdgeStreamError:  # a sink, or a recurrent state that is not kept
            return False
        log.taken_back(n)
        del answer.tokens[-n:]
        return True

    if history.text is None:
        # tokens that the client was not sent are taken back when it goes on: its text has other ones there
        units = history.units[:-1] if history.is_continued else history.units
        before = units[-1].key if units else history.root
        log.add(chain(before, canonical(answer.message)), stream.stats.n_past, "assistant")
        return
    text = "".join(answer.parts)
    pending = [] if how in ("eos", "length", "repetition") else _take_back_unsent(answer, text, engine, take_back)
    if pending is None:
        return
    if how == "eos" and not take_back(1):  # in a text nothing stands for the end
        return
    more = array("i", answer.tokens).tobytes() if history.is_tokens else text.encode("utf-8", errors="surrogatepass")
    key, n_bytes = history.text_key(more), len(history.text) + len(more)
    if key == log.last.key:
        return  # nothing was written
    if not pending:  # logits are not kept: to continue from here, the last token is read again
        n_held = len(answer.tokens) - (answer.loop.n_taken if answer.loop else 0)
        pending = answer.tokens[n_held - 1 : n_held]
        if not take_back(1):
            return
    log.add(key, stream.stats.n_past, "text", pending, n_bytes)


def _take_back_unsent(answer: Answer, text: str, engine: Engine, take_back: Callable[[int], bool]) -> list[int] | None:
    """Take back the tokens that hold nothing of the text that was sent (a stop string, text held back).

    Returns the tokens of what was sent of the last one taken back, to be fed with whatever comes next; None if they
    cannot be taken back.
    """
    if "\ufffd" in text:
        return []  # not valid UTF-8: the text does not tell which tokens were sent
    surplus = answer.n_bytes - len(text.encode("utf-8", errors="surrogatepass"))
    n, rest = 0, b""
    while surplus > 0 and n < min(len(answer.tokens), _MAX_TAKE_BACK):
        n += 1
        piece = answer.piece(engine, answer.tokens[-n])
        if len(piece) > surplus:
            rest = piece[: len(piece) - surplus]
        surplus -= len(piece)
    if n == 0:
        return []
    if surplus > 0 or not take_back(n):
        return None
    return engine.tokenize(rest.decode("utf-8", errors="replace")) if rest else []
