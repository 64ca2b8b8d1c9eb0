"""Parts of a layer, as tensors of a checkpoint: name after `model.layers.N.` -> shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray

from edge_stream.families import Keys, ModelConfig, Place, Shapes

Change = Callable[[NDArray[Any]], NDArray[Any]]


def norms(model: ModelConfig, *names: str) -> Shapes:
    """Norm weights over the hidden size."""
    return {f"{name}.weight": (model.n_embd,) for name in names}


def attention(model: ModelConfig, qk_norm: str = "", p: str = "self_attn.", gate: bool = False) -> Shapes:
    """q, k, v and o. qk_norm: norms over each `head`, over the `row`, or none. gate: q holds one beside each head."""
    n_q, n_kv = model.n_head * model.head_dim, model.n_head_kv * model.head_dim
    rows = {"q": 2 * n_q if gate else n_q, "k": n_kv, "v": n_kv}
    shapes: Shapes = {f"{p}{name}_proj.weight": (n, model.n_embd) for name, n in rows.items()}
    if model.qkv_bias:
        shapes |= {f"{p}{name}_proj.bias": (n,) for name, n in rows.items()}
    shapes[f"{p}o_proj.weight"] = (model.n_embd, n_q)
    if model.o_bias:
        shapes[f"{p}o_proj.bias"] = (model.n_embd,)
    if qk_norm:
        shapes[f"{p}q_norm.weight"] = (n_q if qk_norm == "row" else model.head_dim,)
        shapes[f"{p}k_norm.weight"] = (n_kv if qk_norm == "row" else model.head_dim,)
    return shapes


def mlp(model: ModelConfig, p: str = "mlp.", n_ff: int = 0, names: tuple[str, ...] = ("gate", "up", "down")) -> Shapes:
    """A gated MLP; names: those of gate, up and down before `_proj`."""
    n_ff = n_ff or model.n_ff
    gate, up, down = (name if name.startswith("w") else f"{name}_proj" for name in names)
    return {
        f"{p}{gate}.weight": (n_ff, model.n_embd),
        f"{p}{up}.weight": (n_ff, model.n_embd),
        f"{p}{down}.weight": (model.n_embd, n_ff),
    }


def experts(
    model: ModelConfig, n: int, n_ff: int, p: str = "mlp.", names: tuple[str, ...] = ("gate", "up", "down")
) -> Shapes:
    """n gated MLPs, one tensor each."""
    shapes: Shapes = {}
    for i in range(n):
        shapes |= mlp(model, f"{p}experts.{i}.", n_ff, names)
    return shapes


def stacked(name: str) -> Place | None:
    """The place of one expert's tensor in the tensor of all; None for other tensors."""
    before, found, after = name.partition(".experts.")
    number, _, rest = after.partition(".")
    return Place(f"{before}.experts.{rest}", stack=True) if found and number.isdecimal() else None


# ---------------------------------------------------------------------------------------------------------
# experts behind a router, as Qwen has them: `mlp.gate`, `mlp.experts.N.gate_proj`, or all in `mlp.experts.gate_up_proj`
# ---------------------------------------------------------------------------------------------------------


def expert_names(config: dict[str, Any]) -> dict[str, Any]:
    """The number of experts under its usual name (transformers 5 writes another)."""
    n = config.get("num_experts", config.get("num_local_experts"))
    return config if n is None else config | {"num_experts": n}


def read_experts(keys: Keys) -> dict[str, Any]:
    """How many experts there are, how many a token uses, and their width."""
    n, used = keys.count("num_experts"), keys.count("num_experts_per_tok")
    if used > n:
        keys.refuse(f"num_experts_per_tok = {used} is more than the {n} experts")
    return {"n_expert": n, "n_expert_used": used, "n_ff_expert": keys.count("moe_intermediate_size")}


def expert_keys(model: ModelConfig) -> dict[str, Any]:
    """The same in GGUF."""
    own = model.own
    return {
        "expert_count": own["n_expert"],
        "expert_used_count": own["n_expert_used"],
        "expert_feed_forward_length": own["n_ff_expert"],
    }


def routed(model: ModelConfig) -> Shapes:
    """The router and its experts."""
    own = model.own
    n, n_ff = own["n_expert"], own["n_ff_expert"]
    router: Shapes = {"mlp.gate.weight": (n, model.n_embd)}
    if not own.get("fused"):
        return router | experts(model, n, n_ff)
    shapes = {"gate_up_proj": (2 * n_ff, model.n_embd), "down_proj": (model.n_embd, n_ff)}
    flip = -1 if own.get("transposed") else 1
    return router | {f"mlp.experts.{name}": (n, *shape[::flip]) for name, shape in shapes.items()}


def place_experts(name: str, transposed: bool = False) -> tuple[Place, ...]:
    """Where an expert's tensor goes, or the tensor of all; () for other tensors."""
    if one := stacked(name):
        return (one,)
    if name.endswith("mlp.experts.down_proj"):
        return (Place(f"{name}.weight", (lambda a: a.T) if transposed else None, each=True),)
    if not name.endswith("mlp.experts.gate_up_proj"):
        return ()
    p = name.removesuffix("gate_up_proj")
    halves: dict[str, Change] = {
        "gate": lambda a: a[: len(a) // 2],
        "up": lambda a: a[len(a) // 2 :],
    }

    def turned(half: Change) -> Change:
        return (lambda a: half(a.T)) if transposed else half

    return tuple(Place(f"{p}{n}_proj.weight", turned(half), each=True) for n, half in halves.items())
