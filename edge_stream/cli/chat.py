"""`edge-stream chat`: a conversation of any length."""

from __future__ import annotations

import dataclasses
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import closing, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_stream.chat.conversation import Conversation, count_pinned
from edge_stream.chat.options import ChatOptions
from edge_stream.cli import chat_flags, options, prompts, sampling
from edge_stream.cli.console import LONG_PROMPT, Interrupt, Stopped, read_text, speeds
from edge_stream.cli.lines import Lines, Message
from edge_stream.cli.llama_flags import Command, Switch
from edge_stream.cli.meter import Meter
from edge_stream.cli.options import Count
from edge_stream.errors import EdgeStreamError, SessionError
from edge_stream.measure.metrics import resident_mib
from edge_stream.output.files import check_writable
from edge_stream.paths import given_path
from edge_stream.recall import Log

if TYPE_CHECKING:
    from edge_stream.engine import Engine
    from edge_stream.generation import Token

HELP = """\
/help           this list
/set NAME VALUE change temp, top_k, top_p, min_p, seed, repeat_penalty, predict, ...
/stats          tokens seen, the cache, memory
/save FILE      save the conversation
/load FILE      continue a saved one
/clear          forget everything but the system prompt
/regen          answer the last message anew
/continue       go on with an answer that -n or Ctrl-C cut
/read FILE      send the text of a file
/forget N       delete message N from the log (--recall-log; `recalled` lines name it)
/exit, /bye     quit (so does Ctrl-D)
//TEXT          say something that begins with a slash
\"\"\"             begin and end a message of several lines
Ctrl-C          stop the answer; twice within a second quits"""

_QUIT = ("exit", "bye")
_DIM, _PLAIN = "\033[2m", "\033[0m"


@click.command("chat", cls=Command)
@options.model_option()
@prompts.prompt_options
@options.option("-sys", "--system-prompt", "system", metavar="TEXT", help="System prompt, pinned in the cache.")
@options.option(
    "-sysf",
    "--system-prompt-file",
    "system_file",
    metavar="FILE",
    type=click.Path(),
    help="A file with the system prompt.",
)
@options.option("-st", "--single-turn", is_flag=True, help="Answer one message and exit.")
@options.option(
    "--session",
    "session",
    metavar="FILE",
    type=click.Path(),
    help="Resume the conversation in FILE, and save it there after each turn.",
)
@options.option(
    "--show-thinking/--hide-thinking",
    default=True,
    show_default=False,
    help="Print thoughts, dimmed, or leave them out.",
)
@options.recall_option(
    "Read a message with what belongs to it and has left the window, of at most N tokens. 0: never.", default=64
)
@options.option(
    "--recall-log",
    "recall_log",
    metavar="FILE",
    type=click.Path(dir_okay=False),
    help="Keep what is said in FILE, to be recalled. Default: beside --session, else in memory.",
)
@options.option(
    "--recall-space",
    "recall_space",
    metavar="MIB",
    type=Count(min=1, max=1024),
    default=64,
    help="Size of that file at most, in MiB: beyond it the oldest is dropped.",
)
@options.rare("--display-prompt/--no-display-prompt", default=False)
@options.rare("-co", "--color", type=Switch(), default="auto")
@options.rare("-mli", "--multiline-input", is_flag=True)
@options.rare("-cnv", "--conversation", is_flag=True, expose_value=False)
@options.rare("-i", "--interactive", "-if", "--interactive-first", is_flag=True, expose_value=False)
@sampling.predict_option()
@chat_flags.chat_options
@sampling.loop_guard_option(True)
@options.context_options()
@options.draft_options
@sampling.sampling_options
@options.compute_options
def main(**flags: Any) -> None:
    """Chat with a model through its chat template; /help lists the commands."""
    if flags["system"] is not None and flags["system_file"] is not None:
        raise click.UsageError("Give only one of -sys and -sysf.")
    if flags["system_file"] is not None:
        flags["system"] = read_text(Path(flags["system_file"]))
    first = prompts.given_prompt(flags)
    chat = chat_flags.make_chat_options(flags)
    session = Path(flags["session"]) if flags["session"] else None
    if session:
        check_writable(session)
    sampler = sampling.make_sampling(flags)

    def pinned(engine: Engine) -> int:
        return count_pinned(engine, flags["system"], chat) if flags["system"] or flags["n_keep"] < 0 else 0

    with options.load_engine(flags, pinned) as engine:
        conversation = _open(engine, flags, session, chat)
        with _open_log(flags, session) or nullcontext() as log:
            Chat(engine, conversation, flags, sampler, session, chat, log).loop(first)


