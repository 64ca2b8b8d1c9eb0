"""/lora-adapters: the scales of all conversations, changed while the server runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import Served, serve
from test_adapters import EXACT, write_adapter

from edge_stream.engine import Engine

PATH = "/lora-adapters"
BODY = {"prompt": "Hello there", "n_predict": 24, "temperature": 0, "ignore_eos": True, "seed": 1}


@pytest.fixture(scope="module")
def adapter(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_adapter(tiny("chat"), tmp_path_factory.mktemp("adapters") / "adapter.gguf"))


@pytest.fixture
def served(tiny: Callable[[str], Path], adapter: str, tmp_path: Path) -> Iterator[Served]:
    with (
        Engine.load(tiny("chat"), n_parallel=2, lora=[(adapter, 1.0)], **EXACT) as engine,
        serve(engine, tmp_path / "sessions") as running,
    ):
        yield running


def complete(served: Served, **more: Any) -> dict[str, Any]:
    answer = served.client.post("/completion", json=BODY | more)
    assert answer.status_code == 200, answer.text
    return answer.json()  # type: ignore[no-any-return]


def test_scales_are_those_of_all_conversations(served: Served, tiny: Callable[[str], Path], adapter: str) -> None:
    assert served.client.get(PATH).json() == [{"id": 0, "path": adapter, "scale": 1.0}]
    whole = complete(served)
    assert served.client.post(PATH, json=[{"id": 0, "scale": 1.0}]).json() == {"success": True}
    assert complete(served)["timings"]["cache_n"] > 0  # nothing has changed
    for scales in ([{"id": 0, "scale": 0.0}], []):  # what is not named has none
        assert served.client.post(PATH, json=scales).json() == {"success": True}
    assert served.client.get(PATH).json()[0]["scale"] == 0
    bare = complete(served)
    assert bare["timings"]["cache_n"] == 0 and bare["content"] != whole["content"]
    with Engine.load(tiny("chat"), n_parallel=2, **EXACT) as engine, serve(engine) as other:
        assert complete(other)["content"] == bare["content"]
    # the conversations of each set of scales are kept
    served.client.post(PATH, json=[{"id": 0, "scale": 1.0}])
    again = complete(served)
    assert again["content"] == whole["content"]
    assert again["edge_stream"]["restored"] and again["timings"]["cache_n"] > 0


def test_a_request_has_the_scales_of_all(served: Served) -> None:
    assert complete(served, lora=[{"id": 0, "scale": 1.0}])["content"] == complete(served, lora=[])["content"]
    for lora, said in (
        ([{"id": 0, "scale": 0.5}], "one scale for all conversations"),
        ([{"id": 1, "scale": 0.5}], "no adapter 1"),
        ([{"id": -1}], "lora"),
    ):
        refused = served.client.post("/completion", json=BODY | {"lora": lora})
        assert refused.status_code == 400 and said in refused.json()["error"]["message"]
    for body in ([{"id": 1, "scale": 1.0}], {"id": 0}, [{"id": 0, "scale": "x"}]):
        assert served.client.post(PATH, json=body).status_code == 400
    assert served.client.get(PATH).json()[0]["scale"] == 1


def test_scales_do_not_change_under_an_answer(served: Served) -> None:
    begun = threading.Event()

    def endless() -> None:
        with served.client.stream("POST", "/completion", json=BODY | {"n_predict": -1, "stream": True}) as answer:
            for _ in answer.iter_lines():
                begun.set()
                if done.is_set():
                    break

    done = threading.Event()
    thread = threading.Thread(target=endless)
    thread.start()
    assert begun.wait(30)
    refused = served.client.post(PATH, json=[])
    done.set()
    thread.join(30)
    assert refused.status_code == 503 and "when none is being answered" in refused.json()["error"]["message"]
    served.wait_idle()
    assert served.client.post(PATH, json=[]).status_code == 200
    assert complete(served)["timings"]["cache_n"] == 0


def test_a_server_without_adapters(tiny: Callable[[str], Path]) -> None:
    with Engine.load(tiny("chat"), **EXACT) as engine, serve(engine) as running:
        assert running.client.get(PATH).json() == []
        assert running.client.post(PATH, json=[]).json() == {"success": True}
        refused = running.client.post(PATH, json=[{"id": 0, "scale": 1.0}])
        assert refused.status_code == 400 and "serve --lora" in refused.json()["error"]["message"]
