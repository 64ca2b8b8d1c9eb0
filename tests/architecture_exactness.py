"""The proof that edge-stream streams an architecture exactly: a tiny random model of it, beside raw_llama's oracle.

Some metadata makes llama.cpp abort, so `run` examines each model in a process of its own:

    python tests/architecture_exactness.py FOLDER NAME

makes the model and prints a Result as a line of JSON.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from architecture_metadata import FIXTURES
from raw_llama import N_CTX, N_KEEP, Array, Llama, NoFixtureError, Raw
from tiny_architectures import draw, make

from edge_stream import EdgeStreamError, Engine, UnsupportedModelError

N_TOKENS = 4 * N_CTX  # three cache lengths past the end
REBASE_AT = N_CTX + 20  # every 24 slides or so
TOLERANCE = 1e-3
NOISE_FACTOR = 10.0
MAX_NOISE = 0.1  # more, and the weights are unfit for a comparison
TIMEOUT = 300.0


def engine_logits(path: Path, tokens: Sequence[int], rebase_at: int = 0) -> tuple[Array, int]:
    """The logits of every token from edge-stream, as Raw.stream has them, and the number of rebases."""
    with (
        Engine.load(
            path,
            n_ctx=N_CTX,
            n_keep=N_KEEP,
            cache_type_k="f32",
            cache_type_v="f32",
            flash_attn="off",
            n_threads=1,
            n_slide=1,
            sink_move="bank",
            rebase_at=rebase_at,
        ) as engine,
        engine.stream() as stream,
    ):
        logits = np.concatenate([stream.logits_of([token]) for token in tokens])
        return logits, stream.stats.n_rebases


EXACT, REFUSED, WRONG, CRASHED, NO_FIXTURE = "exact", "refused", "wrong", "crashed", "no fixture"


@dataclass
class Result:
    """What came of a model. Errors: largest absolute difference of a logit from the oracle's; None: not measured."""

    name: str
    arch: str
    status: str
    memory: str = ""
    plain: float | None = None
    rebased: float | None = None
    n_rebases: int = 0
    noise: float | None = None  # one by one against batches of 16, before any slide
    effect: float | None = None  # what leaving the sinks where they were, or dropping them, changes in the oracle
    reason: str = ""

    @property
    def allowed(self) -> float:
        """Exact means: no further from the oracle than this."""
        return max(TOLERANCE, NOISE_FACTOR * (self.noise or 0.0))


def arch_of(name: str) -> str:
    return FIXTURES[name].arch if name in FIXTURES else name


def difference(a: Array, b: Array) -> float:
    """Infinite if either is not a number."""
    # Chameleon's graph masks image tokens with -FLT_MAX, in the first row of a batch only
    shown = ~((np.abs(a) >= 1e30) | (np.abs(b) >= 1e30))
    largest = float(np.abs(a - b)[shown].max())
    return largest if np.isfinite(largest) else float("inf")


def examine(name: str, path: Path) -> Result:
    """Compare edge-stream with the oracle over the model in `path`."""
    result = Result(name, arch_of(name), WRONG)
    llama = Llama()
    raw = Raw(llama, path, N_CTX + 2 * N_KEEP)
    result.memory = raw.kind
    tokens = draw(N_TOKENS)
    try:
        plain, _ = engine_logits(path, tokens)
        rebased, result.n_rebases = engine_logits(path, tokens, REBASE_AT)
    except UnsupportedModelError as error:
        raw.close()
        result.status, result.reason = REFUSED, re.sub(r"^.*? cannot stream: ", "", str(error))
        return result
    except EdgeStreamError as error:
        raw.close()
        result.reason = str(error)
        return result
    llama.quiet()
    oracle = raw.stream(tokens)
    raw.clear()
    batches = [raw.decode(tokens[i : i + 16], i) for i in range(0, N_CTX, 16)]
    result.noise = difference(oracle[:N_CTX], np.concatenate(batches))
    result.effect = 0.0
    for sinks in ("leave", "drop") if raw.kind != "state" else ():
        raw.clear()
        result.effect = max(result.effect, difference(oracle, raw.stream(tokens, sinks)))
    raw.close()
    result.plain, result.rebased = difference(plain, oracle), difference(rebased, oracle)
    if result.noise > MAX_NOISE:
        result.reason = f"its own float noise is {result.noise:.0e}, which hides everything"
    elif max(result.plain, result.rebased) <= result.allowed:
        result.status = EXACT
    else:
        result.reason = f"differs from the oracle by more than {result.allowed:.0e}"
    return result


def run(name: str, folder: Path) -> Result:
    """Make and examine a model, in a process of its own for each candidate that llama.cpp aborts over."""
    result = Result(name, arch_of(name), NO_FIXTURE)
    environment = os.environ | {"GGML_NO_BACKTRACE": "1"}
    first = 0
    while True:
        command = [sys.executable, str(Path(__file__).resolve()), str(folder), name, str(first)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, env=environment)
        except subprocess.TimeoutExpired:
            return replace(result, status=CRASHED, reason=f"no answer within {TIMEOUT:.0f} s")
        finally:
            (folder / f"{name}.gguf").unlink(missing_ok=True)
        lines = done.stdout.splitlines()
        if done.returncode == 0:
            answer = Result(**json.loads(lines[-1]))
            return answer if len(lines) > 1 else result  # no candidate was left: the last one's abort is the reason
        aborted = re.findall(r"[^/\s]+:\d+: GGML_.*", done.stderr)
        reason = [*aborted, *done.stderr.strip().splitlines()[-1:], f"ended with status {done.returncode}"][0]
        tried = [int(line.split()[1]) for line in lines if line.startswith("candidate")]
        if "made" in lines or not tried:
            return replace(result, status=CRASHED, reason=reason)
        result, first = replace(result, reason=reason), tried[-1] + 1


def main() -> None:
    folder, name, first = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 0
    try:
        path = make(folder / f"{name}.gguf", name, first=first)
        print("made", flush=True)
        result = examine(name, path)
    except NoFixtureError as error:
        result = Result(name, arch_of(name), NO_FIXTURE, reason=str(error))
    print(json.dumps(asdict(result)))


if __name__ == "__main__":
    main()
