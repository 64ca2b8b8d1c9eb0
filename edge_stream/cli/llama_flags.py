"""Command lines of llama-server and llama-cli: what is taken for granted, and what is refused, with reasons.

Every flag of the pinned common/arg.cpp is an option of our command or is listed here (tests/test_llama_flags.py).
"""

from __future__ import annotations

import difflib
import itertools
import os
import re
from typing import Any

import click

from edge_stream.errors import EdgeStreamError

_FALSE = ("0", "off", "false", "disabled")

# Flags without a value that ask for what edge-stream does anyway, with their environment variables.
ALWAYS = (
    "-cb --cont-batching LLAMA_ARG_CONT_BATCHING "
    "--context-shift --no-context-shift LLAMA_ARG_CONTEXT_SHIFT LLAMA_ARG_NO_CONTEXT_SHIFT "  # a stream has no end
    "--jinja LLAMA_ARG_JINJA "
    "--swa-full LLAMA_ARG_SWA_FULL "
    "--warmup --no-warmup "  # the proof at a model's first load is its warm-up
    "--no-perf LLAMA_ARG_NO_PERF "
    "-no-kvu --no-kv-unified LLAMA_ARG_NO_KV_UNIFIED "
    "-kvo --kv-offload LLAMA_ARG_KV_OFFLOAD "
    "--op-offload "
    "--no-mmproj --no-mmproj-auto LLAMA_ARG_NO_MMPROJ_AUTO --no-mmproj-offload LLAMA_ARG_NO_MMPROJ_OFFLOAD "
    "--no-agent -no-ag LLAMA_ARG_NO_AGENT "
    "--no-ui-mcp-proxy --no-webui-mcp-proxy LLAMA_ARG_NO_UI_MCP_PROXY "
    "--no-cors-credentials LLAMA_ARG_NO_CORS_CREDENTIALS "
    "--cache-prompt LLAMA_ARG_CACHE_PROMPT "
    "--cache-idle-slots LLAMA_ARG_CACHE_IDLE_SLOTS "  # on disk
    "--metrics LLAMA_ARG_ENDPOINT_METRICS --props LLAMA_ARG_ENDPOINT_PROPS "
    "--prefill-assistant LLAMA_ARG_PREFILL_ASSISTANT "
    "--no-skip-chat-parsing LLAMA_ARG_NO_SKIP_CHAT_PARSING "
    "--reasoning-preserve LLAMA_ARG_REASONING_PRESERVE "  # what was thought stays in the stream
    "--no-log-jsonl LLAMA_ARG_NO_LOG_JSONL "
    "--no-spec-draft-backend-sampling LLAMA_ARG_NO_SPEC_DRAFT_BACKEND_SAMPLING"
)

_SPECULATIVE = (
    "a draft model (-md) has -ngld and --spec-draft-n-max, the model's own -c and -t, and drafts where it pays"
)
_LOOKUP = "--spec-type ngram-simple has --spec-ngram-simple-size-n and --spec-draft-n-max, and drafts where it pays"
_POSITIONS = "a stream's positions never exceed --ctx-size, so RoPE need not be stretched; leave it out"
_THREADS = "edge-stream decides how its threads wait; taskset, nice and numactl place the process"
_MEDIA = "pictures, sound and video cannot be streamed yet: only text is read"
_ROUTER = "one server serves one model; start one per model"
_HOSTED_TOOLS = "the server runs no tools; clients run those that they name in a request"
_PRESET = "presets of models are not built in; name the model with -hf USER/REPO"
_EMBEDDING = "this server streams text; a second model answers for embeddings: --embedding-model"
_HISTORY = "a conversation is found by its exact history and waits on disk (--session-space, --no-sessions)"

