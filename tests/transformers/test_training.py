"""`edge-stream train`: learning, resuming, what it writes, and what it refuses. `make test-transformers` runs this."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: make test-transformers")
transformers = pytest.importorskip("transformers", reason="transformers is not installed: make test-transformers")

sys.path[:0] = [str(Path(__file__).parents[1])]

import numpy as np  # noqa: E402
import tiny_checkpoints as tiny  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from edge_stream import Engine, Sampling  # noqa: E402
from edge_stream.chat.conversation import Conversation  # noqa: E402
from edge_stream.converters import mlc, to_gguf  # noqa: E402
from edge_stream.errors import EdgeStreamError  # noqa: E402
from edge_stream.models.conversion import open_source  # noqa: E402
from edge_stream.training import data, job, loop, model  # noqa: E402
from edge_stream.training.settings import SINK_TOKEN, SINKS, Settings, Shape  # noqa: E402

SHAPE = Shape(n_vocab=320, n_layer=2, n_embd=64, n_head=2)
TINY: dict[str, Any] = {"length": 32, "batch": 4, "n_tokens": 24 * 128, "every": 6, "lr": 2e-2}


def text() -> str:
    return "\n".join(tiny.corpus()[:-1])  # without its other scripts


def train(out: Path, base: str | None = None, shape: Shape = SHAPE, show: Any = None, **changes: Any) -> list[Any]:
    """Run a tiny training; the log."""
    torch.set_num_threads(1)
    source = open_source(base) if base else None
    texts = changes.pop("texts", [text()])
    settings = Settings(**TINY | changes)
    return job.run(texts, [], out, settings, shape, source, "cpu", lambda _: None, show or (lambda *_: None))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of every kind."""
    folder = tmp_path_factory.mktemp("trained")
    for kind in SINKS:
        log = train(folder / kind, sink=kind)
        assert log[-1]["held_out"] < log[0]["held_out"] - 1.0, log
    return {kind: folder / kind for kind in SINKS}


