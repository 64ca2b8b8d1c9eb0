"""The OpenAI API: what requests may ask for, what they get, and what they are refused."""

from __future__ import annotations

import json
import math
import socket
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from serving import WORDS, Served, serve

from edge_stream.chat.options import ChatOptions
from edge_stream.engine import Engine
from edge_stream.errors import EdgeStreamError
from edge_stream.generation import Writer

CHAT = "/v1/chat/completions"
Load = Callable[..., Engine]
HELLO = [{"role": "user", "content": "Hello"}]
DEEP_CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[" * 10_000}}]}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Oslo", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def served(tiny: Callable[[str], Any]) -> Iterator[Served]:
    """One server for all tests here."""
    engine = Engine.load(
        tiny("chat"), n_parallel=2, n_ctx=256, cache_type_k="f32", cache_type_v="f32", flash_attn="off", n_threads=1
    )
    with engine, serve(engine) as running:
        yield running


def stream(served: Served, path: str = "/v1/chat/completions", **body: Any) -> tuple[list[Any], str]:
    """The chunks of a streamed answer, and the raw text."""
    with served.client.stream("POST", path, json={"stream": True, **body}) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        raw = "".join(answer.iter_text())
    lines = [line for line in raw.split("\n\n") if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line[6:]) for line in lines[:-1]], raw


def test_streamed_and_whole_answers_are_the_same(served: Served) -> None:
    options = {"messages": HELLO, "seed": 3, "grammar": WORDS, "max_tokens": 40}
    whole = served.client.chat(**options)
    chunks, raw = stream(served, **options, stream_options={"include_usage": True}, timings_per_token=True)
    assert "\r" not in raw
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": None}
    assert chunks[0]["edge_stream"]["history"] in ("new", "branched")
    text = "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks if c["choices"])
    assert text == whole["choices"][0]["message"]["content"]
    assert chunks[-2]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"] == "stop"
    assert chunks[-2]["timings"]["predicted_n"] == whole["timings"]["predicted_n"]
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == whole["timings"]["predicted_n"]
    assert all({"n_past", "n_cached", "tok_per_s"} <= set(c["edge_stream"]) for c in chunks[1:-2])
    assert len({c["id"] for c in chunks}) == 1


def test_limits_of_length_and_default_of_completions(served: Served) -> None:
    answer = served.client.chat(HELLO, max_tokens=7, ignore_eos=True)
    assert answer["choices"][0]["finish_reason"] == "length" and answer["usage"]["completion_tokens"] == 7
    answer = served.client.post("/v1/completions", json={"prompt": "Hello", "ignore_eos": True}).json()
    assert answer["usage"]["completion_tokens"] == 16
    for tools in ([], [WEATHER]):  # a parser of calls has nothing to give out
        for n in (1, 2):
            answer = served.client.chat(HELLO, max_tokens=0, tools=tools, n=n, verbose=True)
            assert [choice["message"]["content"] for choice in answer["choices"]] == [""] * n
            assert answer["usage"]["completion_tokens"] == answer["__verbose"]["tokens_predicted"] == 0


def said(chunks: list[Any]) -> tuple[dict[int, str], dict[int, str]]:
    """Texts and finish reasons of a streamed answer's choices."""
    texts: dict[int, str] = {}
    reasons: dict[int, str] = {}
    for choice in (c for chunk in chunks for c in chunk["choices"]):
        i = choice["index"]
        texts[i] = texts.get(i, "") + (choice["text"] if "text" in choice else (choice["delta"].get("content") or ""))
        if choice["finish_reason"]:
            assert i not in reasons
            reasons[i] = choice["finish_reason"]
    return texts, reasons


AMONG_SINKS: tuple[tuple[dict[str, Any], str, str, int], ...] = (
    ({"max_tokens": 1, "grammar": 'root ::= "z" "z"'}, "z", "length", 1),
    ({"max_tokens": 2, "grammar": 'root ::= "zz" "z"'}, "zz", "length", 2),
    ({"max_tokens": 9, "grammar": 'root ::= "z"'}, "z", "stop", 2),
    ({"max_tokens": 9, "grammar": 'root ::= "z" "ab"', "stop": "ab"}, "z", "stop", 3),
    ({"max_tokens": 9, "grammar": 'root ::= "ab"', "stop": "ab"}, "", "stop", 2),
    ({"max_tokens": 9, "grammar": 'root ::= ""'}, "", "stop", 1),
    ({"max_tokens": 0}, "", "length", 0),
)


