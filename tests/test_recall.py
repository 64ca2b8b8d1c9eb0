"""The log of what was said: found by its words, whole after a crash, and read with a question in a conversation."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_runner import invoke as run
from click.testing import CliRunner

from edge_stream import EdgeStreamError, Engine, Sampling
from edge_stream.chat.conversation import Conversation
from edge_stream.cli import cli
from edge_stream.errors import SessionError
from edge_stream.measure.metrics import resident_mib
from edge_stream.measure.recall import _lines
from edge_stream.recall import Log, StreamLog

FACTS = {
    "My friend Anna owns a blue kite.": "What does my friend Anna own?",
    "The code of the safe is 8841.": "What is the safe's code?",
    "We liked running in Ålesund.": "Did he like to run in alesund",
    "我的猫叫小白，今年五岁。": "我的猫几岁了",
}


def filled(path: Path | None = None, n: int = 2000) -> Log:
    """FACTS as the first turns, then n turns of other words."""
    log, draw = Log(path), random.Random(1)
    for turn, fact in enumerate(FACTS):
        log.append(fact, turn, "user")
    words = [f"{a}{b}" for a in "bcdfghjklm" for b in ("ora", "uli", "emo", "aki")]
    for turn in range(n):
        log.append(" ".join(draw.choices(words, k=12)) + ".", len(FACTS) + turn, "assistant")
    return log


@pytest.mark.parametrize(("fact", "question"), FACTS.items())
def test_what_was_said_is_found(fact: str, question: str) -> None:
    hit = filled().search(question)[0]
    assert (hit.text, hit.turn, hit.role) == (fact, list(FACTS).index(fact), "user")
    assert 0 < hit.coverage <= 1


def test_the_newest_wins_and_turns_of_the_window_are_left_out() -> None:
    log = Log()
    for turn in range(3):
        log.append("The code is 1.", turn)
    assert [h.turn for h in log.search("code")] == [2, 1, 0]
    assert [h.turn for h in log.search("code", n_turns=2)] == [1, 0]
    assert [h.turn for h in log.search("code", 1)] == [2]
    assert log.search("") == log.search("nothing of that") == []


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ("Write a poem about the sea.", "Write a poem about the hills."),
        ("I need an idea for a birthday present.", "Hi. I need an idea for a school present!"),
        ("Can you draw a cat with a hat", "Can you draw a cat with a bow"),
        ("写一首关于大海的诗。", "写一首关于月亮的诗。"),
        ("海についての詩を書いてください。", "山についての詩を書いてください。"),
        ("你能推荐一本书吗？", "推荐一本书"),
        ("Напиши стихотворение о зиме.", "Напиши стихотворение о лете."),
    ],
)
def test_an_earlier_request_does_not_belong_to_one_like_it(before: str, now: str) -> None:
    log = Log()
    log.append(before, 0, "user")
    assert [(h.text, h.belongs) for h in log.search(now)] == [(before, False)]
    log.append(f"As a fact, {before.rstrip('。？.')} is known.", 1, "assistant")
    assert log.search(now)[0].belongs == (log.search(now)[0].coverage >= 0.6)


def test_the_window_and_the_users_own_words_come_first() -> None:
    log = Log()
    for turn, (role, text) in enumerate(
        (
            ("user", "I think that my friend Anna from school owns a very blue and rather large kite."),
            ("assistant", "My friend Anna owns."),
        )
    ):
        log.append(text, turn, role)
    question = "What does my friend Anna own?"
    assert log.search(question)[0].role == "assistant"
    hit = log.recall(question, 2)
    assert hit and (hit.role, hit.turn) == ("user", 0)
    assert log.recall(question, 0) is None and log.recall(question, 1) == hit  # answered in vain, perhaps
    log.append("My friend Anna owns a horse.", 2, "user")
    assert log.recall(question, 2) is None  # it is in the window
    hit = log.recall(question, 3)
    assert hit and hit.turn == 2


def test_what_belongs_to_a_question_has_most_of_its_words() -> None:
    log = filled()
    for fact, question in list(FACTS.items())[:2]:
        assert (log.search(question)[0].text, log.search(question)[0].belongs) == (fact, True)
    # who speaks of himself asks about the conversation; others may ask about the world
    for question, coverage, belongs in (
        ("Where does my kite fly over London?", (0.2, 0.4), False),
        ("What did my friend lose?", (0.4, 0.6), True),
        ("What did the friend lose?", (0.4, 0.6), False),
    ):
        hit = log.search(question)[0]
        assert coverage[0] < hit.coverage < coverage[1] and hit.belongs == belongs, question


def test_long_turns_become_entries_of_whole_sentences() -> None:
    log = Log()
    sentence = "The quick brown fox number {} jumps over the lazy dog in the green field. "
    log.append("".join(map(sentence.format, range(20))) + "\n\n  - a line\n" + "x" * 1000 + "\n" + "ü" * 500, 0)
    texts = [h.text for h in log.search("fox line " + "x" * 160 + " " + "ü" * 80, 100)]
    assert max(len(t.encode()) for t in texts) <= 160
    assert "- a line" in texts and any(t.startswith("The quick") and t.endswith("field.") for t in texts)


def test_a_file_is_as_it_was_left(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with filled(path, 50) as log:
        stats = log.stats
        assert path.stat().st_size == stats.n_bytes and path.stat().st_mode & 0o777 == 0o600
        with pytest.raises(SessionError, match="in use"):
            Log(path)
    with Log(path) as log:
        assert (log.stats.n_entries, log.stats.n_turns) == (stats.n_entries, stats.n_turns)
        log.truncate(2)
        log.forget(0)
        with pytest.raises(EdgeStreamError, match="nothing of turn 0"):
            log.forget(0)
    assert b"Anna" not in path.read_bytes() and b"8841" in path.read_bytes()
    n_words = 6  # code of safe is 8841 the
    assert path.stat().st_size == 12 + 16 + 4 + 16 + 4 * n_words + len("The code of the safe is 8841.") + 3
    with Log(path) as log:
        assert [h.turn for h in log.search("Anna safe code")] == [1]
        with pytest.raises(EdgeStreamError, match="before the log's newest"):
            log.append("x", 0)
        with log.fork(tmp_path / "other", 2) as other:
            other.append("A branch.", 2)
            assert other.stats.n_entries == 2 and log.stats.n_entries == 1


def test_every_cut_of_the_file_leaves_whole_entries(tmp_path: Path) -> None:
    path = tmp_path / "log"
    filled(path, 0).close()
    data = path.read_bytes()
    kept = set()
    for n in range(len(data) + 1):
        path.write_bytes(data[:n])
        with Log(path) as log:
            kept.add(log.stats.n_entries)
            assert log.stats.n_bytes == path.stat().st_size
    assert kept == {0, 1, 2, 3, 4}


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"GGUF" * 20, "no log|not a log"),
        (b"EDGESLOG\xff\0\0\0", "version 255"),
        (b"EDGESLOG\1\0\0\0", "version 1"),
        (b"", ""),
    ],
)
def test_what_is_no_log_is_refused_and_left_alone(data: bytes, match: str, tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(data)
    if match:
        with pytest.raises(SessionError, match=match):
            Log(path)
        assert path.read_bytes() == data
    else:
        assert Log(path).stats.n_entries == 0


def test_damage_in_the_middle_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "log"
    filled(path, 3).close()
    data = bytearray(path.read_bytes())
    data[60] ^= 1
    path.write_bytes(data)
    with pytest.raises(SessionError, match="damaged"):
        Log(path)
    assert path.read_bytes() == data
    with pytest.raises(SessionError, match=r"regular file|directory"):
        Log(tmp_path)


def test_the_oldest_leaves_a_log_that_is_full(tmp_path: Path) -> None:
    with Log(tmp_path / "log", 10_000) as log:
        for turn in range(1000):
            log.append(f"The number {turn} is a number.", turn)
            assert (tmp_path / "log").stat().st_size <= 10_000
        assert log.stats.n_dropped > 700 and log.search("999")[0].turn == 999 and not log.search("7")


def test_a_log_takes_no_memory_between_searches(tmp_path: Path) -> None:
    with Log(tmp_path / "log") as log:
        for turn in range(2000):
            log.append(f"The number {turn} is a number.", turn)
        log.search("the number 5")
        before = resident_mib()
        for turn in range(2000, 100_000):
            log.append(f"The number {turn} is a number.", turn)
        assert [h.turn for h in log.search("number 77777")][:1] == [77777]
        after = resident_mib()
        assert before is not None and after is not None and log.stats.n_bytes > 6 << 20
        assert after - before < 1


def test_a_full_disk_changes_nothing(tmp_path: Path) -> None:
    """No more than 8 KiB per file: an append that does not fit is taken back."""
    code = (
        "import resource, signal, sys; from edge_stream.recall import Log; from edge_stream.errors import *\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))\n"
        "log, turn = Log(sys.argv[1]), 0\n"
        "try:\n while True:\n  log.append('The words of a turn. ' * 5, turn); turn += 1\n"
        "except SessionError as e: print(e, turn, log.stats.n_entries)"
    )
    path = tmp_path / "log"
    out = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True).stdout
    assert "the disk is full" in out
    with Log(path) as log:
        assert [str(log.stats.n_entries)] * 2 == out.split()[-2:]


def test_a_kill_loses_nothing_that_was_said(tmp_path: Path) -> None:
    code = (
        "import os, sys; from edge_stream.recall import Log; log = Log(sys.argv[1]); log.truncate(int(sys.argv[2]))\n"
        "for i in range(int(sys.argv[2]), 10**9):\n log.append(f'Turn {i} was said.', i); print(i, flush=True)"
    )
    path, done = tmp_path / "log", 0
    for n in range(20):
        with subprocess.Popen([sys.executable, "-c", code, str(path), str(done)], stdout=subprocess.PIPE) as process:
            assert process.stdout
            said = [int(process.stdout.readline()) for _ in range(5 + n)]
            process.kill()
            said += [int(line) for line in process.stdout.read().split(b"\n")[:-1]]
        with Log(path) as log:
            assert log.stats.n_entries >= len(range(said[-1] + 1)) and log.search(f"turn {said[-1]}")[0].text
            done = log.stats.n_turns


def told(engine: Engine, n_tokens: int, log: Log | None = None) -> Conversation:
    """A conversation in which facts were told, further back than the cache reaches."""
    conversation = Conversation(engine)
    conversation.use_log(log or Log(), n_tokens)
    messages = []
    for fact in list(FACTS)[:3]:
        messages += [{"role": "user", "content": fact}, {"role": "assistant", "content": "I see."}]
    messages += [{"role": "user", "content": f"It is {i} o'clock."} for i in range(2)]
    for i in range(60):
        messages += [{"role": "assistant", "content": f"Then {i} it is."}, {"role": "user", "content": f"And {i} now?"}]
    list(conversation.say(messages, max_tokens=4, sampling=Sampling(temp=0)))
    return conversation


def test_a_question_is_read_with_what_has_left_the_window(load_each: Callable[..., Any]) -> None:
    question = "What does my friend Anna own?"
    fact = next(iter(FACTS))
    for n_tokens in (0, 64):
        conversation = told(load_each("chat", n_ctx=512), n_tokens)
        list(conversation.reply(question, max_tokens=4, sampling=Sampling(temp=0)))
        held = conversation.engine.detokenize(conversation.stream.tokens()).decode(errors="replace")
        assert (fact in held) == (n_tokens > 0)
        assert conversation.messages[-2]["content"] == question  # as it was said
        if n_tokens:
            assert (
                conversation.recalled and conversation.recalled["text"] == fact and conversation.recalled["turn"] == 0
            )
            n_past = conversation.stream.stats.n_past
            list(conversation.reply("And now?", max_tokens=4, sampling=Sampling(temp=0)))
            assert conversation.recalled is None
            # the remark is part of what was said: nothing is read again
            assert conversation.stream.stats.n_past - n_past < 60
        conversation.close()


def test_what_is_in_the_window_does_not_come_back(load: Callable[..., Any]) -> None:
    conversation = Conversation(load("chat", n_ctx=512), recall=Log())
    list(conversation.reply("My friend Anna owns a blue kite.", max_tokens=4, sampling=Sampling(temp=0)))
    list(conversation.reply("What does my friend Anna own?", max_tokens=4, sampling=Sampling(temp=0)))
    assert conversation.recalled is None


def test_the_log_follows_the_transcript(load_each: Callable[..., Any], tmp_path: Path) -> None:
    """Answers given again replace what the log had; a session and its log go on together."""
    engine, path = load_each("chat", n_ctx=512), tmp_path / "log"
    log = Log(path)
    conversation = told(engine, 64, log)
    n = log.stats.n_turns
    assert n == len(conversation.messages)
    list(conversation.regenerate(max_tokens=6, sampling=Sampling(temp=1, seed=3)))
    assert log.stats.n_turns == n
    conversation.save(tmp_path / "session")
    list(conversation.reply("This is lost by the session, not by the log.", max_tokens=4))
    assert log.stats.n_turns == n + 2
    conversation.close()
    log.close()
    with Log(path) as log:
        conversation = Conversation.resume(engine, tmp_path / "session")
        conversation.use_log(log)
        assert log.stats.n_turns == n and not log.search("lost by the session")
        list(conversation.reply("What is the safe's code?", max_tokens=4, sampling=Sampling(temp=0)))
        assert conversation.recalled and conversation.recalled["text"] == "The code of the safe is 8841."
        conversation.clear()
        assert log.stats.n_entries == 0
        conversation.close()


QUESTION = "What does my friend Anna own?"


@pytest.mark.parametrize("rebase_at", [0, 600])
def test_a_remark_stays_with_its_message(load_each: Callable[..., Any], tmp_path: Path, rebase_at: int) -> None:
    """While answers are given again, positions rebased and sessions restored, it is there once, and read once."""
    engine, fact = load_each("chat", n_ctx=512, rebase_at=rebase_at), next(iter(FACTS))
    log = Log()
    conversation = told(engine, 64, log)

    def held() -> int:
        return int(engine.detokenize(conversation.stream.tokens()).decode(errors="replace").count(fact))

    list(conversation.reply(QUESTION, max_tokens=4, sampling=Sampling(temp=0)))
    greedy, n_past = conversation.messages[-1], conversation.stream.stats.n_past
    for sampling in (Sampling(temp=1, seed=3), Sampling(temp=0)):
        list(conversation.regenerate(max_tokens=4, sampling=sampling))
        assert held() == 1 and conversation.recalled and conversation.recalled["text"] == fact
        assert log.stats.n_turns == len(conversation.messages)
    assert (conversation.messages[-1], conversation.stream.stats.n_past) == (greedy, n_past)
    conversation.save(tmp_path / "session")
    conversation.close()
    conversation = Conversation.resume(engine, tmp_path / "session")
    conversation.use_log(log)
    list(conversation.regenerate(max_tokens=4, sampling=Sampling(temp=0)))
    assert (conversation.messages[-1], conversation.stream.stats.n_past, held()) == (greedy, n_past, 1)
    list(conversation.reply("And now?", max_tokens=120, sampling=Sampling(temp=0), ignore_eos=True, loop_guard=False))
    assert held() == 1 and conversation.recalled is None
    assert (conversation.stream.stats.n_rebases > 0) == (rebase_at > 0)
    conversation.close()


@pytest.mark.parametrize("attached", ["a log, nothing may come back", "a log, nothing belongs"])
def test_without_recall_every_bit_is_the_same(load_each: Callable[..., Any], attached: str) -> None:
    """A conversation with a log, from which nothing comes back, and one without: tokens and logits."""
    engine = load_each("chat", n_ctx=256)
    questions = [QUESTION] if "may" in attached else ["And the weather?"]

    def followed(log: Log | None) -> tuple[Any, ...]:
        conversation = Conversation(engine)
        if log:
            conversation.use_log(log, 0 if "may" in attached else 64)
        out: list[Any] = []
        for text in [*FACTS, *(f"It is {i} o'clock." for i in range(20)), *questions]:
            for token in conversation.reply(text, max_tokens=6, sampling=Sampling(temp=0.8, seed=1)):
                logits = conversation.stream.logits
                out.append((token.text, logits is not None and logits.tobytes()))
            assert conversation.recalled is None
        assert sum(bool(row[1]) for row in out) > 50
        stats = conversation.stream.stats
        assert stats.n_evicted > 256
        out += [conversation.stream.tokens(), stats.n_past, stats.n_evicted, conversation.messages]
        conversation.close()
        return tuple(out)

    log = Log()
    assert followed(log) == followed(None)
    assert log.stats.n_entries > 20
    hit = log.recall(QUESTION, 40)  # it could have come back
    assert hit and hit.turn == 0


def test_a_stream_with_a_log_has_the_same_bits(load_each: Callable[..., Any]) -> None:
    engine = load_each("gqa", n_ctx=128)
    lines = ["The secret word of Anna Bell is mango.\n", *(f"It was {i} o'clock.\n" for i in range(40))]

    def followed(log: Log | None) -> tuple[Any, ...]:
        with engine.stream() as stream:
            stream.use_log(log)
            out: list[Any] = []
            for line in lines:
                stream.feed(line)
                assert stream.logits is not None
                out.append(stream.logits.tobytes())
                if log:
                    stream.search("The secret word of Anna Bell is")
                    stream.unrecall()  # nothing is
            assert stream.stats.n_evicted > 128
            return (*out, stream.tokens())

    assert followed(Log()) == followed(None)


def test_a_log_of_another_conversation_is_left_alone(load: Callable[..., Any], tmp_path: Path) -> None:
    engine, path = load("chat", n_ctx=512), tmp_path / "log"
    with Log(path) as log:
        told(engine, 64, log).close()
        data = path.read_bytes()
        for text in (None, "Something else was said."):  # a new conversation, and one that has begun
            conversation = Conversation(engine)
            if text:
                list(conversation.reply(text, max_tokens=3, sampling=Sampling(temp=0)))
            with pytest.raises(SessionError, match="the log is of another conversation"):
                conversation.use_log(log)
            list(conversation.reply(QUESTION, max_tokens=3, sampling=Sampling(temp=0)))
            assert conversation.recalled is None and path.read_bytes() == data
            conversation.close()
        unfinished = Log()  # a crash in the first turn leaves that much without a session
        unfinished.append("Hello?", 0, "user")
        unfinished.append("Hel", 1, "assistant")
        conversation = Conversation(engine, recall=unfinished)
        assert unfinished.stats.n_entries == 0
        conversation.close()


@pytest.mark.parametrize("which", [-1, -2, 0])
def test_what_is_forgotten_stays_forgotten(load: Callable[..., Any], tmp_path: Path, which: int) -> None:
    """Whichever message it is, the session that still has it does not write it to the log again."""
    engine, path, word = load("chat", n_ctx=512), tmp_path / "log", "Zanzibar"
    with Log(path) as log:
        conversation = Conversation(engine)
        conversation.use_log(log)
        for i in range(2):
            messages = [{"role": "user", "content": f"Message {i} of {word}."}]
            list(conversation.say(messages, max_tokens=3, sampling=Sampling(temp=0)))
        turn = range(4)[which]
        assert any(h.turn == turn for h in log.search(conversation.messages[turn]["content"])) or turn % 2
        log.append(f"{word} once more", 3, "assistant")
        log.forget(turn)
        conversation.save(tmp_path / "session")
        conversation.close()
    with Log(path) as log:
        conversation = Conversation.resume(engine, tmp_path / "session")
        conversation.use_log(log)
        list(conversation.reply("And now?", max_tokens=3, sampling=Sampling(temp=0)))
        assert turn not in {h.turn for h in log.search(f"{word} message And now?", 100)}
        assert log.stats.n_turns == 6
        conversation.close()


def test_a_log_that_fails_does_not_end_the_conversation(load: Callable[..., Any], tmp_path: Path) -> None:
    log = Log(tmp_path / "log", 3000)
    conversation = told(load("chat", n_ctx=512), 64, log)
    (tmp_path / "log").unlink()
    (tmp_path / "log").mkdir()
    for i in range(40):  # until the file must be written anew
        list(conversation.reply(f"A long message number {i}. " * 4, max_tokens=2, sampling=Sampling(temp=0)))
    list(conversation.reply("Still there?", max_tokens=2, sampling=Sampling(temp=0)))
    assert conversation.recall_error and "not a regular file" in conversation.recall_error
    assert conversation.messages[-1]["role"] == "assistant"
    conversation.close()


def test_chat_says_what_it_recalls(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    def chat(*flags: str, lines: str) -> str:
        arguments = ["chat", "-m", str(tiny("chat")), "-c", "256", "-n", "4", "--temp", "0", *flags]
        result = CliRunner().invoke(cli, arguments, input=lines)
        assert result.exit_code == 0, result.output
        return result.stderr

    talk = "".join(f"The hour of the day is {i}.\n" for i in range(12))
    lines = f"My friend Anna owns a blue kite.\n{talk}What does my friend Anna own?\n"
    session = tmp_path / "session"
    said = chat("--recall", "64", "--session", str(session), lines=lines)
    assert "(recalled: message 0, just now, you said: My friend Anna owns a blue kite.)" in said
    assert "recalled" in chat(
        "--recall", "64", "--session", str(session), lines=f"{talk}What does my friend Anna own?\n"
    )
    log = tmp_path / "session.log"
    assert b"kite" in log.read_bytes()
    chat("--recall", "64", "--session", str(session), lines="/forget 0\n")
    assert b"kite" not in log.read_bytes()
    assert "recalled" not in chat("--recall", "0", lines=lines)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("no log", "is not a log of edge-stream"),
        ("newer", "is of version 9"),
        ("a bit", "is damaged: a checksum does not match"),
        ("a length", "is damaged: an entry is too long"),
        ("foreign", "the log is of another conversation"),
        ("truncated", None),
    ],
)
def test_a_chat_goes_on_without_a_log_that_is_bad(
    how: str, says: str | None, given: bool, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    """One sentence, and the log is left as it is; what was cut off is written again, as far as the session has it."""
    session, path = tmp_path / "session", tmp_path / ("other" if given else "session.log")

    def chat(lines: str) -> tuple[str, str]:
        flags = ["-c", "256", "-n", "4", "--temp", "0", "--recall", "64", "--session", str(session)]
        flags += ["--recall-log", str(path)] if given else []
        result = CliRunner().invoke(cli, ["chat", "-m", str(tiny("chat")), *flags], input=lines)
        assert result.exit_code == 0, result.output
        return result.stdout, result.stderr

    chat(f"{next(iter(FACTS))}\n" + "".join(f"The hour of the day is {i}.\n" for i in range(12)))
    whole = data = path.read_bytes()
    n = data.index(b"The hour")
    if how == "no log":
        data = b"x" * 100
    elif how == "newer":
        data = data[:8] + b"\x09" + data[9:]
    elif how == "a bit":
        data = data.replace(b"kite", b"kits")
    elif how == "a length":
        data = data[:12] + b"\xff\xff" + data[14:]
    elif how == "foreign":
        with Log(tmp_path / "x") as other:
            for i in range(4):
                other.append("My friend Anna owns a horse.", i, "user")
        data = (tmp_path / "x").read_bytes()
    else:
        data = data[: n + 4]
    path.write_bytes(data)
    out, err = chat(f"{QUESTION}\n")
    notes = [line for line in err.splitlines() if line.startswith("note:")]
    assert out.strip()
    if says:
        assert len(notes) == 1 and says in notes[0] and notes[0].endswith(": the chat goes on without it")
        assert path.read_bytes() == data
    else:
        assert not notes and len(path.read_bytes()) > len(whole)
    assert "you said: My friend Anna owns a blue kite.)" in err  # the session has it


def test_run_reads_the_last_line_with_one_that_left_the_window(tiny: Callable[[str], Path]) -> None:
    fact = "The secret word of Anna Bell is mango."
    prose = "".join(f"It was {i} o'clock and nothing happened.\n" for i in range(20))
    prompt = f"{prose}{fact}\n{prose}{prose}\nThe secret word of Anna Bell is"
    arguments = ["run", "-m", str(tiny("gqa")), "-c", "256", "-n", "2", "--temp", "0", "--echo", "-p"]
    result = run(*arguments, prompt, "--recall", "64")
    as_text = run(*arguments, prompt, "--recall", "64", "--sink-move", "redecode")  # it is read as text there
    assert f"(recalled: line 21: {fact})" in as_text.stderr and as_text.exit_code == 0
    assert f"(recalled: line 21: {fact})" in result.stderr and result.exit_code == 0
    assert "recalled" not in run(*arguments, prompt).stderr
    for near in (f"{prose}{fact}\nThe secret word of Anna Bell is", "The secret word of Anna Bell is"):
        assert "recalled" not in run(*arguments, near, "--recall", "64").stderr
    assert "recalled" not in run(*arguments, prompt, "--recall", "4").stderr


def test_a_stream_finds_what_left_its_window(load_each: Callable[..., Any]) -> None:
    fact = "The secret word of Anna Bell is mango."
    with load_each("gqa", n_ctx=512).stream() as stream:
        with pytest.raises(EdgeStreamError, match="call use_log"):
            stream.search(fact)
        stream.use_log(Log())
        stream.feed(f"It begins.\n{fact}\n")
        assert stream.search("The secret word of Anna Bell is") is None  # it is in the window
        stream.feed("".join(f"It was {i} o'clock.\n" for i in range(80)))
        hit = stream.search("The secret word of Anna Bell is")
        assert hit and (hit.text, hit.turn) == (fact, 1)
        assert hit.block == "\n" + 2 * f"{fact}\n"  # said as often as there is room
        n = stream.recall(hit.block)
        assert stream.stats.n_recalled == n > len(fact) // 8
        stream.unrecall()
        stream.reset()
        with pytest.raises(EdgeStreamError, match="call use_log"):
            stream.search(fact)
        n_line = len(stream.backend.vocabulary.tokenize(fact))
        for n_tokens, n_copies in ((n_line - 1, 0), (n_line, 1), (2 * n_line + 2, 1), (2 * n_line + 3, 2)):
            found = StreamLog(stream, Log(), n_tokens).fitted(hit)
            assert (found.n_copies if found else 0) == n_copies


def test_a_log_can_be_looked_into(tmp_path: Path) -> None:
    path = str(tmp_path / "log")
    filled(Path(path), 3).close()
    found = json.loads(run("recall", "search", path, "What does my friend Anna own?", "-n", "1", "-o", "json").stdout)
    assert (found[0]["text"], found[0]["message"], found[0]["belongs"]) == (next(iter(FACTS)), 0, "yes")
    assert run("recall", "forget", path, "0").exit_code == 0
    assert "nothing of turn 0" in run("recall", "forget", path, "0").output
    for form, out in (("md", ""), ("csv", ""), ("json", "[]\n")):
        assert run("recall", "search", path, "Anna", "-o", form).stdout == out
    Path(path).write_bytes(b"x" * 50)
    assert "not a log" in run("recall", "search", path, "Anna").output


def test_eval_recall_has_a_row_per_distance(tiny: Callable[[str], Path]) -> None:
    flags = ("-m", str(tiny("gqa")), "-c", "256", "--distances", "3,0.3,150", "--questions", "2")
    rows = json.loads(run("eval", "recall", *flags, "-o", "json").stdout)
    assert [(r["caches"], r["n"], r["streamed"], r["found"]) for r in rows] == [
        (0.3, 2, "yes", 0.0),
        (3, 2, "yes", 1.0),
        (150, 2, "log only", 1.0),
    ]
    assert rows[0]["distance"] < 256 and all(0.9 <= r["distance"] / 256 / r["caches"] < 1.5 for r in rows[1:])
    assert "less than a line apart" in run("eval", "recall", *flags, "--distances", "3,3.01").output
    assert "is not between" in run("eval", "recall", *flags, "--distances", "0").output


def test_no_fact_of_the_measurement_is_stated_twice() -> None:
    """The second would be an update, which rightly comes back in place of the first."""
    lines = _lines(60_000, set(range(40)), random.Random(0))
    questions = [line.fact[0] for line in lines if line.fact]
    assert len(questions) > 2500 and len(set(questions)) == len(questions)
