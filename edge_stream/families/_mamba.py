"""Mamba-2 mixers: their tensors and metadata."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_stream.families import Keys, ModelConfig, Place, Shapes


@dataclass(frozen=True)
class Mamba2:
    """Sizes of the convolution's kernel, of a head's state, of heads and their groups; what it has."""

    kernel: int
    state: int
    heads: int
    head_dim: int
    groups: int
    conv_bias: bool = True
    norm: bool = True  # before the output projection, after the gate

    @property
    def inner(self) -> int:
        """All heads."""
        return self.heads * self.head_dim

    def tensors(self, model: ModelConfig, p: str) -> Shapes:
        """The tensors of a mixer, names beginning with p."""
        conv = self.inner + 2 * self.groups * self.state
        shapes: Shapes = {
            f"{p}in_proj.weight": (self.inner + conv + self.heads, model.n_embd),
            f"{p}conv1d.weight": (conv, 1, self.kernel),
            f"{p}A_log": (self.heads,),
            f"{p}D": (self.heads,),
            f"{p}dt_bias": (self.heads,),
            f"{p}out_proj.weight": (model.n_embd, self.inner),
        }
        if self.conv_bias:
            shapes[f"{p}conv1d.bias"] = (conv,)
        if self.norm:
            shapes[f"{p}norm.weight"] = (self.inner,)
        return shapes

    def place(self, name: str) -> Place | None:
        """Where a tensor of a mixer goes; None if it goes there as it is."""
        changes = {
            "A_log": lambda a: -np.exp(a).reshape(-1, 1),
            "D": lambda a: a.reshape(-1, 1),
            "conv1d.weight": squeeze,
            "norm.weight": lambda a: a.reshape(self.groups, -1),
        }
        for ending, change in changes.items():
            if name.endswith(f".{ending}"):
                return Place(name, change)
        return Place(name.replace(".dt_bias", ".dt_proj.bias")) if name.endswith(".dt_bias") else None

    def keys(self) -> dict[str, Any]:
        """Metadata."""
        return {
            "ssm.conv_kernel": self.kernel,
            "ssm.inner_size": self.inner,
            "ssm.state_size": self.state,
            "ssm.time_step_rank": self.heads,
            "ssm.group_count": self.groups,
        }


def read_mamba(keys: Keys, inner: int, norm: bool = True) -> Mamba2:
    """The mixer of a config.json with keys `mamba_*`. inner: the size of all heads, if none is given of one."""
    heads = keys.count("mamba_n_heads", 128)
    width = keys.get("mamba_d_head", "auto")
    return Mamba2(
        keys.count("mamba_d_conv", 4),
        keys.count("mamba_d_state", 256),
        heads,
        inner // heads if width == "auto" else keys.count("mamba_d_head"),
        keys.count("mamba_n_groups", 1),
        keys.flag("mamba_conv_bias", True),
        norm,
    )


def squeeze(a: NDArray[Any]) -> NDArray[Any]:
    """A convolution over single channels: [channels, 1, kernel] to [channels, kernel]."""
    return a.reshape(a.shape[0], -1)


def check(keys: Keys) -> None:
    """Refuse what llama.cpp does not compute: limits of the time step."""
    limits = keys.get("time_step_limit", None)
    if isinstance(limits, (list, tuple)) and len(limits) == 2:
        high = limits[1].get("__float__") if isinstance(limits[1], dict) else limits[1]
        if limits[0] == 0 and high in (float("inf"), "Infinity"):
            return
    if limits is not None:
        keys.refuse(f"time_step_limit = {limits!r} is not supported: llama.cpp does not limit the time step")
