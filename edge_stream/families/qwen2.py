"""Qwen2 and Qwen2.5: biases on q, k and v; a sliding window in the upper layers, if enabled."""

from edge_stream.families import Family, Gguf, Mlc

FAMILY = Family(
    model_type="qwen2",
    hf_class="Qwen2ForCausalLM",
    models="Qwen2, Qwen2.5",
    gguf=Gguf(arch="qwen2", free_head_dim=False, qkv_bias=True),
    mlc=Mlc(qkv_name="c_attn", qkv_bias=True),
    qkv_bias=True,
    window_flag="use_sliding_window",
    windowed=lambda layer, count: layer >= count("max_window_layers", least=0),
    defaults={"rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "max_window_layers": 28},
)