@pytest.mark.parametrize("n_keep", [4, 64])
@pytest.mark.parametrize("prompt", ["Hi", [70, 71]])
def test_answers_that_end_among_the_sinks(prompt: Any, n_keep: int, load: Load) -> None:
    """Sinks cannot be taken back, so these conversations cannot be gone on with: that is no concern of the answer."""
    with serve(load("chat", n_ctx=128, n_keep=n_keep)) as served:
        for options, text, reason, n in AMONG_SINKS:
            for path, body in (
                ("/v1/completions", {"prompt": prompt, **options}),
                (CHAT, {"messages": HELLO, **options}),
            ):
                for _ in range(2):  # a new conversation, and one that may be known
                    whole = served.client.post(path, json=body)
                    assert whole.status_code == 200, whole.text
                    (choice,) = whole.json()["choices"]
                    assert (choice["text"] if "text" in choice else choice["message"]["content"]) == text
                    assert choice["finish_reason"] == reason
                    assert whole.json()["usage"]["completion_tokens"] == n
                    assert said(stream(served, path, **body)[0]) == ({0: text}, {0: reason})
                assert said(stream(served, path, **body, n=2)[0]) == ({0: text, 1: text}, {0: reason, 1: reason})
                both = served.client.post(path, json=body | {"n": 2}).json()["choices"]
                assert [c["finish_reason"] for c in both] == [reason, reason]
            more = served.client.chat([*HELLO, {"role": "assistant", "content": text}, *HELLO], max_tokens=1)
            assert more["usage"]["completion_tokens"] == 1


