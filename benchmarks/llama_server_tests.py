"""Run llama.cpp's own server tests against `edge-stream serve`, and write docs/llama-server-tests.md.

    python benchmarks/llama_server_tests.py [-m MODEL] [--embedding-model MODEL] [-k EXPRESSION] [-o FILE]

The tests come with the pinned source (tools/server/tests) and stay there, unchanged. Only their launcher is replaced:
`ServerProcess.start` starts our server with flags of ours, and nothing is downloaded. All tests run with one model,
which is not theirs: where a test looks for words that theirs would write, any text will do, and the table says so. This
file is both the command and the plugin that pytest loads. Needs the packages of the extra [test], and half an hour on
two cores.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
import types
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

from results import stamp_line
from serving_bench import free_port

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "build/llama.cpp/llama.cpp/tools/server/tests"
_REPORT = "EDGE_STREAM_TESTS_REPORT"  # the plugin's file, a JSON object per test

# Tests of what serve does not have: not run. File or test, and why.
OUTSIDE: tuple[tuple[str, str], ...] = (
    (r"test_router\.py|test_stream\.py", "several models behind one server"),
    (r"test_mcp_servers\.py|test_tools_builtin\.py", "tools and MCP servers run by the server"),
    (r"test_proxy\.py|test_cors_proxy", "a proxy for the page's MCP servers"),
    (r"test_speculative\.py", "speculative decoding"),
    (r"test_vision_api\.py|on_multimodal|multimodal_slot|test_local_media_file|slot_.*_image|media_file", "images"),
    (r"test_anthropic_vision_base64", "images"),
    (r"test_rerank\.py", "reranking models"),
    (r"test_sleep\.py", "unloading the model when idle"),
    (r"test_compat_gcp\.py", "Google's prediction protocol"),
    (r"test_kv_keep_only_active\.py", "lines of llama-server's log"),
    (r"test_load_split_model", "a download"),
    (r"backend_sampling", "sampling on a device"),
    (r"defaults_to_localhost_with_tools_enabled", "tools and MCP servers run by the server"),
    (r"test_server_multiple_addresses", "several addresses"),
)

# Tests that fail because edge-stream is meant to differ.
DELIBERATE: tuple[tuple[str, str], ...] = (
    (r"test_invalid_chat_completion_req\[messages7", "an answer may follow an answer"),
    (r"test_cors_options.*Allow-Headers", "Authorization is named, since a browser's `*` leaves it out"),
    (r"test_metrics_disabled", "metrics are always there"),
    (r"test_lora_per_request", "adapters have one scale for all conversations"),
    (r"test_ctx_shift_disabled|test_context_size_exceeded|test_nocache_long_input", "no prompt is too long"),
    (r"test_slot_restore_legacy", "session files have a format of their own"),
    (r"test_anthropic_vision_format_accepted|tool_result_with_image", "an image is refused with 400, not 500"),
    (r"test_anthropic_empty_messages", "no messages are an error, as in Anthropic's own API"),
)

# Tests that fail because they count or name what only their model or cache has.
OTHER_MODEL: tuple[tuple[str, str], ...] = (
    (r"test_anthropic_tool_result$", "the model ends its answer at once"),
    (r"test_completion_without_tool_call_fast", "the model begins a call"),
    (r"test_infill", "the model has no tokens to fill in"),
    (r"test_embedding_multiple_with_fa", "the texts are too long for this model"),
    (r"test_completion_with_tokens_input", "one of the prompts is in the cache: rounding decides between two words"),
)

# Lines that compare with a count, a token or a text that only their model has.
OTHER_MODEL_LINES = re.compile(
    r"== n_|== min\(n_|prompt_n\"\] ==|n_saved|n_restored|batch_count|bosId|\[\"prompt\"\] ==|== 2 \* 9|== 5 #"
)

MISSING: tuple[tuple[str, str], ...] = (
    (r"test_chat_completion\[.*This is not", "a chat template without Jinja"),
    (r"test_access_static_assets", "the files of llama-server's page"),
)


#
# the plugin
#


def command(server: Any) -> list[str]:
    """The command for a ServerProcess of utils.py: its fields as our flags."""
    n_slots = server.n_slots or 4
    flags: dict[str, Any] = {
        "--model": os.environ["EDGE_STREAM_TESTS_MODEL"],
        "--host": server.server_host,
        "--port": server.server_port,
        "--temp": server.temperature,
        "--seed": server.seed,
        "--parallel": n_slots,
        "--alias": server.model_alias,
        "--tags": server.model_tags,
        "--api-key": server.api_key,
        "--n-predict": server.n_predict,
        "--ctx-size": server.n_ctx // n_slots if server.n_ctx else None,  # ours is of each conversation
        "--batch-size": server.n_batch,
        "--ubatch-size": server.n_ubatch,
        "--threads": server.n_threads,
        "--cache-type-k": server.ctk,
        "--cache-type-v": server.ctv,
        "--flash-attn": server.fa,
        "--slot-save-path": server.slot_save_path,
        "--lora": ",".join(server.lora_files or ()) or None,
        "--chat-template": server.chat_template,
        "--chat-template-file": server.chat_template_file,
        "--reasoning-format": server.reasoning_format,
        "--reasoning": server.reasoning,
        "--cors-origins": server.cors_origins or "*",  # llama-server's default
    }
    if server.server_embeddings:
        flags |= {"--embedding-model": os.environ["EDGE_STREAM_TESTS_EMBEDDING"], "--pooling": server.pooling}
    switches = {
        "--no-sessions": not server.slot_save_path,
        "--no-ui": server.no_ui,
        "--no-slots": not server.server_slots,
        "--verbose": server.debug,
    }
    return [
        *(str(part) for flag, value in flags.items() if value is not None for part in (flag, value)),
        *(switch for switch, on in switches.items() if on),
    ]


class ForkedServer(multiprocessing.get_context("fork").Process):  # type: ignore[misc,name-defined]
    """`edge-stream serve` with arguments. A fork of a process that has imported it, since most tests are short.

    It stays after a test, in case the next one wants the same.
    """

    running: ForkedServer | None = None

    @classmethod
    def of(cls, arguments: list[str], fresh: bool) -> ForkedServer:
        """The one that runs, if it has these arguments, else a new one in its place. fresh: a new one."""
        old = cls.running
        if old and (fresh or not old.is_alive() or old._arguments != arguments):
            old.end()
            old = None
        if old is None:
            old = cls(arguments)
            old.start()
        cls.running = old
        return old

    def __init__(self, arguments: list[str]) -> None:
        super().__init__(daemon=True)
        self._arguments = arguments

    def run(self) -> None:
        """The command."""
        from edge_stream.cli.serve import main

        main(self._arguments)

    def terminate(self) -> None:
        """Not yet."""

    def wait(self, timeout: float) -> None:
        """Nothing to wait for."""

    def end(self) -> None:
        """Terminate it."""
        super().terminate()
        self.join(30)
        self.kill()
        self.join()


def start(self: Any, timeout_seconds: int = 300) -> None:
    """Instead of ServerProcess.start."""
    import utils

    arguments = command(self)
    unknown = [part for part in arguments if part.startswith("--") and part not in _options()]
    if unknown:
        raise NoSuchFlagError(f"serve has no {unknown[0]}")
    print("starting", *arguments)
    self.process = ForkedServer.of(arguments, fresh=bool(self.server_metrics))
    utils.server_instances.add(self)
    deadline = time.monotonic() + timeout_seconds
    while time.monotonic() < deadline:
        if not self.process.is_alive():
            raise RuntimeError(f"the server ended with status {self.process.exitcode}")
        try:
            if self.make_request("GET", "/health").status_code == 200:
                headers = {"Authorization": f"Bearer {self.api_key}"}
                for slot in range(self.n_slots or 4):  # what the test before left
                    self.make_request("POST", f"/slots/{slot}?action=erase", headers=headers)
                return
        except Exception:
            time.sleep(0.05)
    raise TimeoutError("the server did not start")


class NoSuchFlagError(Exception):
    """A test needs a flag that serve does not have."""


@cache
def _options() -> set[str]:
    from edge_stream.cli.serve import main

    return {name for option in main.params for name in (*option.opts, *option.secondary_opts)}


_other_text = False  # whether this test has looked for words of its own model in vain


def _match_regex(regex: str, text: str) -> bool:
    """Instead of utils.match_regex: any text will do."""
    global _other_text
    found = re.search(regex, text, re.IGNORECASE | re.MULTILINE | re.DOTALL) is not None
    _other_text = _other_text or not found
    return True


def install() -> None:
    """Replace the launcher, before the tests import it by name."""
    sys.modules["wget"] = types.ModuleType("wget")
    sys.path.insert(0, str(TESTS))
    import utils

    import edge_stream.embedder
    import edge_stream.server.serve  # noqa: F401

    utils.ServerProcess.start = start
    utils.ServerPreset.load_all = staticmethod(lambda: None)
    utils.match_regex = _match_regex
    utils.download_file = lambda *_: os.environ["EDGE_STREAM_TESTS_ADAPTER"]  # only adapters are fetched so


def pytest_runtest_logreport(report: Any) -> None:
    """Note a result."""
    global _other_text
    if report.when == "setup":
        _other_text = False
    if report.when != "call" and report.passed:
        return
    crash = getattr(report.longrepr, "reprcrash", None)
    lines = str(report.longrepr or "").splitlines()
    result = {
        "id": report.nodeid,
        "outcome": report.outcome,
        "other_text": _other_text,
        "error": (crash.message if crash else lines[-1] if lines else "").partition("\n")[0],
        "line": next((line[1:].strip() for line in lines if line.startswith(">")), ""),
    }
    with open(os.environ[_REPORT], "a") as file:
        file.write(json.dumps(result) + "\n")


#
# the command
#

INTRODUCTION = """# llama.cpp's server tests