def reference(folder: Path) -> Any:
    """The model as transformers computes it, in float64."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").double().eval()


def gguf_of(folder: Path, out: Path) -> Path:
    options = to_gguf.GgufOptions(outtype="f32")
    return to_gguf.convert(open_source(str(folder)), out, options, lambda _: None)[0]


@pytest.mark.parametrize("kind", SINKS)
def test_converted_logits_are_those_of_transformers(trained: dict[str, Path], tmp_path: Path, kind: str) -> None:
    folder = trained[kind]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer("A stream of any length, and its sink.")["input_ids"]
    assert (tokens[0] == tokenizer.convert_tokens_to_ids(SINK_TOKEN)) == (kind == "token")
    with torch.no_grad():
        want = reference(folder)(torch.tensor([tokens])).logits[0].numpy()
    flags = {"cache_type_k": "f32", "cache_type_v": "f32", "flash_attn": "off"}
    with Engine.load(gguf_of(folder, tmp_path / "m.gguf"), n_ctx=64, **flags) as engine:
        assert engine.tokenize("A stream of any length, and its sink.", add_bos=engine.add_bos) == tokens
        assert np.abs(engine.stream().logits_of(tokens) - want).max() < 1e-4
        assert engine.metadata.get("edge_stream.sink") == (None if kind == "none" else kind)
        assert engine.metadata["edge_stream.n_keep"] == ("1" if kind == "token" else "4")


def test_the_sink_token_goes_to_mlc(trained: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("tvm", reason="TVM is not installed: pip install 'edge-stream[mlc]'")
    out = tmp_path / "mlc"
    mlc.convert(open_source(str(trained["token"])), out, mlc.MlcOptions(quantization="q0f32"), lambda _: None)
    config = json.loads((out / "mlc-chat-config.json").read_text(encoding="utf-8"))
    assert (config["attention_sink_size"], config["attention_sink"]) == (1, "token")
    with Engine.load(out, n_ctx=32, n_keep=1, cache_type_k="f32", cache_type_v="f32") as engine:
        tokens = engine.tokenize("A stream and its sink.", add_bos=engine.add_bos)
        assert tokens[0] == engine.bos == SHAPE.n_vocab
        with torch.no_grad():
            rounded = reference(trained["token"]).bfloat16().double()  # as MLC stores unquantised weights
            want = rounded(torch.tensor([tokens])).logits[0].numpy()
        assert np.abs(engine.stream().logits_of(tokens) - want).max() < 1e-3


def test_a_chat_begins_with_one_sink(trained: dict[str, Path], tmp_path: Path) -> None:
    """Whoever adds it, the template or the tokenizer, it is not there twice."""
    with Engine.load(gguf_of(trained["token"], tmp_path / "m.gguf"), n_ctx=128, n_keep=1) as engine:
        chat = Conversation(engine, n_keep=1)
        list(chat.reply("Hi.", max_tokens=1, sampling=Sampling(temp=0)))
        text = engine.tokenize("user: Hi.\nassistant:", add_bos=True)
        assert text[0] == engine.bos and chat.n_read == len(text)


def test_mlc_refuses_a_zero_sink(trained: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(EdgeStreamError, match="MLC has no model of"):
        mlc.convert(open_source(str(trained["softmax1"])), tmp_path / "mlc", mlc.MlcOptions(), lambda _: None)


def test_the_fast_zero_sink_is_that_of_transformers(trained: dict[str, Path]) -> None:
    """Training pads keys with zeros; the written model has sinks of 0, and transformers' own attention."""
    slow = reference(trained["softmax1"])
    fast = model.with_zero_sink(model.read(open_source(str(trained["softmax1"])))).double()
    batch = torch.randint(0, SHAPE.n_vocab, (3, 33), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert abs(model.loss(fast, batch, None) - model.loss(slow, batch, None)) < 1e-5  # summed in float32


def test_kinds_begin_alike_and_read_alike() -> None:
    """The same weights but for the sink token's row; batches depend on the seed and the step only."""
    plain, token = (model.new(SHAPE, 32, 0, seed=3) for _ in range(2))
    model.add_token(token, SHAPE.n_vocab, seed=3)
    rows = token.get_input_embeddings().weight
    assert len(rows) == SHAPE.n_vocab + 1
    assert torch.equal(rows[: SHAPE.n_vocab], plain.get_input_embeddings().weight)
    other = dict(token.named_parameters())
    for name, values in plain.named_parameters():
        assert "embed" in name or torch.equal(values, other[name]), name
    samples = data.Samples(torch.arange(100, dtype=torch.int32), 8, 3, seed=5)
    assert samples.n_samples == 12
    epoch = torch.cat([samples.batch(step) for step in range(4)])
    assert len({int(row[0]) for row in epoch}) == 12, "each sample once"
    assert bool((epoch.diff(dim=1) == 1).all())
    assert torch.equal(samples.batch(2), data.Samples(torch.arange(100, dtype=torch.int32), 8, 3, seed=5).batch(2))
    assert not torch.equal(epoch[:3], samples.batch(4)), "another order in the next epoch"


def test_the_loss_predicts_the_same_with_a_sink() -> None:
    """shared leaves out what is predicted from the sink itself; the values are those of a loop over positions."""
    net = model.new(SHAPE, 32, 0, seed=1).double()
    batch = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        logp = net(torch.tensor([[9, 5, 6, 7]])).logits[0].log_softmax(-1)
        each = [-float(logp[i, t]) for i, t in enumerate([5, 6, 7, 8])]
        assert abs(float(model.loss(net, batch, 9)) - sum(each) / 4) < 1e-6
        assert abs(float(model.loss(net, batch, 9, shared=True)) - sum(each[1:]) / 3) < 1e-6


_KILLED = """
import os, signal, sys
sys.path[:0] = {paths!r}
import test_training
test_training.train({out!r}, sink="token", show=lambda step, _: step == 15 and os.kill(os.getpid(), signal.SIGKILL))
"""


def test_resumed_after_kill_9_is_bit_identical(trained: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "killed"
    code = f"from pathlib import Path\n{_KILLED.format(paths=sys.path, out='OUT')}".replace(
        "'OUT'", f"Path({str(out)!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["killed.checkpoint"]
    seen: list[int] = []
    log = train(out, sink="token", show=lambda step, _: seen.append(step))
    assert seen == list(range(13, 25)), "it goes on from the checkpoint at step 12"
    assert (out / "model.safetensors").read_bytes() == (trained["token"] / "model.safetensors").read_bytes()
    assert log == json.loads((trained["token"] / "training.json").read_text(encoding="utf-8"))["log"]
    assert [p.name for p in tmp_path.iterdir()] == ["killed"]


_CUT = """
import resource, signal, sys
sys.path[:0] = {paths!r}
import test_training
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
limit = lambda step, _: step == 15 and resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
test_training.train(test_training.Path({out!r}), show=limit)
"""


def test_killed_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    """What was written of it is removed when the next one is."""
    out = tmp_path / "cut"
    code = _CUT.format(paths=[str(Path(__file__).parent), *sys.path], out=str(out))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -signal.SIGXFSZ, done.stderr
    assert len(list(tmp_path.iterdir())) == 2
    assert out.with_name("cut.checkpoint").stat().st_mode & 0o777 == 0o644
    train(out)
    assert [p.name for p in tmp_path.iterdir()] == ["cut"]
    assert (out / "model.safetensors").stat().st_mode & 0o777 == 0o644


def test_weight_decay_shrinks_matrices_only(tmp_path: Path) -> None:
    norms = {}
    for decay in (0.0, 5.0):
        train(tmp_path / str(decay), weight_decay=decay)
        weights = load_file(tmp_path / str(decay) / "model.safetensors")
        matrices = [w.norm().item() for name, w in weights.items() if w.ndim > 1]
        vectors = [w.norm().item() for name, w in weights.items() if w.ndim < 2]
        norms[decay] = np.mean(matrices), np.mean(vectors)
    assert norms[5.0][0] < 0.8 * norms[0.0][0] and norms[5.0][1] > 0.8 * norms[0.0][1]


@pytest.mark.parametrize("as_gguf", [False, True])
def test_only_the_sink_is_learned(trained: dict[str, Path], tmp_path: Path, as_gguf: bool) -> None:
    base = gguf_of(trained["none"], tmp_path / "base.gguf") if as_gguf else trained["none"]
    train(tmp_path / "out", str(base), sink="token", only_sink=True)
    before, after = (load_file(f / "model.safetensors") for f in (trained["none"], tmp_path / "out"))
    assert before.keys() == after.keys()
    table = "model.embed_tokens.weight"
    assert all(torch.equal(before[name], after[name]) for name in before if name != table)
    assert torch.equal(before[table], after[table][:-1])
    begun = model.new(SHAPE, 32, 0, seed=0)
    begun.load_state_dict(before, strict=False)
    model.add_token(begun, SHAPE.n_vocab, seed=0)
    assert not torch.equal(begun.get_input_embeddings().weight[-1], after[table][-1])
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out")("a")["input_ids"][0] == SHAPE.n_vocab


def test_a_trained_sink_is_learned_on(trained: dict[str, Path], tmp_path: Path) -> None:
    """A tokenizer that has a token in front of every text gets no second one."""
    train(tmp_path / "more", str(trained["token"]), sink="token")
    assert len(load_file(tmp_path / "more" / "model.safetensors")["model.embed_tokens.weight"]) == SHAPE.n_vocab + 1


# ---------------------------------------------------------------------------------------------------------
# what goes wrong: one sentence, and nothing half-written
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"texts": [""]}, "the text is empty"),
        ({"texts": ["some text"]}, "lower --vocab, or give more text"),
        ({"length": 100_000}, "a sample needs 100001"),
        ({"length": 2000}, "the text to evaluate on has"),
        ({"shape": Shape(320, 2, 64, 5)}, "does not make 5 heads"),
        ({"lr": 1e30}, "the loss is (nan|inf) at step"),
    ],
)
def test_bad_input(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(EdgeStreamError, match=message) as error:
        train(tmp_path / "out", **changes)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_nan_later_keeps_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest, calls = loop.loss, []

    def broken(*args: Any, **flags: Any) -> Any:
        calls.append(1)
        value = honest(*args, **flags)
        return value * float("nan") if not flags and len(calls) > 15 else value

    monkeypatch.setattr(loop, "loss", broken)
    with pytest.raises(EdgeStreamError, match="the loss is nan at step"):
        train(tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out.checkpoint"]


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"shape": Shape(320, 3, 64, 2)}, "model"), ({"lr": 1e-3}, "lr"), ({"sink": "token"}, "sink")],
)
def test_a_checkpoint_of_another_run(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(RuntimeError):
        train(tmp_path / "out", show=_stop(8))
    stored = (tmp_path / "out.checkpoint").read_bytes()
    with pytest.raises(EdgeStreamError, match=f"of a run with another {named}"):
        train(tmp_path / "out", **changes)
    assert (tmp_path / "out.checkpoint").read_bytes() == stored
    (tmp_path / "out.checkpoint").write_bytes(stored[:100])
    with pytest.raises(EdgeStreamError, match="cannot be read as a checkpoint"):
        train(tmp_path / "out")


def _stop(at: int) -> Callable[[int, float], None]:
    def show(step: int, _loss: float) -> None:
        if step == at:
            raise RuntimeError

    return show


@pytest.fixture
def small_disk() -> Iterator[None]:
    """Files of at most 50 kB, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.usefixtures("small_disk")
def test_full_disk(tmp_path: Path) -> None:
    with pytest.raises(EdgeStreamError, match=r"cannot write .*File too large") as error:
        train(tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_full_disk_at_the_end(tmp_path: Path) -> None:
    """The folder cannot be written: there is none, and the checkpoint of the last step is still there."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def show(step: int, _loss: float) -> None:
        if step == 24:
            resource.setrlimit(resource.RLIMIT_FSIZE, (700_000, limit[1]))

    try:
        with pytest.raises(EdgeStreamError, match="cannot write"):
            train(tmp_path / "out", show=show, shape=Shape(320, 4, 128, 2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert [p.name for p in tmp_path.iterdir()] == ["out.checkpoint"]