def test_a_grammar_that_allows_nothing_more_ends_a_choice_only(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Writer.choose

    def choose(self: Writer) -> int:
        if self._n == 2:
            raise EdgeStreamError("the grammar allows no token here")
        return real(self)

    monkeypatch.setattr(Writer, "choose", choose)
    answer = served.client.chat(HELLO, grammar='root ::= "x" "y" "z"', n=3)
    assert [(c["message"]["content"], c["finish_reason"]) for c in answer["choices"]] == [("xy", "stop")] * 3


def test_a_grammar_that_takes_too_long_is_the_clients_error(served: Served) -> None:
    answer = served.client.post("/v1/chat/completions", json={"messages": HELLO, "grammar": 'root ::= "a"*{1000}'})
    assert answer.status_code == 400 and "too many ways" in answer.json()["error"]["message"]
    assert served.client.chat(HELLO, max_tokens=1)


def test_several_prompts_are_written_side_by_side(load: Load) -> None:
    """More prompts than slots, answers far longer than what a reader may be behind, and no patience at all."""
    with serve(load("chat", n_parallel=2, n_ctx=128), backlog=8, stall_seconds=0) as served:
        body = {"prompt": ["One", "Two", "Three", "Four"], "max_tokens": 200, "ignore_eos": True, "seed": 1}
        alone = [
            served.client.post("/v1/completions", json=body | {"prompt": prompt}).json()["choices"][0]["text"]
            for prompt in body["prompt"]  # type: ignore[attr-defined]
        ]
        whole = served.client.post("/v1/completions", json=body).json()
        assert [c["index"] for c in whole["choices"]] == [0, 1, 2, 3]
        assert [c["text"] for c in whole["choices"]] == alone
        assert whole["usage"]["completion_tokens"] == 800
        chunks, _ = stream(served, "/v1/completions", **body, stream_options={"include_usage": True})
        assert said(chunks) == (dict(enumerate(alone)), dict.fromkeys(range(4), "length"))
        assert chunks[-1]["usage"]["completion_tokens"] == 800
        order = [chunk["choices"][0]["index"] for chunk in chunks[:-1]]
        assert order.index(1) < len(order) - 1 - order[::-1].index(0)  # neither waits for the other's end


def test_an_error_of_one_prompt_is_the_answer(served: Served) -> None:
    """And ends the others."""
    with pytest.MonkeyPatch.context() as patch:
        real = served.scheduler.renderer.rebuilt

        def rebuilt(history: Any, n_ctx: int) -> Any:
            if history.text == b"bad":
                raise EdgeStreamError("bad")
            return real(history, n_ctx)

        patch.setattr(served.scheduler.renderer, "rebuilt", rebuilt)
        body = {"prompt": ["endless", "bad"], "max_tokens": -1, "ignore_eos": True}
        answer = served.client.post("/v1/completions", json=body)
        assert answer.status_code == 400 and answer.json()["error"]["message"] == "bad"
        served.wait_idle()


def test_a_streamed_echo_and_its_offsets(served: Served) -> None:
    body = {
        "prompt": ["ab", "cde"],
        "echo": True,
        "n": 2,
        "grammar": 'root ::= "xyz"',
        "logprobs": 1,
        "max_tokens": 9,
        "seed": 1,
    }
    whole = served.client.post("/v1/completions", json=body).json()["choices"]
    chunks, _ = stream(served, "/v1/completions", **body)
    assert [c["text"] for c in whole] == ["abxyz", "abxyz", "cdexyz", "cdexyz"]
    assert said(chunks)[0] == {i: c["text"] for i, c in enumerate(whole)}
    for choice in whole:
        columns = choice["logprobs"]
        assert columns["text_offset"][0] == 0 and len({len(column) for column in columns.values()}) == 1
        for offset, token in zip(columns["text_offset"], columns["tokens"], strict=True):
            assert choice["text"][offset:].startswith(token) or token in ("<|im_end|>", "</s>")
        parts = [c["logprobs"] for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        for name, column in columns.items():
            streamed = [item for part in parts if part for item in part[name]]
            if name == "top_logprobs":
                assert [item.keys() for item in streamed if item] == [item.keys() for item in column if item]
            else:
                assert streamed == (pytest.approx(column, abs=1e-4) if name == "token_logprobs" else column)


def test_choices_are_what_requests_alone_would_give(served: Served) -> None:
    options = {"grammar": WORDS, "max_tokens": 40}
    three = served.client.chat(HELLO, n=3, seed=5, **options)["choices"]
    assert [c["index"] for c in three] == [0, 1, 2]
    alone = [served.client.chat(HELLO, seed=5 + i, **options)["choices"][0]["message"] for i in range(3)]
    assert [c["message"] for c in three] == alone
    chunks, _ = stream(served, messages=HELLO, n=3, seed=5, **options)
    texts = ["", "", ""]
    for chunk in chunks:
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["delta"].get("content") or ""
    assert texts == [m["content"] for m in alone]
    # the first choice is the one that goes on
    more = served.client.chat([*HELLO, alone[0], *HELLO], max_tokens=1)
    assert more["edge_stream"]["history"] == "continued"


def test_choices_longer_than_the_window(served: Served) -> None:
    answer = served.client.chat(HELLO, n=2, seed=1, max_tokens=300, ignore_eos=True)
    assert answer["usage"]["completion_tokens"] == 600
    alone = served.client.chat(HELLO, seed=1, max_tokens=300, ignore_eos=True)
    assert answer["choices"][0]["message"] == alone["choices"][0]["message"]


def test_logprobs(served: Served) -> None:
    answer = served.client.chat(HELLO, max_tokens=5, temperature=0, logprobs=True, top_logprobs=4, ignore_eos=True)
    items = answer["choices"][0]["logprobs"]["content"]
    assert len(items) == 5
    for item in items:
        top = [t["logprob"] for t in item["top_logprobs"]]
        assert len(top) == 4 and top == sorted(top, reverse=True) and sum(map(math.exp, top)) < 1
        assert math.isclose(top[0], item["logprob"], abs_tol=1e-4)  # greedy
    legacy = served.client.post(
        "/v1/completions",
        json={"prompt": "Hello", "max_tokens": 3, "logprobs": 2, "temperature": 0, "ignore_eos": True},
    ).json()["choices"][0]["logprobs"]
    assert len(legacy["tokens"]) == len(legacy["token_logprobs"]) == len(legacy["text_offset"]) == 3
    assert all(1 <= len(t) <= 2 for t in legacy["top_logprobs"])


def test_logit_bias_and_stop_and_echo(served: Served) -> None:
    token = served.engine.tokenize("z")[-1]
    bias = {"max_tokens": 6, "logit_bias": {str(token): 100}}
    assert served.client.chat(HELLO, **bias)["choices"][0]["message"]["content"] == "zzzzzz"
    answer = served.client.chat(HELLO, **bias, stop="zzz")
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["choices"][0]["message"]["content"] == ""
    many = served.client.post("/v1/completions", json={"prompt": ["a", "b"], "n": 2, "echo": True, **bias}).json()
    assert [c["text"] for c in many["choices"]] == ["azzzzzz"] * 2 + ["bzzzzzz"] * 2
    tokens = served.client.post("/v1/completions", json={"prompt": served.engine.tokenize("a"), **bias}).json()
    assert tokens["choices"][0]["text"] == "zzzzzz"


def test_json_schema_and_json_object(served: Served) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "y"]}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
    answer = served.client.chat(HELLO, response_format=form, max_tokens=200, seed=1)
    value = json.loads(answer["choices"][0]["message"]["content"])
    assert isinstance(value["a"], int) and value["b"] in ("x", "y")
    answer = served.client.chat(HELLO, response_format={"type": "json_object"}, max_tokens=3)
    assert answer["choices"][0]["message"]["content"].startswith("{")


