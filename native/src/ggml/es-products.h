// Products with quantised matrices (Q8_0, Q4_0, Q4_1), for llama.cpp's CPU backend: native/patches/0009-products.patch
// asks here when a model is loaded and takes what we take out of llama.cpp's hands. docs/architecture.md, "Products on
// the CPU", says how it works.
//
// EDGE_STREAM_PRODUCTS=stock leaves everything to llama.cpp's own code.
#pragma once

#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_compute_params;

// Whether this matrix of a model is ours: then it is stored by es_products_pack and multiplied by es_products.
bool es_products_take(const struct ggml_tensor * matrix);

// Store a matrix, whose rows `data` has as GGUF has them, in our order. It takes as many bytes.
void es_products_pack(struct ggml_tensor * matrix, const void * data);

// Bytes of work buffer that `node`, a GGML_OP_MUL_MAT with such a matrix, needs.
size_t es_products_work_size(const struct ggml_tensor * node);

// Called by every thread of a graph with the same node.
void es_products(const struct ggml_compute_params * params, struct ggml_tensor * node);

// Whose code it is: "edge-stream (AVX2)", or "stock" where everything is left to llama.cpp. Python looks this name up.
const char * es_products_name(void);

#ifdef __cplusplus
}
#endif
