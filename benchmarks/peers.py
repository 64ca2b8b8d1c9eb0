"""edge-stream beside other engines on this machine: `make peers`, or python benchmarks/peers.py [--rounds N] [-n N].

Each peer gets an environment of its own in build/peers, with the versions below from PyPI, and the demo model in its
own format: Q4_0 of our quantiser for those that read GGUF files, else converted from f16. One that cannot be set up is
named with the reason. Then they are measured in turns, each in a process of its own (peer_worker.py):

prefill: a text of 1,000 random tokens. decode: the tokens after it, given one by one; edge-stream's stream is full
(n_ctx 1024) and slides with each, the others hold 1,000 tokens and what follows. peak: the largest resident memory of
the process. first token: from the start of a process to the first token of a short prompt's answer, taken last, engine
after engine, when no other's process is left.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
import venv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_stream.backends.loading import default_threads
from edge_stream.hardware.processor import cpu_flags
from edge_stream.measure.table import markdown, rounded

ROOT = Path(__file__).resolve().parents[1]
HOME = ROOT / "build" / "peers"
WORKER = Path(__file__).with_name("peer_worker.py")
N_PROMPT, PROMPT = 1000, "Once upon a time there was"
F16, Q4_0 = HOME / "models" / "demo-f16.gguf", HOME / "models" / "demo-q4_0.gguf"
STOCK = HOME / "llama.cpp"  # the pinned source, without our patches, and its build
# what tells one processor's speed from another's
INSTRUCTIONS = (
    "avx2 fma f16c avx_vnni avx512f avx512bw avx512_vnni avx512_bf16 avx512_fp16 amx_int8 asimd dotprod i8mm sve"
)

# transformers reads a GGUF file's weights as float32, and refuses to save them as long as it calls them quantised
_TO_HUGGING_FACE = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, file, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype="float32")
model.hf_quantizer, model.is_quantized = None, False
del model.config.quantization_config
model.save_pretrained(out)
AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(out)
"""


_ORIGIN = "-DCMAKE_BUILD_RPATH_USE_ORIGIN=ON"  # the folder can be moved


class Missing(Exception):
    """A peer that cannot be set up; the text says why."""


@dataclass
class Peer:
    """name: in the table. engine: peer_worker's. prepare: returns (python, model). first: a command that ends with the
    first token, if there is a better one than the worker."""

    name: str
    engine: str
    prepare: Callable[[], tuple[Path, Path]]
    env: dict[str, str]
    first: list[str] | None = None


def run(*words: str | Path, env: dict[str, str] | None = None) -> None:
    """A step of setting up. Raises Missing with its last words."""
    print("$", *words, file=sys.stderr)
    done = subprocess.run([str(w) for w in words], env={**os.environ, **(env or {})}, capture_output=True, text=True)
    if done.returncode != 0:
        lines = (done.stderr.strip() or done.stdout.strip() or f"status {done.returncode}").splitlines()
        raise Missing(f"`{Path(words[0]).name} {' '.join(map(str, words[1:4]))} ...` failed: {lines[-1]}")


def environment(name: str, *packages: str | Path, env: dict[str, str] | None = None) -> Path:
    """The Python of an environment that has these packages (the last one is there when all are)."""
    folder = HOME / name / "venv"
    python = folder / "bin" / "python"
    wanted = " ".join(map(str, packages))
    mark = folder / "packages"
    if not mark.exists() or mark.read_text() != wanted:
        venv.create(folder, with_pip=True, clear=True)
        run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages, env=env)
        mark.write_text(wanted)
    return python


def ours(*words: str | Path) -> list[str]:
    return [sys.executable, "-m", "edge_stream.cli", *map(str, words)]


def models() -> None:
    """The demo model as f16 and as Q4_0."""
    for path, flag in ((F16, ("--outtype", "f16")), (Q4_0, ("--quantize", "Q4_0"))):
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            run(*ours("convert", "demo", "--to", "gguf", *flag, "-o", path))


def mlc() -> tuple[Path, Path]:
    folder = HOME / "models" / "demo-mlc"
    if not folder.exists():
        run(*ours("convert", "demo", "--to", "mlc", "--quantization", "q4f16_1", "-o", folder))
    return Path(sys.executable), folder