def test_a_demanded_tool_call_and_its_result(served: Served) -> None:
    options: dict[str, Any] = {"tools": [WEATHER], "max_tokens": 200, "seed": 2}
    answer = served.client.chat(HELLO, tool_choice="required", **options)
    choice = answer["choices"][0]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
    call = choice["message"]["tool_calls"][0]
    assert call["function"]["name"] == "weather" and json.loads(call["function"]["arguments"])["city"] in (
        "Oslo",
        "Rome",
    )
    chunks, _ = stream(
        served, messages=HELLO, tool_choice={"type": "function", "function": {"name": "weather"}}, **options
    )
    deltas = [t for c in chunks for t in c["choices"][0]["delta"].get("tool_calls", [])]
    assert deltas[0]["function"]["name"] == "weather" and {t["index"] for t in deltas} == {0}
    arguments = "".join(t["function"]["arguments"] for t in deltas)
    assert json.loads(arguments)["city"] in ("Oslo", "Rome")
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
    # clients send the call back in a formatting of their own
    call["function"]["arguments"] = json.dumps(json.loads(call["function"]["arguments"]), indent=2)
    history = [*HELLO, choice["message"], {"role": "tool", "tool_call_id": call["id"], "content": "sunny"}]
    more = served.client.chat(history, grammar=WORDS, **options)
    assert more["edge_stream"]["history"] == "continued"
    assert more["choices"][0]["message"]["content"]
    for seed in range(5):  # a random model would go on calling
        more_options = options | {"seed": seed, "parallel_tool_calls": False}
        one = served.client.chat(HELLO, tool_choice="required", **more_options)["choices"][0]
        assert one["finish_reason"] == "tool_calls" and len(one["message"]["tool_calls"]) == 1
    none = served.client.chat(HELLO, tool_choice="none", grammar=WORDS, **options)
    assert none["choices"][0]["finish_reason"] == "stop"


def test_text_endpoints(served: Served) -> None:
    text = "héllo <|im_end|>"
    tokens = served.client.post("/tokenize", json={"content": text}).json()["tokens"]
    assert served.client.post("/detokenize", json={"tokens": tokens}).json()["content"] == text
    pieces = served.client.post("/tokenize", json={"content": text, "with_pieces": True}).json()["tokens"]
    assert [p["id"] for p in pieces] == tokens and pieces[-1]["piece"] == "<|im_end|>"
    prompt = served.client.post("/apply-template", json={"messages": HELLO}).json()["prompt"]
    assert prompt == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"


