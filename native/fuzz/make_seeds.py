"""make_seeds.py FOLDER: the headers of tiny GGUF files of many architectures, the first inputs of fuzz_gguf."""

import sys
import tempfile
from pathlib import Path

import gguf

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

import tiny_models
from architecture_metadata import FIXTURES
from tiny_architectures import make

folder = Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)
with tempfile.TemporaryDirectory() as temporary:
    for name in ("tiny", "bert", "gpt2", *FIXTURES):
        path = Path(temporary) / "model.gguf"
        if name == "tiny":
            tiny_models.write_tiny_llama(path, n_layer=1, head_dim=16, chat_template="{{ messages[0].content }}")
        elif name in ("bert", "gpt2"):
            getattr(tiny_models, f"write_tiny_{name}")(path)
        else:
            make(path, name)
        header = gguf.GGUFReader(path).data_offset
        (folder / name).write_bytes(path.read_bytes()[:header])
