"""Llama 1, 2 and 3; SmolLM and SmolLM2 are Llama with tied embeddings."""

from edge_stream.families import Family, Gguf, Mlc

FAMILY = Family(
    model_type="llama",
    hf_class="LlamaForCausalLM",
    models="Llama 1, 2, 3.x, SmolLM, SmolLM2",
    gguf=Gguf(
        arch="llama",
        permuted=True,
        rope_scalings=("linear", "llama3", "yarn", "longrope"),
        partial_rotary=False,
        qkv_bias=True,
        o_bias=True,
    ),
    mlc=Mlc(rope_scalings=("llama3",)),
    defaults={"rms_norm_eps": 1e-6},
)
