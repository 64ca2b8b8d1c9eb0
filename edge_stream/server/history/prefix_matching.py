"""A client sends its whole history each time; which part of it does a stream already hold?

The cache holds the sinks and the newest tokens only. Beside each stream a log is kept: after the head and after every
message an `Entry` records a running hash of everything said so far, the number of tokens seen, and a running hash of
the tokens that were fed. The hashes of a request's prefixes are looked up among the entries, the longest prefix first.
An entry is dropped once its place has left the window, since the stream cannot be taken back to it: the log is as
bounded as the cache. Before an entry is relied on, the tokens that the stream itself reports are hashed again
(`verify`).
"""

from __future__ import annotations

import json
from array import array
from bisect import bisect_left
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edge_stream.chat.core import ChatRequest
    from edge_stream.stream import Stream

Message = Mapping[str, Any]
Recalled = dict[str, Any]

_KEY_BYTES = 32
# the newest tokens are hashed later, so that some of them can be taken back
_UNHASHED = 2048


@dataclass(frozen=True, slots=True)  # thousands of a long history
class Unit:
    """What is read or written between two places where a history can be continued.

    kind: `inputs` (all messages between two answers) or `assistant` (one answer). key: running hash up to and
    including it. end: messages of the history up to there, the system prompt included.
    """

    kind: str
    key: bytes
    end: int


@dataclass(frozen=True)
class History:
    """A request's conversation: what the chat core is given (body, and request, if it was made of it already), and its
    units with their running hashes.

    n_skipped: messages after the system prompt that `request` lacks, since no stream could hold them. text: a
    completion's prompt instead (UTF-8, or int32 tokens), which may be continued after any number of bytes.
    """

    root: bytes
    n_system: int = 0  # messages of the system prompt
    body: Mapping[str, Any] = field(default_factory=dict)
    request: ChatRequest | None = None
    n_skipped: int = 0
    units: tuple[Unit, ...] = ()
    text: bytes | None = None
    is_tokens: bool = False

    def ends_of(self, keys: Collection[bytes]) -> dict[bytes, int]:
        """Messages up to the places that running hashes stand for, of those that are of this history."""
        ends = {unit.key: unit.end for unit in self.units if unit.key in keys}
        return {self.root: self.n_system} | ends if self.root in keys else ends

    def place(self, n_messages: int) -> tuple[bytes, str]:
        """The running hash after so many messages, and the kind of the unit that ends there, or `head`."""
        if n_messages == self.n_system:
            return self.root, "head"
        unit = self.units[bisect_left(self.units, n_messages, key=lambda unit: unit.end)]
        assert unit.end == n_messages
        return unit.key, unit.kind

    @property
    def is_continued(self) -> bool:
        """Whether the last message is the beginning of the answer."""
        if not self.units or self.units[-1].kind != "assistant":
            return False
        is_open = self.body.get("continue_final_message") is not False
        return is_open and not self.body["messages"][-1].get("tool_calls")

    @property
    def whole(self) -> tuple[Unit, ...]:
        """The units up to the last answer: what comes after it may still become more."""
        return self.units if self.units and self.units[-1].kind == "assistant" else self.units[:-1]

    def keys_at(self, lengths: Iterable[int]) -> Iterator[tuple[int, bytes]]:
        """The running hashes of the text's first n bytes, for every n of `lengths` that it has, shortest first."""
        assert self.text is not None
        running, done = blake2b(self.root, digest_size=_KEY_BYTES), 0
        for n in sorted(n for n in lengths if n <= len(self.text)):
            running.update(self.text[done:n])
            done = n
            yield n, running.copy().digest()

    def text_key(self, more: bytes = b"") -> bytes:
        """The running hash of the text and what was written after it."""
        assert self.text is not None
        return blake2b(self.root + self.text + more, digest_size=_KEY_BYTES).digest()


@dataclass(frozen=True)
class Entry:
    """A place in a stream: after `n_past` tokens it had seen what hashes to `key`.

    tokens_hash: running hash of the tokens fed. kind: `head`, `inputs`, `assistant` or `text`. Of a text: pending,
    tokens to feed before whatever comes next, and n_bytes. recalled: what the last message before was read with. Of a
    head: n_gone, messages left out after it, the system prompt counted as well.
    """

    key: bytes
    n_past: int
    tokens_hash: bytes
    kind: str
    pending: tuple[int, ...] = ()
    n_bytes: int = 0
    recalled: Recalled | None = None
    n_gone: int = 0


