"""From a history to tokens: what a stream must take back and be fed to hold it. The native chat core does the work."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from edge_stream.chat.core import ChatCore, ChatRequest, Plan
from edge_stream.server.history.newest import NewestHistories, NewestLogs
from edge_stream.server.history.prefix_matching import Entry, History, Recalled, flat_content

if TYPE_CHECKING:
    from edge_stream.chat.options import ChatOptions
    from edge_stream.engine import Engine
    from edge_stream.stream import Stream


_BYTES_PER_TOKEN = 16  # more than tokens of a vocabulary have on average, as in the core's plans
_LEAST_TURNS = 4


@dataclass
class Piece:
    """Tokens to feed, after which the history can be continued.

    mark: a message starts here, where a slide may end. The others: see prefix_matching.Entry.
    """

    tokens: list[int]
    key: bytes
    kind: str
    pending: list[int] = field(default_factory=list)
    n_bytes: int = 0
    recalled: Recalled | None = None
    n_gone: int = 0
    mark: bool = False


@dataclass
class Rendered:
    """What is to be fed for a request.

    answer_start: what comes between the last piece and the first generated token. n_back: tokens to take back before.
    n_dropped: messages left out, the oldest of the history. n_head: tokens of the head, if it is fed. recalled:
    what the newest message is read with, of what the stream no longer holds.
    """

    pieces: list[Piece]
    answer_start: list[int]
    n_back: int = 0
    n_dropped: int = 0
    n_head: int = 0
    recalled: Recalled | None = None

    @property
    def n_tokens(self) -> int:
        """Tokens to feed in all."""
        return sum(len(piece.tokens) for piece in self.pieces) + len(self.answer_start)


@dataclass(frozen=True)
class Held:
    """A stream's newest tokens, without a gap, from token number `first` on, and its log."""

    tokens: Sequence[int]
    first: int
    entries: Sequence[Entry]

    @classmethod
    def by(cls, stream: Stream, entries: Sequence[Entry]) -> Held:
        """What a stream holds."""
        stats, tokens = stream.stats, stream.tokens()
        if stats.n_evicted:
            tokens = tokens[stats.n_sinks :]
        return cls(tokens, stats.n_past - len(tokens), list(entries))


def newest_messages(history: History, n_ctx: int) -> tuple[Mapping[str, Any], int]:
    """A chat's body without the oldest messages, which n_ctx tokens cannot hold, and how many those are.

    It begins where a user speaks after an answer, as the core's own plans do, and with more than they would look at.
    """
    messages = history.body["messages"]
    room, n_turns = _BYTES_PER_TOKEN * (n_ctx + 1), 0
    for i in range(len(messages) - 1, history.n_system, -1):
        room -= len(flat_content(messages[i].get("content")))
        if messages[i]["role"] == "user" and messages[i - 1]["role"] == "assistant":
            n_turns += 1
            if room < 0 and n_turns > _LEAST_TURNS:
                kept = [*messages[: history.n_system], *messages[i:]]
                return {**history.body, "messages": kept}, i - history.n_system
    return history.body, 0