def _open(engine: Engine, flags: dict[str, Any], session: Path | None, chat: ChatOptions) -> Conversation:
    if session is None or not session.exists():
        return Conversation(engine, system=flags["system"], n_keep=flags["n_keep"], chat=chat)
    try:
        conversation = Conversation.resume(engine, session, chat=chat)
    except EdgeStreamError as error:
        raise SessionError(
            f"{error} (the file is untouched: move it away or give another --session FILE to start a new conversation)"
        ) from error
    _print_note(f"resumed {session}: {conversation.stream.stats.n_past:,} tokens seen")
    if flags["system"] is not None and flags["system"] != conversation.system:
        _print_note("the session keeps its own system prompt; -sys is ignored")
    options.note_kept_sizes(flags, conversation.stream)
    return conversation


def _open_log(flags: dict[str, Any], session: Path | None) -> Log | None:
    """The log of --recall-log, or beside the session; in memory if that one cannot be used. None: nothing is kept."""
    given, space = flags["recall_log"], flags["recall_space"] << 20
    if not given and not flags["n_recall"]:
        return None
    path = Path(given) if given else session.with_name(session.name + ".log") if session else None
    try:
        return Log(path, space)
    except SessionError as error:
        return _log_in_memory(error, space)


def _log_in_memory(error: SessionError, space: int) -> Log:
    _print_note(f"note: {error}: the chat goes on without it")
    return Log(None, space)


def _print_note(text: str) -> None:
    click.echo(text, err=True)


