"""A whole run: read what it needs, train or go on with training, write the folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer

from edge_stream.errors import EdgeStreamError
from edge_stream.training import checkpoint, data, export, loop, model
from edge_stream.training.settings import END_TOKEN, SINK_TOKEN, Settings, Shape

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from edge_stream.converters.source import Source


@dataclass
class Start:
    """What training begins with. sink: the token in front of every sample."""

    model: PreTrainedModel
    tokenizer: Tokenizer
    tokenizer_config: dict[str, Any]
    sink: int | None


def run(
    texts: Sequence[str],
    held_out: Sequence[str],
    out: Path,
    settings: Settings,
    shape: Shape,
    base: Source | None,
    device: str,
    note: Callable[[str], None],
    show: Callable[[int, float], None],
    *,
    restart: bool = False,
) -> list[dict[str, Any]]:
    """Train on texts and write the folder `out`; the log, a row per evaluation.

    held_out: texts to evaluate on; if empty, the last twentieth of each of the texts. A checkpoint is kept beside the
    folder, in a file that is removed at the end; if it is there, training goes on from it. Raises EdgeStreamError.
    """
    if not any(texts):
        raise EdgeStreamError("the text is empty")
    texts, held_out = (list(texts), list(held_out)) if held_out else data.split(texts)
    begin = _continued(base, settings) if base else _new(texts, settings, shape)
    end = begin.tokenizer.token_to_id(END_TOKEN) if base is None else begin.model.config.eos_token_id
    tokens = data.encode(begin.tokenizer, texts, end if isinstance(end, int) else None)
    samples = data.Samples(tokens, settings.length, settings.batch, settings.seed)
    evaluated = data.in_order(data.encode(begin.tokenizer, held_out, None), settings.length, settings.n_held_out)
    if settings.sink == "softmax1":
        begin.model = model.with_zero_sink(begin.model)
    if settings.only_sink:
        assert begin.sink is not None
        model.learn_only(begin.model, begin.sink)
    model.mark(begin.model, settings, begin.sink)
    learned = sum(p.numel() for p in begin.model.parameters() if p.requires_grad)
    n_steps = settings.n_steps
    note(
        f"{sum(p.numel() for p in begin.model.parameters()) / 1e6:,.2f} M parameters"
        + (", one row of the embedding is learned" if settings.only_sink else f", {learned / 1e6:,.2f} M are learned")
        + f"; {len(tokens):,} tokens of text in {samples.n_samples:,} samples; {n_steps:,} steps of {settings.batch}"
    )
    begin.model.to(device)
    state = loop.start(begin.model, settings)
    file = out.with_name(f"{out.name}.checkpoint")
    about = _about(settings, tokens, begin)
    if restart:
        file.unlink(missing_ok=True)
    if file.exists():
        checkpoint.restore(file, state, about)
        note(f"going on from step {state.step:,} of {n_steps:,} ({file})")
    loop.train(state, samples, evaluated, settings, begin.sink, lambda r: checkpoint.save(file, r, about), show)
    log = {"settings": asdict(settings), "base": base.name if base else asdict(shape), "log": state.log}
    export.folder(out, begin.model.cpu(), begin.tokenizer, begin.tokenizer_config, log)
    file.unlink(missing_ok=True)
    return state.log


def _about(settings: Settings, tokens: torch.Tensor, begin: Start) -> dict[str, Any]:
    """What a run's result depends on, for the user to compare."""
    config = begin.model.config
    shape = [config.vocab_size, config.num_hidden_layers, config.hidden_size, config.num_attention_heads]
    text = hashlib.sha256(tokens.numpy().tobytes()).hexdigest()[:16]
    return asdict(settings) | {"model (words, layers, width, heads)": shape, "text (SHA-256 of its tokens)": text}


def _new(texts: Sequence[str], settings: Settings, shape: Shape) -> Start:
    tokenizer = data.train_tokenizer(texts, shape.n_vocab)
    end = tokenizer.token_to_id(END_TOKEN)
    assert end is not None
    begin = Start(model.new(shape, settings.length, end, settings.seed), tokenizer, {}, None)
    begin.tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_TOKEN,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "chat_template": export.TEMPLATE,
    }
    if settings.sink == "token":
        _add_sink(begin, settings.seed)
    return begin


def _continued(base: Source, settings: Settings) -> Start:
    files = base.tokenizer_files
    if "tokenizer.json" not in files:
        raise EdgeStreamError(f"{base.name} has no tokenizer.json, which train needs")
    content, rest = files["tokenizer.json"], files.get("tokenizer_config.json")
    tokenizer = Tokenizer.from_str(_text(content))
    begin = Start(model.read(base), tokenizer, json.loads(_text(rest)) if rest else {}, None)
    begin.tokenizer_config.pop("added_tokens_decoder", None)  # tokenizer.json has them
    template = base.chat_templates.get("default")
    if template:
        begin.tokenizer_config["chat_template"] = template
    ends = base.generation_config.get("eos_token_id")
    if ends is not None:
        begin.model.generation_config.eos_token_id = ends
    in_front = tokenizer.encode("").ids
    if len(in_front) > 1:
        raise EdgeStreamError(
            f"the tokenizer of {base.name} puts several tokens around a text: train cannot add a sink"
        )
    if settings.sink == "token" and not in_front:
        _add_sink(begin, settings.seed)
    elif in_front:  # it has one, which is learned like any other token, or on its own
        begin.sink = in_front[0]
    return begin


def _add_sink(begin: Start, seed: int) -> None:
    """Put SINK_TOKEN into the tokenizer, in front of every text, into the vocabulary and into the chat template."""
    begin.tokenizer.add_special_tokens([SINK_TOKEN])
    begin.sink = begin.tokenizer.token_to_id(SINK_TOKEN)
    assert begin.sink is not None
    data.put_in_front(begin.tokenizer, SINK_TOKEN)
    model.add_token(begin.model, begin.sink, seed)
    template = begin.tokenizer_config.get("chat_template")
    if isinstance(template, str) and "bos_token" not in template:
        begin.tokenizer_config["chat_template"] = "{{ bos_token }}" + template
    begin.tokenizer_config |= {"bos_token": SINK_TOKEN, "add_bos_token": True}


def _text(content: Path | bytes) -> str:
    return (content if isinstance(content, bytes) else content.read_bytes()).decode("utf-8")
