"""Checkpoints of a run: one safetensors file with what is learned and the optimizer's state, replaced atomically."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from edge_stream.errors import EdgeStreamError
from edge_stream.output.files import target_of
from edge_stream.output.staging import publish, staging_folder
from edge_stream.training.loop import Run

_MOMENTS = ("exp_avg", "exp_avg_sq")


def save(path: Path, run: Run, about: dict[str, Any]) -> None:
    """Write a checkpoint. about: what the run depends on, as JSON. On EdgeStreamError the one before is unchanged."""
    tensors = {}
    for name, values in _learned(run).items():
        tensors[name] = values.detach()
        tensors |= {f"{name}:{moment}": run.optimizer.state[values][moment] for moment in _MOMENTS}
    facts = {"edge_stream": json.dumps({"about": about, "step": run.step, "log": run.log})}
    path = target_of(path)
    # in a folder of its own: safetensors writes beside a file, under a name that nobody would remove after a kill
    with staging_folder(path) as staging:
        write(tensors, staging / path.name, facts)
        publish([staging / path.name], path.parent, overwrite=True)


def write(tensors: dict[str, torch.Tensor], path: Path, facts: dict[str, str]) -> None:
    """A safetensors file. Raises OSError if the disk is full."""
    try:
        safetensors.torch.save_file({k: t.contiguous().cpu() for k, t in tensors.items()}, path, facts)
    except SafetensorError as error:
        raise OSError(f"{error}".partition(":")[2].strip() or str(error)) from None
    path.chmod(0o644)  # safetensors makes it 0600; as replace_file leaves a file


def restore(path: Path, run: Run, about: dict[str, Any]) -> None:
    """Bring a run to where a checkpoint was written. Raises EdgeStreamError if it is another run's, or damaged."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            facts = json.loads((file.metadata() or {})["edge_stream"])
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise EdgeStreamError(f"{path} cannot be read as a checkpoint ({error}): --restart begins anew") from None
    for key, value in about.items():
        if facts["about"].get(key) != value:
            raise EdgeStreamError(
                f"{path} is of a run with another {key} ({facts['about'].get(key)}, not {value}): use the same, or "
                "--restart to begin anew"
            )
    learned = _learned(run)
    for name, values in learned.items():
        if name not in stored or stored[name].shape != values.shape:
            raise EdgeStreamError(f"{path} is of a model of another shape ({name}): --restart begins anew")
    with torch.no_grad():
        for name, values in learned.items():
            values.copy_(stored[name])
            state = {moment: stored[f"{name}:{moment}"].to(values.device) for moment in _MOMENTS}
            run.optimizer.state[values] = {"step": torch.tensor(float(facts["step"]), device=values.device), **state}
    run.step, run.log = facts["step"], facts["log"]


def _learned(run: Run) -> dict[str, torch.nn.Parameter]:
    return {name: values for name, values in run.model.named_parameters() if values.requires_grad}