def test_characters_that_end_lines_and_lone_surrogates(served: Served) -> None:
    """Clients that split streams as str.splitlines does get whole chunks; what UTF-8 cannot carry is replaced."""
    grammar = 'root ::= "a" "\\u2028" "b" "\\u0085" "c"'
    with served.client.stream("POST", CHAT, json={"messages": HELLO, "stream": True, "grammar": grammar}) as answer:
        chunks = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: {")]
    assert "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks) == "a\u2028b\u0085c"
    lone = b'{"messages": [{"role": "user", "content": "x\\ud800"}], "max_tokens": 1, "model": "\\ud800"}'
    headers = {"Content-Type": "application/json"}
    assert served.client.post("/apply-template", content=lone, headers=headers).status_code == 200
    assert served.client.post(CHAT, content=lone, headers=headers).status_code == 200


def test_facts(served: Served) -> None:
    assert served.client.get("/health").json() == {"status": "ok"}
    assert served.client.get("/v1/models").json()["data"][0]["id"] == "tiny"
    assert served.client.get("/props").json()["total_slots"] == 2
    assert [slot["id"] for slot in served.client.get("/slots").json()] == [0, 1]
    assert "edge_stream_tokens_written_total" in served.client.get("/metrics").text
    page = served.client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        (CHAT, {"messages": []}, "messages"),
        (CHAT, {"messages": [{"role": "king", "content": "x"}]}, "role"),
        (CHAT, {"messages": [{"role": "system", "content": "x"}]}, "nothing to answer"),
        (CHAT, {"messages": HELLO, "n": 9}, "n = 9"),
        (CHAT, {"messages": HELLO, "stop": ["a"] * 17}, "stop strings"),
        (CHAT, {"messages": HELLO, "stop": "a" * 300}, "longer than"),
        (CHAT, {"messages": HELLO, "grammar": "root ::= x"}, "grammar"),
        (CHAT, {"messages": HELLO, "grammar": "root ::= " + '"a" ' * 20000}, "larger than"),
        (CHAT, {"messages": HELLO, "grammar": 'root ::= "a" \ud83d'}, "no text that UTF-8 can carry"),
        ("/completion", {"prompt": "a", "grammar": 'root ::= "\ud83d"'}, "no text that UTF-8 can carry"),
        (CHAT, {"messages": HELLO, "dry_sequence_breakers": ["\udcff"]}, "no text that UTF-8 can carry"),
        (CHAT, {"messages": HELLO, "samplers": ["\udcff"]}, "no text that UTF-8 can carry"),
        (CHAT, {"messages": HELLO, "grammar": "root ::= " + "(" * 300 + '"a"' + ")" * 300}, "deeper than"),
        (CHAT, {"messages": HELLO, "response_format": {"type": "json_schema"}}, "needs json_schema"),
        (
            CHAT,
            {
                "messages": HELLO,
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"schema": {"type": "string", "maxLength": 10**9}},
                },
            },
            "maxLength",
        ),
        (CHAT, {"messages": HELLO, "logit_bias": {"99999": 1}}, "vocabulary"),
        (CHAT, {"messages": HELLO, "temperature": "hot"}, "temperature"),
        (CHAT, {"messages": HELLO, "add_generation_prompt": True, "continue_final_message": True}, "excludes"),
        (CHAT, {"messages": HELLO, "grammar": " "}, "grammar is empty"),
        (CHAT, {"messages": HELLO, "best_of": 3}, "best_of is not supported"),
        (CHAT, {"messages": HELLO, "functions": [{"name": "f"}]}, "send tools"),
        (CHAT, {"messages": HELLO, "id_slot": 2}, "id_slot = 2"),
        (CHAT, {"messages": HELLO, "logit_bias": [["z", True]]}, "logit_bias"),
        (CHAT, {"messages": HELLO, "tool_choice": "required"}, "no tools"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "content"),
        (CHAT, {"messages": [DEEP_CALL]}, "arguments: the JSON is nested deeper"),
        ("/apply-template", {"messages": [DEEP_CALL]}, "arguments: the JSON is nested deeper"),
        (CHAT, {"messages": HELLO, "max_tokens": 2**31}, "max_tokens"),
        (CHAT, {"messages": HELLO, "max_tokens": -2}, "max_tokens"),
        (CHAT, {"messages": HELLO, "top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ("/v1/completions", {"prompt": None}, "prompt"),
        ("/v1/completions", {"prompt": []}, "empty"),
        ("/v1/completions", {"prompt": [[]]}, "empty"),
        ("/v1/completions", {"prompt": ["a", ""]}, "empty"),
        ("/v1/completions", {"prompt": ["a", [1], 1]}, "tokens and texts only"),
        ("/completion", {"prompt": {"prompt_string": "a", "multimodal_data": ["x"]}}, "multimodal_data"),
        ("/v1/completions", {"prompt": ["a"] * 9}, "9 prompts"),
        ("/v1/completions", {"prompt": "a", "logprobs": -1}, "logprobs"),
        ("/v1/completions", {"prompt": ""}, "empty"),
        ("/v1/completions", {"prompt": [5000]}, "vocabulary"),
        ("/detokenize", {"tokens": [5000]}, "vocabulary"),
        ("/slots/0?action=save", {"filename": "../../x"}, "sessions"),
        ("/slots/0?action=fly", {}, "action"),
    ],
)
def test_what_is_refused(path: str, body: dict[str, Any], said: str, served: Served) -> None:
    answer = served.client.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
    error = answer.json()["error"]
    assert answer.status_code == error["code"] == 400 and error["type"] == "invalid_request_error"
    assert said in error["message"]


