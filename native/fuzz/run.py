"""Run a native fuzzer: run.py TARGET -n 100000 --minutes 60 (at least). Resumes: earlier runs count, in slices of time.

The programs are built by `make build/fuzz/.stamp` (clang, libFuzzer, address and undefined-behaviour sanitizers). A
crash, 10 s of CPU time for one input, or more than 2 GiB of memory end the run; the input is left in build/endurance.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from edge_stream.output.files import replace_text

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "fuzz"
SLICE = 600  # seconds of one process; what a killed one had read is not counted
LONGEST = {"gguf": 300_000, "session": 60_000, "log": 4096}  # bytes of an input; the others are texts


def seeds(target: str, program: Path) -> Path:
    """A folder of first inputs."""
    folder = BUILD / "seeds" / target
    if not folder.exists():
        if target == "gguf":
            subprocess.run([sys.executable, HERE / "make_seeds.py", folder], check=True)
        else:
            subprocess.run([program], env={**os.environ, "ES_FUZZ_SEEDS": str(folder)}, check=True)
    return folder


def run(target: str, program: Path, state: Path, seconds: float, n: int | None) -> tuple[int, dict[str, int]]:
    """One process, for so many seconds or new inputs. Returns how many it made, without its files, and figures.

    Raises SystemExit with the last of its output.
    """
    corpus = BUILD / "corpus" / target
    corpus.mkdir(parents=True, exist_ok=True)
    kept = HERE / "corpus" / target  # inputs that were faults
    folders = [folder for folder in (corpus, kept, seeds(target, program)) if folder.exists()]
    n_files = sum(len(list(folder.iterdir())) for folder in folders)
    command = [
        str(program), *map(str, folders), f"-max_total_time={max(1, round(seconds))}",
        f"-runs={-1 if n is None else n_files + n}", f"-max_len={LONGEST.get(target, 4096)}",
        "-rss_limit_mb=2048", "-timeout=3600", "-print_final_stats=1", "-verbosity=0",
        f"-artifact_prefix={state}/{target}-",
    ]  # fmt: skip
    leaks = int(target != "rpc")  # ggml keeps the devices of every server that was named
    options = f"allocator_may_return_null=1:detect_leaks={leaks}:quarantine_size_mb=64"
    done = subprocess.run(
        command, env={**os.environ, "ASAN_OPTIONS": options}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    text = done.stderr.decode(errors="replace")
    stats = dict(re.findall(r"stat::(\w+):\s+(\d+)", text))
    inputs = max(0, int(stats.get("number_of_executed_units", 0)) - n_files)
    if done.returncode:
        print("\n".join(text.splitlines()[-80:]), file=sys.stderr)
        raise SystemExit(f"fuzz_{target} ended with {done.returncode} after {inputs} inputs")
    return inputs, {
        "corpus": len(list(corpus.iterdir())),
        "peak_mib": int(stats.get("peak_rss_mb", 0)),
        "slowest_s": int(stats.get("slowest_unit_time_sec", 0)),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("-n", type=int, default=100_000, help="inputs in all, those of earlier runs among them")
    parser.add_argument("--minutes", type=float, default=60, help="at least, in all")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop this run after")
    parser.add_argument(
        "--slice", type=float, default=SLICE, help="seconds of one process; each reads the corpus first"
    )
    args = parser.parse_args()
    program = BUILD / "native" / "fuzz" / f"fuzz_{args.target}"
    state = ROOT / "build" / "endurance"
    path = state / f"fuzz-native-{args.target}.json"
    state.mkdir(parents=True, exist_ok=True)
    known = json.loads(path.read_text()) if path.exists() else {"inputs": 0, "seconds": 0}
    begun = time.monotonic()
    while True:
        inputs_left, left = args.n - known["inputs"], 60 * args.minutes - known["seconds"]
        this_run = args.seconds - (time.monotonic() - begun)
        if (inputs_left <= 0 and left <= 0) or this_run < 1:
            break
        seconds = min(args.slice, this_run, left if inputs_left <= 0 else args.slice)
        slice_begun = time.monotonic()
        # after the time that it must have at least, the number ends it
        inputs, found = run(args.target, program, state, seconds, inputs_left if left <= 0 else None)
        known = {
            "inputs": known["inputs"] + inputs,
            "seconds": known["seconds"] + round(time.monotonic() - slice_begun),
            **{name: max(value, known.get(name, 0)) for name, value in found.items()},
        }
        replace_text(path, json.dumps(known))
    print(args.target, json.dumps(known))


if __name__ == "__main__":
    main()
