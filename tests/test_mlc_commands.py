"""What the layers above the engine do with an MLC folder, and what is said about folders that are not good."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from serving import serve

from edge_stream import EdgeStreamError, Engine, Sampling, SessionError
from edge_stream.cli import cli, options
from edge_stream.mlc.folder import MlcFolder
from edge_stream.server.serve import memory

Draw = Callable[..., list[int]]
Load = Callable[..., Any]
OPTIONS = {"n_ctx": 64, "n_keep": 4}
SAMPLINGS = {
    "greedy": Sampling(temp=0),
    "seeded": Sampling(seed=7, temp=1.0, top_k=0, top_p=1.0, min_p=0.0, repeat_penalty=1.2),
    "grammar": Sampling(seed=7, temp=1.0, grammar="root ::= [a-c]+"),
}


def tokens_of(stream: Any, n: int, sampling: Sampling) -> list[int]:
    """n generated tokens."""
    return [t.token for t in stream.generate(n, sampling=sampling, ignore_eos=True)]


@pytest.mark.parametrize("kind", SAMPLINGS)
def test_both_engines_sample_the_same(kind: str, load: Load, load_mlc: Load, draw: Draw) -> None:
    """One sampler serves both: the same seed gives the same tokens over several cache lengths."""
    found = []
    for engine in (load("gqa", **OPTIONS), load_mlc("gqa", **OPTIONS)):
        with engine.stream() as stream:
            stream.feed(draw(30))
            found.append(tokens_of(stream, 20 if kind == "grammar" else 250, SAMPLINGS[kind]))
    assert found[0] == found[1]


def test_both_engines_read_text_alike(load: Load, load_mlc: Load) -> None:
    """The tokenizer of the folder, as llama.cpp reads it, is the GGUF file's."""
    one, other = load("gqa"), load_mlc("gqa")
    text = "The quick brown fox — naïve, 3,141 times\n\n<s>"
    assert one.tokenize(text, add_bos=True, special=True) == other.tokenize(text, add_bos=True, special=True)
    facts = ("n_vocab", "bos", "eos", "add_bos", "chat_template")
    assert [getattr(one, f) for f in facts] == [getattr(other, f) for f in facts]
    assert all(one.token_to_piece(t) == other.token_to_piece(t) for t in range(one.n_vocab))
    assert [t for t in range(one.n_vocab) if one.is_eog(t)] == [t for t in range(one.n_vocab) if other.is_eog(t)]


@pytest.mark.parametrize("n_before", [30, 300])
@pytest.mark.parametrize("cache", ["f32", "f16"])
def test_a_session_continues_identically(cache: str, n_before: int, load_mlc: Load, draw: Draw, tmp_path: Path) -> None:
    options = OPTIONS | {"cache_type_k": cache, "cache_type_v": cache}
    path = tmp_path / "s"
    with load_mlc("gqa", **options).stream() as stream:
        stream.feed(draw(n_before))
        tokens_of(stream, 10, SAMPLINGS["seeded"])
        stream.save(path, b"mine")
        want = tokens_of(stream, 150, SAMPLINGS["seeded"])
    with load_mlc("gqa", **options).restore(path) as stream:
        assert (stream.user, stream.stats.n_past) == (b"mine", n_before + 10)
        assert tokens_of(stream, 150, SAMPLINGS["seeded"]) == want


def test_sessions_of_other_models_and_engines_are_refused(
    load: Load, load_mlc: Load, draw: Draw, tmp_path: Path
) -> None:
    with load_mlc("gqa", **OPTIONS).stream() as stream:
        stream.feed(draw(100))
        stream.save(tmp_path / "s")
    for other in (load("gqa", **OPTIONS), load_mlc("mha", **OPTIONS)):
        with pytest.raises(SessionError, match="another model"):
            other.restore(tmp_path / "s")
    with pytest.raises(SessionError, match="cache types"):
        load_mlc("gqa", **OPTIONS, cache_type_k="f16").restore(tmp_path / "s")