def test_rubbish_is_refused_in_the_same_form(served: Served) -> None:
    client = served.client
    for content in (b"{", b"\xff\xfe", b"[" * 5000, b"null", b'"x"', b'{"messages": ' + b"[" * 70 + b"]" * 70 + b"}"):
        answer = client.post(CHAT, content=content, headers={"Content-Type": "application/json"})
        assert answer.status_code == 400 and answer.json()["error"]["type"] == "invalid_request_error"
    assert client.get("/nothing").json()["error"] == {"code": 404, "message": "Not Found", "type": "not_found_error"}
    assert client.get(CHAT).status_code == 405
    deep_string = {"messages": [{"role": "user", "content": "[{" * 500}], "max_tokens": 1}
    assert client.post(CHAT, json=deep_string).status_code == 200  # brackets in a text are text


def test_pages_of_other_sites_are_kept_out(served: Served) -> None:
    url = served.url + "/v1/models"
    assert httpx.get(url, headers={"Host": "evil.example"}).status_code == 403
    assert httpx.get(url, headers={"Origin": "https://evil.example"}).status_code == 403
    assert httpx.get(url, headers={"Origin": served.url}).status_code == 200
    assert "access-control-allow-origin" not in httpx.get(url).headers


def answer_to_all_of(url: str, path: str, n: int) -> str:
    """The answer to a client that sends all n bytes of its body before it reads."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer two\r\nContent-Length: {n}\r\n\r\n"
        connection.sendall(head.encode() + b" " * n)
        received = b""
        while part := connection.recv(1 << 16):
            received += part
    return received.decode()


def test_keys_and_sizes_and_cors(load: Load) -> None:
    options = {"api_keys": ("one", "two"), "body_bytes": 1000, "cors": ("https://friend.example",)}
    with serve(load("chat"), **options) as served:  # type: ignore[arg-type]
        client = served.client
        assert client.get("/health").status_code == client.get("/").status_code == 200
        for headers in ({}, {"Authorization": "Bearer three"}, {"Authorization": "two"}):
            answer = client.get("/v1/models", headers=headers)
            assert answer.status_code == 401 and answer.json()["error"]["type"] == "authentication_error"
        client.headers["Authorization"] = "Bearer two"
        assert client.get("/v1/models").status_code == 200
        large = {"messages": [{"role": "user", "content": "x" * 2000}]}
        assert client.post(CHAT, json=large).status_code == 413
        chunked = client.post(CHAT, content=(b"x" * 100 for _ in range(50)))
        assert chunked.status_code == 413
        assert "larger than 1000 bytes" in answer_to_all_of(served.url, CHAT, 20 << 20)
        friend = client.get("/v1/models", headers={"Origin": "https://friend.example"})
        assert friend.headers["access-control-allow-origin"] == "https://friend.example"


def test_slots_are_saved_restored_and_erased(load: Load, tmp_path: Any) -> None:
    with serve(load("chat", n_ctx=256), tmp_path) as served:
        client, messages = served.client, []
        served.client.turn(messages, "One.", seed=1)
        saved = client.post("/slots/0?action=save", json={"filename": "../../etc/passwd"})
        assert saved.json()["n_saved"] > 0
        assert {p.suffix for p in tmp_path.rglob("*") if p.is_file()} == {".session", ".saved", ""}
        assert client.post("/slots/0?action=erase").json()["n_erased"] == saved.json()["n_saved"]
        assert client.get("/slots").json()[0].get("conversation") is None
        assert client.post("/slots/0?action=restore", json={"filename": "other"}).status_code == 404
        assert client.post("/slots/1?action=erase").status_code == 404
        restored = client.post("/slots/0?action=restore", json={"filename": "../../etc/passwd"})
        assert restored.json()["n_restored"] == saved.json()["n_saved"]
        assert served.client.turn(messages, "Two.", seed=1)["edge_stream"]["history"] == "continued"


def test_slots_are_saved_under_their_names_in_a_folder_of_the_users(load: Load, tmp_path: Any) -> None:
    folder = tmp_path / "slots"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    with serve(load("chat", n_ctx=256), tmp_path / "sessions", slot_save_path=folder) as served:
        client, messages = served.client, []
        served.client.turn(messages, "One.", seed=1)
        for name in ("../x", "a/b", "..", "", ".hidden", "a" * 201, "a\0", "nul\n"):
            answer = client.post("/slots/0?action=save", json={"filename": name})
            assert answer.status_code == 400, name
        refused = client.post("/slots/0?action=save", json={"filename": "notes.txt"})
        assert (refused.status_code, (folder / "notes.txt").read_text()) == (400, "mine")
        saved = client.post("/slots/0?action=save", json={"filename": "one.bin"}).json()
        assert client.post("/slots/0?action=save", json={"filename": "one.bin"}).status_code == 200  # over itself
        assert sorted(p.name for p in folder.iterdir()) == ["notes.txt", "one.bin"]
        client.post("/slots/0?action=erase")
        (folder / "one.bin").rename(folder / "two.bin")  # the files are the user's
        restored = client.post("/slots/0?action=restore", json={"filename": "two.bin"})
        assert restored.json()["n_restored"] == saved["n_saved"]
        assert served.client.turn(messages, "Two.", seed=1)["edge_stream"]["history"] == "continued"


def test_what_flags_switch_off_and_add(load: Load) -> None:
    options = {"has_slots": False, "has_page": False, "stop": (" ", "e"), "n_http_threads": 2}
    with serve(load("chat", n_ctx=256), ignore_eos=True, n_predict=40, **options) as served:
        assert served.client.get("/slots").status_code == 501
        assert served.client.get("/props").json()["endpoint_slots"] is False
        assert served.client.get("/").status_code == 404
        choice = served.client.chat([{"role": "user", "content": "One."}], seed=1, stop=["a"])["choices"][0]
        assert not set(choice["message"]["content"]) & set(" ea")


def test_variables_of_the_template_are_those_of_the_flags(load: Load) -> None:
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ mark }}{% endfor %}<assistant>"
    chat = ChatOptions(template=template, template_kwargs={"mark": "!"})
    with serve(load("chat", n_ctx=256), chat=chat) as served:
        messages = [{"role": "user", "content": "One."}]
        answer = served.client.post("/apply-template", json={"messages": messages}).json()
        assert answer["prompt"] == "<user>One.!<assistant>"
        assert served.client.get("/props").json()["chat_template"] == template
