// How a model rotates its keys, read from the graph that computes them.
#pragma once

#include "ggml.h"

#include <cstdint>

struct es_key_rotation {
    bool          rotated    = false;
    int32_t       params[16] = {};      // op_params of its GGML_OP_ROPE, for a rotation by a difference
    ggml_tensor * factors    = nullptr; // its frequency factors, or null
    int64_t       n_hadamard = 0;       // size of the Hadamard matrix applied before the store; 0: none
    const char *  unknown    = nullptr; // an operation on the keys that is not understood, or null

    // k_cur: what a layer stores in the cache. pos_per_row: positions that a token has, 4 with M-RoPE, else 1.
    static es_key_rotation of(const ggml_tensor * k_cur, int64_t pos_per_row, uint32_t n_embd_head);

    // Rotates by differences of positions, as the model's graph does. Angles add up, also with linear, YaRN and Llama 3
    // scaling, since the frequency of each dimension is fixed. cur: [n_embd_head, n_head, n_pos] f32; pos:
    // [n_pos*pos_per_row] i32, of which a layer with plain positions takes the first n_pos.
    ggml_tensor * rotate(ggml_context * ctx, ggml_tensor * cur, ggml_tensor * pos, int64_t n_pos) const;
};
