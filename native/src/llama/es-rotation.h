// How a model rotates its keys, read from the graph that computes them.
#pragma once

#include "ggml.h"

#include <cstdint>

struct es_key_rotation {
    bool          rotated    = false;
    int32_t       params[16] = {};      // op_params of its GGML_OP_ROPE, for a rotation by a difference
    ggml_tensor * factors    = nullptr; // its frequency factors, or null
    int64_t       n_hadamard = 0;       // size of the matrix that the graph turns them by before the store, 0: none
    const char *  unknown    = nullptr; // what is done with the keys that cannot be followed

    // k_cur: what a layer stores in the cache. pos_per_row: positions that a token has, 4 with M-RoPE, else 1.
    static es_key_rotation of(const ggml_tensor * k_cur, int64_t pos_per_row, uint32_t n_embd_head);

    // Rotate by differences of positions, as the model's own graph rotates. Angles add up, also under linear, YaRN and
    // Llama 3 scaling, since each dimension's frequency is fixed. cur: [n_embd_head, n_head, n_pos] f32; pos:
    // [n_pos*pos_per_row] i32, of which a layer with plain positions takes the first n_pos.
    ggml_tensor * rotate(ggml_context * ctx, ggml_tensor * cur, ggml_tensor * pos, int64_t n_pos) const;
};
