"""`edge-stream serve`: conversations of any length over the OpenAI API, and a chat page."""

from __future__ import annotations

import logging
import os
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_stream.cli import chat_flags, options, prompts, sampling
from edge_stream.cli.llama_flags import Command
from edge_stream.errors import EdgeStreamError, cannot_import
from edge_stream.paths import given_path

if TYPE_CHECKING:
    from edge_stream.chat.options import ChatOptions
    from edge_stream.engine import Engine
    from edge_stream.server.settings import Settings


_FILE = click.Path(exists=True, dir_okay=False)
_NEVER_SECONDS = 1e9


def _default_sessions() -> Path:
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "edge-stream" / "sessions"


@click.command("serve", cls=Command)
@options.model_option()
@options.option("--host", env="HOST", default="127.0.0.1", help="Address to listen on.")
@options.option("--port", env="PORT", type=options.Count(0, 65535), default=8080, help="Port. 0: any free one.")
@options.option(
    "-a",
    "--alias",
    env="ALIAS",
    default="",
    metavar="NAME,...",
    help="Names of the model in the API. Default: that of its file.",
)
@options.option(
    "-np",
    "--parallel",
    "n_parallel",
    env="N_PARALLEL",
    type=options.Count(1, 64),
    default=4,
    help="Conversations in the cache at once, each with --ctx-size tokens of its own, decoded in one batch; others "
    "wait on disk. With N > 1, -fa auto means off on the CPU, so that conversations do not change each other's text.",
)
@options.option(
    "--api-key",
    envvar=["LLAMA_API_KEY", "LLAMA_ARG_API_KEY"],
    show_envvar=True,
    multiple=True,
    metavar="KEY,...",
    help="Keys; each request must have one of them.",
)
@options.option(
    "--api-key-file",
    env="API_KEY_FILE",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="A file with one key per line; # begins a comment.",
)
@options.option("--no-api-key", is_flag=True, help="Listen without a key on addresses other than loopback.")
@options.option(
    "--cors",
    "--cors-origins",
    env="CORS_ORIGINS",
    multiple=True,
    metavar="ORIGIN,...",
    help="Allow pages of these origins to use the server; localhost: all of this machine, *: all. Repeatable.",
)
@options.option(
    "--embedding-model",
    metavar="MODEL",
    help="A second model, which answers /v1/embeddings. Any GGUF file that llama.cpp can embed with.",
)
@options.option(
    "--pooling",
    type=click.Choice(("none", "mean", "cls", "last")),
    env="POOLING",
    help="How --embedding-model makes one vector of a text's tokens. Default: its own.",
)
@options.option(
    "--session-dir",
    type=click.Path(file_okay=False),
    metavar="DIR",
    help="Where conversations are saved after every turn. Default: ~/.local/state/edge-stream/sessions.",
)
@options.option("--no-sessions", is_flag=True, help="Write nothing to disk.")
@options.option(
    "--slot-save-path",
    type=click.Path(file_okay=False, exists=True, writable=True),
    metavar="DIR",
    help="Where POST /slots saves states, each in a file of the name that the client gives. Default: in --session-dir.",
)
@options.option(
    "--session-space",
    type=sampling.Number(0.001),
    default=4.0,
    metavar="GIB",
    help="Disk space for everything in --session-dir, other models' sessions and saved slots included. Beyond it, "
    "damaged sessions and then the least recently used conversations are deleted; saved slots never are.",
)
@options.recall_option(
    "Read a message with the line of its own history that belongs to it and has left the window, of at most N "
    "tokens. 0: never. Only what the request itself holds is searched.",
    default=64,
)
@options.option("--queue", type=options.Count(min=1), default=64, help="Maximum of waiting requests.")
@options.option(
    "-to",
    "--timeout",
    env="TIMEOUT",
    type=sampling.Number(1),
    default=3600.0,
    metavar="S",
    help="Seconds per request, after which its answer is cut off.",
)
@options.option(
    "--max-request", type=sampling.Number(0.01), default=16.0, metavar="MIB", help="Size limit of requests."
)
@options.option("--ssl-key-file", env="SSL_KEY_FILE", metavar="FILE", type=_FILE, help="PEM key, for https.")
@options.option("--ssl-cert-file", env="SSL_CERT_FILE", metavar="FILE", type=_FILE, help="PEM certificate, for https.")
@options.option(
    "--ui/--no-ui", " /--no-webui", "ui", env="UI", default=True, show_default=False, help="Serve the page."
)
@options.rare("--webui", is_flag=True, expose_value=False)
@options.rare("--slots/--no-slots", env="ENDPOINT_SLOTS", default=True)
@options.rare("--threads-http", env="THREADS_HTTP", type=options.Count(-1, 1024), default=-1)
@options.rare("--sse-ping-interval", env="SSE_PING_INTERVAL", type=options.Count(min=-1), default=15)
@options.rare("--lora-init-without-apply", is_flag=True)
@options.rare("--tags", env="TAGS", default="")
@options.rare("--log-disable", is_flag=True)
@options.rare("--log-file", env="LOG_FILE", type=click.Path(dir_okay=False))
@options.rare("--log-prefix/--no-log-prefix", env="LOG_PREFIX", default=True)
@options.rare("--log-timestamps/--no-log-timestamps", env="LOG_TIMESTAMPS", default=True)
@options.log_colors_option
@prompts.escape_option
@sampling.predict_option()
@chat_flags.chat_options
@sampling.loop_guard_option(True)
@options.context_options()
@options.draft_options
@sampling.sampling_options
@options.compute_options
def main(**flags: Any) -> None:
    """Serve conversations of any length over the OpenAI API. Sampler flags are defaults that requests may override."""
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import sse_starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise cannot_import(error, "the server", "server") from error
    from edge_stream.server.serve import serve

    keys = _keys(flags)
    chat = chat_flags.make_chat_options(flags)
    prompts.unescape_stops(flags)
    if bool(flags["ssl_key_file"]) != bool(flags["ssl_cert_file"]):
        raise click.UsageError("https needs both --ssl-key-file and --ssl-cert-file.")
    if flags["slot_save_path"] and flags["no_sessions"]:
        raise click.UsageError("--slot-save-path writes conversations to disk, which --no-sessions forbids.")
    _start_log(flags)
    with options.load_engine(flags) as engine, ExitStack() as stack:
        embedder = None
        if flags["embedding_model"]:
            from edge_stream.embedder import Embedder

            o = engine.backend.options
            embedder = stack.enter_context(
                Embedder(flags["embedding_model"], flags["pooling"], o.n_threads, o.n_gpu_layers, o.devices)
            )
        serve(engine, replace(make_settings(engine, flags, keys, chat), embedder=embedder))