def stock() -> tuple[Path, Path]:
    """The pinned source built as it is, with llama-completion, and llama-cpp-python's bindings of it."""
    archive = next((ROOT / "build" / "llama.cpp").glob("llama_cpp_python-*.tar.gz"))
    if not (STOCK / "build" / "bin" / "llama-completion").exists():
        STOCK.mkdir(parents=True, exist_ok=True)
        run("tar", "-xzf", archive, "-C", STOCK, "--strip-components=1")
        off = [f"-DLLAMA_{what}=OFF" for what in ("CURL", "BUILD_TESTS", "BUILD_EXAMPLES", "BUILD_SERVER")]
        source, build = STOCK / "vendor" / "llama.cpp", STOCK / "build"
        run("cmake", "-S", source, "-B", build, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release", _ORIGIN, *off)
        run("cmake", "--build", build, "--target", "llama-completion")
    return environment("stock", archive, env={"CMAKE_ARGS": "-DLLAMA_BUILD=OFF"}), Q4_0


def onnx() -> tuple[Path, Path]:
    """onnxruntime-genai; its model builder has an environment of its own, with torch."""
    package = "onnxruntime-genai==0.18.0"
    folder, checkpoint = HOME / "models" / "demo-onnx", HOME / "models" / "demo-hf"
    if not (folder / "genai_config.json").exists():
        builder = ("torch", "transformers", "onnx", "onnx-ir", "gguf", "accelerate", "sentencepiece")
        python = environment("onnx-builder", package, *builder)
        run(python, "-c", _TO_HUGGING_FACE, F16.parent, F16.name, checkpoint)
        words = ("-m", "onnxruntime_genai.models.builder", "-m", checkpoint, "-o", folder, "-p", "int4", "-e", "cpu")
        extra = ("--extra_options", "int4_block_size=32", "int4_accuracy_level=4", "hf_token=false")
        run(python, *words, "-c", HOME / "onnx-builder" / "cache", *extra)
    return environment("onnx", package), folder


def gguf(name: str, package: str) -> Callable[[], tuple[Path, Path]]:
    return lambda: (environment(name, package), Q4_0)


def cli(model: Path | str) -> list[str]:
    return ours("run", "-m", model, "-p", PROMPT, "-n", "1", "--temp", "0", "--ignore-eos")


_COMPLETION = ["-m", str(Q4_0), "-p", PROMPT, "-n", "1", "--temp", "0", "-no-cnv", "--no-display-prompt"]
PEERS = [
    Peer("edge-stream, Q4_0", "edge_stream", lambda: (Path(sys.executable), Q4_0), {}, cli(Q4_0)),
    Peer("edge-stream, MLC q4f16_1", "edge_stream", mlc, {}, cli(HOME / "models" / "demo-mlc")),
    Peer(
        "stock llama.cpp, Q4_0",
        "llama_cpp",
        stock,
        {name: str(STOCK / "build" / "bin") for name in ("LLAMA_CPP_LIB_PATH", "LD_LIBRARY_PATH")},
        [str(STOCK / "build" / "bin" / "llama-completion"), *_COMPLETION],
    ),
    Peer("ik_llama.cpp, Q4_0", "ik_llama", gguf("ik_llama", "ik_llama-cpp-python==0.1.5"), {}),
    Peer("OpenVINO GenAI, Q4_0", "openvino", gguf("openvino", "openvino-genai==2026.4.1.0"), {}),
    Peer("onnxruntime-genai, int4", "onnxruntime", onnx, {}),
]


class Worker:
    """A process of peer_worker.py. Raises Missing if it ends early."""

    def __init__(self, peer: Peer, python: Path, model: Path, threads: int) -> None:
        self.name = peer.name
        self.command = [str(python), str(WORKER), peer.engine, str(model), str(threads)]
        self.env = {**os.environ, **peer.env}
        self.env.pop("PYTHONDONTWRITEBYTECODE", None)  # what pip has compiled for the others is kept of ours too
        self.first_command = peer.first or [*self.command, "first"]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            [*self.command, "serve"], stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, env=self.env, text=True
        )
        self.version: str = self._receive()
        self.rounds: list[dict[str, float]] = []

    def _receive(self) -> Any:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("answer "):
                return json.loads(line.removeprefix("answer "))
        command = " ".join(self.command).replace(f"{ROOT}/", "")
        raise Missing(f"its process ended with status {self._process.wait()}: {command} serve")

    def text(self, n_prompt: int, n: int, seed: int) -> tuple[float, float, float]:
        """Seconds of reading and of writing, and the peak in MiB."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([n_prompt, n, seed]) + "\n")
        self._process.stdin.flush()
        read, written, peak = self._receive()
        return read, written, peak

    def first(self) -> float:
        """Milliseconds from the start of a process to its first byte of output."""
        start = time.perf_counter()
        with subprocess.Popen(
            self.first_command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=self.env,
        ) as process:
            assert process.stdout is not None
            got = process.stdout.read(1)
            elapsed = (time.perf_counter() - start) * 1e3
            process.stdout.read()
        if not got or process.returncode != 0:
            raise Missing(f"{self.first_command[0]} wrote nothing (status {process.returncode})")
        return elapsed

    def measure(self, n: int, seed: int) -> None:
        """One turn."""
        read, written, peak = self.text(N_PROMPT, n, seed)
        self.rounds.append({"decode tok/s": n / written, "prefill tok/s": N_PROMPT / read, "peak MiB": peak})
        print(self.name, {key: round(value, 1) for key, value in self.rounds[-1].items()}, file=sys.stderr)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def row(worker: Worker, base: Worker) -> dict[str, Any]:
    """Medians, and those of the rounds' ratios to the first engine."""

    def median(key: str) -> float:
        return statistics.median(turn[key] for turn in worker.rounds)

    def ratio(key: str) -> float:
        return statistics.median(a[key] / b[key] for a, b in zip(base.rounds, worker.rounds, strict=True))

    return {
        "engine": worker.name,
        "version": worker.version,
        **{key: rounded(median(key), 1) if key == "decode tok/s" else round(median(key)) for key in worker.rounds[0]},
        "ours / it, decode": rounded(ratio("decode tok/s"), 2),
        "ours / it, prefill": rounded(ratio("prefill tok/s"), 2),
    }


