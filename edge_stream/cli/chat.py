"""`edge-stream chat`: a conversation of any length."""

from __future__ import annotations

import dataclasses
import sys
import tempfile
import time
from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_stream.chat.conversation import Conversation, count_pinned
from edge_stream.cli import options, sampling
from edge_stream.cli.console import LONG_PROMPT, Interrupt, Stopped, read_text
from edge_stream.cli.lines import Lines
from edge_stream.cli.meter import Meter
from edge_stream.errors import EdgeStreamError, SessionError
from edge_stream.measure.metrics import resident_mib
from edge_stream.output.files import check_writable

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
/read FILE      send the text of a file
/exit, /bye     quit (so does Ctrl-D)
\"\"\"             begin and end a message of several lines
Ctrl-C          stop the answer; twice within a second quits"""


@click.command("chat")
@options.model_option()
@click.option("-sys", "--system-prompt", "system", metavar="TEXT", help="System prompt, pinned in the cache.")
@click.option(
    "-sysf",
    "--system-prompt-file",
    "system_file",
    metavar="FILE",
    type=click.Path(),
    help="A file with the system prompt.",
)
@click.option(
    "--session",
    "session",
    metavar="FILE",
    type=click.Path(),
    help="Resume the conversation in FILE, and save it there after each turn.",
)
@click.option("--show-timings", is_flag=True, help="Print speeds after each answer.")
@sampling.predict_option()
@sampling.loop_guard_option(True)
@options.context_options()
@sampling.sampling_options
@options.compute_options
def main(**flags: Any) -> None:
    """Chat with a model through its chat template; /help lists the commands."""
    if flags["system"] is not None and flags["system_file"] is not None:
        raise click.UsageError("Give only one of -sys and -sysf.")
    if flags["system_file"] is not None:
        flags["system"] = read_text(Path(flags["system_file"]))
    session = Path(flags["session"]) if flags["session"] else None
    if session:
        check_writable(session)
    sampler = sampling.make_sampling(flags)

    def pinned(engine: Engine) -> int:
        return count_pinned(engine, flags["system"]) if flags["system"] or flags["n_keep"] < 0 else 0

    with options.load_engine(flags, pinned) as engine:
        conversation = _open(engine, flags, session)
        Chat(engine, conversation, flags, sampler, session).loop()


def _open(engine: Engine, flags: dict[str, Any], session: Path | None) -> Conversation:
    if session is None or not session.exists():
        return Conversation(engine, system=flags["system"], n_keep=flags["n_keep"])
    try:
        conversation = Conversation.resume(engine, session)
    except EdgeStreamError as error:
        raise SessionError(
            f"{error} (the file is untouched: move it away or give another --session FILE to start a new conversation)"
        ) from error
    _print_note(f"resumed {session}: {conversation.stream.stats.n_past:,} tokens seen")
    if flags["system"] is not None and flags["system"] != conversation.system:
        _print_note("the session keeps its own system prompt; -sys is ignored")
    return conversation


def _print_note(text: str) -> None:
    click.echo(text, err=True)


class Chat:
    """The loop of `edge-stream chat`: lines in, answers out."""

    def __init__(
        self, engine: Engine, conversation: Conversation, flags: dict[str, Any], sampling: Any, session: Path | None
    ) -> None:
        self._engine = engine
        self._conversation = conversation
        self._flags = flags
        self._sampling = sampling
        self._session = session
        self._n_predict: int = flags["n_predict"]
        self._interrupt = Interrupt()
        self._lines = Lines()

    def loop(self) -> None:
        """Read and answer messages until Ctrl-D or /exit."""
        if self._conversation.note:
            _print_note(f"note: {self._conversation.note}")
        if self._lines.interactive:
            _print_note("Type a message, or /help. Ctrl-C stops an answer, Ctrl-D quits.")
        try:
            while True:
                try:
                    text = self._lines.read_message()
                except KeyboardInterrupt:
                    self._interrupt.press()
                    _print_note("(Ctrl-C again or Ctrl-D to quit)")
                    continue
                if not text.strip():
                    continue
                try:
                    if not self._handle(text):
                        return
                except EdgeStreamError as error:
                    if not self._lines.interactive:
                        raise
                    _print_note(f"error: {error}")
        except EOFError:
            if self._lines.interactive:
                _print_note("")
        finally:
            self._conversation.close()

    def _handle(self, text: str) -> bool:
        """Answer a message or run a command; False to quit."""
        # a message of several lines may begin with a slash
        if not text.startswith("/") or "\n" in text:
            self._answer(text)
            return True
        name, _, argument = text[1:].strip().partition(" ")
        argument = argument.strip()
        if name in ("exit", "bye"):
            return False
        command = getattr(self, f"_do_{name}", None) if name.isalpha() else None
        if name == "?":
            command = self._do_help
        if command is None:
            raise EdgeStreamError(f"unknown command /{name}: /help lists them")
        command(argument)
        return True

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
                self._conversation = Conversation.resume(self._engine, path)
            except EdgeStreamError:
                self._conversation = Conversation.resume(self._engine, here)
                raise
        self._keep_session()
        _print_note(f"loaded {path}: {self._conversation.stream.stats.n_past:,} tokens seen")

    def _do_clear(self, _argument: str) -> None:
        self._conversation.clear()
        self._keep_session()
        _print_note("cleared")

    def _do_regen(self, _argument: str) -> None:
        self._print(self._conversation.regenerate(**self._options()), Meter())

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
                            read_s = time.perf_counter() - start
                        n_written += 1
                        loop = token.loop
                        click.echo(token.text, nl=False)
                        sys.stdout.flush()
                        if self._interrupt.is_pending():
                            break
            except Stopped:
                pass  # Ctrl-C while the message was read: the conversation took it back
            finally:
                click.echo()
            self._keep_session()
        if loop:
            _print_note(
                f"({loop.period} tokens were repeated {loop.repetitions} times: --no-loop-guard does not end that)"
            )
        written_s = time.perf_counter() - start - read_s
        if self._flags["show_timings"] and n_written > 1:
            _print_note(
                f"[ Prompt: {self._conversation.n_read / max(read_s, 1e-9):.1f} t/s | "
                f"Generation: {(n_written - 1) / max(written_s, 1e-9):.1f} t/s ]"
            )


def _file(argument: str, command: str) -> Path:
    if not argument:
        raise EdgeStreamError(f"{command} needs a file name")
    return Path(argument).expanduser()
