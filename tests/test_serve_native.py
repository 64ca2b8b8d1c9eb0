"""llama-server's own API, and what OpenAI's has in common with it: prompts, limits, scores, embeddings."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving import Served, serve
from serving_template import SPECIAL, TEMPLATE
from tiny_models import write_tiny_bert, write_tiny_llama

from edge_stream.embedder import Embedder
from edge_stream.engine import Engine
from edge_stream.server.scheduling.line_limits import LineLimits

Load = Callable[..., Engine]
EXACT: dict[str, Any] = {"cache_type_k": "f32", "cache_type_v": "f32", "flash_attn": "off", "n_threads": 1}


@pytest.fixture(scope="module")
def served(tiny: Callable[[str], Any]) -> Iterator[Served]:
    """One server for all tests here."""
    with Engine.load(tiny("chat"), n_parallel=2, n_ctx=256, **EXACT) as engine, serve(engine) as running:
        yield running


def complete(served: Served, path: str = "/completion", **body: Any) -> Any:
    """A whole answer."""
    answer = served.client.post(path, json={"seed": 1, "ignore_eos": True, "n_predict": 4, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def stream(served: Served, path: str = "/completion", **body: Any) -> list[Any]:
    """The objects of a streamed answer."""
    body = {"seed": 1, "ignore_eos": True, "n_predict": 4, "stream": True, **body}
    with served.client.stream("POST", path, json=body) as answer:
        return [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: {")]


def test_every_form_of_a_prompt_is_the_same_text(served: Served) -> None:
    text = "Hello there"
    tokens = served.engine.tokenize(text)
    bos = [served.engine.bos] if served.engine.add_bos else []
    alike = [text, [*bos, *tokens], {"prompt_string": text}, [*bos, *tokens[:2], *tokens[2:]]]
    alone = [complete(served, prompt=prompt) for prompt in alike]
    assert len({answer["content"] for answer in alone}) == 1
    assert {answer["tokens_evaluated"] for answer in alone} == {len(bos) + len(tokens)}
    many = complete(served, prompt=[text, alike[1], alike[2]])
    assert [answer["index"] for answer in many] == [0, 1, 2]
    assert [answer["content"] for answer in many] == [alone[0]["content"]] * 3
    mixed = complete(served, prompt=[5, 6, "ab", 7], return_tokens=True, response_fields=["tokens_evaluated", "tokens"])
    assert mixed["tokens_evaluated"] == 3 + len(served.engine.tokenize("ab")) and len(mixed["tokens"]) == 4


def test_the_fields_of_an_answer(served: Served) -> None:
    answer = complete(served, prompt="Hello", grammar='root ::= "a\\n" "bc" "stop"', stop=["stop"], n_predict=20)
    assert answer["content"] == "a\nbc" and answer["tokens"] == [] and answer["stop"] is True
    assert (answer["stop_type"], answer["stopping_word"], answer["has_new_line"]) == ("word", "stop", True)
    settings = answer["generation_settings"]
    assert (
        settings["n_predict"] == settings["max_tokens"] == 20 and settings["seed"] == 1 and settings["stop"] == ["stop"]
    )
    assert {bias["bias"] for bias in settings["logit_bias"]} == {None}  # of the tokens that end a text
    assert answer["truncated"] is False and answer["timings"]["predicted_n"] == answer["tokens_predicted"]
    fields = ["content", "generation_settings/n_predict", "no/such"]
    assert complete(served, prompt="Hello", response_fields=fields, n_predict=2).keys() == set(fields[:2])
    long = complete(served, prompt="Hello", n_predict=300)
    assert long["truncated"] is True and long["stop_type"] == "limit" and long["tokens_predicted"] == 300
    ended = complete(served, prompt="Hello", grammar='root ::= "a"', ignore_eos=False)
    assert (ended["content"], ended["stop_type"]) == ("a", "eos")


def test_a_stream_says_the_same(served: Served) -> None:
    body = {"prompt": "Hello", "n_probs": 2, "n_predict": 6}
    whole = complete(served, **body, return_tokens=True)
    parts = stream(served, **body, timings_per_token=True, return_progress=True, cache_prompt=False)
    progress = [part["prompt_progress"] for part in parts if "prompt_progress" in part]
    assert progress[0]["processed"] == progress[0]["cache"] == 0
    assert progress[-1]["processed"] == progress[-1]["total"] == whole["tokens_evaluated"]
    *parts, last = [part for part in parts if "prompt_progress" not in part]
    assert "".join(part["content"] for part in parts) == whole["content"] and last["content"] == ""
    assert [part["tokens"][0] for part in parts] == whole["tokens"]
    assert [part["completion_probabilities"][0] for part in parts] == whole["completion_probabilities"]
    assert all("timings" in part and not part["stop"] for part in parts) and last["stop"] and "timings" in last
    assert "completion_probabilities" not in last


def test_probabilities_after_sampling(served: Served) -> None:
    body = {"prompt": "Hello", "n_probs": 1000, "top_k": 3, "post_sampling_probs": True, "n_predict": 5}
    for item in complete(served, **body)["completion_probabilities"]:
        top = [one["prob"] for one in item["top_probs"]]
        assert 1 <= len(top) <= 3 and sum(top) == pytest.approx(1, abs=1e-5) and top == sorted(top, reverse=True)
        assert item["prob"] == next(one["prob"] for one in item["top_probs"] if one["id"] == item["id"])
    # XTC leaves the last of the candidates above its threshold
    xtc = complete(served, **body | {"xtc_probability": 1, "xtc_threshold": 1e-6, "min_p": 0, "top_p": 1})
    assert all([one["prob"] for one in item["top_probs"]] == [1] for item in xtc["completion_probabilities"])
    assert all(item["id"] == item["top_probs"][0]["id"] for item in xtc["completion_probabilities"])
    greedy = complete(served, **body | {"temperature": 0})["completion_probabilities"]
    assert [item["prob"] for item in greedy] == [1] * 5


def test_slots_and_the_cache_are_chosen(served: Served) -> None:
    prompt = "A text that nothing else begins with"
    first = complete(served, prompt=prompt, id_slot=1)
    assert first["id_slot"] == 1 and first["timings"]["cache_n"] == 0
    again = complete(served, prompt=prompt, id_slot=1)
    assert again["id_slot"] == 1 and again["timings"]["cache_n"] > 0 and again["content"] == first["content"]
    other = complete(served, prompt=prompt, id_slot=0)
    assert other["id_slot"] == 0 and other["timings"]["cache_n"] == 0
    anew = complete(served, prompt=prompt, id_slot=1, cache_prompt=False)
    assert anew["timings"]["cache_n"] == 0 and anew["content"] == first["content"]


@pytest.mark.parametrize("bias", [[["z", 100]], [["z", 90]], {"z": 100}, [["a", False], ["z", 100.0]]])
def test_forms_of_logit_bias(bias: Any, served: Served) -> None:
    *before, token = served.engine.tokenize("z")
    if before:  # a text's tokens are all meant: ban those that are not the letter
        bias = (
            [*bias, *([t, False] for t in before)] if isinstance(bias, list) else bias | {str(t): False for t in before}
        )
    assert complete(served, prompt="Hello", logit_bias=bias, n_predict=3)["content"] == "zzz"
    assert complete(served, prompt="Hello", logit_bias=[[token, 100]], n_predict=3)["content"] == "zzz"


@pytest.mark.parametrize("control", SPECIAL)
def test_a_stop_string_may_be_a_control_token(control: str, served: Served) -> None:
    (token,) = served.engine.tokenize(control, special=True)
    body = {"prompt": "Hello", "logit_bias": {str(token): 100}, "n_predict": 5, "ignore_eos": False}
    answer = complete(served, **body, stop=[control])
    assert answer["content"] == "" and answer["tokens_predicted"] <= (1 if answer["stop_type"] == "word" else 5)
    if not served.engine.is_eog(token):
        assert (answer["stop_type"], answer["stopping_word"]) == ("word", control)
        assert complete(served, **body)["content"] == "" and complete(served, **body)["tokens_predicted"] == 5
    # what was sent can be gone on with
    assert complete(served, prompt="Hello", n_predict=1)["tokens_predicted"] == 1


def test_lines_end_an_answer(served: Served) -> None:
    body = {"prompt": "x", "grammar": 'root ::= "a\\n  b\\n c\\n  d"', "n_predict": 40}
    assert complete(served, **body, n_indent=2)["content"] == "a\n  b\n "
    assert complete(served, **body, n_indent=1)["content"] == "a\n  b\n c\n  d"
    limits = LineLimits(0, 100)
    assert limits.push("a\nb", 50) == ("a\nb", False) and limits.push("c", 150) == ("c", False)
    assert limits.push("\n", 151) == ("\n", True)
    first_line = LineLimits(4, 0)
    assert first_line.push("x = 1", 0) == ("x = 1", False)
    assert first_line.push("\n    y\n", 0) == ("\n    y\n", False) and first_line.push("  z", 0) == ("  ", True)


def test_max_tokens_zero_reads_the_prompt(served: Served) -> None:
    for path, field in (
        ("/completion", "n_predict"),
        ("/v1/completions", "max_tokens"),
        ("/v1/completions", "n_predict"),
    ):
        answer = served.client.post(path, json={"prompt": "Nothing to write", field: 0})
        assert answer.status_code == 200 and answer.json()["timings"]["predicted_n"] == 0


def test_nulls_are_not_given(served: Served) -> None:
    names = ("n", "stream", "echo", "stop", "logprobs", "seed", "stream_options", "temperature", "suffix", "logit_bias")
    answer = served.client.post("/v1/completions", json={"prompt": "Hello", "max_tokens": 2, **dict.fromkeys(names)})
    assert answer.status_code == 200 and len(answer.json()["choices"]) == 1


def test_numbers_that_switch_a_sampler_off(served: Served) -> None:
    off = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
    same = {"top_k": -1, "top_p": 1.5, "min_p": -1.0}
    assert complete(served, prompt="Hello", **off)["content"] == complete(served, prompt="Hello", **same)["content"]
    greedy = [complete(served, prompt="Hello", temperature=t)["content"] for t in (0, -1)]
    assert greedy[0] == greedy[1]


def test_chats_as_clients_write_them(served: Served) -> None:
    call = {"id": "1", "function": {"name": "f", "arguments": {"x": 1}}}  # some clients parse the arguments
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "One"}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "function", "name": "f", "content": "3"},
    ]
    prompt = served.client.post("/apply-template", json={"messages": messages}).json()["prompt"]
    assert "One\ntwo" in prompt
    answer = served.client.chat(messages, max_tokens=1)
    assert answer["system_fingerprint"].startswith("b")
    count = served.client.post("/v1/chat/completions/input_tokens", json={"messages": messages}).json()
    assert count["input_tokens"] == answer["usage"]["prompt_tokens"]
    verbose = served.client.chat(messages, max_tokens=1, verbose=True)
    assert "One\ntwo" in verbose["__verbose"]["prompt"]


def test_routes_with_and_without_v1(served: Served) -> None:
    client = served.client
    assert client.get("/models").json() == client.get("/v1/models").json()
    model = client.get("/v1/models/tiny").json()
    assert model == client.get("/models").json()["data"][0]
    assert client.get("/v1/models/other").status_code == 404
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
    assert client.post("/chat/completions", json=body).json()["object"] == "chat.completion"
    assert "content" in complete(served, "/completions", prompt="Hi")
    props = client.get("/props").json()
    assert props["default_generation_settings"]["params"]["top_k"] == 40 and props["model_path"].endswith(".gguf")
    assert props["modalities"] == {"vision": False, "audio": False, "video": False}
    for path in ("/rerank", "/v1/rerank"):
        answer = client.post(path, json={"query": "a", "documents": ["b"]})
        assert answer.status_code == 501 and answer.json()["error"]["type"] == "not_supported_error"


def test_bodies_that_are_none(served: Served) -> None:
    said = {
        b"{": "the body is not JSON",
        b"[1]": "the body must be a JSON object",
        b'"x"': "the body must be a JSON object",
        b"": "the request has no body",
    }
    for content, message in said.items():
        for headers in ({"Content-Type": "application/json"}, {"Content-Type": "text/plain"}, {}):
            answer = served.client.post("/completion", content=content, headers=headers)
            assert answer.status_code == 400 and message in answer.json()["error"]["message"]
    without_type = served.client.post("/completion", content=b'{"prompt": "Hi", "n_predict": 1}')
    assert without_type.status_code == 200
    assert served.client.post("/slots/1?action=erase").status_code in (200, 400)
    erased = served.client.post("/slots/1?action=erase")
    assert erased.status_code == 400 and "holds no conversation" in erased.json()["error"]["message"]


def logprobs_of(engine: Engine, tokens: list[int]) -> list[float]:
    """What a stream of its own gives, token by token."""
    with engine.stream(seq_id=0) as own:
        return [-float(nll) for nll in own.score(tokens, chunk=16)]  # the server's portions


@pytest.mark.parametrize("as_tokens", [True, False])
def test_an_echoed_prompt_is_scored(as_tokens: bool, load: Load) -> None:
    text = "A longer text, which lm-evaluation-harness would like to know the probability of: " * 3 + "héé"
    engine = load("chat", n_ctx=128)
    tokens = engine.tokenize(text)
    bos = [engine.bos] if engine.add_bos and not as_tokens else []
    expected = logprobs_of(engine, [*bos, *tokens])[len(bos) :]
    with serve(engine, n_prefill=16) as served:
        body: dict[str, Any] = {"prompt": tokens if as_tokens else text, "echo": True, "logprobs": 3, "max_tokens": 1}
        first = served.client.post("/v1/completions", json=body | {"temperature": 0, "seed": 1}).json()
        again = served.client.post("/v1/completions", json=body | {"temperature": 0, "seed": 1}).json()
        assert first["choices"] == again["choices"]  # whatever the cache holds of it
        (choice,) = first["choices"]
        columns = choice["logprobs"]
        assert len(columns["tokens"]) == len(tokens) + 1
        assert columns["token_logprobs"][0] is None if as_tokens else columns["token_logprobs"][0] is not None
        scored = columns["token_logprobs"][: len(tokens)]
        np.testing.assert_allclose(scored[1:], expected[1:], atol=2e-3)
        for logprob, top in zip(scored[1:], columns["top_logprobs"][1:], strict=False):
            assert 1 <= len(top) <= 3 and max(top.values()) >= logprob - 1e-6
        for offset, token in zip(columns["text_offset"], columns["tokens"], strict=True):
            assert "\ufffd" in token or choice["text"][offset:].startswith(token) or token in ("<s>", "</s>", *SPECIAL)
        none = served.client.post("/v1/completions", json=body | {"max_tokens": 0}).json()["choices"][0]
        assert none["logprobs"]["token_logprobs"] == scored and none["finish_reason"] == "length"


def test_infill(load: Load, tmp_path: Path) -> None:
    with serve(load("chat")) as served:
        refused = served.client.post("/infill", json={"input_prefix": "a", "input_suffix": "b"})
        assert (
            refused.status_code == 501 and "no token for prefix, suffix, middle" in refused.json()["error"]["message"]
        )
        assert served.client.post("/v1/completions", json={"prompt": "a", "suffix": "b"}).status_code == 400
    special = [*SPECIAL, "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|file_sep|>"]
    model = write_tiny_llama(tmp_path / "fim.gguf", head_dim=16, chat_template=TEMPLATE, special_tokens=special, seed=7)
    with Engine.load(model, n_ctx=256, **EXACT) as engine, serve(engine) as served:
        body = {"input_prefix": "def f(", "input_suffix": "):", "prompt": "x", "n_predict": 1}
        answer = served.client.post("/infill", json=body | {"input_extra": [{"filename": "a.py", "text": "y = 1"}]})
        bos = "<s>" if engine.add_bos else ""
        prompt = answer.json()["prompt"].replace(" ", "")
        assert prompt == (
            f"<|file_sep|>a.py\ny=1<|file_sep|>filename\n{bos}<|fim_prefix|>deff(x<|fim_suffix|>):<|fim_middle|>"
        )
        for wrong in ({"input_extra": [{"filename": "x"}]}, {"input_prefix": 5}, {"input_extra": {}}):
            assert served.client.post("/infill", json=body | wrong).status_code == 400
        suffixed = served.client.post("/v1/completions", json={"prompt": "a", "suffix": "b", "max_tokens": 1})
        assert suffixed.status_code == 200 and suffixed.json()["usage"]["prompt_tokens"] > 4


def test_embeddings(load: Load, tmp_path: Path) -> None:
    with serve(load("chat")) as served:
        refused = served.client.post("/v1/embeddings", json={"input": "a"})
        assert refused.status_code == 501 and "--embedding-model" in refused.json()["error"]["message"]
    path = write_tiny_bert(tmp_path / "bert.gguf")
    with Embedder(path) as embedder, serve(load("chat"), embedder=embedder) as served:
        client = served.client
        texts = ["Hello", "there", "Hello"]
        answer = client.post("/v1/embeddings", json={"input": texts}).json()
        rows = [np.array(item["embedding"]) for item in answer["data"]]
        assert [item["index"] for item in answer["data"]] == [0, 1, 2]
        np.testing.assert_allclose([np.linalg.norm(row) for row in rows], 1, atol=1e-6)
        np.testing.assert_array_equal(rows[0], rows[2])
        assert np.abs(rows[0] - rows[1]).max() > 1e-3
        tokens = embedder.vocabulary.tokenize("Hello", add_bos=True)
        # mean pooling: the mean of what is computed for each token
        with Embedder(path, "none") as single:
            mean = single.embed(tokens).mean(0)
        np.testing.assert_allclose(rows[0], mean / np.linalg.norm(mean), atol=1e-5)
        for form in (tokens, {"prompt_string": "Hello"}, {"content": [{"type": "text", "text": "Hello"}]}):
            one = client.post("/v1/embeddings", json={"input": form}).json()
            np.testing.assert_array_equal(one["data"][0]["embedding"], rows[0])
            assert one["usage"]["prompt_tokens"] == len(tokens)
        coded = client.post("/v1/embeddings", json={"input": "Hello", "encoding_format": "base64"}).json()
        data = base64.b64decode(coded["data"][0]["embedding"])
        np.testing.assert_array_equal(np.array(struct.unpack(f"<{len(rows[0])}f", data)), rows[0])
        native = client.post("/embedding", json={"content": ["Hello"]}).json()
        assert native == [{"index": 0, "embedding": [rows[0].tolist()]}]
        for wrong, said in (
            ({"input": []}, "empty"),
            ({"input": "word " * 500}, "too large"),
            ({"input": "a", "dimensions": 3}, "dimensions"),
            ({"input": [5000]}, "neither a text nor a token"),
            ({"input": {"content": [{"type": "image_url"}]}}, "input"),
        ):
            refused = client.post("/v1/embeddings", json=wrong)
            assert refused.status_code == 400 and said in refused.json()["error"]["message"]


def test_a_model_with_several_names(load: Load) -> None:
    with serve(load("chat"), aliases=("tiny", "small/one"), tags=("chat", "fim")) as served:
        (model,) = served.client.get("/models").json()["data"]
        assert (model["id"], model["aliases"], model["tags"]) == ("tiny", ["tiny", "small/one"], ["chat", "fim"])
        assert [served.client.get(f"/v1/models/{name}").json() for name in model["aliases"]] == [model, model]
        assert served.client.get("/v1/models/chat").status_code == 404
        assert complete(served, prompt="a", model="small/one")["model"] == "tiny"


def test_keys_and_origins(load: Load) -> None:
    with serve(load("chat"), api_keys=("one",), cors=("localhost",)) as served:
        client = served.client
        assert client.get("/models", headers={"X-Api-Key": "one"}).status_code == 200
        assert client.get("/models", headers={"X-Api-Key": "two"}).status_code == 401
        for origin, allowed in (
            ("http://localhost:3000", True),
            ("http://[::1]:3000", True),
            ("https://127.0.0.1", True),
            ("http://localhost.evil.example", False),
            ("http://evil.example", False),
            ("null", False),
        ):
            asked = client.options("/completions", headers={"Origin": origin, "Access-Control-Request-Method": "POST"})
            assert asked.status_code == 200
            assert asked.headers.get("access-control-allow-origin") == (origin if allowed else None)
            answer = client.get("/models", headers={"Origin": origin, "X-Api-Key": "one"})
            assert answer.status_code == (200 if allowed else 403)
            assert answer.headers.get("access-control-allow-origin") == (origin if allowed else None)


def test_the_same_seed_is_the_same_text_while_nothing_leaves_the_cache(served: Served) -> None:
    body = {"prompt": "Again and again", "seed": 7, "n_predict": 100}
    first, second, anew = (
        complete(served, **body),
        complete(served, **body),
        complete(served, **body, cache_prompt=False),
    )
    assert first["content"] == second["content"] == anew["content"] and not first["truncated"]
    assert second["edge_stream"]["history"] == "branched"
