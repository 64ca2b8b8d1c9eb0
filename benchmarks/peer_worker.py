"""One engine of benchmarks/peers.py, in a process of its own: run by the Python that has it, which need have no more.

    python peer_worker.py ENGINE MODEL THREADS serve    # a line on stdin asks, a line of JSON on stdout answers
    python peer_worker.py ENGINE MODEL THREADS first    # ends with the first token

Every engine offers text(tokens, n): reads tokens from nothing, then writes n more; the seconds of both.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

N_CTX = 1024  # ours slides in it; the others get room for prompt and answer
ROOM = 2048
VOCABULARY = 49_000  # the demo's has 49,152 tokens
Text = Callable[[list[int], int], tuple[float, float]]


def draw(n: int, seed: int) -> list[int]:
    """Random tokens."""
    source = random.Random(seed)
    return [source.randrange(100, VOCABULARY) for _ in range(n)]


def edge_stream(model: str, threads: int) -> tuple[Text, str]:
    """This repository, over llama.cpp or MLC: the cache is full when it writes, and every token slides."""
    from edge_stream import Engine, __version__

    engine = Engine.load(model, n_ctx=N_CTX, n_threads=threads)

    def text(tokens: list[int], n: int) -> tuple[float, float]:
        stream = engine.stream()
        start = time.perf_counter()
        stream.feed_tokens(tokens)
        engine.backend.synchronize()
        read = time.perf_counter()
        if len(tokens) > N_CTX // 2:
            stream.feed_tokens(draw(N_CTX, 1))
            engine.backend.synchronize()
        begin = time.perf_counter()
        for token in draw(n, 2):
            stream.feed_tokens([token])
            engine.backend.synchronize()
        return read - start, time.perf_counter() - begin

    return text, __version__


def llama_cpp(model: str, threads: int) -> tuple[Text, str]:
    """Stock llama.cpp by llama-cpp-python's raw bindings; flash attention is llama.cpp's choice."""
    import llama_cpp.llama_cpp as c

    c.llama_backend_init()
    silent = c.llama_log_callback(lambda *_: None)
    c.llama_log_set(silent, None)
    handle = c.llama_model_load_from_file(model.encode(), c.llama_model_default_params())
    params = c.llama_context_default_params()
    params.n_ctx, params.n_threads, params.n_threads_batch = ROOM, threads, threads
    context = c.llama_init_from_model(handle, params)

    def feed(tokens: list[int]) -> None:
        array = (c.llama_token * len(tokens))(*tokens)
        assert c.llama_decode(context, c.llama_batch_get_one(array, len(tokens))) == 0
        c.llama_synchronize(context)

    def text(tokens: list[int], n: int) -> tuple[float, float]:
        assert silent
        c.llama_memory_clear(c.llama_get_memory(context), True)
        start = time.perf_counter()
        feed(tokens)
        read = time.perf_counter()
        for token in draw(n, 2):
            feed([token])
        return read - start, time.perf_counter() - read

    return text, version("llama-cpp-python")


def ik_llama(model: str, threads: int) -> tuple[Text, str]:
    """ik_llama.cpp; the package switches flash attention off where the processor has no AVX-VNNI."""
    from ik_llama_cpp import IkLlama
    from ik_llama_cpp import _ctypes_api as c
    from ik_llama_cpp._internals import make_batch_range

    engine = IkLlama(model, n_ctx=ROOM, n_threads=threads, verbose=False)

    def feed(tokens: list[int], position: int) -> None:
        context = engine._context
        step = context._n_ubatch
        for i in range(0, len(tokens), step):
            batch = make_batch_range(tokens[i : i + step], pos_start=position + i, logits_last=i + step >= len(tokens))
            assert context.decode(batch) == 0
            c.llama_batch_free(batch)
        context.get_logits(-1)

    def text(tokens: list[int], n: int) -> tuple[float, float]:
        engine._context.kv_cache_clear()
        start = time.perf_counter()
        feed(tokens, 0)
        read = time.perf_counter()
        for i, token in enumerate(draw(n, 2)):
            feed([token], len(tokens) + i)
        return read - start, time.perf_counter() - read

    return text, version("ik_llama-cpp-python")


def openvino(model: str, threads: int) -> tuple[Text, str]:
    """OpenVINO GenAI, which reads GGUF files itself. It writes greedily."""
    import numpy as np
    import openvino as ov
    import openvino_genai as genai

    pipeline = genai.LLMPipeline(model, "CPU", INFERENCE_NUM_THREADS=threads)

    def text(tokens: list[int], n: int) -> tuple[float, float]:
        ids = np.array([tokens], dtype=np.int64)
        inputs = genai.TokenizedInputs(ov.Tensor(ids), ov.Tensor(np.ones_like(ids)))
        start = time.perf_counter()
        done = pipeline.generate(inputs, max_new_tokens=n + 1, ignore_eos=True, do_sample=False)
        whole = time.perf_counter() - start
        written = sum(done.perf_metrics.raw_metrics.m_durations) / 1e6 if n else 0.0
        assert len(done.tokens[0]) == n + 1
        return whole - written, written

    return text, genai.__version__.split("-")[0]


def onnxruntime(model: str, threads: int) -> tuple[Text, str]:
    """onnxruntime-genai over a folder of its model builder. It writes greedily."""
    import onnxruntime_genai as og

    config = og.Config(model)
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    loaded = og.Model(config)

    def text(tokens: list[int], n: int) -> tuple[float, float]:
        params = og.GeneratorParams(loaded)
        params.set_search_options(max_length=ROOM, min_length=ROOM, do_sample=False)
        generator = og.Generator(loaded, params)
        start = time.perf_counter()
        generator.append_tokens(tokens)
        generator.generate_next_token()
        read = time.perf_counter()
        for _ in range(n):
            generator.generate_next_token()
        return read - start, time.perf_counter() - read

    return text, og.__version__


ENGINES: dict[str, Callable[[str, int], tuple[Text, str]]] = {
    f.__name__: f for f in (edge_stream, llama_cpp, ik_llama, openvino, onnxruntime)
}


def peak_mib() -> float:
    """The largest resident memory of this process so far."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith("VmHWM"))


def main() -> None:
    """Load the engine, then do as the last argument says."""
    engine, model, threads, mode = sys.argv[1:]
    text, its_version = ENGINES[engine](model, int(threads))
    if mode == "first":
        text(draw(6, 0), 0)
        print("token", flush=True)
        return

    def answer(value: Any) -> None:
        print("answer " + json.dumps(value), flush=True)  # some engines print to stdout themselves

    answer(its_version)
    for line in sys.stdin:
        n_prompt, n, seed = json.loads(line)
        answer([*text(draw(n_prompt, seed), n), peak_mib()])


if __name__ == "__main__":
    main()
