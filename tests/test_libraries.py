"""llama-cpp-python's bindings are imported alone, and are those that everybody else in the process sees."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from edge_stream.native import libraries

_SAME = """
import llama_cpp.llama_cpp as bindings
from llama_cpp import Llama, llama_cpp as again, llama_model_default_params
assert bindings is again is llama_cpp.llama_cpp is libraries.llama()
assert llama_model_default_params is bindings.llama_model_default_params
assert isinstance(Llama, type) and llama_cpp.__version__
params = llama_cpp.llama_model_default_params()
assert type(params) is bindings.llama_model_params
everything = {}
exec("from llama_cpp import *", everything)
assert everything["Llama"] is Llama
try:
    llama_cpp.nonsense
    raise SystemExit("nonsense was found")
except AttributeError as error:
    assert "nonsense" in str(error)
"""
ORDERS = {
    "before": "import llama_cpp\nfrom edge_stream.native import libraries\nlibraries.llama()\n" + _SAME,
    "after": "from edge_stream.native import libraries\nlibraries.llama()\nimport llama_cpp\n" + _SAME,
    "a submodule after": "from edge_stream.native import libraries\nlibraries.llama()\n"
    "from llama_cpp.llama import Llama as first\nimport llama_cpp._ctypes_extensions\n"
    "assert llama_cpp._ctypes_extensions.byref\n" + _SAME + "assert first is Llama\n",
    "in a thread": "import threading\nfrom edge_stream.native import libraries\nlibraries.llama()\nfound = []\n"
    "def look():\n    import llama_cpp\n    found.append(llama_cpp.Llama)\n"
    "threads = [threading.Thread(target=look) for _ in range(8)]\n"
    "[t.start() for t in threads]\n[t.join() for t in threads]\n"
    "import llama_cpp\nassert found == 8 * [llama_cpp.Llama]\n" + _SAME,
}


def _run(code: str) -> str:
    env = {**os.environ, "LLAMA_CPP_LIB_PATH": str(libraries.llama_dir())}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("order", ORDERS)
def test_a_user_of_llama_cpp_sees_the_same_bindings(order: str) -> None:
    _run(ORDERS[order])


def test_the_bindings_alone_are_imported() -> None:
    loaded = _run(
        "import sys\nfrom edge_stream.native import libraries\nlibraries.llama()\nprint(*sys.modules)"
    ).split()
    assert [name for name in loaded if name.startswith("llama_cpp")] == ["llama_cpp.llama_cpp"]
    assert not {"numpy", "jinja2"} & set(loaded)
