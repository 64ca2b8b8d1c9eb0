"""`edge-stream info`: what is installed, whether a model can stream, and the memory it takes."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import click

from edge_stream.cli import options
from edge_stream.cli.llama_flags import Command

_SINKS = {
    "token": ["trained with      a sink token, which is in front of every text: one sink is enough"],
    "softmax1": ["trained with      softmax1: a sink of 0 beside the logits of the keys"],
}


@click.command("info", cls=Command)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@options.model_option(required=False)
@options.context_options()
@options.compute_options
def main(**flags: Any) -> None:
    """Show versions and devices; with -m also whether the model can stream, and its memory at -c."""
    from edge_stream.hardware import devices
    from edge_stream.hardware.system import system_facts

    if flags["rpc"]:
        for endpoint in flags["rpc"]:
            devices.add_rpc_server(endpoint)
    facts = system_facts()
    if flags["model"]:
        with options.load_engine(flags) as engine:
            facts |= {"model": model_facts(engine)}
    click.echo(json.dumps(facts, indent=2) if flags["as_json"] else _text(facts))


def model_facts(engine: Any) -> dict[str, Any]:
    """What matters for streaming. The model can stream: Engine.load refuses others."""
    return {
        "path": str(engine.model_path),
        "description": engine.desc,
        "architecture": engine.architecture,
        "can_stream": True,
        "sink_move": engine.sink_move,
        "chat_template": engine.chat_template is not None,
        # an MLC folder states no training length, only the cache that it was made for
        "n_ctx_train": None if engine.model_path.is_dir() else engine.n_ctx_train,
        "n_ctx": engine.n_ctx,
        "n_keep": engine.n_keep,
        "trained_with_sink": engine.metadata.get("edge_stream.sink") or engine.metadata.get("attention_sink"),
        "recurrent": engine.is_recurrent,
        "proof": asdict(engine.proof) if engine.proof and engine.proof.distance else None,
        "kv_bytes_per_token": engine.kv_bytes_per_token,
        "kv_mib": round(engine.kv_bytes_per_token * engine.n_ctx / 2**20, 2),
        "kv_host_mib": round(engine.cache_bytes(engine.n_ctx)[0] / 2**20, 2),
        "kv_device_mib": round(engine.cache_bytes(engine.n_ctx)[1] / 2**20, 2),
        "state_bytes": engine.state_bytes,
        "devices": [d.name for d in engine.devices],
        "file_mib": round(engine.n_bytes / 2**20, 2),
    }


def _tokens(n: int | None) -> str:
    return "not stated in the folder" if n is None else f"{n:,} tokens"


def _how(model: dict[str, Any]) -> str:
    if model["recurrent"]:
        return "as it is: a recurrent model has no cache, so --keep and -c have no effect"
    return "on TVM: no sink has to move" if model["sink_move"] == "none" else f"moving sinks by {model['sink_move']}"


def _proof(proof: dict[str, Any]) -> list[str]:
    error = max(proof["positions"], proof["move"], proof["rebase"])
    return [
        f"proof             off by {error:.1e} at position {proof['distance']:,} ({proof['date']}); "
        f"{proof['bound']:.1e} counts as exact",
        f"                  the model itself {proof['positions']:.1e}, sinks moved {proof['move']:.1e}, brought back "
        f"{proof['rebase']:.1e}; logits spread by {proof['spread']:.2g}",
    ]


def _text(facts: dict[str, Any]) -> str:
    moves = {
        "bank": "bank (libllama carries the sink bank patch)",
        "redecode": "redecode (a stock libllama: sinks are decoded again, in larger slides)",
    }
    lines = [
        f"edge-stream       {facts['edge_stream']}",
        f"llama-cpp-python  {facts['llama_cpp_python']}",
        f"llama.cpp         {facts['llama_cpp']} (ggml {facts['ggml']})",
        f"libraries         {facts['libraries']}",
        f"sinks move by     {moves[facts['sink_move']]}",
        f"CPU attention     {facts['attention']}",
        f"CPU products      {facts['products']}",
    ]
    lines += [
        f"device            {d['name']}: {d['description']} ({d['kind']}, {d['free_mib']:,} of "
        f"{d['memory_mib']:,} MiB free)"
        for d in facts["devices"]
    ]
    for d in facts["devices"]:
        # an accelerator only multiplies matrices; an RPC device cannot be asked
        if d["kind"] != "accelerator" and d["backend"] != "RPC":
            rest = [name for name in d["moves_sinks"] if name not in d["rebases"]]
            note = f" (rebased with the CPU's help: {' '.join(rest)})" if rest else ""
            lines.append(f"{'K on ' + d['name']:<18}{' '.join(d['moves_sinks'])}{note}")
    if "model" in facts:
        m = facts["model"]
        lines += [
            "",
            f"model             {m['path']}",
            f"                  {m['description']} ({m['architecture']}), {m['file_mib']:,.0f} MiB",
            f"can stream        yes, {_how(m)}",
            *(_proof(m["proof"]) if m["proof"] else []),
            f"chat template     {'its own' if m['chat_template'] else 'none (ChatML would be used)'}",
            f"trained length    {_tokens(m['n_ctx_train'])}",
            *_SINKS.get(m["trained_with_sink"], ()),
            f"KV cache          {m['kv_bytes_per_token']:,} bytes per token, {m['kv_mib']:,.1f} MiB for "
            f"{m['n_ctx']:,} tokens however long the stream",
        ]
        if m["state_bytes"]:
            lines.append(f"state             {m['state_bytes']:,} bytes of recurrent layers, whatever -c is")
        if m["devices"]:
            where = (
                f"{m['kv_host_mib']:,.1f} MiB with the CPU, {m['kv_device_mib']:,.1f} MiB on {', '.join(m['devices'])}"
            )
            lines.append(f"                  {where}")
    return "\n".join(lines)
