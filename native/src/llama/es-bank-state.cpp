// The bank's blocks as bytes. Per cache { n_rows, pos0, pos, n_layers }, then per layer in ascending order
// { il, n_embd, rows as f32 }.
#include "es-bank.h"

#include <cstring>
#include <limits>

namespace {
struct block_header {
    uint32_t n_rows;
    int32_t  pos0;
    int32_t  pos;
    uint32_t n_layers;
};
struct layer_header {
    int32_t  il;
    uint32_t n_embd;
};
} // namespace

size_t llama_es_bank_state_get(llama_context * ctx, llama_seq_id seq, uint8_t * dst, size_t size) {
    llama_synchronize(ctx);
    size_t        total = 0;
    const int32_t rc    = es_for_each_bank(*ctx, seq, true, [&](es_bank & bank) -> int32_t {
        const auto & b = bank.blocks.at(seq);
        if (b.n_filled != b.n_rows) {
            return ES_BANK_INVALID;
        }
        const auto put = [&](const void * src, size_t n) {
            if (dst && total + n <= size) {
                memcpy(dst + total, src, n);
            }
            total += n;
        };
        const block_header h = { b.n_rows, b.pos0, b.pos, (uint32_t) b.k.size() };
        put(&h, sizeof(h));
        for (const auto & [il, t] : b.k) {
            const layer_header lh = { il, (uint32_t) t->ne[0] };
            put(&lh, sizeof(lh));
            if (dst && total + ggml_nbytes(t) <= size) {
                ggml_backend_tensor_get(t, dst + total, 0, ggml_nbytes(t));
            }
            total += ggml_nbytes(t);
        }
        return ES_BANK_OK;
    });
    return rc == ES_BANK_OK ? total : 0;
}

int32_t llama_es_bank_state_set(llama_context * ctx, llama_seq_id seq, const uint8_t * src, size_t size) {
    size_t     off = 0;
    const auto get = [&](void * out, size_t n) {
        if (n > size - off) {
            return false;
        }
        memcpy(out, src + off, n);
        off += n;
        return true;
    };
    llama_synchronize(ctx);
    ctx->es_graph_changed();
    const int32_t rc = es_for_each_bank(*ctx, seq, false, [&](es_bank & bank) -> int32_t {
        block_header h;
        if (!get(&h, sizeof(h)) || h.n_rows == 0 || h.n_rows > bank.kv.n_cells() || h.pos < 0 || h.pos0 < 0 ||
            h.pos > std::numeric_limits<int32_t>::max() / 2) {
            return ES_BANK_FORMAT;
        }
        const int32_t rc = bank.alloc(seq, h.n_rows);
        if (rc != ES_BANK_OK) {
            return rc;
        }
        auto & b   = bank.blocks.at(seq);
        b.n_filled = h.n_rows;
        b.pos0     = h.pos0;
        b.pos      = h.pos;
        if (h.n_layers != b.k.size()) {
            return ES_BANK_FORMAT;
        }
        for (const auto & [il, t] : b.k) {
            layer_header lh;
            if (!get(&lh, sizeof(lh)) || lh.il != il || (int64_t) lh.n_embd != t->ne[0] ||
                ggml_nbytes(t) > size - off) {
                return ES_BANK_FORMAT;
            }
            ggml_backend_tensor_set(t, src + off, 0, ggml_nbytes(t));
            off += ggml_nbytes(t);
        }
        bank.write_delta(*ctx, b);
        b.moving = true; // the saved cells may be older than the last move
        return bank.find_cells(seq);
    });
    return rc == ES_BANK_OK && off != size ? (int32_t) ES_BANK_FORMAT : rc;
}
