"""The training loop: AdamW, a warm-up and a cosine, an evaluation and a checkpoint every so many steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

from edge_stream.errors import EdgeStreamError
from edge_stream.training.data import Samples
from edge_stream.training.model import loss
from edge_stream.training.settings import Settings

_WARM_UP, _LAST = 0.05, 0.1  # part of the steps, part of the learning rate
_CLIP = 1.0  # of the gradient's norm
_EVALUATED = 8  # samples at a time


@dataclass
class Run:
    """A training run between two steps. log: a row per evaluation, losses in nats per token."""

    model: transformers.PreTrainedModel
    optimizer: torch.optim.Optimizer
    step: int = 0
    log: list[dict[str, Any]] = field(default_factory=list)


def start(model: transformers.PreTrainedModel, settings: Settings) -> Run:
    """A run before its first step. Matrices decay, vectors do not, and nothing does where only the sink is learned."""
    decay = 0.0 if settings.only_sink else settings.weight_decay
    learned = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in learned if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in learned if p.ndim < 2], "weight_decay": 0.0},
    ]
    return Run(
        model, torch.optim.AdamW([g for g in groups if g["params"]], lr=settings.lr, betas=(0.9, 0.95), fused=True)
    )


def rate(settings: Settings, step: int) -> float:
    """The learning rate of a step: up in a line, then down along a cosine to a tenth."""
    warm = max(1, int(settings.n_steps * _WARM_UP))
    if step < warm:
        return settings.lr * (step + 1) / warm
    along = (step - warm) / max(1, settings.n_steps - warm)
    return settings.lr * (_LAST + (1.0 - _LAST) * 0.5 * (1.0 + math.cos(math.pi * along)))


def train(
    run: Run,
    samples: Samples,
    held_out: torch.Tensor,
    settings: Settings,
    sink: int | None,
    save: Callable[[Run], None],
    show: Callable[[int, float], None],
) -> None:
    """Take the steps that are left. sink: the token in front of every sample. held_out: samples to evaluate on.

    save is called after every evaluation. show: called with the number of steps done and the last loss. Raises
    EdgeStreamError if the loss is no longer a number; the last checkpoint is from before.
    """
    device = next(run.model.parameters()).device
    if not run.log:
        run.log.append(_row(run, settings, None, evaluate(run.model, held_out, sink)))
    since: list[float] = []
    while run.step < settings.n_steps:
        run.model.train()
        for group in run.optimizer.param_groups:
            group["lr"] = rate(settings, run.step)
        value = loss(run.model, samples.batch(run.step).to(device), sink)
        since.append(value.item())
        _check(since[-1], run)
        run.optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_([p for p in run.model.parameters() if p.requires_grad], _CLIP)
        run.optimizer.step()
        run.step += 1
        show(run.step, since[-1])
        if run.step % settings.every == 0 or run.step == settings.n_steps:
            held = evaluate(run.model, held_out, sink)
            _check(held, run)
            run.log.append(_row(run, settings, sum(since) / len(since), held))
            since.clear()
            save(run)


def evaluate(model: transformers.PreTrainedModel, held_out: torch.Tensor, sink: int | None) -> float:
    """Mean negative log-likelihood in nats of the tokens that are predicted with and without a sink token alike."""
    model.eval()
    device = next(model.parameters()).device
    total = 0.0
    with torch.no_grad():
        for part in held_out.split(_EVALUATED):
            total += float(loss(model, part.to(device), sink, shared=True)) * len(part)
    return total / len(held_out)


def _check(value: float, run: Run) -> None:
    if not math.isfinite(value):
        raise EdgeStreamError(
            f"the loss is {value} at step {run.step}: start again with a lower --lr (nothing of this step was saved)"
        )


def _row(run: Run, settings: Settings, trained: float | None, held: float) -> dict[str, Any]:
    return {"step": run.step, "tokens": run.step * settings.batch * settings.length, "loss": trained, "held_out": held}
