"""Names of pre-tokenizers (tokenizer.ggml.pre): all that llama.cpp treats alike are one to the converters."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

import gguf
import pytest
import tiny_checkpoints as tiny
from awkward_strings import awkward_strings
from tokenizers import Tokenizer

from edge_stream.backends import loading
from edge_stream.converters import to_gguf, vocab_bpe
from edge_stream.converters.gguf_source import GgufSource
from edge_stream.models.conversion import open_source
from edge_stream.native.callbacks import Callbacks
from edge_stream.vocabulary import Vocabulary

SOURCE = Path(__file__).parents[1] / "build" / "llama.cpp" / "llama.cpp" / "src" / "llama-vocab.cpp"
# a tiny checkpoint with each kind of tokenizer
CHECKPOINTS = {"llama-bpe": "llama3", "qwen2": "qwen2", "smollm": "smollm", "gpt-4o": "phi4-mini"}


def names_alike() -> list[set[str]]:
    """The names that llama-vocab.cpp gives the same expressions and flags."""
    text = SOURCE.read_text(encoding="utf-8")
    start = text.index("switch (vocab.get_pre_type())")
    cases = re.findall(
        r"((?:\s+case LLAMA_VOCAB_PRE_TYPE_\w+:)+)(.*?)break;", text[start : text.index("default:", start)], re.DOTALL
    )
    rules = {}
    for types, body in cases:
        code = re.sub(r"^\s*//.*$", "", body, flags=re.MULTILINE)
        for name in re.findall(r"LLAMA_VOCAB_PRE_TYPE_\w+", types):
            rules[name] = " ".join(code.split())
    alike: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for branch in re.split(r"\} else if \(", text[text.index('tokenizer_pre == "default"') :]):
        names = re.findall(r'tokenizer_pre == "([^"]+)"', branch)
        kind = re.search(r"pre_type = (LLAMA_VOCAB_PRE_TYPE_\w+);", branch)
        if names and kind and kind[1] in rules:
            body = branch[branch.index("{") : branch.find("}", branch.index("{"))]
            flags = re.findall(r"(ignore_merges|add_bos|add_sep|special_bos_id) = \w+", body)
            alike[(rules[kind[1]], *sorted(flags))] |= set(names)
    return list(alike.values())


def test_the_table_is_llama_cpps() -> None:
    if not SOURCE.exists():
        pytest.skip("llama.cpp's source is not at hand (make build unpacks it)")
    groups = names_alike()
    assert sum(map(len, groups)) > 80
    for name in sorted(set(vocab_bpe._NAMES.values())):
        (group,) = (group for group in groups if name in group)
        assert {name, *vocab_bpe._ALIASES.get(name, ())} == group
    assert set(vocab_bpe._ALIASES) <= set(vocab_bpe._NAMES.values())


@pytest.fixture(scope="module", params=CHECKPOINTS)
def original(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("pre")
    source = open_source(str(tiny.write_tiny(folder / "hf", CHECKPOINTS[request.param])))
    to_gguf.convert(source, folder / "m.gguf", to_gguf.GgufOptions(), lambda _line: None)
    return request.param, folder / "m.gguf"


def renamed(source: Path, out: Path, pre: str) -> Path:
    """A copy of a model under another name of its pre-tokenizer, which does not say whether text begins with BOS."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(out, str(reader.fields["general.architecture"].contents()))
    for key, field in reader.fields.items():
        if key.startswith(("GGUF.", "general.architecture", "tokenizer.ggml.add_bos")):
            continue
        value = pre if key == "tokenizer.ggml.pre" else field.contents()
        writer.add_key_value(key, value, field.types[0], sub_type=field.types[-1] if len(field.types) > 1 else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def test_every_name_gives_the_same_tokens(original: tuple[str, Path], tmp_path: Path) -> None:
    """llama.cpp's tokens under each name; the rebuilt tokenizer.json (for MLC) gives the ones of the first name."""
    name, path = original
    texts = [text for text in awkward_strings(60) if "<|" not in text]
    llama = loading.start(False)
    params = llama.llama_model_default_params()
    params.vocab_only = True
    want: tuple[list[list[int]], bool] | None = None
    files = set()
    for pre in (name, *vocab_bpe._ALIASES.get(name, ())):
        copy = renamed(path, tmp_path / "m.gguf", pre)
        model = loading.load_model(copy, params, Callbacks())
        assert model, pre
        vocabulary = Vocabulary(model)
        got = [vocabulary.tokenize(text) for text in texts], vocabulary.add_bos
        llama.llama_model_free(model)
        want = want or got
        assert got == want, pre
        source = GgufSource(copy)
        assert source.vocab().add_bos == got[1], pre
        files.add(source.tokenizer_files["tokenizer.json"])
    (content,) = files
    assert isinstance(content, bytes) and want is not None
    tokenizer = Tokenizer.from_str(content.decode())
    same = [
        tokenizer.encode(text, add_special_tokens=False).ids == ids for text, ids in zip(texts, want[0], strict=True)
    ]
    assert same.count(False) <= 4  # what the conversion's notes are about
