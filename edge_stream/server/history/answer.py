"""What an answer leaves behind: an entry in its conversation's log that matches text, tokens and cache."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Any

from edge_stream.errors import EdgeStreamError
from edge_stream.server.history.prefix_matching import canonical, chain
from edge_stream.server.history.rendering import Renderer
from edge_stream.server.scheduling.tasks import Job

if TYPE_CHECKING:
    from edge_stream.engine import Engine

# newest tokens of an answer that can be taken back when it ends inside a token or after a stop string
_MAX_TAKE_BACK = 1024


def log_answer(job: Job, how: str, renderer: Renderer) -> None:
    """The answer becomes part of the conversation's log, as the text that the client was sent.

    how: `eos`, `stop` (a stop string), `length`, `grammar` (it allows nothing more), or `cut` (by the client or the
    clock). Where tokens that the client was not sent cannot be taken back, the log ends before the answer, and a client
    that goes on from it has its text read again.
    """
    conversation, history = job.conversation, job.wish.history
    assert conversation is not None and conversation.stream is not None
    stream, conv_log, last = conversation.stream, conversation.log, conversation.log.last
    assert last is not None
    text = "".join(job.text)
    pending = [] if how in ("eos", "length") else _take_back_unsent(job, text, renderer.engine)
    if pending is None:
        return
    if history.text is not None:
        if how == "eos" and not _take_back(job, 1):  # in a text nothing stands for the end
            return
        more = _text_bytes(job, text)
        key, n_bytes = history.text_key(more), len(history.text) + len(more)
        if key == last.key:
            return  # nothing was written
        if not pending:  # to go on from exactly here, something must be read again: the last token
            pending = job.answer[-1:]
            if not _take_back(job, 1):
                return
        conv_log.add(key, stream.stats.n_past, "text", pending, n_bytes=n_bytes)
        return
    message: dict[str, Any] = {"role": "assistant", "content": job.answer_prefix + text}
    if job.parser:
        message = {"role": "assistant", "content": job.answer_prefix + job.parser.shown}
        message["tool_calls"] = job.parser.calls
    close, ended = job.close, False
    if how == "eos":
        close = renderer.after_end(job.close)
        # some templates write the end of an answer only with the next message: not once more then
        ended = close == job.close
    keys = [history.root, *(unit.key for unit in history.units)]
    before = keys[-2] if history.units[-1].kind == "assistant" else keys[-1]
    key = chain(before, canonical(message))
    conv_log.add(key, stream.stats.n_past, "assistant", pending + close, ended)


def _take_back(job: Job, n: int) -> bool:
    """Take the answer's newest n tokens back; False if the stream cannot."""
    assert job.conversation is not None and job.conversation.stream is not None
    try:
        job.conversation.stream.rewind(n)
    except EdgeStreamError:  # a sink, or a recurrent state that is not kept
        return False
    job.conversation.log.taken_back(n)
    del job.answer[-n:]
    return True


def _text_bytes(job: Job, text: str) -> bytes:
    if job.wish.history.variables.get("tokens"):
        return array("i", job.answer).tobytes()
    return text.encode("utf-8", errors="surrogatepass")


def _take_back_unsent(job: Job, text: str, engine: Engine) -> list[int] | None:
    """Take tokens back that hold nothing of the text that was sent (a stop string, text held back).

    Returns the tokens of what was sent of the last one taken back, to be fed with whatever comes next; None if they
    cannot be taken back.
    """
    if "\ufffd" in text:
        return []  # bytes that are no text: tokens cannot be told apart by what was sent
    surplus = job.n_answer_bytes - len(text.encode("utf-8", errors="surrogatepass"))
    n, rest = 0, b""
    while surplus > 0 and n < min(len(job.answer), _MAX_TAKE_BACK):
        n += 1
        piece = job.piece(engine, job.answer[-n])
        if len(piece) > surplus:
            rest = piece[: len(piece) - surplus]
        surplus -= len(piece)
    if n == 0:
        return []
    if surplus > 0 or not _take_back(job, n):
        return None
    return engine.tokenize(rest.decode("utf-8", errors="replace")) if rest else []
