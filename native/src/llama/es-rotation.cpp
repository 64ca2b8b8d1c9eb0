#include "es-rotation.h"

#include "es-llama-access.h"
#include "llama-es-bank.h"

#include <cmath>
#include <cstring>

namespace {

// What the walk from a stored key back to its projection met.
struct walked {
    const ggml_tensor * rope       = nullptr;
    int64_t             offset     = 0;       // elements of the key before the rotated ones
    int64_t             n_hadamard = 0;       // size of the Hadamard matrix applied last, 0: none
    const char *        unknown    = nullptr; // what it cannot follow
};

// Between the rotation and the store only what commutes with a rotation may happen: layout, one factor for the whole
// key, a norm without weights. Without a rotation anything linear in the hidden state ends the walk.
walked walk_back(const ggml_tensor * t) {
    const char * after      = nullptr; // something that does not commute
    int64_t      n_hadamard = 0;
    const auto   ended      = [&](const ggml_tensor * rope, const char * unknown) {
        walked w;
        w.rope       = rope;
        w.n_hadamard = n_hadamard;
        w.unknown    = unknown;
        return w;
    };
    while (t) {
        switch (t->op) {
        case GGML_OP_VIEW:
        case GGML_OP_RESHAPE:
        case GGML_OP_CONT:
        case GGML_OP_CPY:
        case GGML_OP_DUP:
        case GGML_OP_REPEAT:
        case GGML_OP_SCALE:
        case GGML_OP_RMS_NORM:
        case GGML_OP_L2_NORM: t = t->src[0]; break;
        case GGML_OP_NORM:
        case GGML_OP_CLAMP:
        case GGML_OP_MUL:
        case GGML_OP_ADD:
            after = ggml_op_name(t->op);
            t     = t->src[0];
            break;
        case GGML_OP_MUL_MAT:
            if (!(t->src[0]->flags & GGML_TENSOR_FLAG_INPUT)) {
                return ended(nullptr, nullptr); // the projection
            }
            n_hadamard = t->src[0]->ne[0]; // of a quantised K cache: its own inverse
            t          = t->src[1];
            break;
        case GGML_OP_MUL_MAT_ID:
        case GGML_OP_GET_ROWS:
        case GGML_OP_NONE: return ended(nullptr, nullptr);
        case GGML_OP_ROPE: return ended(t, after);
        case GGML_OP_CONCAT: {
            // MLA: a part that is not rotated beside one that is
            const walked first  = walk_back(t->src[0]);
            const walked second = walk_back(t->src[1]);
            walked       w      = second.rope ? second : first;
            if (!w.unknown) {
                w.unknown = after                       ? after
                            : first.rope && second.rope ? "two rotations in one key"
                            : t->op_params[0] != 0      ? "CONCAT"
                                                        : (second.rope ? first : second).unknown;
            }
            w.offset += second.rope ? t->src[0]->ne[0] : 0;
            w.n_hadamard = n_hadamard;
            return w;
        }
        default: return ended(nullptr, ggml_op_desc(t));
        }
    }
    return {};
}

float get_f32(const int32_t * params, int i) {
    float f;
    memcpy(&f, params + i, sizeof(f));
    return f;
}

// for tests: what the proof must notice
int32_t fault = ES_BANK_FAULT_NONE;

void distort(es_key_rotation & r, uint32_t n_embd_head) {
    const auto set = [&](int i, float f) { memcpy(r.params + i, &f, sizeof(f)); };
    if (fault == ES_BANK_FAULT_SIGN) {
        set(ES_ROPE_FREQ_SCALE, -get_f32(r.params, ES_ROPE_FREQ_SCALE));
    } else if (fault == ES_BANK_FAULT_BASE) {
        set(ES_ROPE_FREQ_BASE, 1.1f * get_f32(r.params, ES_ROPE_FREQ_BASE));
    } else if (fault == ES_BANK_FAULT_NOPE && !r.rotated) {
        r.rotated                = true;
        r.params[ES_ROPE_N_DIMS] = (int32_t) n_embd_head;
        set(ES_ROPE_FREQ_BASE, 10000.0f);
        set(ES_ROPE_FREQ_SCALE, 1.0f);
        set(ES_ROPE_ATTN_FACTOR, 1.0f);
    }
}

} // namespace

void llama_es_bank_fault(int32_t kind) {
    fault = kind;
}

es_key_rotation es_key_rotation::of(const ggml_tensor * k_cur, int64_t pos_per_row, uint32_t n_embd_head) {
    const walked    w = walk_back(k_cur);
    es_key_rotation r;
    r.unknown    = w.unknown;
    r.n_hadamard = w.n_hadamard;
    if (w.rope) {
        r.rotated = true;
        memcpy(r.params, w.rope->op_params, sizeof(r.params));
        r.params[ES_ROPE_OFFSET] += (int32_t) w.offset;
        r.factors = w.rope->src[2];
        if (r.factors && r.factors->op != GGML_OP_NONE) {
            r.unknown = "rotation factors that the graph computes";
        }
        if (r.params[ES_ROPE_MODE] & GGML_ROPE_TYPE_MROPE && pos_per_row != GGML_MROPE_SECTIONS) {
            r.unknown = "multi-dimensional positions in a model that has one";
        }
        // ggml multiplies the magnitude by 1 + 0.1 ln(1/freq_scale) when ext_factor != 0 (rope_yarn in ops.cpp); it
        // is in the key already, so it is cancelled
        const float magnitude   = get_f32(r.params, ES_ROPE_EXT_FACTOR) != 0.0f
                                      ? 1.0f + 0.1f * logf(1.0f / get_f32(r.params, ES_ROPE_FREQ_SCALE))
                                      : 1.0f;
        const float attn_factor = 1.0f / magnitude;
        memcpy(r.params + ES_ROPE_ATTN_FACTOR, &attn_factor, sizeof(attn_factor));
    }
    if (fault != ES_BANK_FAULT_NONE) {
        distort(r, n_embd_head);
    }
    return r;
}

ggml_tensor * es_key_rotation::rotate(ggml_context * ctx, ggml_tensor * cur, ggml_tensor * pos, int64_t n_pos) const {
    const int     mode    = params[ES_ROPE_MODE];
    const int     n_dims  = params[ES_ROPE_N_DIMS];
    int           none[4] = {};
    ggml_tensor * out;
    if (mode & GGML_ROPE_TYPE_MROPE) {
        out = ggml_rope_multi(ctx, cur, pos, factors, n_dims, none, mode, 0, 1.0f, 1.0f, 0.0f, 1.0f, 0.0f, 0.0f);
    } else {
        ggml_tensor * p = pos->ne[0] == n_pos ? pos : ggml_view_1d(ctx, pos, n_pos, 0);
        out             = ggml_rope_ext(ctx, cur, p, factors, n_dims, mode, 0, 1.0f, 1.0f, 0.0f, 1.0f, 0.0f, 0.0f);
    }
    memcpy(out->op_params, params, sizeof(params));
    return out;
}
