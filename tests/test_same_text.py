"""The same prompt, seed and settings give the same text in Python, in C and in Swift."""

from __future__ import annotations

import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from edge_stream import Engine, Sampling
from edge_stream.chat.conversation import Conversation
from edge_stream.models import names
from edge_stream.native import libraries

ROOT = Path(__file__).parent.parent
SYSTEM = "You are a pirate. Ünïcode: 漢字 😀."
SAYS = ("Tell me a story about a dragon 🐉 and a café.", "And then?")
N_CTX, N_TOKENS, SEED, TEMP = 128, 100, 11, 0.7  # beyond the cache with the first answer


@pytest.fixture(scope="module")
def demo() -> Path:
    return names.resolve("demo")


@pytest.fixture(scope="module")
def c_program(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """native/examples/endless_chat.c, compiled against the header and the libraries only."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    lib, program = libraries.lib_dir(), tmp_path_factory.mktemp("c") / "endless_chat"
    linked = [f"-l{name}" for name in ("edge_stream", "llama", "ggml", "ggml-base")]
    source = [str(ROOT / "native/examples/endless_chat.c"), f"-I{ROOT / 'native/include'}"]
    subprocess.run([compiler, *source, f"-L{lib}", f"-Wl,-rpath,{lib}", *linked, "-o", str(program)], check=True)
    return [str(program)]


@pytest.fixture(scope="module")
def swift_program() -> list[str]:
    """edge-chat of EdgeStreamKit."""
    swift = shutil.which("swift")
    if swift is None:
        pytest.skip("the Swift toolchain is not on PATH")
    build = [swift, "build", "--package-path", str(ROOT / "ios_demo/EdgeStreamKit"), "-Xswiftc", "-warnings-as-errors"]
    built = subprocess.run([*build, "--product", "edge-chat"], capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    where = subprocess.run([*build, "--show-bin-path"], capture_output=True, text=True, check=True)
    return [str(Path(where.stdout.strip()) / "edge-chat"), "-m"]


@pytest.fixture(scope="module")
def python_texts(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path, str]:
    """Two answers, a session saved after them, and what comes next."""
    session = tmp_path_factory.mktemp("session") / "python.session"
    with Engine.load(demo, n_ctx=N_CTX, n_threads=2) as engine:
        conversation = Conversation(engine, system=SYSTEM)

        def say(text: str) -> str:
            sampling = Sampling(seed=SEED, temp=TEMP)
            return "".join(t.text for t in conversation.reply(text, sampling=sampling, max_tokens=N_TOKENS))

        texts = [say(text) for text in SAYS]
        assert engine.n_ctx < conversation.stream.stats.n_past
        conversation.save(session)
        return texts, session, say("Go on.")


def test_killed_it_goes_on_identically(
    swift_program: list[str], demo: Path, python_texts: tuple[list[str], Path, str], tmp_path: Path
) -> None:
    session, texts = tmp_path / "swift.session", python_texts[0]
    assert run(swift_program, demo, "-sys", SYSTEM, "--session", str(session), SAYS[0]) == f"{texts[0]}\n"
    saved = session.read_bytes()
    endless = [*swift_program, str(demo), "--ignore-eos", "-t", "2", "--session", str(session), "Write for ever."]
    with subprocess.Popen(endless, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.read(100)
        process.kill()  # while it writes
    assert process.returncode == -signal.SIGKILL
    assert session.read_bytes() == saved
    assert run(swift_program, demo, "--session", str(session), SAYS[1]) == f"{texts[1]}\n"


def run(program: list[str], demo: Path, *words: str) -> str:
    settings = ["-c", str(N_CTX), "-n", str(N_TOKENS), "-s", str(SEED), "--temp", str(TEMP), "-t", "2"]
    done = subprocess.run([*program, str(demo), *settings, *words], capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode(errors="replace")


@pytest.mark.parametrize("language", ["c_program", "swift_program"])
def test_same_text(
    language: str, demo: Path, python_texts: tuple[list[str], Path, str], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    program = request.getfixturevalue(language)
    texts, saved, then = python_texts
    assert run(program, demo, "-sys", SYSTEM, *SAYS) == "".join(f"{text}\n" for text in texts)
    # a session that Python wrote goes on alike
    session = tmp_path / "copy.session"
    shutil.copy(saved, session)
    assert run(program, demo, "--session", str(session), "Go on.") == f"{then}\n"


@pytest.mark.parametrize("language", ["c_program", "swift_program"])
@pytest.mark.parametrize(
    "settings",
    [
        {"dry_multiplier": 0.8, "xtc_probability": 0.5},
        {"mirostat": 1},
        {"mirostat": 2},
        {"adaptive_target": 0.3, "samplers": "top_k;min_p;adaptive_p"},
    ],
    ids=str,
)
def test_same_text_with_every_kind_of_draw(
    language: str, settings: dict[str, Any], demo: Path, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    # two answers, the second after a session was saved and restored, also in the other language: histories and aims go
    # on. Python restores too: a restored cache has its cells in another order, which tips a draw once in a long while
    program, session = request.getfixturevalue(language), tmp_path / "session"
    words = [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    order = {"samplers": settings["samplers"].split(";")} if "samplers" in settings else {}
    answer = {"sampling": Sampling(seed=SEED, temp=TEMP, **(settings | order)), "max_tokens": N_TOKENS}
    with Engine.load(demo, n_ctx=N_CTX, n_threads=2) as engine:
        conversation = Conversation(engine, system=SYSTEM)
        texts = ["".join(t.text for t in conversation.reply(SAYS[0], **answer))]
        conversation.save(tmp_path / "after one")
    with Engine.load(demo, n_ctx=N_CTX, n_threads=2) as engine:
        conversation = Conversation.resume(engine, tmp_path / "after one")
        texts.append("".join(t.text for t in conversation.reply(SAYS[1], **answer)))
    assert run(program, demo, *words, "-sys", SYSTEM, "--session", str(session), SAYS[0]) == f"{texts[0]}\n"
    assert run(program, demo, *words, "--session", str(session), SAYS[1]) == f"{texts[1]}\n"
    assert run(program, demo, *words, "--session", str(tmp_path / "after one"), SAYS[1]) == f"{texts[1]}\n"