def test_commands(tiny_mlc: Callable[..., Path], tmp_path: Path) -> None:
    """run, info, bench and eval by the same code paths as with a GGUF file."""
    model = str(tiny_mlc("gqa"))
    text = tmp_path / "text"
    text.write_text("abc def " * 60)

    def call(*arguments: str) -> str:
        result = CliRunner().invoke(cli, list(arguments))
        assert result.exit_code == 0, result.output
        return result.stdout

    call("run", "-m", model, "-p", "abc", "-n", "100", "-c", "64", "--ignore-eos")
    facts = json.loads(call("info", "-m", model, "-c", "64", "--json"))["model"]
    assert (facts["sink_move"], facts["n_ctx"], facts["kv_bytes_per_token"]) == ("none", 64, 2 * 2 * 2 * 16 * 2)
    rows = json.loads(
        call("bench", "-m", model, "-c", "64", "-p", "16", "-n", "4", "-r", "1", "-d", "full", "-o", "json")
    )
    assert len(rows) == 2
    call("eval", "ppl", "-m", model, "-f", str(text), "-c", "64", "--mode", "stream,window", "--max-tokens", "200")
    result = CliRunner().invoke(cli, ["eval", "ppl", "-m", model, "-f", str(text), "-c", "64", "--mode", "shift"])
    assert result.exit_code != 0 and "the MLC engine has modes stream and window" in result.stderr


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "mlc-chat-config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_model(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "mlc-chat-config.json").read_text())
    edit(folder, model_config=config["model_config"] | changes)


def edit_index(folder: Path, **changes: Any) -> None:
    """Change the first shard's record."""
    path = folder / "tensor-cache.json"
    index = json.loads(path.read_text())
    index["records"][0].update(changes)
    path.write_text(json.dumps(index))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


_EXPERTS: dict[str, Any] = {
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
    "norm_topk_prob": True,
}
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "mlc-chat-config.json").unlink(), "a folder without mlc-chat-config.json"),
    "half a config": (lambda f: (f / "mlc-chat-config.json").write_text('{"model'), "it is not JSON"),
    "no sizes": (lambda f: edit(f, model_config={}), "is damaged"),
    "odd sizes": (lambda f: edit(f, model_config={"num_hidden_layers": -1}), "is damaged"),
    "endless layers": (lambda f: edit_model(f, num_hidden_layers=10**12), "n_layer is 1000000000000"),
    "too many layers": (lambda f: edit_model(f, num_hidden_layers=10**6), "n_layer is 1000000"),
    "a base that is none": (lambda f: edit_model(f, position_embedding_base=-0.0), "is damaged"),
    "layers of another model": (lambda f: edit_model(f, no_rope_layers=[1, 0, 1]), "does not describe 2 layers"),
    "a window of nothing": (
        lambda f: edit_model(f, layer_types=["sliding_attention"] * 2, sliding_window=0),
        "is damaged: n_swa 0",
    ),
    "no window": (lambda f: edit_model(f, layer_types=["sliding_attention"] * 2), "'sliding_window'"),
    "a scale of nothing": (lambda f: edit_model(f, query_pre_attn_scalar=0), "is damaged"),
    "a scale that is none": (lambda f: edit_model(f, query_pre_attn_scalar=-4), "is damaged"),
    "a scaling that is none": (lambda f: edit_model(f, rope_scaling=7), "rope_scaling = 7 is not a JSON object"),
    "no experts": (lambda f: edit(f, model_type="qwen3_moe"), "'num_experts'"),
    "more experts used than there are": (
        lambda f: [edit(f, model_type="qwen3_moe"), edit_model(f, **_EXPERTS | {"num_experts_per_tok": 7})],
        "is damaged: 7 of 6 experts are used",
    ),
    "experts without a width": (
        lambda f: [edit(f, model_type="qwen3_moe"), edit_model(f, **_EXPERTS | {"moe_intermediate_size": 0})],
        "moe_intermediate_size is 0",
    ),
    "experts that do not add up": (
        lambda f: [edit(f, model_type="qwen3_moe"), edit_model(f, **_EXPERTS | {"norm_topk_prob": False})],
        "does not make its experts' weights add up to 1",
    ),
    "soft caps": (lambda f: edit_model(f, final_logit_softcapping=30.0), "has soft caps"),
    "Gemma 3 of mlc-llm": (lambda f: edit(f, model_type="gemma3_text"), "'layer_types'"),
    "model": (lambda f: edit(f, model_type="mamba"), "does not know model_type 'mamba'"),
    "quantization": (lambda f: edit(f, quantization="q4f32_1"), "lacks the tensor .* in q4f32_1"),
    "unknown quantization": (lambda f: edit(f, quantization="e4m3"), "quantization 'e4m3'; the MLC engine runs q0f32"),
    "no weights": (lambda f: (f / "params_shard_0.bin").unlink(), "No such file"),
    "cut weights": (lambda f: (f / "params_shard_0.bin").write_bytes(b"1234"), "has 4 bytes"),
    "flipped weights": (lambda f: flip(f / "params_shard_0.bin"), "damaged: its md5 sum differs"),
    "no md5 sum": (lambda f: edit_index(f, md5sum=None), "gives params_shard_0.bin no md5 sum"),
    "no index": (lambda f: (f / "tensor-cache.json").unlink(), "tensor-cache.json cannot be read"),
    "no tokenizer": (lambda f: [p.unlink() for p in f.glob("tokenizer*")], "no tokenizer"),
    "odd tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_folders(kind: str, tiny_mlc: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_mlc("gqa"), folder)
    damage, message = DAMAGE[kind]
    damage(folder)
    with pytest.raises(EdgeStreamError, match=message) as caught:
        Engine.load(folder, n_ctx=64)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache_type_k": "q8_0"}, "the MLC engine has f32 and f16"),
        ({"n_gpu_layers": 1}, "runs on the CPU"),
        ({"sink_move": "bank"}, "no sinks to move"),
        ({"flash_attn": "on"}, "the MLC engine has auto and off"),
        ({"split_mode": "row"}, "runs on the CPU"),
        ({"n_parallel": 2}, "one stream at a time"),
        ({"n_ctx": 5, "n_keep": 4}, "window tokens"),
        ({"n_ctx": 1 << 28}, "would fit"),
    ],
)
def test_options_that_it_does_not_have(options: dict[str, Any], message: str, tiny_mlc: Callable[..., Path]) -> None:
    with pytest.raises(EdgeStreamError, match=message):
        Engine.load(tiny_mlc("gqa"), **({"n_ctx": 64} | options))


