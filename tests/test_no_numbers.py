"""Models that compute NaN or infinity: an error wherever their numbers are used, never a text of such numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from click.testing import CliRunner
from serving import WORDS, Served, serve
from tiny_models import write_tiny_bert, write_tiny_llama

from edge_stream import EdgeStreamError, Engine, Sampling, UnsupportedModelError
from edge_stream.cli import cli
from edge_stream.converters import verify
from edge_stream.embedder import Embedder
from edge_stream.errors import no_numbers
from edge_stream.generation import Writer
from edge_stream.models.conversion import open_source

SAYS = r"computed no numbers \(NaN or infinity\)"


def damaged(path: Path, tensor: str, value: float) -> Path:
    """All numbers of a tensor of a GGUF file are replaced."""
    reader = gguf.GGUFReader(path, "r+")
    next(t for t in reader.tensors if t.name == tensor).data[...] = value
    reader.data.flush()
    return path


@pytest.mark.parametrize(
    ("tensor", "value"),
    [("output.weight", np.nan), ("blk.0.attn_q.weight", np.nan), ("token_embd.weight", np.inf)],
)
def test_no_token_is_chosen(tensor: str, value: float, tmp_path: Path) -> None:
    path = damaged(write_tiny_llama(tmp_path / "m.gguf", head_dim=16), tensor, value)
    with Engine.load(path, n_ctx=64, proof=False) as engine:
        for sampling in (Sampling(temp=0), Sampling(seed=1), Sampling(seed=1, grammar=WORDS), Sampling(mirostat=2)):
            with engine.stream() as stream:
                stream.feed([10, 11, 12])
                with pytest.raises(EdgeStreamError, match=SAYS):
                    list(stream.generate(5, sampling=sampling))
        with engine.stream() as stream, pytest.raises(EdgeStreamError, match=SAYS):
            stream.score([10, 11, 12])
    with pytest.raises(
        UnsupportedModelError, match=r"cannot stream: this model computes no numbers \(NaN or infinity\)"
    ):
        Engine.load(path, n_ctx=64)


def test_a_perplexity_is_an_error(tmp_path: Path) -> None:
    path = damaged(write_tiny_llama(tmp_path / "m.gguf", head_dim=16), "output.weight", np.nan)
    (tmp_path / "text").write_text("one two three " * 20)
    arguments = ["eval", "ppl", "-m", str(path), "-f", str(tmp_path / "text"), "-c", "64", "--no-proof"]
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 1 and done.stderr.startswith("error: the model computed no numbers")


def test_an_embedding_is_an_error(tmp_path: Path) -> None:
    path = damaged(write_tiny_bert(tmp_path / "bert.gguf"), "token_embd.weight", np.nan)
    with Embedder(path) as embedder, pytest.raises(EdgeStreamError, match="embedding model " + SAYS):
        embedder.embed([5, 6, 7])


def test_nothing_is_verified_with_it(tmp_path: Path) -> None:
    source = open_source(str(write_tiny_llama(tmp_path / "m.gguf", head_dim=16)))
    with pytest.raises(EdgeStreamError, match="converted model " + SAYS):
        verify.compare(source, [5, 6], np.full((2, 320), np.nan))
    source.close()


def test_a_server_answers_500_and_keeps_nothing_of_it(
    tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(served: Served) -> int:
        """Tokens of the question that were in the cache."""
        used = served.client.chat([{"role": "user", "content": "a question of some length"}], max_tokens=2)["usage"]
        return int(used["prompt_tokens_details"]["cached_tokens"])

    def choose(_writer: Writer) -> int:
        raise no_numbers("the model")

    with Engine.load(tiny("chat"), n_ctx=256) as engine, serve(engine) as served:
        for body in ({}, {"grammar": WORDS}):
            with monkeypatch.context() as patch:
                patch.setattr(Writer, "choose", choose)
                messages = [{"role": "user", "content": "a question of some length"}]
                answer = served.client.post("/v1/chat/completions", json={"messages": messages, **body})
            assert answer.status_code == 500 and "computed no numbers" in answer.json()["error"]["message"]
        assert (ask(served), ask(served) > 0) == (0, True)