def _start_log(flags: dict[str, Any]) -> None:
    parts = (("%(asctime)s", flags["log_timestamps"]), ("%(levelname)s", flags["log_prefix"]), ("%(message)s", True))
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    if flags["log_file"]:
        try:
            handlers.append(logging.FileHandler(flags["log_file"], encoding="utf-8"))
        except OSError as error:
            raise EdgeStreamError(f"cannot write {flags['log_file']}: {error.strerror}") from None
    logging.basicConfig(
        format=" ".join(part for part, wanted in parts if wanted), level=logging.INFO, handlers=handlers
    )
    logging.getLogger("httpx").setLevel(logging.WARNING)
    if flags["log_disable"]:
        logging.disable()


def _keys(flags: dict[str, Any]) -> tuple[str, ...]:
    """The API keys. Raises UsageError if there must be one and there is none."""
    from edge_stream.cli.console import read_text
    from edge_stream.server.settings import LOOPBACK

    keys = [key.strip() for value in flags["api_key"] for key in value.split(",")]
    if flags["api_key_file"]:
        lines = read_text(Path(flags["api_key_file"])).splitlines()
        keys += [line.strip() for line in lines if not line.startswith("#")]
    keys = [key for key in keys if key]
    if (flags["api_key"] or flags["api_key_file"]) and not keys:
        raise click.UsageError("--api-key is empty.")
    if flags["host"] not in LOOPBACK and not keys and not flags["no_api_key"]:
        raise click.UsageError(
            f"--host {flags['host']} can be reached from other machines: give an --api-key (or --no-api-key, if anyone "
            "there may use it)."
        )
    return tuple(keys)


def _names(given: str) -> tuple[str, ...]:
    """Names separated by commas, in llama-server's order."""
    return tuple(sorted({name.strip() for name in given.split(",")} - {""}))


def make_settings(engine: Engine, flags: dict[str, Any], keys: tuple[str, ...], chat: ChatOptions) -> Settings:
    """The server's settings."""
    from edge_stream.server.settings import Limits, Settings

    folder = given_path(flags["session_dir"]) if flags["session_dir"] else _default_sessions()
    aliases, tags = (_names(flags[name]) for name in ("alias", "tags"))
    return Settings(
        aliases=aliases or (engine.model_path.stem,),
        tags=tags,
        host=flags["host"],
        port=flags["port"],
        api_keys=keys,
        cors=tuple(origin.strip() for given in flags["cors"] for origin in given.split(",")),
        session_dir=None if flags["no_sessions"] else folder,
        session_bytes=int(flags["session_space"] * 2**30),
        slot_save_path=Path(flags["slot_save_path"]) if flags["slot_save_path"] else None,
        n_predict=flags["n_predict"],
        loop_guard=flags["loop_guard"],
        sampling=sampling.make_sampling(flags),
        verbose=flags["verbose"],
        stop=tuple(flags["stop"]),
        ignore_eos=flags["ignore_eos"],
        chat=chat,
        n_recall=flags["n_recall"],
        ping_seconds=flags["sse_ping_interval"] if flags["sse_ping_interval"] > 0 else _NEVER_SECONDS,
        ssl_files=(flags["ssl_key_file"], flags["ssl_cert_file"]) if flags["ssl_key_file"] else None,
        has_page=flags["ui"],
        has_slots=flags["slots"],
        n_http_threads=flags["threads_http"] if flags["threads_http"] > 0 else None,
        limits=Limits(
            queue=flags["queue"], request_seconds=flags["timeout"], body_bytes=int(flags["max_request"] * 2**20)
        ),
    )