# What cannot work, and what to use instead. An option of the same name goes before: `-cnv` is one of `chat`, say.
REFUSED = {
    "-nocb --no-cont-batching LLAMA_ARG_NO_CONT_BATCHING": "conversations are always decoded together; "
    "-np 1 answers one at a time",
    "--no-jinja LLAMA_ARG_NO_JINJA": "templates are always Jinja; --chat-template NAME takes one of llama.cpp's own",
    "--perf LLAMA_ARG_PERF": "use --show-timings (chat), --stats FILE (run) or GET /metrics (serve)",
    "--verbose-prompt": "POST /tokenize of edge-stream serve shows a text's tokens",
    "-ptc --print-token-count": "use /stats (chat) or --stats FILE (run)",
    "-cnv --conversation -i --interactive -if --interactive-first": "use edge-stream chat",
    "-no-cnv --no-conversation": "use edge-stream run, which completes a text without a chat template",
    "--in-prefix --in-suffix --in-prefix-bos": "messages go through the chat template; "
    "--chat-template changes what is around them",
    "-sys --system-prompt -sysf --system-prompt-file -mli --multiline-input --chat-template --chat-template-file "
    "--chat-template-kwargs -rea --reasoning --reasoning-format --reasoning-effort --reasoning-budget "
    "--reasoning-budget-message": "run completes a text without a chat template; use edge-stream chat",
    "--log-file": "redirect the messages: 2> FILE",
    "-sp --special": "an answer has no control tokens; run prints them",
    "--prompt-cache --prompt-cache-all --prompt-cache-ro": "use --save FILE and --load FILE (run) or "
    "--session FILE (chat)",
    "-gan --grp-attn-n LLAMA_ARG_GRP_ATTN_N -gaw --grp-attn-w LLAMA_ARG_GRP_ATTN_W": _POSITIONS,
    "--rope-scaling LLAMA_ARG_ROPE_SCALING_TYPE --rope-scale LLAMA_ARG_ROPE_SCALE --rope-freq-base "
    "LLAMA_ARG_ROPE_FREQ_BASE --rope-freq-scale LLAMA_ARG_ROPE_FREQ_SCALE --yarn-orig-ctx LLAMA_ARG_YARN_ORIG_CTX "
    "--yarn-ext-factor LLAMA_ARG_YARN_EXT_FACTOR --yarn-attn-factor LLAMA_ARG_YARN_ATTN_FACTOR --yarn-beta-slow "
    "LLAMA_ARG_YARN_BETA_SLOW --yarn-beta-fast LLAMA_ARG_YARN_BETA_FAST": _POSITIONS,
    "-C --cpu-mask -Cr --cpu-range --cpu-strict --prio --poll -Cb --cpu-mask-batch -Crb --cpu-range-batch "
    "--cpu-strict-batch --prio-batch --poll-batch --numa LLAMA_ARG_NUMA": _THREADS,
    "-lcs --lookup-cache-static -lcd --lookup-cache-dynamic "
    "--spec-draft-threads -td --threads-draft --spec-draft-threads-batch -tbd --threads-batch-draft "
    "--spec-draft-cpu-mask -Cd --cpu-mask-draft --spec-draft-cpu-range -Crd --cpu-range-draft "
    "--spec-draft-cpu-strict --cpu-strict-draft --spec-draft-prio --prio-draft --spec-draft-poll --poll-draft "
    "--spec-draft-cpu-mask-batch -Cbd --cpu-mask-batch-draft --spec-draft-cpu-strict-batch --cpu-strict-batch-draft "
    "--spec-draft-prio-batch --prio-batch-draft --spec-draft-poll-batch --poll-batch-draft "
    "--spec-draft-type-k -ctkd --cache-type-k-draft LLAMA_ARG_SPEC_DRAFT_CACHE_TYPE_K "
    "--spec-draft-type-v -ctvd --cache-type-v-draft LLAMA_ARG_SPEC_DRAFT_CACHE_TYPE_V "
    "--spec-draft-override-tensor -otd --override-tensor-draft "
    "--spec-draft-cpu-moe -cmoed --cpu-moe-draft LLAMA_ARG_SPEC_DRAFT_CPU_MOE "
    "--spec-draft-n-cpu-moe --spec-draft-ncmoe -ncmoed --n-cpu-moe-draft LLAMA_ARG_SPEC_DRAFT_N_CPU_MOE "
    "--spec-synth-len LLAMA_ARG_SPEC_SYNTH_LEN --spec-synth-rates LLAMA_ARG_SPEC_SYNTH_RATES "
    "--spec-draft-p-split --draft-p-split LLAMA_ARG_SPEC_DRAFT_P_SPLIT "
    "--spec-draft-p-min --draft-p-min LLAMA_ARG_SPEC_DRAFT_P_MIN "
    "--spec-draft-backend-sampling LLAMA_ARG_SPEC_DRAFT_BACKEND_SAMPLING "
    "--spec-draft-device -devd --device-draft": _SPECULATIVE,
    "--spec-ngram-mod-n-min --spec-ngram-mod-n-max --spec-ngram-mod-n-match --spec-ngram-simple-min-hits "
    "--spec-ngram-map-k-size-n --spec-ngram-map-k-size-m --spec-ngram-map-k-min-hits --spec-ngram-map-k4v-size-n "
    "--spec-ngram-map-k4v-size-m --spec-ngram-map-k4v-min-hits --spec-ngram-size-n --spec-ngram-size-m "
    "--spec-ngram-min-hits": _LOOKUP,
    "-mm --mmproj LLAMA_ARG_MMPROJ -mmu --mmproj-url LLAMA_ARG_MMPROJ_URL --mmproj-auto LLAMA_ARG_MMPROJ_AUTO "
    "--mmproj-offload LLAMA_ARG_MMPROJ_OFFLOAD -mmdev --mmproj-device MTMD_BACKEND_DEVICE --image --audio --video "
    "--image-min-tokens LLAMA_ARG_IMAGE_MIN_TOKENS --image-max-tokens LLAMA_ARG_IMAGE_MAX_TOKENS "
    "--mtmd-batch-max-tokens LLAMA_ARG_MTMD_BATCH_MAX_TOKENS --video-fps LLAMA_ARG_VIDEO_FPS "
    "--video-timestamp-interval LLAMA_ARG_VIDEO_TIMESTAMP_INTERVAL --video-ffmpeg-dir LLAMA_ARG_VIDEO_FFMPEG_DIR "
    "--media-path": _MEDIA,
    "-kvu --kv-unified LLAMA_ARG_KV_UNIFIED --kv-unified-per-slot LLAMA_ARG_KV_UNIFIED_PER_SLOT": "each conversation "
    "has --ctx-size cells of its own, so that it does not depend on the others",
    "-nkvo --no-kv-offload LLAMA_ARG_NO_KV_OFFLOAD": "the cache stays with its layers; it never grows, so choose "
    "--ctx-size, -ctk and -ctv such that it fits the device",
    "-ctxcp --ctx-checkpoints --swa-checkpoints LLAMA_ARG_CTX_CHECKPOINTS -cms --checkpoint-min-step "
    "LLAMA_ARG_CHECKPOINT_MIN_SPACING_NT": "marks to go back to are set at every message",
    "-cram --cache-ram LLAMA_ARG_CACHE_RAM --no-cache-idle-slots LLAMA_ARG_NO_CACHE_IDLE_SLOTS --no-cache-prompt "
    "LLAMA_ARG_NO_CACHE_PROMPT -sps --slot-prompt-similarity": _HISTORY,
    "--cache-reuse LLAMA_ARG_CACHE_REUSE": "moving pieces of a prompt to other places of the cache is not exact",
    "--override-kv": "a session is tied to the model's metadata; change them in the file (gguf-set-metadata)",
    "--control-vector --control-vector-scaled --control-vector-layer-range": "control vectors are not supported; "
    "--lora takes adapters",
    "-dr --docker-repo LLAMA_ARG_DOCKER_REPO": "models come from files, URLs (-mu) and Hugging Face (-hf)",
    "-lzm --lazy-mode LLAMA_ARG_LAZY_MODE": "tensors are read as llama.cpp's auto mode does; leave it out",
    "-fitt --fit-target LLAMA_ARG_FIT_TARGET -fitc --fit-ctx LLAMA_ARG_FIT_CTX": "nothing is fitted by itself; "
    "info -m MODEL shows the memory that -c, -ngl and -ctk need",
    "-bs --backend-sampling LLAMA_ARG_BACKEND_SAMPLING": "the sampler is part of the session and runs on the CPU",
    "--no-op-offload": "llama.cpp decides where an operation on host memory runs; leave it out",
    "--embedding --embeddings LLAMA_ARG_EMBEDDINGS --embd-normalize --rerank --reranking "
    "LLAMA_ARG_RERANKING --embd-gemma-default": _EMBEDDING,
    "--spm-infill": "a model is asked in the order prefix, suffix, middle; leave it out",
    "--fim-qwen-1.5b-default --fim-qwen-3b-default --fim-qwen-7b-default --fim-qwen-7b-spec --fim-qwen-14b-spec "
    "--fim-qwen-30b-default --gpt-oss-20b-default --gpt-oss-120b-default --vision-gemma-4b-default "
    "--vision-gemma-12b-default": _PRESET,
    "-cl --cache-list": "`hf cache ls` lists what was downloaded",
    "--completion-bash": 'eval "$(_EDGE_STREAM_COMPLETE=bash_source edge-stream)" completes in bash',
    "--server-base": "chat loads its model itself; any OpenAI client talks to a server",
    "-o --output --output-file": "redirect the output: > FILE",
    "--reuse-port LLAMA_ARG_REUSE_PORT": "two servers at one port would each know half of every conversation",
    "--path LLAMA_ARG_STATIC_PATH --api-prefix LLAMA_ARG_API_PREFIX": "a reverse proxy serves files and prefixes",
    "--cors-methods LLAMA_ARG_CORS_METHODS --cors-headers LLAMA_ARG_CORS_HEADERS --cors-credentials "
    "LLAMA_ARG_CORS_CREDENTIALS": "origins of --cors may send GET and POST with any header, keys but no cookies",
    "--ui-config --webui-config LLAMA_ARG_UI_CONFIG --ui-config-file --webui-config-file "
    "LLAMA_ARG_UI_CONFIG_FILE": "the page has edge-stream's settings, which a browser keeps",
    "--ui-mcp-proxy --webui-mcp-proxy LLAMA_ARG_UI_MCP_PROXY --tools LLAMA_ARG_TOOLS --tools-runtime "
    "LLAMA_ARG_TOOLS_RUNTIME --mcp-servers-config LLAMA_ARG_MCP_SERVERS_CONFIG --mcp-servers-json "
    "LLAMA_ARG_MCP_SERVERS_JSON -ag --agent LLAMA_ARG_AGENT": _HOSTED_TOOLS,
    "--models-dir LLAMA_ARG_MODELS_DIR --models-preset LLAMA_ARG_MODELS_PRESET --models-max LLAMA_ARG_MODELS_MAX "
    "--models-autoload --no-models-autoload LLAMA_ARG_MODELS_AUTOLOAD": _ROUTER,
    "--no-prefill-assistant LLAMA_ARG_NO_PREFILL_ASSISTANT": "a last message by the assistant is always continued",
    "--skip-chat-parsing LLAMA_ARG_SKIP_CHAT_PARSING": "--reasoning-format none leaves thoughts in the text",
    "--no-reasoning-preserve LLAMA_ARG_NO_REASONING_PRESERVE": "what was thought stays in the stream",
    "--sleep-idle-seconds": "a server keeps its memory; stop it when it is not needed",
    "--log-jsonl LLAMA_ARG_LOG_JSONL": "the log is lines of text",
    "--log-prompts-dir": "texts of conversations are not logged; --session-dir keeps them",
}