class Renderer:
    """A model's template and tokenizer. For one thread at a time, except for `core` and `histories`.

    n_recall: tokens of a line that may be recalled for a message, 0: none.
    """

    def __init__(self, engine: Engine, chat: ChatOptions, n_recall: int = 0) -> None:
        self.engine, self._n_recall = engine, n_recall
        self.core = ChatCore(engine.backend.vocabulary, chat.template)
        self.histories, self._logs = NewestHistories(), NewestLogs()

    def continued(self, history: History, n_known: int, held: Held) -> Rendered:
        """What a history adds to a stream that ends at an entry, n_known units or bytes of text into the history."""
        if history.text is not None:
            return self._text(history, n_known, list(held.entries[-1].pending))
        ends = history.ends_of({e.key for e in held.entries})
        places = [(ends[e.key], e.n_past - held.first) for e in held.entries if ends.get(e.key)]
        known = {ends[e.key] - 1: e.recalled for e in held.entries if e.recalled and e.key in ends}
        n_gone = max(held.entries[0].n_gone, ends.get(held.entries[0].key, 0)) if held.entries else 0
        history, recalled = self._recall(history, n_gone, known)
        places = [place for place in places if place[1] >= 0]
        near = [(n - history.n_skipped, at) for n, at in places if n > history.n_system + history.n_skipped]
        if history.n_skipped and not near:
            history, near = self._whole(history), places
        plan = self._request(history).plan(near if history.n_skipped else places, held.tokens)
        out = self._chat(history, plan, recalled)
        out.n_back = len(held.tokens) - plan.keep
        return out

    def rebuilt(self, history: History, n_ctx: int) -> Rendered:
        """The whole history; of a chat the newest messages that n_ctx tokens hold without a slide."""
        if history.text is not None:
            # a client's tokens are all there is
            bos = [self.engine.bos] if self.engine.add_bos and not history.is_tokens else []
            out = self._text(history, 0, [])
            out.pieces.insert(0, Piece(bos, history.root, "head"))
            return out
        if n_ctx > self.engine.n_ctx:
            history = self._whole(history)
        plan = self._request(history).plan(n_ctx=n_ctx)
        n_dropped = history.n_skipped + plan.n_dropped
        history, recalled = self._recall(history, history.n_system + n_dropped, {})
        if recalled:
            plan = self._request(history).plan(n_ctx=n_ctx)
            n_dropped = history.n_skipped + plan.n_dropped
        out = self._chat(history, plan, recalled)
        if not out.pieces or out.pieces[0].kind != "head":
            out.pieces.insert(0, Piece([], history.root, "head"))
        out.pieces[0].n_gone = history.n_system + n_dropped
        out.n_dropped, out.n_head = n_dropped, plan.n_head
        return out

    def request(self, history: History) -> ChatRequest:
        """The core's view of a whole chat. Raises EdgeStreamError if the template refuses it."""
        return self._request(self._whole(history))

    def forget(self) -> None:
        """Keep nothing of earlier requests in memory."""
        self.histories.forget()
        self._logs.forget()

    def _whole(self, history: History) -> History:
        return replace(history, request=None, n_skipped=0) if history.n_skipped else history

    def _request(self, history: History) -> ChatRequest:
        return history.request or self.core.request(history.body)

    def _recall(self, history: History, n_gone: int, known: dict[int, Recalled]) -> tuple[History, Recalled | None]:
        """The history with what is recalled for its messages, and what that is for the newest.

        n_gone: messages that the stream no longer holds. known: what was recalled before, by message.
        """
        messages = list(history.body["messages"])
        newest = len(messages) - 1
        if newest not in known and self._n_recall and n_gone > history.n_system and messages[-1]["role"] == "user":
            found = self._find(history, n_gone)
            known = known | {newest: found} if found else known
        if not known:
            return history, None
        for i, recalled in known.items():
            messages[i] = {**messages[i], "recalled": recalled}
        history = replace(history, body={**history.body, "messages": messages})
        first = history.n_system + history.n_skipped
        near = {**history.body, "messages": [*messages[: history.n_system], *messages[first:]]}
        return replace(history, request=self.core.request(near)), known.get(newest)

    def _find(self, history: History, n_gone: int) -> Recalled | None:
        """What belongs to the newest message: its history is all that there is to search."""
        messages = history.body["messages"]
        with self._logs.log(history) as log:
            hit = log.recall(flat_content(messages[-1].get("content")), n_gone)
        if hit is None or len(self.engine.tokenize(hit.text)) > self._n_recall:
            return None
        return {
            "text": hit.text,
            "role": hit.role,
            "message": hit.turn,
            "messages_ago": len(messages) - 1 - hit.turn,
            "coverage": round(hit.coverage, 3),
        }

    @staticmethod
    def _chat(history: History, plan: Plan, recalled: Recalled | None) -> Rendered:
        pieces = []
        for i, piece in enumerate(plan.pieces):
            n = piece.n_messages + (history.n_skipped if piece.n_messages > history.n_system else 0)
            made = Piece(piece.tokens, *history.place(n), mark=i > 0 or plan.keep > 0)
            if n == len(history.body["messages"]):
                made.recalled = recalled
            pieces.append(made)
        return Rendered(pieces, plan.start, recalled=recalled)

    def _text(self, history: History, n_known: int, pending: list[int]) -> Rendered:
        """A completion's prompt from a byte on."""
        assert history.text is not None
        data = history.text[n_known:]
        if history.is_tokens:
            tokens = pending + array("i", data).tolist()
        else:
            text = data.decode("utf-8", errors="surrogatepass")
            tokens = pending + (self.engine.tokenize(text, special=True) if text else [])
        if not tokens:
            return Rendered([], [])
        piece = Piece(tokens[:-1], history.text_key(), "text", tokens[-1:], n_bytes=len(history.text))
        return Rendered([piece], tokens[-1:])
