"""Vocabularies of published models, which llama.cpp's source carries with texts and the tokens expected of them."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from tokenizers import Tokenizer

from edge_stream.converters.gguf_source import GgufSource

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