llama.cpp's own tests of its server (`tools/server/tests` of the pinned source, those not marked slow), run unchanged
against `edge-stream serve`, by `python benchmarks/llama_server_tests.py`, which replaces only their launcher. They are
written for other models: where a test looks for words that its model writes, any text passes here, and the note says
*other text*.

- pass: every assertion holds. other model: it fails at a count or a text that only its own model has.
- outside: it tests what the server does not have, and was not run. deliberate: edge-stream is meant to differ.
- missing: it could be there and is not. **fault**: none of these.
"""


def tiny_bert(work: Path) -> Path:
    """A model of random weights for the tests of embeddings."""
    from tiny_models import write_tiny_bert

    return write_tiny_bert(work / "bert.gguf", n_ctx_train=512)


def random_adapter(model: str, work: Path) -> Path:
    """A LoRA adapter of random weights for a model."""
    import gguf
    from test_adapters import write_adapter

    from edge_stream.models import names

    path = names.resolve(model)
    architecture = str(gguf.GGUFReader(path).fields["general.architecture"].contents())
    return write_adapter(path, work / "adapter.gguf", architecture=architecture)


def _find(table: tuple[tuple[str, str], ...], name: str) -> str | None:
    return next((why for pattern, why in table if re.search(pattern, name)), None)


def verdict(result: dict[str, Any]) -> tuple[str, str]:
    """Verdict and note for a test that was run."""
    name = result["id"]
    if result["outcome"] == "outside":
        return "outside", _find(OUTSIDE, name) or ""
    if result["outcome"] == "passed":
        return "pass", "other text" if result["other_text"] else ""
    if result["outcome"] == "skipped":
        return "skipped", "by the test itself"
    if "NoSuchFlagError" in result["error"]:
        return "missing", result["error"].partition(": ")[2]
    for kind, table in (("deliberate", DELIBERATE), ("other model", OTHER_MODEL), ("missing", MISSING)):
        why = _find(table, name)
        if why:
            return kind, why
    if OTHER_MODEL_LINES.search(result["line"]):
        return "other model", f"`{result['line']}`"
    return "fault", f"`{result['line']}`"


def run(arguments: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    """Results of all tests; those outside have the outcome `outside`."""
    report = work / "report"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(ROOT)]),
        "EDGE_STREAM_TESTS_MODEL": arguments.model,
        "EDGE_STREAM_TESTS_EMBEDDING": arguments.embedding_model or str(tiny_bert(work)),
        "EDGE_STREAM_TESTS_ADAPTER": str(random_adapter(arguments.model, work)),
        "XDG_STATE_HOME": str(work),
        "PORT": str(free_port()),
        _REPORT: str(report),
    }
    pytest = [sys.executable, "-m", "pytest", "-p", Path(__file__).stem, "-p", "no:cacheprovider", "-m", "not slow"]
    listing = subprocess.run(
        [*pytest, "--collect-only", "-q", "unit"], cwd=TESTS, env=environment, capture_output=True, text=True
    )
    names = [line for line in listing.stdout.splitlines() if "::" in line and re.search(arguments.only, line)]
    if not names:
        sys.exit(listing.stdout + listing.stderr)
    outside = {name for name in names if _find(OUTSIDE, name)}
    subprocess.run([*pytest, "-q", *(n for n in names if n not in outside)], cwd=TESTS, env=environment)
    results = {name: {"id": name, "outcome": "outside"} for name in outside}
    for line in report.read_text().splitlines():
        result = json.loads(line)
        if results.get(result["id"], {}).get("outcome") != "failed":
            results[result["id"]] = result
    return [results[name] for name in names if name in results]


def table(results: list[dict[str, Any]]) -> str:
    """The verdicts: how many of each, then a row per test function and verdict."""
    rows: dict[tuple[str, str, str, str], int] = Counter()
    for result in results:
        file, _, test = result["id"].removeprefix("unit/").partition("::")
        rows[(file, test.partition("[")[0], *verdict(result))] += 1
    count = Counter[str]()
    for (_, _, kind, _), n in rows.items():
        count[kind] += n
    lines = [f"{len(results)} tests: " + ", ".join(f"{n} {kind}" for kind, n in count.most_common()) + ".", ""]
    lines += ["| file | test | verdict | cases | note |", "|---|---|---|---|---|"]
    for (file, test, kind, note), n in rows.items():
        shown = f"**{kind}**" if kind == "fault" else kind
        lines.append(f"| {file} | {test} | {shown} | {n} | {note.replace('|', chr(92) + '|')} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("-m", "--model", default="demo")
    parser.add_argument("--embedding-model", help="default: a tiny random BERT")
    parser.add_argument("-k", "--only", default="", help="tests whose name matches; nothing is written then")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "docs" / "llama-server-tests.md")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests"))
    with tempfile.TemporaryDirectory() as work:
        text = table(run(arguments, Path(work)))
    if arguments.only:
        print(text)
        return
    facts = f"Model `{arguments.model}`. {stamp_line()}"
    arguments.output.write_text(f"{INTRODUCTION}\n{facts}\n\n{text}", encoding="utf-8")


if __name__ == "__main__":
    main()
elif _REPORT in os.environ:  # pytest's plugin
    install()