def instructions() -> str:
    """Those of INSTRUCTIONS that this processor has."""
    flags = set(cpu_flags())
    return " ".join(name for name in INSTRUCTIONS.split() if name in flags)


def main() -> None:
    """Set up, measure, and print the section's tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("-n", type=int, default=64, help="tokens to write")
    parser.add_argument("-t", "--threads", type=int, default=default_threads())
    args = parser.parse_args()
    models()
    workers: list[Worker] = []
    missing: list[str] = []
    for peer in PEERS:
        try:
            worker = Worker(peer, *peer.prepare(), args.threads)
            worker.text(32, 4, 0)  # what is compiled at first use
            worker.first()
            workers.append(worker)
        except Missing as error:
            missing.append(f"- {peer.name} is missing: {error}")
            print(missing[-1], file=sys.stderr)
    loads = [os.getloadavg()[0]]
    for i in range(args.rounds):
        for worker in workers[i % len(workers) :] + workers[: i % len(workers)]:
            worker.measure(args.n, i + 1)
        loads.append(os.getloadavg()[0])
    for worker in workers:
        worker.close()
    for worker in workers:  # not in turns: a virtual machine gets the memory back slowly that another engine gave up
        for i in range(args.rounds):
            worker.rounds[i]["first token ms"] = worker.first()
    # one measured process at a time keeps it at the number of threads; what is above comes from others
    busy = f"load average {min(loads):.1f} to {max(loads):.1f}"
    print(f"{args.threads} threads; instruction sets: {instructions()}; {busy}.\n")
    rows = [row(worker, workers[0]) for worker in workers]
    print(markdown(rows, list(rows[0])))
    print("\n".join(["", *missing]) if missing else "")


if __name__ == "__main__":
    if shutil.which("cmake") is None:
        os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    main()
