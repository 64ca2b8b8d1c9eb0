"""Run a native fuzzer: run.py TARGET -n 100000. Resumes: what earlier runs found to be new is kept, and counts.

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


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("-n", type=int, default=100_000, help="inputs in all, those of earlier runs among them")
    parser.add_argument("--seconds", type=int, default=0, help="stop this run after; 0: no limit")
    args = parser.parse_args()
    program = BUILD / "native" / "fuzz" / f"fuzz_{args.target}"
    state = ROOT / "build" / "endurance"
    corpus, path = BUILD / "corpus" / args.target, state / f"fuzz-native-{args.target}.json"
    corpus.mkdir(parents=True, exist_ok=True)
    state.mkdir(parents=True, exist_ok=True)
    known = json.loads(path.read_text()) if path.exists() else {"inputs": 0, "seconds": 0}
    if known["inputs"] >= args.n:
        print(args.target, json.dumps(known))
        return
    command = [
        str(program), str(corpus), str(seeds(args.target, program)), f"-runs={args.n - known['inputs']}",
        f"-max_total_time={args.seconds}", f"-max_len={LONGEST.get(args.target, 4096)}", "-rss_limit_mb=2048",
        "-timeout=3600", "-print_final_stats=1", "-verbosity=0", f"-artifact_prefix={state}/{args.target}-",
    ]  # fmt: skip
    kept = HERE / "corpus" / args.target  # inputs that were faults
    if kept.exists():
        command.insert(2, str(kept))
    leaks = int(args.target != "rpc")  # ggml keeps the devices of every server that was named
    options = f"allocator_may_return_null=1:detect_leaks={leaks}:quarantine_size_mb=64"
    begun = time.monotonic()
    done = subprocess.run(
        command, env={**os.environ, "ASAN_OPTIONS": options}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    text = done.stderr.decode(errors="replace")
    stats = dict(re.findall(r"stat::(\w+):\s+(\d+)", text))
    inputs = int(stats.get("number_of_executed_units", 0))
    if done.returncode:
        print("\n".join(text.splitlines()[-80:]), file=sys.stderr)
        raise SystemExit(f"fuzz_{args.target} ended with {done.returncode} after {known['inputs'] + inputs} inputs")
    found = {
        "inputs": known["inputs"] + inputs,
        "seconds": known["seconds"] + round(time.monotonic() - begun),
        "corpus": len(list(corpus.iterdir())),
        "peak_mib": int(stats.get("peak_rss_mb", 0)),
        "slowest_s": int(stats.get("slowest_unit_time_sec", 0)),
    }
    replace_text(path, json.dumps(found))
    print(args.target, json.dumps(found))


if __name__ == "__main__":
    main()