REASONS = {name: reason for names, reason in REFUSED.items() for name in names.split()}
ALWAYS_FLAGS = frozenset(ALWAYS.split())


class Command(click.Command):
    """A click command that reads flags as llama.cpp does: `-cb` is one flag, never `-c b`, and `_` in `--a_b` is `-`.

    Flags of llama.cpp that it lacks are taken for granted or refused by this module's tables. Errors of the library
    name flags, not parameters.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Check the names of all flags, then let click read their values."""
        options = [p for p in self.get_params(ctx) if isinstance(p, click.Option)]
        n_values = {
            name: 0 if option.is_flag or option.count else option.nargs
            for option in options
            for name in (*option.opts, *option.secondary_opts)
        }
        kept: list[str] = []
        rest = iter(args)
        for arg in rest:
            if not arg.startswith("-") or arg in ("-", "--"):
                kept += [arg, *rest] if arg == "--" else [arg]
                continue
            name, equals, value = arg.partition("=") if arg.startswith("--") else (arg, "", "")
            name = name[:2] + name[2:].replace("_", "-") if name != "--usage" else "--help"
            if name == "--version":
                from edge_stream._version import __version__

                click.echo(f"edge-stream {__version__}")
                ctx.exit()
            if name in n_values:
                kept += [name + equals + value, *itertools.islice(rest, 0 if equals else n_values[name])]
            elif name in REASONS:
                raise click.UsageError(f"{name}: {REASONS[name]}.", ctx)
            elif name not in ALWAYS_FLAGS:
                raise click.NoSuchOption(name, possibilities=difflib.get_close_matches(name, n_values), ctx=ctx)
        self._note_environment(options)
        return super().parse_args(ctx, kept)

    def _note_environment(self, options: list[click.Option]) -> None:
        """Say which of llama.cpp's environment variables have no effect."""
        read = {name for option in options for name in _list(option.envvar)}
        for name, value in sorted(os.environ.items()):
            if value in _FALSE and not name.startswith("LLAMA_ARG_NO_"):
                name = name.replace("LLAMA_ARG_", "LLAMA_ARG_NO_", 1)
            if name in REASONS and name not in read:
                click.echo(f"{name} is ignored: {REASONS[name]}", err=True)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except EdgeStreamError as error:
            raise EdgeStreamError(self.in_flags(str(error)), error.status) from error

    def in_flags(self, message: str) -> str:
        """A sentence with `n_keep = 5` as `--keep 5`."""
        for param in self.params:
            if param.name and "_" in param.name and isinstance(param, click.Option):
                flag = next((name for name in param.opts if name.startswith("--")), param.opts[0])
                message = re.sub(rf"(?<![\w/.-]){param.name} = ", flag + " ", message)
                message = re.sub(rf"(?<![\w/.-]){param.name}(?![\w/.-])", flag, message)
        return message


class Option(click.Option):
    """An option with llama.cpp's ways of reading its environment variable: LLAMA_ARG_NO_X, and more words for yes."""

    def resolve_envvar_value(self, ctx: click.Context) -> str | None:
        """The variable's value."""
        names = [name.replace("LLAMA_ARG_", "LLAMA_ARG_NO_", 1) for name in _list(self.envvar)]
        if self.secondary_opts and any(name in os.environ for name in names):
            return "0"
        value = super().resolve_envvar_value(ctx)
        return {"enabled": "1", "disabled": "0"}.get(value or "", value) if self.is_flag else value


class Switch(click.Choice):  # type: ignore[type-arg]
    """on, off or auto, with llama.cpp's other words for them."""

    _WORDS = (("on", ("on", "enabled", "true", "1")), ("off", _FALSE), ("auto", ("auto", "-1")))

    def __init__(self) -> None:
        super().__init__(["on", "off", "auto"])

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """One of the three."""
        word = next((name for name, words in self._WORDS if value in words), value)
        return str(super().convert(word, param, ctx))


def _list(envvar: Any) -> list[str]:
    return [envvar] if isinstance(envvar, str) else list(envvar or ())
