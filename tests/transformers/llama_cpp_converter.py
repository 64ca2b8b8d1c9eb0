"""Runs llama.cpp's converter in a process of its own: python llama_cpp.py PRE_TOKENIZER ARGUMENTS.

It recognises pre-tokenizers by a hash over published vocabularies, so a tiny one's name must be told.
"""

import runpy
import sys
from pathlib import Path

LLAMA_CPP = Path(__file__).resolve().parents[2] / "build" / "llama.cpp" / "llama.cpp"

if __name__ == "__main__":
    sys.path[:0] = [str(LLAMA_CPP), str(LLAMA_CPP / "gguf-py")]
    from conversion.base import TextModel

    pre = sys.argv.pop(1)
    TextModel.get_vocab_base_pre = lambda _self, _tokenizer: pre
    runpy.run_path(str(LLAMA_CPP / "convert_hf_to_gguf.py"), run_name="__main__")
