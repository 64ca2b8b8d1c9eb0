// Products of a few or many rows with a Q4_0 matrix, for llama.cpp's CPU backend: native/patches/0009-products.patch
// asks here first. docs/architecture.md, "Products on the CPU", says how it works.
//
// EDGE_STREAM_PRODUCTS=stock leaves everything to llama.cpp's own code.
#pragma once

#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// out[row * stride + column] for n_rows rows and n_columns columns (a multiple of 8) of n values (a multiple of 32).
// columns: ggml's block_q4_0x8, interleaved by 8 bytes. rows: block_q8_0x4, interleaved by 8 bytes, as far as there are
// four, then block_q8_0. Returns false if it is left to llama.cpp.
bool es_products_q4_0(int64_t n, float * out, int64_t stride, const void * columns, const void * rows, int64_t n_rows,
                      int64_t n_columns);

// Whose code it is: "edge-stream (AVX2)", or "stock" where everything is left to llama.cpp. Python looks this name up.
const char * es_products_name(void);

#ifdef __cplusplus
}
#endif