class Chat:
    """The loop of `edge-stream chat`: lines in, answers out."""

    def __init__(
        self,
        engine: Engine,
        conversation: Conversation,
        flags: dict[str, Any],
        sampling: Any,
        session: Path | None,
        chat: ChatOptions,
        log: Log | None,
    ) -> None:
        self._log = log
        self._engine = engine
        self._conversation = conversation
        self._flags = flags
        self._sampling = sampling
        self._session = session
        self._n_predict: int = flags["n_predict"]
        self._interrupt = Interrupt()
        self._chat = chat
        self._use_log()
        self._lines = Lines(simple=flags["simple_io"], multiline=flags["multiline_input"])
        self._colored = flags["color"] == "on" or (flags["color"] == "auto" and sys.stdout.isatty())
        self._thinking, self._last = False, ""
        self._log_error: str | None = None

    def _use_log(self) -> None:
        n_tokens = self._flags["n_recall"]
        try:
            self._conversation.use_log(self._log, n_tokens)
        except SessionError as error:
            assert self._log
            self._log.close()
            self._log = _log_in_memory(error, self._flags["recall_space"] << 20)
            self._conversation.use_log(self._log, n_tokens)

    def loop(self, first: str | None = None) -> None:
        """Answer the first message, if there is one, then read and answer others until Ctrl-D or /exit."""
        if self._conversation.note:
            _print_note(f"note: {self._conversation.note}")
        if self._lines.interactive and not self._flags["single_turn"]:
            _print_note("Type a message, or /help. Ctrl-C stops an answer, Ctrl-D quits.")
        try:
            if first is not None and first.strip():
                if self._flags["display_prompt"]:
                    click.echo(f"> {first}\n")
                if not self._try(Message(first, True)):
                    return
            while True:
                try:
                    message = self._lines.read_message()
                except KeyboardInterrupt:
                    self._interrupt.press()
                    _print_note("(Ctrl-C again or Ctrl-D to quit)")
                    continue
                if message.text.strip() and not self._try(message):
                    return
        except EOFError:
            if self._lines.interactive:
                _print_note("")
        finally:
            self._conversation.close()

    def _try(self, message: Message) -> bool:
        """Answer a message or run a command; False to quit. On a terminal an error is printed, and the chat goes on."""
        try:
            return self._handle(message)
        except EdgeStreamError as error:
            if not self._lines.interactive:
                raise
            _print_note(f"error: {main.in_flags(str(error))}")
            return True

    def _handle(self, message: Message) -> bool:
        name, _, argument = message.text[1:].strip().partition(" ")
        command = None if message.is_text else self._command(name)
        if command is None and not message.is_text and self._lines.interactive:
            raise EdgeStreamError(f"unknown command /{name}: /help lists them, and // begins a text with a slash")
        if command is None:  # of piped lines only those with commands of the list are commands
            self._answer(message.text)
            return not self._flags["single_turn"]
        command(argument.strip())
        return name not in _QUIT

    def _command(self, name: str) -> Callable[[str], None] | None:
        if name in _QUIT:
            return lambda _argument: None
        command: Callable[[str], None] | None = getattr(self, f"_do_{name}", None) if name.isalpha() else None
        return self._do_help if name == "?" else command

    def _do_help(self, _argument: str) -> None:
        _print_note(HELP)

    def _do_set(self, argument: str) -> None:
        name, _, value = argument.replace("=", " ", 1).partition(" ")
        value = value.strip()
        fields = {f.name: getattr(self._sampling, f.name) for f in dataclasses.fields(self._sampling)}
        numbers = {n: v for n, v in fields.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
        numbers["predict"] = self._n_predict
        if not name:
            _print_note("  ".join(f"{n}={v}" for n, v in numbers.items()))
            return
        if name not in numbers:
            raise EdgeStreamError(f"there is no setting {name!r}, only {', '.join(numbers)}")
        # the flag of the same name checks the value
        wanted = "n_predict" if name == "predict" else name
        flag = next(p for p in main.params if p.name == wanted)
        try:
            number = flag.type.convert(value, None, None)
        except click.BadParameter as error:
            raise EdgeStreamError(f"{name}: {error.message}") from None
        if name == "predict":
            self._n_predict = number
        else:
            self._sampling = dataclasses.replace(self._sampling, **{name: number})

    def _do_stats(self, _argument: str) -> None:
        stats = self._conversation.stream.stats
        memory = resident_mib()
        _print_note(
            f"{stats.n_past:,} tokens seen, {stats.n_cached:,} of {stats.n_ctx:,} in the cache: "
            f"{stats.n_sinks} sinks ({stats.sink_move}) and a window of {stats.n_window:,}\n"
            f"{stats.n_slides:,} slides, {stats.n_rebases:,} rebases"
            + (f", {stats.n_accepted:,} of {stats.n_drafted:,} drafted tokens came true" if stats.n_drafted else "")
            + (f", {memory:,.0f} MiB resident" if memory else "")
        )

    def _do_save(self, argument: str) -> None:
        path = _file(argument, "/save")
        self._conversation.save(path)
        _print_note(f"saved to {path}")

    def _do_load(self, argument: str) -> None:
        path = _file(argument, "/load")
        # the engine holds one stream: this one is kept in a file in case the other cannot be loaded
        with tempfile.TemporaryDirectory() as folder:
            here = Path(folder) / "here"
            self._conversation.save(here)
            self._conversation.close()
            try:
                self._conversation = Conversation.resume(self._engine, path, chat=self._chat)
            except EdgeStreamError:
                self._conversation = Conversation.resume(self._engine, here, chat=self._chat)
                self._use_log()
                raise
        if self._log:
            self._log.truncate(0)  # another conversation's
        self._use_log()
        self._keep_session()
        _print_note(f"loaded {path}: {self._conversation.stream.stats.n_past:,} tokens seen")

    def _do_clear(self, _argument: str) -> None:
        self._conversation.clear()
        self._keep_session()
        _print_note("cleared")

    def _do_forget(self, argument: str) -> None:
        if not argument.isdigit():
            raise EdgeStreamError("/forget needs the number of a message, as in `recalled` lines")
        if not self._log:
            raise EdgeStreamError("there is no log: with --recall 0 and no --recall-log, nothing is kept")
        self._log.forget(int(argument))
        _print_note(f"message {argument} is out of the log (what is still in the window is not)")

    def _do_regen(self, _argument: str) -> None:
        self._print(self._conversation.regenerate(**self._options()), Meter())

    def _do_continue(self, _argument: str) -> None:
        self._print(self._conversation.continue_answer(**self._options()), Meter())

    def _do_read(self, argument: str) -> None:
        text = read_text(_file(argument, "/read"))
        if not text.strip():
            raise EdgeStreamError(f"{argument} is empty")
        self._answer(text)

    def _keep_session(self) -> None:
        if self._session:
            self._conversation.save(self._session)

    def _options(self) -> dict[str, Any]:
        return {
            "max_tokens": self._n_predict,
            "sampling": self._sampling,
            "stop": self._flags["stop"],
            "ignore_eos": self._flags["ignore_eos"],
            "loop_guard": self._flags["loop_guard"],
        }

    def _answer(self, text: str) -> None:
        meter = Meter(min_total=LONG_PROMPT)
        self._print(
            self._conversation.reply(text, on_progress=self._interrupt.reading(meter), **self._options()), meter
        )

    def _print(self, answer: Generator[Token, None, None], meter: Meter) -> None:
        start, read_s, n_written = time.perf_counter(), 0.0, 0
        loop = None
        with self._interrupt.watch():
            try:
                with meter, closing(answer) as tokens:
                    for token in tokens:
                        if not n_written:
                            meter.close()
                            self._show_recalled()
                            read_s = time.perf_counter() - start
                        n_written += 1
                        loop = token.loop
                        self._show(token)
                        sys.stdout.flush()
                        if self._interrupt.is_pending():
                            break
            except Stopped:
                pass  # Ctrl-C while the message was read: the conversation took it back
            finally:
                self._switch(False)
                click.echo()
            self._keep_session()
        if loop:
            _print_note(
                f"({loop.period} tokens were repeated {loop.repetitions} times: --no-loop-guard does not end that)"
            )
        written_s = time.perf_counter() - start - read_s
        if self._flags["show_timings"] and n_written > 1:
            read = self._conversation.n_read / max(read_s, 1e-9)
            _print_note(speeds(read, (n_written - 1) / max(written_s, 1e-9)))

    def _show_recalled(self) -> None:
        """Say what the message was read with, and what is wrong with the log."""
        found, error = self._conversation.recalled, self._conversation.recall_error
        if found:
            who = "you" if found["role"] == "user" else "the model"
            line = f"(recalled: message {found['turn']}, {_ago(found['when'])}, {who} said: {found['text']})"
            click.echo(click.style(line, dim=True), err=True, color=None if self._colored else False)
        if error and error != self._log_error:
            self._log_error = error
            _print_note(f"note: {error}: the chat goes on without its log")

    def _show(self, token: Token) -> None:
        """Print a token's text; thoughts dimmed and marked, or not at all."""
        if token.reasoning and not self._flags["show_thinking"]:
            return
        if token.text:
            self._switch(token.reasoning)
            self._last = token.text[-1]
        click.echo(token.text, nl=False, color=self._colored)

    def _switch(self, thinking: bool) -> None:
        """Mark where thoughts begin and end, with llama-cli's words."""
        if thinking == self._thinking:
            return
        self._thinking = thinking
        begin, end = (_DIM, _PLAIN) if self._colored else ("", "")
        line = "" if self._last == "\n" else "\n"
        text = f"{begin}[Start thinking]\n" if thinking else f"{line}[End thinking]{end}\n\n"
        click.echo(text, nl=False, color=True)


def _file(argument: str, command: str) -> Path:
    if not argument:
        raise EdgeStreamError(f"{command} needs a file name")
    return given_path(argument)


def _ago(when: int) -> str:
    """How long ago a time is, in words."""
    minutes = max(0, int(time.time()) - when) // 60
    for size, unit in ((1440, "day"), (60, "hour"), (1, "minute")):
        if minutes >= size:
            n = minutes // size
            return f"{n} {unit}{'' if n == 1 else 's'} ago"
    return "just now"
