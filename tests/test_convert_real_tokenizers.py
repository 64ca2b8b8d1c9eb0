"""Tokenizers of published models: vocabularies that llama.cpp's source carries, with texts and the tokens expected of
them, and Mistral's own files, which are in the package mistral-common."""

from __future__ import annotations

import base64
import importlib.util
import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny_checkpoints as tiny
from awkward_strings import awkward_strings, marked, mixed_case
from tokenizers import Tokenizer

from edge_stream import Engine
from edge_stream.converters import to_gguf
from edge_stream.converters.gguf_source import GgufSource
from edge_stream.models.conversion import open_source

FOLDER = Path(__file__).parents[1] / "build" / "llama.cpp" / "llama.cpp" / "models"
NAMES = ["llama-spm", "phi-3", "gpt-2", "qwen2"]  # a reader of larger vocabularies takes its time


def model_with(vocabulary: Path, path: Path) -> Path:
    """A llama model of one tiny layer with the tokenizer of a GGUF file that has no tensors."""
    fields = {k: f for k, f in gguf.GGUFReader(vocabulary).fields.items() if k.startswith("tokenizer.")}
    n_vocab = len(fields["tokenizer.ggml.tokens"].data)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(32)
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(32)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(n_vocab)
    for name, field in fields.items():
        sub_type = field.types[-1] if len(field.types) > 1 else None
        writer.add_key_value(name, field.contents(), field.types[0], sub_type=sub_type)
    one, square = np.ones(32, np.float32), np.zeros((32, 32), np.float32)
    writer.add_tensor("token_embd.weight", np.zeros((n_vocab, 32), np.float16))
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        writer.add_tensor(f"blk.0.{name}.weight", square)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", one)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("name", NAMES)
def test_rebuilt_tokenizer_gives_the_published_tokens(name: str, tmp_path: Path) -> None:
    """GGUF -> tokenizer.json -> the `tokenizers` library, against the tokens that the model's own tokenizer gave."""
    if not FOLDER.is_dir():
        pytest.skip("llama.cpp's source is not at hand (make build unpacks it)")
    source = GgufSource(model_with(FOLDER / f"ggml-vocab-{name}.gguf", tmp_path / "model.gguf"))
    try:
        content = source.tokenizer_files["tokenizer.json"]
    finally:
        source.close()
    assert isinstance(content, bytes)
    tokenizer = Tokenizer.from_str(content.decode("utf-8", errors="surrogatepass"))
    texts = (FOLDER / f"ggml-vocab-{name}.gguf.inp").read_bytes().decode("utf-8").split("\n__ggml_vocab_test__\n")[:-1]
    expected = (FOLDER / f"ggml-vocab-{name}.gguf.out").read_text(encoding="utf-8").splitlines()
    assert len(texts) == len(expected) > 30
    wrong = {}
    for text, line in zip(texts, expected, strict=True):
        got = tokenizer.encode(text, add_special_tokens=False).ids
        if got != [int(word) for word in line.split()]:
            wrong[text] = (tokenizer.decode(got), line, got)
    assert not wrong


def mistrals(name: str) -> Path:
    """A file of mistral-common, which is not imported: it needs much that is not at hand."""
    found = importlib.util.find_spec("mistral_common")
    if found is None or found.origin is None:
        pytest.skip("mistral-common is not installed: pip install --no-deps mistral-common")
    return Path(found.origin).with_name("data") / name


def tokens_of(folder: Path, file: Path, name: str, n_vocab: int, texts: list[str]) -> list[list[int]]:
    """llama.cpp's tokens, after the conversion of a tiny model with a tokenizer's file."""
    config = tiny.config_of("mistral-nemo") | {"vocab_size": n_vocab, "hidden_size": 32, "head_dim": 32}
    (folder / "hf").mkdir()
    (folder / "hf" / "config.json").write_text(json.dumps(config))
    tiny.save_tensors(folder / "hf" / "model.safetensors", dict(tiny.random_tensors(config)), "BF16")
    shutil.copy(file, folder / "hf" / name)
    source = open_source(str(folder / "hf"))
    to_gguf.convert(source, folder / "model.gguf", to_gguf.GgufOptions(outtype="bf16"), lambda _line: None)
    source.close()
    with Engine.load(folder / "model.gguf", n_ctx=64, proof=False) as engine:
        return [list(engine.tokenize(text)) for text in texts]


@pytest.mark.parametrize("name", ["tekken_240718.json", "tekken_240911.json"])
def test_mistrals_tekken(name: str, tmp_path: Path) -> None:
    """Of Nemo, and of Ministral, Small 3 and later. What llama.cpp cannot split is known: a note says so."""
    tiktoken = pytest.importorskip("tiktoken")
    content = json.loads(mistrals(name).read_text(encoding="utf-8"))
    config = content["config"]
    n_vocab, n_special = config["default_vocab_size"], config["default_num_special_tokens"]
    words = content["vocab"][: n_vocab - n_special]
    ranks = {base64.b64decode(word["token_bytes"]): word["rank"] for word in words}
    original = tiktoken.Encoding(name, pat_str=config["pattern"], mergeable_ranks=ranks, special_tokens={})
    texts = [text for text in awkward_strings(200) if not mixed_case(text) and not marked(text)]
    assert len(texts) > 100
    got = tokens_of(tmp_path, mistrals(name), "tekken.json", n_vocab, texts)
    want = [[token + n_special for token in original.encode_ordinary(text)] for text in texts]
    assert {text: (g, w) for text, g, w in zip(texts, got, want, strict=True) if g != w} == {}


@pytest.mark.parametrize(
    "name",
    ["tokenizer.model.v1", "mistral_instruct_tokenizer_240216.model.v2", "mistral_instruct_tokenizer_240323.model.v3"],
)
def test_mistrals_sentencepiece(name: str, tmp_path: Path) -> None:
    """Of Mistral 7B 0.1 to 0.3 and Mixtral."""
    sentencepiece = pytest.importorskip("sentencepiece")
    original = sentencepiece.SentencePieceProcessor(model_file=str(mistrals(name)))
    texts = awkward_strings(200)
    got = tokens_of(tmp_path, mistrals(name), "tokenizer.model", original.vocab_size(), texts)
    want = [original.encode(text) for text in texts]
    assert {text: (g, w) for text, g, w in zip(texts, got, want, strict=True) if g != w} == {}
