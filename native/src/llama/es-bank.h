// The sink bank inside libllama; its contract is in llama-es-bank.h.
#pragma once

#include "es-llama-access.h"
#include "es-rotation.h"
#include "ggml-cpp.h"
#include "llama-es-bank.h"

#include <cstdint>
#include <map>
#include <unordered_map>
#include <vector>

// Pinned rows of one sequence in one KV cache.
struct es_bank_block {
    uint32_t  n_rows   = 0;     // pinned cells
    uint32_t  n_filled = 0;     // rows captured so far
    llama_pos pos0     = 0;     // position of row 0 when captured
    llama_pos pos      = 0;     // position of row 0 now
    bool      moving   = false; // decode graphs write the rows to the cache

    std::vector<int32_t>  delta; // [n_rows*pos_per_row]: pos - pos0, kept here while a backend may still be reading it
    std::vector<uint32_t> cells; // [n_rows]: the cells of the rows, once all are captured

    // rows that the next decode captures; 0: none
    uint32_t n_capture     = 0;
    bool     capture_built = false; // a graph with this capture was built

    std::map<int32_t, ggml_tensor *> k; // model layer -> [n_embd_k_gqa, n_rows] f32, before Hadamard

    // small inputs, one set per buffer type, so that nothing is copied between devices
    struct inputs {
        ggml_tensor * delta; // [(1 or n_rows)*pos_per_row] i32: pos - pos0, see es_bank::place
        ggml_tensor * cells; // [n_rows] i64: rows of the merged K tensor
        ggml_tensor * rot;   // [n, n]   f32: Hadamard matrix of quantised K, or null
    };
    std::unordered_map<int32_t, inputs> in; // model layer -> its buffer type's inputs

    std::vector<std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>> bufs;
};

// A sequence, and which of its blocks.
using es_bank_key = std::pair<llama_seq_id, int32_t>;

// One per cache. Everything goes through backend buffers and ggml ops.
class es_bank {
public:
    explicit es_bank(const es_kv_cache & kv) : kv(kv) {}

    // Graph building, called from llama_kv_cache::cpy_k. k_cur: [n_embd_k_gqa, n_tokens] f32; k: the layer's (merged)
    // cache tensor; stored: the node that stores the new keys in it. Both return what cpy_k uses instead.
    ggml_tensor * capture(ggml_context * ctx, ggml_tensor * k_cur, int32_t il);
    ggml_tensor * place(ggml_context * ctx, ggml_tensor * k, ggml_tensor * stored, int32_t il) const;

    int32_t alloc(es_bank_key key, uint32_t n_rows);
    int32_t move(llama_context & ctx, es_bank_key key, llama_pos pos);
    int32_t find_cells(es_bank_key key); // by position, when the rows are complete
    int32_t take_cells(es_bank_key key); // free ones
    void    write_delta(llama_context & ctx, es_bank_block & b) const;

    // rotate the keys of the cells whose shift is not 0; shift: [kv_size*n_stream]
    int32_t rotate_cells(llama_context & lctx, const std::vector<int32_t> & shift);
    int32_t shift_window(llama_context & lctx, llama_seq_id seq, llama_pos delta);

    const es_kv_cache                            kv;
    std::map<es_bank_key, es_bank_block>         blocks;
    std::unordered_map<int32_t, es_key_rotation> rotations; // model layer -> how its graph rotates keys
    bool     reserving  = false;                            // buffers are being reserved: every block counts as moving
    uint32_t n_reserved = 0;                                // rows that buffers are reserved for

private:
    int64_t pos_per_row() const { return kv.n_pos_per_token(); }
    void    spread(int32_t * out, const int32_t * pos, int64_t n) const;
};

// Calls f on the bank of each cache of ctx until one fails; throws nothing. need_block: there must be such a block.
template <typename F>
int32_t es_for_each_bank(llama_context & ctx, es_bank_key key, bool need_block, F && f) {
    try {
        const auto caches = es_caches_of(ctx);
        if (caches.empty()) {
            return ES_BANK_UNSUPPORTED;
        }
        for (const es_kv_cache & kv : caches) {
            if (!kv.has_seq(key.first) || (need_block && kv.bank().blocks.count(key) == 0)) {
                return ES_BANK_INVALID;
            }
        }
        for (const es_kv_cache & kv : caches) {
            const int32_t rc = f(kv.bank());
            if (rc != ES_BANK_OK) {
                return rc;
            }
        }
        return ES_BANK_OK;
    } catch (const std::bad_alloc &) {
        return ES_BANK_NO_MEMORY;
    } catch (const std::exception & e) {
        LLAMA_LOG_ERROR("%s: %s\n", __func__, e.what());
        return ES_BANK_COMPUTE;
    }
}