_ENCODER = json.JSONEncoder(sort_keys=True, ensure_ascii=False, separators=(",", ":"))
_PLAIN = {"role", "content", "reasoning_content"}


def flat_content(content: Any) -> str:
    """The text of a message's content: a string, null, or parts of type text, each on lines of its own."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    text = ""
    for part in content:  # as the chat core does
        text += ("\n" if text else "") + part["text"]
    return text


def canonical(message: Message) -> bytes:
    """What is hashed of a message. Space around an answer is left out: clients trim it."""
    content = flat_content(message.get("content"))
    assistant = message["role"] == "assistant"
    if message.keys() <= _PLAIN:  # as below, in a tenth of the time: a long history has thousands
        text = _ENCODER.encode(content.strip() if assistant else content)
        role = _ENCODER.encode(message["role"])
        plain = f'{{"content":{text},"name":null,"role":{role},"tool_call_id":null,"tool_calls":[]}}'
        return plain.encode("utf-8", errors="surrogatepass")
    calls = [
        {"name": call["function"]["name"], "arguments": _arguments(call["function"]["arguments"])}
        for call in message.get("tool_calls") or ()
    ]
    return _json(
        {
            "role": message["role"],
            "content": content.strip() if assistant else content,
            "name": message.get("name"),
            "tool_calls": calls,
            "tool_call_id": message.get("tool_call_id"),
        }
    )


def _arguments(arguments: Any) -> Any:
    """Arguments are JSON text, which clients may reformat."""
    try:
        return json.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError:
        return arguments


def _json(value: Any) -> bytes:
    return _ENCODER.encode(value).encode("utf-8", errors="surrogatepass")


def chain(key: bytes, data: bytes) -> bytes:
    """The running hash after some data."""
    return blake2b(data, key=key, digest_size=_KEY_BYTES).digest()


def root_key(kind: str, value: Any = None) -> bytes:
    """The running hash before the first message: of everything else that the template is given."""
    return blake2b(_json([kind, value]), digest_size=_KEY_BYTES).digest()


# what a request may change without becoming another conversation
_PER_ANSWER = (
    "tool_choice", "parallel_tool_calls", "json_schema", "grammar", "reasoning_format", "enable_thinking",
    "reasoning_effort", "reasoning_budget_tokens", "reasoning_budget_message", "add_generation_prompt",
    "continue_final_message",
)  # fmt: skip


def chat_history(messages: Sequence[Message], variables: Mapping[str, Any], begun: History | None = None) -> History:
    """Cut a chat into units and hash them, in one pass over the text. variables: the rest of the core's request.

    begun: a history that ends with an answer, which these begin with: that part is not hashed again.
    """
    messages = list(messages)
    n_system = 0
    while n_system < len(messages) and messages[n_system]["role"] in ("system", "developer"):
        n_system += 1
    system = [flat_content(m.get("content")) for m in messages[:n_system]]
    lasting = {name: value for name, value in variables.items() if name not in _PER_ANSWER}
    root = key = root_key("chat", [system, lasting])
    units: list[Unit] = []
    group: list[Message] = []
    n_known = n_system
    if begun and begun.root == root:
        units, key, n_known = list(begun.units), begun.units[-1].key, begun.units[-1].end

    def close_group(end: int) -> None:
        nonlocal key, group
        if group:
            key = chain(key, b"".join(map(canonical, group)))
            units.append(Unit("inputs", key, end))
            group = []

    for i, message in enumerate(messages[n_known:], n_known):
        if message["role"] != "assistant":
            group.append(message)
            continue
        close_group(i)
        key = chain(key, canonical(message))
        units.append(Unit("assistant", key, i + 1))
    close_group(len(messages))
    return History(root, n_system, {**variables, "messages": messages}, units=tuple(units))


class TokenLog:
    """The running hash of the tokens fed to a stream since an entry, in constant space."""

    def __init__(self, tokens_hash: bytes) -> None:
        self._hash = blake2b(key=tokens_hash[:_KEY_BYTES], digest_size=_KEY_BYTES)
        self._tail: deque[int] = deque()

    def add(self, tokens: Sequence[int]) -> None:
        """Tokens that were fed."""
        self._tail.extend(tokens)
        while len(self._tail) > _UNHASHED:
            self._hash.update(array("i", (self._tail.popleft(),)).tobytes())

    def take_back(self, n: int) -> bool:
        """Forget the newest n tokens; False if they are hashed already."""
        if n > len(self._tail):
            return False
        for _ in range(n):
            self._tail.pop()
        return True

    def digest(self) -> bytes:
        """The hash so far."""
        now = self._hash.copy()
        now.update(array("i", self._tail).tobytes())
        return now.digest()


class PrefixLog:
    """The entries of one stream, oldest first. The first is where the head ends."""

    def __init__(self, entries: Sequence[Entry] = ()) -> None:
        self.entries = list(entries)
        self._tokens = TokenLog(self.entries[-1].tokens_hash if self.entries else b"")

    @property
    def last(self) -> Entry | None:
        """The newest entry."""
        return self.entries[-1] if self.entries else None

    def fed(self, tokens: Sequence[int]) -> None:
        """Tokens went into the stream."""
        self._tokens.add(tokens)

    def taken_back(self, n: int) -> bool:
        """The newest n tokens were taken back; False if that cannot be logged."""
        return self._tokens.take_back(n)

    def add(
        self,
        key: bytes,
        n_past: int,
        kind: str,
        pending: Sequence[int] = (),
        n_bytes: int = 0,
        recalled: Recalled | None = None,
        n_gone: int = 0,
    ) -> None:
        """The stream has now seen everything that hashes to key."""
        self.entries.append(Entry(key, n_past, self._tokens.digest(), kind, tuple(pending), n_bytes, recalled, n_gone))
        self._tokens = TokenLog(self.entries[-1].tokens_hash)

    def cut(self, index: int) -> None:
        """Back to entry index."""
        del self.entries[index + 1 :]
        self._tokens = TokenLog(self.entries[-1].tokens_hash)

    def go_back(self, n_past: int, tokens: Sequence[int]) -> bool:
        """Back to n_past tokens, of which `tokens` are the newest; False if that is before them, or the first entry."""
        index = next((i for i in reversed(range(len(self.entries))) if self.entries[i].n_past <= n_past), None)
        if index is None or n_past - self.entries[index].n_past > len(tokens):
            return False
        self.cut(index)
        self.fed(tokens[len(tokens) - (n_past - self.entries[index].n_past) :])
        return True

    def trim(self, n_past: int, n_window: int) -> None:
        """Drop the entries that have left the window, to which the stream cannot be taken back."""
        first = n_past - n_window
        keep = next((i for i, e in enumerate(self.entries) if e.n_past >= first), len(self.entries) - 1)
        del self.entries[: max(keep, 0)]

    def find(self, key: bytes) -> int | None:
        """Index of the newest entry with this key."""
        return next((i for i in reversed(range(len(self.entries))) if self.entries[i].key == key), None)


def verify(log: PrefixLog, index: int, stream: Stream) -> bool:
    """Whether the tokens that the stream holds are those that the log says it was fed.

    Hashes every span between two entries up to `index` that lies in the cache, and the head where it is pinned.
    """
    stats = stream.stats
    if log.entries[index].n_past > stats.n_past or log.entries[-1].n_past > stats.n_past:
        return False
    held = stream.tokens()
    sinks, window = held[: stats.n_sinks], held[stats.n_sinks :]
    first = stats.n_past - len(window)

    def span(start: int, end: int) -> Sequence[int] | None:
        if start >= first:
            return window[start - first : end - first]
        if end <= len(sinks):
            return sinks[start:end]
        return sinks[start:] + window[: end - first] if first == len(sinks) else None

    for i in range(index + 1):
        entry = log.entries[i]
        before = log.entries[i - 1] if i else None
        if before is None and entry.kind != "head":
            continue  # the start of its span is no longer known
        tokens = span(before.n_past if before else 0, entry.n_past)
        if tokens is None:
            continue
        check = TokenLog(before.tokens_hash if before else b"")
        check.add(tokens)
        if check.digest() != entry.tokens_hash:
            return False
    return True
