"""OLMo 2: norms after attention and MLP instead of before, norms over all of q and of k."""

from __future__ import annotations

from edge_stream.families import Family, Gguf, ModelConfig, Shapes
from edge_stream.families._layers import attention, mlp, norms


def layer(model: ModelConfig, _layer: int) -> Shapes:
    """The tensors of a layer."""
    after = norms(model, "post_attention_layernorm", "post_feedforward_layernorm")
    return attention(model, "row") | after | mlp(model)


def lacks(model: ModelConfig) -> str | None:
    """What llama.cpp cannot represent."""
    return "has no tied embeddings" if model.tied else None


FAMILY = Family(
    model_type="olmo2",
    hf_class="Olmo2ForCausalLM",
    models="OLMo 2",
    gguf=Gguf(arch="olmo2", read_back=False, partial_rotary=False, free_head_dim=False, masks_window=True, lacks=lacks),
    layer=layer,
    defaults={"rms_norm_eps": 1e-5},
)