def test_missing_and_wrong_packages(tiny_mlc: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from edge_stream.mlc import compile as compiler

    model = tiny_mlc("gqa")
    monkeypatch.setattr(compiler, "VERSIONS", {"apache-tvm": "0.1"})
    with pytest.raises(EdgeStreamError, match=r"need apache-tvm 0\.1, this is 0\.27"):
        Engine.load(model, n_ctx=64)
    monkeypatch.setattr(compiler.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(EdgeStreamError, match=r"not installed: pip install 'edge-stream\[mlc\]'"):
        Engine.load(model, n_ctx=64)


def test_kept_libraries(
    tiny_mlc: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Built once; built again if it is damaged; without a C++ compiler the sentence says so and nothing is left."""
    model = tiny_mlc("gqa")
    monkeypatch.setenv("EDGE_STREAM_CACHE", str(tmp_path / "cache"))
    with monkeypatch.context() as patch:
        patch.setenv("PATH", "")
        with pytest.raises(EdgeStreamError, match=r"needs a C\+\+ compiler"):
            Engine.load(model, n_ctx=64)
    assert not list((tmp_path / "cache").rglob("*.so"))

    def said_on_load() -> str:
        capfd.readouterr()
        Engine.load(model, n_ctx=64).close()
        return capfd.readouterr().err

    assert "compiling" in said_on_load()
    assert "compiling" not in said_on_load()
    (library,) = (tmp_path / "cache" / "mlc").glob("*.so")
    whole = library.read_bytes()
    library.unlink()  # it is mapped into this process
    library.write_bytes(whole[:1000])
    assert "compiling" in said_on_load()
    kept = {path.name.split("-")[0].replace(library.stem, "library") for path in library.parent.iterdir()}
    assert kept == {"library.so", "library.sha256", "processor", "vocab"}


_LOAD = """
import sys
from edge_stream import Engine
with Engine.load(sys.argv[1], n_ctx=64) as engine, engine.stream() as stream:
    stream.feed_tokens([1, 2, 3])
    print("tvm" in sys.modules, "gguf" in sys.modules, float(stream.logits[7]), engine.tokenize("hello"))
"""


def test_what_is_kept_needs_neither_compiler_nor_converter(tiny_mlc: Callable[..., Path], tmp_path: Path) -> None:
    """The second load imports neither, and answers as the first; damaged notes are written again."""
    model, cache = tiny_mlc("gqa"), tmp_path / "cache"

    def load() -> list[str]:
        env = {**os.environ, "EDGE_STREAM_CACHE": str(cache)}
        words = [sys.executable, "-c", _LOAD, str(model)]
        return subprocess.run(words, env=env, capture_output=True, text=True, check=True).stdout.split(maxsplit=2)

    *made, first = load()
    *found, second = load()
    assert made == ["True", "True"]
    assert found == ["False", "False"]
    assert first == second
    (note,) = cache.glob("mlc/processor-*.json")
    text = note.read_text()
    note.write_text("[]")
    assert load() == ["True", "False", first]
    assert note.read_text() == text


def test_a_tokenizer_that_changes_is_read_again(
    tiny_mlc: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("EDGE_STREAM_CACHE", str(tmp_path / "cache"))
    model = tmp_path / "model"
    shutil.copytree(tiny_mlc("gqa"), model)
    first = MlcFolder(model).vocab_file(tmp_path)
    assert MlcFolder(model).vocab_file(tmp_path) != first  # kept by now
    path = model / "mlc-chat-config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "eos_token_id": [1, 2]}))
    assert MlcFolder(model).vocab_file(tmp_path) == first


def test_a_cache_folder_that_cannot_be_written(
    tiny_mlc: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("EDGE_STREAM_CACHE", str(tmp_path / "file"))
    made = MlcFolder(tiny_mlc("gqa")).vocab_file(tmp_path)
    assert made.read_bytes()[:4] == b"GGUF" and made.parent == tmp_path


def test_serve(load_mlc: Callable[..., Engine], tmp_path: Path) -> None:
    """One conversation at a time, the others on disk; whole answers and completions."""
    engine = load_mlc("chat", n_ctx=256)
    with serve(engine, tmp_path) as served:
        histories: dict[str, list[dict[str, Any]]] = {"a": [], "b": []}
        for _ in range(2):
            for name, history in histories.items():
                answer = served.client.turn(history, f"hello from {name}", name=name)
                assert answer["choices"][0]["finish_reason"] == "stop"
        assert all(len(history) == 4 and history[-1]["content"] for history in histories.values())
        body = {"prompt": ["abc", "def"], "max_tokens": 3, "temperature": 0}
        done = served.client.post("/v1/completions", json=body).json()
        assert [c["index"] for c in done["choices"]] == [0, 1] and done["usage"]["completion_tokens"] == 6
        assert served.client.get("/props").json()["total_slots"] == 1
    # the weights, whatever the model's files are
    assert memory(engine)["weights"] * 2**20 == sum(f.stat().st_size for f in engine.model_path.glob("params_shard_*"))


def test_serve_holds_one_stream_unless_told_otherwise(tiny_mlc: Callable[..., Path]) -> None:
    seen: dict[str, Any] = {}

    @click.command()
    @click.option("-np", "n_parallel", type=int, default=4)
    @options.context_options()
    @options.compute_options
    def command(**flags: Any) -> None:
        with options.load_engine(flags | {"model": str(tiny_mlc("chat"))}) as engine:
            seen["n"] = engine.n_parallel

    done = CliRunner().invoke(command, ["-c", "64"])
    assert done.exit_code == 0 and seen["n"] == 1
    assert "--parallel 1: the MLC engine holds no more streams at a time" in done.stderr
    refused = CliRunner().invoke(command, ["-c", "64", "-np", "4"])
    assert isinstance(refused.exception, EdgeStreamError) and "one stream at a time" in str(refused.exception)
