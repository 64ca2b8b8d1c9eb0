"""A working day of chat: thousands of turns through one server, in four APIs, with tools, thinking, schemas and recall.

    python benchmarks/endurance_chat.py --turns 2000

A scripted user talks to `edge-stream serve`, which keeps the conversation; the client sends its growing history, in the
form of another API from turn to turn (chat_apis.py). Two more conversations, with facts of their own, are talked to at
the same moments, and once more afterwards, each alone, on a new server: the texts must be the same. Every answer is
checked: complete, not empty, of the kind that was asked for, in its own conversation, and what is recalled is its own.

Time to first token is that of plain turns in /v1/chat/completions: the medians of turns 5 to 35 and of the last 40. The
speed of a shared machine drifts, so that the last 40 take turns with turns 21 to 60 of a conversation begun then.

Resumable: histories, figures and the server's sessions are kept in build/endurance/chat-N, and so is result.json, from
which a finished run prints its table again.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
from chat_apis import APIS, Message, Options, Reply, ask
from serving_bench import ServerProcess, edge_stream_command

from edge_stream.measure.stamp import stamp
from edge_stream.measure.table import markdown
from edge_stream.output.files import replace_text

ROOT = Path(__file__).resolve().parents[1]
OPENAI = "chat completions"
COLUMNS = ["what", "measured", "aim"]
COLOURS = ["red", "green", "blue"]
WORDS = ("time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school", "state")
SCHEMA = {
    "type": "object",
    "properties": {"mood": {"enum": ["good", "bad"]}, "level": {"enum": [1, 2, 3]}},
    "required": ["mood", "level"],
    "additionalProperties": False,
}
PAINT = {
    "type": "object",
    "properties": {"colour": {"enum": COLOURS}},
    "required": ["colour"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": "paint", "description": "Paint a wall.", "parameters": PAINT}}]
THOUGHT = 'root ::= "<think>\\n" [a-z] [a-z ]{8,30} "\\n</think>\\n\\n" [A-Z] [a-z ]{8,30} "."'
# the demo model's ChatML, with tools as Hermes and thinking as Qwen3 have them
TEMPLATE = """\
{{- '<|im_start|>system\\n' }}
{%- if messages[0].role == 'system' %}{{- messages[0].content }}{%- else %}{{- 'You are a helpful AI assistant.' }}{%- endif %}
{%- if tools %}{{- '\\nTools:' }}{%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}{%- endif %}
{{- '<|im_end|>\\n' }}
{%- for m in messages %}
{%- if m.role == 'system' and loop.first %}
{%- elif m.role == 'tool' %}
{{- '<|im_start|>user\\n<tool_response>\\n' + m.content + '\\n</tool_response><|im_end|>\\n' }}
{%- else %}
{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' and m.reasoning_content %}{{- '<think>\\n' + m.reasoning_content + '\\n</think>\\n\\n' }}{%- endif %}
{{- m.content }}
{%- for call in m.tool_calls or [] %}
{{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' + (call.function.arguments | tojson) + '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
"""  # noqa: E501

# what turn i is, by i % 20; "plain" is always in chat completions, the others go through the APIs
KINDS = (
    "plain", "fact", "other", "plain", "tool", "result", "plain", "think", "other", "question",
    "plain", "schema", "other", "plain", "no think", "grammar", "plain", "fact", "other", "question",
)  # fmt: skip
BESIDE = 15  # turns of the other conversations are sent together with turns 5, 15, 25, ... of the first
FIRST, LAST = (5, 35), 40  # turns whose time to first token is compared: these, and as many at the end


class Fault(Exception):
    """An answer that is not as it must be."""


def written(message: Message) -> list[str]:
    """What the model wrote of a message: all but the ids of calls."""
    calls = [call["function"]["arguments"] for call in message.get("tool_calls") or ()]
    return [message["content"], message.get("reasoning_content", ""), *calls]


class Talk:
    """One conversation, as its client has it."""

    def __init__(self, name: str, state: dict[str, Any] | None = None) -> None:
        self.name = name
        kept = state or {"messages": [], "facts": {}, "id": None, "n_past": 0, "n_last": 0, "right": 0, "asked": 0}
        self.messages: list[Message] = kept["messages"]
        self.facts: dict[str, str] = kept["facts"]  # by number of the turn, as it is said
        self.id, self.n_past, self.n_last = kept["id"], kept["n_past"], kept["n_last"]
        self.right, self.asked = kept["right"], kept["asked"]
        self.kinds: Counter[str] = Counter(kept.get("kinds", {}))
        self.may_branch = state is not None

    @property
    def state(self) -> dict[str, Any]:
        """What is kept."""
        return {k: v for k, v in vars(self).items() if k not in ("name", "may_branch")}

    def said(self, i: int) -> Message:
        """The user's message of turn i."""
        rng, kind = random.Random(f"{self.name} {i}"), KINDS[i % len(KINDS)]
        number = f"{i:04}"  # as many tokens in every turn
        if kind == "fact":
            text = f"Box {number} of {self.name} holds {rng.randrange(1000, 9999)} coins."
            self.facts[number] = text
        elif kind == "question" and self.facts:
            # an early one: it must have left the window
            j = rng.choice(list(self.facts)[: max(1, len(self.facts) - 8)])
            text = f"What does box {j} of {self.name} hold?"
        elif kind == "tool":
            text = f"Wall {number} needs paint, whatever colour."
        elif kind == "result" and self.messages and self.messages[-1].get("tool_calls"):
            call = self.messages[-1]["tool_calls"][0]
            return {"role": "tool", "tool_call_id": call["id"], "content": f"wall {i - 1:04} is painted"}
        elif kind == "grammar":
            text = f"Is {number} a large number?"
        elif kind == "schema":
            text = f"How was part {number}?"
        else:
            text = f"Please go on with part {number}: {rng.choice(WORDS)} and {rng.choice(WORDS)}."
        return {"role": "user", "content": text}

    def turn(self, client: httpx.Client, i: int, max_tokens: int) -> Reply:
        """Say something, check the answer, and keep both. Raises Fault."""
        kind = KINDS[i % len(KINDS)]
        api = OPENAI if kind == "plain" else list(APIS)[i // len(KINDS) % len(APIS)]
        if kind == "other":
            api = list(APIS)[1 + i % 3]
        options: Options = {"max_tokens": max_tokens, "temperature": 0.7, "seed": i, "tools": TOOLS}
        options["tool_choice"] = "none"  # the small model calls at any time
        options |= {
            "tool": {
                "tool_choice": "required",
                "parallel_tool_calls": False,
                "max_tokens": 120,
                "enable_thinking": False,
            },
            "think": {"grammar": THOUGHT, "max_tokens": 80, "enable_thinking": True},
            "no think": {"enable_thinking": False, "ignore_eos": True},
            "schema": {"json_schema": SCHEMA, "max_tokens": 120, "enable_thinking": False},
            "grammar": {"grammar": 'root ::= "Yes." | "No."'},
        }.get(kind, {"ignore_eos": True})
        said = self.said(i)
        reply = ask(client, api, [*self.messages, said], self.name, **options)
        begun, self.may_branch = self.may_branch, True  # the server has what is not kept here
        self.check(reply, i, kind, begun, max_tokens)
        self.may_branch = False
        self.messages += [said, reply.message]
        self.kinds[f"{kind}"] += 1
        self.kinds[f"{api}"] += 1
        return reply

    def check(self, reply: Reply, i: int, kind: str, may_branch: bool, max_tokens: int) -> None:
        """Raise Fault if the answer is empty, cut, of another kind, or of another conversation."""

        def must(ok: object, what: str) -> None:
            if not ok:
                raise Fault(f"{self.name}, turn {i} ({kind}): {what}: {reply}")

        must(reply.status == 200 and not reply.error, "an error")
        must(reply.finish, "it was cut")
        expected = ("continued",) if self.messages else ("new",)
        known = reply.known or reply.info.get(
            "history", expected[0]
        )  # an answer that begins after a ping has no header
        must(known in (*expected, *(("branched",) if may_branch else ())), f"history {known}")
        if kind == "tool":
            must(reply.finish == "tool_calls" and len(reply.calls) == 1, "no call")
            made = reply.calls[0]["function"]
            must(made["name"] == "paint" and json.loads(made["arguments"])["colour"] in COLOURS, "another call")
        elif kind == "schema":
            must(reply.finish == "stop", "it was cut")
            answer = json.loads(reply.text)
            must(answer["mood"] in ("good", "bad") and answer["level"] in (1, 2, 3), "not of the schema")
        elif kind == "grammar":
            must(reply.text in ("Yes.", "No."), "not of the grammar")
        elif kind == "think":
            must(reply.finish == "stop" and reply.thinking.strip() and reply.text.endswith("."), "no thoughts")
        else:
            must((reply.text + reply.thinking).strip(), "it is empty")
            must(reply.finish == "length" and reply.n_tokens == max_tokens, "it was cut")
        if kind not in ("think", "plain", "other"):
            must(not reply.thinking, "thoughts")
        info = reply.info
        if not info:
            return
        self.id = self.id or info["conversation"]
        must(info["conversation"] == self.id, "another conversation")
        must(not info["timed_out"] and not info["n_messages_dropped"], "something was left out")
        # the newest answer may be read again, as the template has it: a call, or one with control tokens
        must(info["n_reused"] >= self.n_past - self.n_last - 16, f"{self.n_past} tokens were known")
        self.n_past, self.n_last = info["n_past"], reply.n_tokens
        recalled = info["recalled"]
        if recalled:
            own = any(recalled["text"] in (m["content"] or "") for m in self.messages)
            must(own, "what was recalled is of another conversation")
        if kind == "question":
            self.asked += 1
            self.right += bool(recalled) and recalled["text"] == self.facts[self.said(i)["content"].split()[3]]


class Day:
    """The conversations, the server, and what is measured."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder, self.path = args, folder, folder / "state.json"
        self.state: dict[str, Any] = {"turn": 0, "runs": 0, "seconds": 0.0, "ttft": {}, "fresh": {}, "rss": {}}
        self.state |= {"growth_mib": [0.0, 0.0], "faults": [], "talks": {}, "stamp": made()}
        if self.path.exists():
            self.state = json.loads(self.path.read_text())
        self.state["runs"] += 1
        kept = self.state["talks"]
        self.main, *self.others = (Talk(name, kept.get(name)) for name in ("Ada", "Ben", "Cleo"))
        self.fresh = Talk(f"Dan{self.state['runs']}")

    def command(self, sessions: Path | None) -> list[str]:
        """The server, with slots for the conversations and the one that times are compared with."""
        template = self.folder / "template.jinja"
        template.write_text(TEMPLATE)
        flags = ("-c", str(self.args.ctx_size), "-np", "4", "-t", str(self.args.threads))
        return edge_stream_command(self.args.model, sessions, *flags, "--chat-template-file", str(template))

    def keep(self) -> None:
        """The state."""
        self.state["talks"] = {talk.name: talk.state for talk in (self.main, *self.others)}
        replace_text(self.path, json.dumps(self.state))

    def guarded(self, turn: Callable[..., Reply], *args: Any) -> Reply | None:
        """A turn; a fault is kept, and ends the run if it is one of many."""
        try:
            return turn(*args)
        except Fault as fault:
            self.state["faults"].append(str(fault))
            print(fault, flush=True)
            if len(self.state["faults"]) >= 20:
                raise SystemExit("too many faults") from None
            return None

    def run(self) -> None:
        """All turns."""
        n, a = self.args.turns, self.args
        server = ServerProcess(self.command(self.folder / "sessions"), self.folder / "server.log")
        then: tuple[float, float] | None = None
        with server, httpx.Client(base_url=server.url, timeout=600) as client, ThreadPoolExecutor(3) as pool:
            began = time.monotonic()
            for i in range(self.state["turn"] + 1, n + 1):
                if i > n - LAST and not self.fresh.messages:
                    for j in range(1, 21):
                        self.guarded(self.fresh.turn, client, j, a.predict)
                beside = []
                if i % 10 == BESIDE % 10:
                    beside = [
                        pool.submit(self.guarded, talk.turn, client, i // 10 + 1, a.predict) for talk in self.others
                    ]
                if i > n - LAST:
                    self.note("fresh", i, self.guarded(self.fresh.turn, client, i - (n - LAST) + 20, a.predict))
                self.note("ttft", i, self.guarded(self.main.turn, client, i, a.predict))
                for one in beside:
                    one.result()
                now, files = self.state["rss"][str(i)] = server.memory()
                if i >= 100:
                    then = then or (now, now - files)
                    grown = now - then[0], now - files - then[1]
                    self.state["growth_mib"] = [*map(max, self.state["growth_mib"], grown)]
                self.state["turn"] = i
                if i % 20 == 0 or i == n:
                    self.state["seconds"] += time.monotonic() - began
                    began = time.monotonic()
                    self.keep()
                if i % 100 == 0:
                    print(f"{i} turns, {self.state['seconds']:.0f} s, {now:.0f} MiB", flush=True)

    def note(self, what: str, i: int, reply: Reply | None) -> None:
        """The time of a plain turn, and the tokens that were read in it."""
        if reply and KINDS[i % len(KINDS)] == "plain":
            self.state[what][str(i)] = 1000 * reply.ttft, reply.info["n_read"]

    def alone(self) -> tuple[int, int]:
        """The other conversations again, one after the other, on a new server: texts that are the same, and all."""
        same = all_ = 0
        with ServerProcess(self.command(None)) as server, httpx.Client(base_url=server.url, timeout=600) as client:
            for talk in self.others:
                again = Talk(talk.name)
                for k in range(1, len(talk.messages) // 2 + 1):
                    again.turn(client, k, self.args.predict)
                pairs = zip(talk.messages, again.messages, strict=True)
                equal = [written(x) == written(y) for x, y in pairs if x["role"] == "assistant"]
                same, all_ = same + sum(equal), all_ + len(equal)
        return same, all_

    def result(self) -> dict[str, Any]:
        """Figures, and whether the aims hold."""
        s, n = self.state, self.args.turns
        times = {int(i): found for i, found in s["ttft"].items()}
        (first, n_first), (last, n_last), (fresh, n_fresh) = (
            [statistics.median(column) for column in zip(*found, strict=True)]
            for found in (
                [x for i, x in times.items() if FIRST[0] <= i <= FIRST[1]],
                [x for i, x in times.items() if i > n - LAST],
                s["fresh"].values(),
            )
        )
        same, all_ = self.alone()
        body = json.dumps(self.main.messages).encode()
        out = {
            "turns": n,
            "turns beside": all_,
            "n_ctx": self.args.ctx_size,
            "tokens": self.main.n_past,
            "history_kib": round(len(body) / 1024),
            "kinds": self.main.kinds,
            "faults": len(s["faults"]),
            "recalled_right": [self.main.right, self.main.asked],
            "same_alone": [same, all_],
            "ttft_ms": [first, last],
            "ttft_ms_fresh": fresh,
            "tokens_read": [n_last, n_first, n_fresh],
            "rss_mib": {i: s["rss"][i][0] for i in dict.fromkeys((str(min(100, n)), str(n // 2), str(n)))},
            "growth_mib": s["growth_mib"],
            "runs": s["runs"],
            "seconds": s["seconds"],
            "stamp": s["stamp"],
        }
        out["holds"] = {
            "answers": not s["faults"] and same == all_,
            "ttft": last / first <= 1.3,
            "ttft beside a new conversation": last / fresh <= 1.3,
            "memory": s["growth_mib"][1] <= 16,
        }
        return out

    def measure(self) -> dict[str, Any]:
        """The next turns, which are not kept, in turns with a conversation begun now; and what one request costs."""
        n, a = self.args.turns, self.args
        times: dict[str, list[float]] = {"last": [], "fresh": []}
        with tempfile.TemporaryDirectory(prefix="edge-stream-chat-") as folder:
            shutil.copytree(self.folder / "sessions", Path(folder) / "sessions")
            with ServerProcess(self.command(Path(folder) / "sessions")) as server:
                with httpx.Client(base_url=server.url, timeout=600) as client:
                    for j in range(1, 21):
                        self.fresh.turn(client, j, a.predict)
                    before = server.rss()
                    self.main.may_branch = True
                    for j in range(21, 21 + LAST):
                        for what, talk, i in (("fresh", self.fresh, j), ("last", self.main, n - 20 + j)):
                            reply = talk.turn(client, i, a.predict)
                            if KINDS[i % len(KINDS)] == "plain":
                                times[what].append(1000 * reply.ttft)
                    grown = server.rss() - before
        medians = {what: statistics.median(ms) for what, ms in times.items()}
        return {**medians, "holds": medians["last"] / medians["fresh"] <= 1.3, "request_mib": grown, "stamp": made()}


def made() -> str:
    """Date, machine, commit."""
    facts = stamp()
    return f"{facts['test_time'][:10]}, {facts['cpu_info']}, edge-stream {facts['edge_stream_commit']}"


def table(r: dict[str, Any]) -> str:
    """The result as Markdown."""
    (first, last), fresh = r["ttft_ms"], r["ttft_ms_fresh"]
    kinds = r["kinds"]
    apis = ", ".join(f"{name} {kinds[name]}" for name in APIS)
    asked = ", ".join(f"{name} {n}" for name, n in kinds.items() if name not in APIS and name != "other")

    def ratio(a: float, b: float) -> str:
        return f"{a:.0f} / {b:.0f} ms: {a / b:.2f}"

    memory = ", ".join(f"{mib:.0f}" for mib in r["rss_mib"].values())
    rows = {
        "turns; tokens; cells of the cache": (f"{r['turns']:,}; {r['tokens']:,}; {r['n_ctx']}", ""),
        "turns by API": (apis, ""),
        "turns by kind, others plain": (asked, ""),
        "answers empty, cut, of another kind or conversation": (r["faults"], "0"),
        "texts of the others that are the same alone": ("{} of {}".format(*r["same_alone"]), "all"),
        "facts recalled rightly when asked for": ("{} of {}".format(*r["recalled_right"]), ""),
        "first token, last turns / turns {} to {}".format(*FIRST): (ratio(last, first), 1.3),
        "first token, last turns / turns 21 to 60, in turns": (ratio(last, fresh), 1.3),
        "tokens that they read: last turns, turns {} to {}, turns 21 to 60".format(*FIRST): (
            "{:g}, {:g}, {:g}".format(*r["tokens_read"]),
            "",
        ),
        "the history that the last turn sends": (f"{r['history_kib']} KiB", ""),
        f"memory at turns {', '.join(r['rss_mib'])}": (f"{memory} MiB", ""),
        "most growth from turn 100 on": (f"{r['growth_mib'][0]:.1f} MiB", ""),
        "the same without pages of files": (f"{r['growth_mib'][1]:.1f} MiB", "16 MiB"),
    }
    if again := r.get("again"):
        rows |= {
            "the same, the next 40 turns on a quiet machine": (ratio(again["last"], again["fresh"]), 1.3),
            "growth of a new server that goes on with it": (f"{again['request_mib']:.1f} MiB", ""),
        }
    lines = markdown([{"what": w, "measured": x, "aim": aim} for w, (x, aim) in rows.items()], COLUMNS)
    missed = ", ".join(name for name, ok in r["holds"].items() if not ok)
    more = f"Missed: {missed}." if missed else "All aims are met."
    return f"{lines}\n\n{more} {r['runs']} run(s), {r['seconds'] / 60:.0f} minutes; {r['stamp']}."


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", default="demo")
    parser.add_argument("-c", "--ctx-size", type=int, default=512)
    parser.add_argument("-n", "--predict", type=int, default=24)
    parser.add_argument("-t", "--threads", type=int, default=1)
    parser.add_argument("--turns", type=int, default=2000)
    parser.add_argument("--again", action="store_true", help="begin anew")
    parser.add_argument("--measure", action="store_true", help="measure the first token again, in turns after the last")
    parser.add_argument("--state", type=Path, default=ROOT / "build" / "endurance")
    args = parser.parse_args()
    folder = args.state / f"chat-{args.turns}"
    if args.again:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "result.json"
    if not path.exists():
        day = Day(args, folder)
        day.run()
        replace_text(path, json.dumps(day.result(), indent=1))
    if args.measure:
        found = json.loads(path.read_text()) | {"again": Day(args, folder).measure()}
        replace_text(path, json.dumps(found, indent=1))
    print(table(json.loads(path.read_text())))


if __name__ == "__main__":
    main()
