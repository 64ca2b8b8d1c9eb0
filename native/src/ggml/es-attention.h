// Attention of a few query rows over a long cache, for llama.cpp's CPU backend: native/patches/0006-attention.patch
// asks here first. docs/architecture.md, "Attention on the CPU", says how it works.
//
// EDGE_STREAM_ATTENTION=stock leaves everything to llama.cpp's own code.
#pragma once

#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_compute_params;

// Bytes of work buffer that `node`, a GGML_OP_FLASH_ATTN_EXT, needs with n_threads. 0: left to llama.cpp.
size_t es_attention_work_size(const struct ggml_tensor * node, int n_threads);

// Called by every thread of a graph with the same node. False, in all threads alike: left to llama.cpp.
bool es_attention(const struct ggml_compute_params * params, struct ggml_tensor * node);

// Whose code it is: "edge-stream (AVX2)", or "stock" where everything is left to llama.cpp. Python looks this name up.
const char * es_attention_name(void);

#ifdef __cplusplus
}
#endif
