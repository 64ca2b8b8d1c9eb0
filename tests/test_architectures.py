"""Every architecture that llama.cpp knows streams exactly (architecture_exactness.py) or is refused with a reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from architecture_exactness import EXACT, NO_FIXTURE, REFUSED, Result, run
from architecture_metadata import FIXTURES, names

from edge_stream.native import bindings

# fmt: off
MUST_STREAM = {
    "afmoe", "apertus", "baichuan13", "bailingmoe3", "chatglm", "cohere2", "cohere2_wide", "cohere2moe", "deepseek2",
    "deepseek2-ocr", "deepseek2_expanded", "deepseek2_lite", "deepseek2_yarn", "ernie4_5", "exaone-moe", "exaone4_12",
    "exaone4_32", "falcon-h1", "gemma2", "gemma3", "gemma3n", "gemma4", "gemma4_shared", "glm4", "glm4moe", "gpt-oss",
    "granite", "granite_swa", "granite_swa_wide", "granitehybrid", "granitehybrid_rope", "jamba", "kimi-linear",
    "laguna", "lfm2", "lfm2moe", "llama", "llama4", "mamba", "mamba2", "maple", "mellum", "mellum_wide", "minicpm",
    "minimax-m2", "mistral3", "mistral3_notemp", "muse-glimmer", "nanbeige", "nemotron_h", "nemotron_h_moe", "olmo2",
    "olmo3", "phi3", "phi3_long", "phi4mini", "plamo2", "qwen2", "qwen2vl", "qwen3", "qwen35", "qwen35moe",
    "qwen3moe", "qwen3next", "qwen3vl", "qwen3vlmoe", "rwkv6", "rwkv7", "seed_oss", "smallthinker", "smollm3",
    "stablelm", "talkie",
}
MUST_REFUSE = {
    "hunyuan-dense", "hunyuan-moe", "maincoder",  # keys are changed after their rotation
    "starcoder", "gpt2",  # positions are learned
    "bert", "dream", "t5",  # no causal decoder
}
# fmt: on


@pytest.fixture(scope="module")
def result(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], Result]]:
    """result(name): what came of the model. Those that this session tests are examined two at a time."""
    if not bindings.library().es_bank_available():
        pytest.skip("a stock libllama has no sink bank")
    folder = tmp_path_factory.mktemp("architectures")
    mine = [item for item in request.session.items if isinstance(item, pytest.Function) and item.path == request.path]
    wanted = [str(item.callspec.params["name"]) for item in mine]
    with ThreadPoolExecutor(2) as pool:
        futures: dict[str, Future[Result]] = {name: pool.submit(run, name, folder) for name in wanted}
        yield lambda name: futures[name].result()
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("name", names())
def test_streams_exactly_or_is_refused(result: Callable[[str], Result], name: str) -> None:
    found = result(name)
    print(found)
    if found.status == NO_FIXTURE and name not in FIXTURES:
        pytest.skip(f"llama.cpp makes no tiny model of it: {found.reason}")
    assert found.status in (EXACT, REFUSED), found
    assert name not in MUST_STREAM or found.status == EXACT, found
    assert name not in MUST_REFUSE or found.status == REFUSED, found
    if found.status == REFUSED:
        assert found.reason
    elif found.memory != "state":
        assert found.n_rebases >= 6
        assert found.effect is not None and found.effect > 10 * found.allowed, "the model does not look at its sinks"
