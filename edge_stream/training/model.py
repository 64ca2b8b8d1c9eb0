"""The model that is trained: a new Llama, or one that is continued, with a sink token or a zero sink."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
import transformers
from transformers import AttentionInterface

from edge_stream.errors import EdgeStreamError
from edge_stream.training.settings import Settings, Shape

if TYPE_CHECKING:
    from edge_stream.converters.source import Source

KEY = "attention_sink"  # of config.json: token or softmax1
_ZERO_SINK = "edge_stream_zero_sink"


def new(shape: Shape, length: int, end: int, seed: int) -> transformers.PreTrainedModel:
    """A Llama with random weights. Raises EdgeStreamError for a shape that makes none."""
    if shape.n_embd % shape.n_head or shape.n_embd // shape.n_head % 2:
        raise EdgeStreamError(f"a width of {shape.n_embd} does not make {shape.n_head} heads of an even size")
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=shape.n_vocab,
            hidden_size=shape.n_embd,
            intermediate_size=shape.n_ff,
            num_hidden_layers=shape.n_layer,
            num_attention_heads=shape.n_head,
            num_key_value_heads=shape.n_head,
            max_position_embeddings=length,
            tie_word_embeddings=True,
            rms_norm_eps=1e-5,
            bos_token_id=None,
            eos_token_id=end,
        )
    )


def read(source: Source) -> transformers.PreTrainedModel:
    """The model of a checkpoint, in float32. Raises EdgeStreamError unless it is of Llama's type."""
    kinds = (transformers.LlamaConfig, transformers.GraniteSWAConfig)
    kind = next((k for k in kinds if k.model_type == source.model.family.model_type), None)
    if kind is None:
        raise EdgeStreamError(f"train continues models of Llama's type, not {source.model.family.model_type}")
    config = kind(
        **{key: value for key, value in source.config.items() if key not in ("model_type", "dtype", "torch_dtype")}
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    weights = {name: torch.from_numpy(source.load(name).astype("float32")) for name in source.tensors}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and all(name == "lm_head.weight" for name in missing), (missing, unexpected)
    model.tie_weights()
    return model


def add_token(model: transformers.PreTrainedModel, token: int, seed: int) -> None:
    """Let the vocabulary have a row for `token`: as large as the others' mean, and random as they are."""
    rows = model.get_input_embeddings().weight.detach()
    if token >= len(rows):
        model.resize_token_embeddings(token + 1, mean_resizing=False)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in {model.get_input_embeddings(), model.get_output_embeddings()}:
            layer.weight[token] = rows.mean(0) + rows.std(0) * torch.randn(rows.shape[1], generator=random)


def learn_only(model: transformers.PreTrainedModel, token: int) -> None:
    """Freeze everything but a token's row of the embedding."""
    table = model.get_input_embeddings().weight
    for parameter in model.parameters():
        parameter.requires_grad_(parameter is table)
    chosen = torch.zeros(len(table), 1, device=table.device)
    chosen[token] = 1.0
    table.register_hook(lambda gradient: gradient * chosen)


def with_zero_sink(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """The same weights with a logit of 0 beside those of the keys (softmax1: exp(x) / (1 + sum of exp)).

    transformers and llama.cpp have a Llama with a learned logit per head, Granite SWA; here the logits are 0, all
    layers see everything, and Granite's factors change nothing.
    """
    if any("sinks" in name and bool(values.any()) for name, values in model.named_parameters()):
        raise EdgeStreamError("this model has learned sinks, and softmax1 would replace them by zeros")
    old = model.config
    head_dim = getattr(old, "head_dim", None) or old.hidden_size // old.num_attention_heads
    if head_dim * old.num_attention_heads != old.hidden_size:
        raise EdgeStreamError("softmax1 needs heads x head_dim = hidden_size")
    copied = (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "rope_parameters"),
        *("attention_bias", "bos_token_id", "eos_token_id", "initializer_range"),
    )
    config = transformers.GraniteSWAConfig(
        **{name: getattr(old, name) for name in copied},
        attention_multiplier=1.0 / math.sqrt(head_dim),
        layer_types=["full_attention"] * old.num_hidden_layers,
    )
    AttentionInterface.register(_ZERO_SINK, _attention)
    changed = transformers.GraniteSWAForCausalLM._from_config(config, attn_implementation=_ZERO_SINK)
    missing, unexpected = changed.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected and all(name.endswith("sinks") for name in missing), (missing, unexpected)
    for name, values in changed.named_parameters():
        if name.endswith(".sinks"):
            values.data.zero_()
            values.requires_grad_(False)
    return changed


def _attention(
    _module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    _mask: torch.Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention over whole samples, [batch, heads, tokens, head], with a key and a value of zeros in front: its
    score is 0, so it adds 1 to the denominator, and nothing to the sum.
    """
    q, k, v = (F.pad(x, (0, 0, 1, 0)) for x in (query, key, value))
    grouped = query.shape[1] != key.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=grouped)
    return out[:, :, 1:].transpose(1, 2).contiguous(), None


def loss(
    model: transformers.PreTrainedModel, batch: torch.Tensor, sink: int | None, *, shared: bool = False
) -> torch.Tensor:
    """Mean negative log-likelihood in nats of the tokens after each. batch: [n, length + 1].

    sink: a token in front of every sample, from which its first token is predicted as well; shared: that is left out,
    so that what is predicted is the same with and without.
    """
    inputs, targets = batch[:, :-1], batch[:, 1:]
    if sink is not None:
        inputs, targets = F.pad(inputs, (1, 0), value=sink), batch
    logits = model(input_ids=inputs, use_cache=False).logits
    if sink is not None and shared:
        logits, targets = logits[:, 1:], targets[:, 1:]
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def mark(model: transformers.PreTrainedModel, settings: Settings, sink: int | None) -> None:
    """Note in the configuration what the model was trained with, and for which length."""
    if settings.sink != "none":
        setattr(model.config, KEY, settings.sink)
    if sink is not None:
        model.config.bos_token_id = model.generation_config.bos_token_id = sink
    longest = settings.length + (sink is not None)
    model.config.max_position_embeddings = max(model.config.max_position_embeddings, longest)
