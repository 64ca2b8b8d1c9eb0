// The bank's blocks as bytes. Per cache { n_rows and part, pos0, pos, n_layers }, then per layer in ascending order
// { il, n_embd, rows as f32 }; a copy goes on with what a layer's cells hold: values, and keys that are not rotated,
// which nothing else would write.
#include "es-bank.h"

#include <algorithm>
#include <cstring>
#include <limits>

namespace {

struct block_header {
    uint32_t rows_part; // n_rows, and the part in the highest bit
    int32_t  pos0;
    int32_t  pos;
    uint32_t n_layers;

    uint32_t n_rows() const { return rows_part & ~(1u << 31); }
    int32_t  part() const { return (int32_t) (rows_part >> 31); }
};
struct layer_header {
    int32_t  il;
    uint32_t n_embd;
};

// Bytes to read or to write, one after another.
struct writer {
    uint8_t * dst;
    size_t    size, at = 0;

    uint8_t * next(size_t n) { // null: only counted
        uint8_t * p = dst && n <= size - std::min(size, at) ? dst + at : nullptr;
        at += n;
        return p;
    }
    void put(const void * src, size_t n) {
        if (uint8_t * p = next(n)) {
            memcpy(p, src, n);
        }
    }
};
struct reader {
    const uint8_t * src;
    size_t          size, at = 0;

    const uint8_t * next(size_t n) { // null: there are no more
        if (n > size - at) {
            return nullptr;
        }
        at += n;
        return src + at - n;
    }
    bool get(void * out, size_t n) {
        const uint8_t * p = next(n);
        if (p) {
            memcpy(out, p, n);
        }
        return p != nullptr;
    }
};

// Calls f(offset, n_bytes) for what cells hold in a tensor, in an order that is the same for any cells.
template <typename F>
bool each_piece(const es_kv_cache & kv, llama_seq_id seq, const std::vector<uint32_t> & cells, const ggml_tensor * t,
                bool transposed, F && f) {
    const size_t first = (size_t) kv.stream_of(seq) * kv.n_cells();
    const size_t el    = ggml_type_size(t->type);
    const size_t row   = ggml_row_size(t->type, t->ne[0]);
    for (int64_t j = 0; j < (transposed ? t->ne[0] : 1); ++j) {
        for (const uint32_t idx : cells) {
            const size_t at = transposed ? (first * t->ne[0] + j * kv.n_cells() + idx) * el : (first + idx) * row;
            if (!f(at, transposed ? el : row)) {
                return false;
            }
        }
    }
    return true;
}

// What a copy has besides the rows, by layer.
template <typename F>
bool each_of_cells(const es_bank & bank, es_bank_key key, int32_t il, F && f) {
    const auto & b  = bank.blocks.at(key);
    const auto   it = bank.rotations.find(il);
    for (const auto & layer : bank.kv.layers()) {
        if ((int32_t) layer.il != il) {
            continue;
        }
        const auto piece    = [&](ggml_tensor * t) { return [&f, t](size_t at, size_t n) { return f(t, at, n); }; };
        const bool has_keys = it == bank.rotations.end() || !it->second.rotated;
        if ((has_keys && !each_piece(bank.kv, key.first, b.cells, layer.k, false, piece(layer.k))) ||
            (layer.v && !each_piece(bank.kv, key.first, b.cells, layer.v, bank.kv.v_trans(), piece(layer.v)))) {
            return false;
        }
    }
    return true;
}

int32_t write_block(es_bank & bank, es_bank_key key, bool with_cells, writer & out) {
    const auto & b = bank.blocks.at(key);
    if (b.n_filled != b.n_rows) {
        return ES_BANK_INVALID;
    }
    const block_header h = { b.n_rows | (uint32_t) key.second << 31, b.pos0, b.pos, (uint32_t) b.k.size() };
    out.put(&h, sizeof(h));
    for (const auto & [il, t] : b.k) {
        const layer_header lh = { il, (uint32_t) t->ne[0] };
        out.put(&lh, sizeof(lh));
        if (uint8_t * p = out.next(ggml_nbytes(t))) {
            ggml_backend_tensor_get(t, p, 0, ggml_nbytes(t));
        }
        if (with_cells) {
            each_of_cells(bank, key, il, [&](ggml_tensor * x, size_t at, size_t n) {
                if (uint8_t * p = out.next(n)) {
                    ggml_backend_tensor_get(x, p, at, n);
                }
                return true;
            });
        }
    }
    return ES_BANK_OK;
}

// pos: where to put it, in free cells; -1: where it was, in cells that are there.
int32_t read_block(llama_context & ctx, es_bank & bank, es_bank_key key, llama_pos pos, reader & in) {
    block_header h;
    if (!in.get(&h, sizeof(h)) || h.part() != key.second || h.n_rows() == 0 || h.n_rows() > bank.kv.n_cells() ||
        h.pos < 0 || h.pos0 < 0 || h.pos > std::numeric_limits<int32_t>::max() / 2) {
        return ES_BANK_FORMAT;
    }
    int32_t rc = bank.alloc(key, h.n_rows());
    if (rc != ES_BANK_OK) {
        return rc;
    }
    auto & b   = bank.blocks.at(key);
    b.n_filled = h.n_rows();
    b.pos0     = h.pos0;
    b.pos      = pos < 0 ? h.pos : pos;
    if (h.n_layers != b.k.size()) {
        return ES_BANK_FORMAT;
    }
    if (pos >= 0 && (rc = bank.take_cells(key)) != ES_BANK_OK) {
        return rc;
    }
    for (const auto & [il, t] : b.k) {
        layer_header    lh;
        const bool      known = in.get(&lh, sizeof(lh)) && lh.il == il && (int64_t) lh.n_embd == t->ne[0];
        const uint8_t * rows  = known ? in.next(ggml_nbytes(t)) : nullptr;
        if (!rows) {
            return ES_BANK_FORMAT;
        }
        ggml_backend_tensor_set(t, rows, 0, ggml_nbytes(t));
        const bool whole = pos < 0 || each_of_cells(
                                          bank, key, il,
                                          [&](ggml_tensor * x, size_t at, size_t n) {
                                              const uint8_t * p = in.next(n);
                                              if (p) {
                                                  ggml_backend_tensor_set(x, p, at, n);
                                              }
                                              return p != nullptr;
                                          });
        if (!whole) {
            return ES_BANK_FORMAT;
        }
    }
    bank.write_delta(ctx, b);
    b.moving = true; // a session's cells may be older than the last move, and new ones have no keys yet
    return pos < 0 ? bank.find_cells(key) : (int32_t) ES_BANK_OK;
}

} // namespace

size_t llama_es_bank_state_get(llama_context * ctx, llama_seq_id seq, uint8_t * dst, size_t size) {
    llama_synchronize(ctx);
    writer out = { dst, size };
    for (const int32_t part : { ES_BANK_SINKS, ES_BANK_RECALLED }) {
        const es_bank_key key = { seq, part };
        const int32_t     rc  = es_for_each_bank(*ctx, key, false, [&](es_bank & bank) -> int32_t {
            return bank.blocks.count(key) ? write_block(bank, key, false, out) : (int32_t) ES_BANK_OK;
        });
        if (rc != ES_BANK_OK) {
            return 0;
        }
    }
    return out.at;
}

int32_t llama_es_bank_state_set(llama_context * ctx, llama_seq_id seq, const uint8_t * src, size_t size) {
    llama_synchronize(ctx);
    ctx->es_graph_changed();
    reader in = { src, size };
    while (in.at < size) {
        block_header h;
        if (size - in.at < sizeof(h)) {
            return ES_BANK_FORMAT;
        }
        memcpy(&h, src + in.at, sizeof(h));
        const es_bank_key key = { seq, h.part() };
        const int32_t     rc  = es_for_each_bank(
            *ctx, key, false, [&](es_bank & bank) -> int32_t { return read_block(*ctx, bank, key, -1, in); });
        if (rc != ES_BANK_OK) {
            return rc;
        }
    }
    return ES_BANK_OK;
}

size_t llama_es_bank_copy(llama_context * ctx, llama_seq_id seq, int32_t part, uint8_t * dst, size_t size) {
    llama_synchronize(ctx);
    writer        out = { dst, size };
    const int32_t rc  = es_for_each_bank(*ctx, { seq, part }, true, [&](es_bank & bank) -> int32_t {
        return bank.kv.has_cell_ext() ? (int32_t) ES_BANK_UNSUPPORTED : write_block(bank, { seq, part }, true, out);
    });
    return rc == ES_BANK_OK ? out.at : 0;
}

int32_t llama_es_bank_paste(llama_context * ctx, llama_seq_id seq, int32_t part, llama_pos pos, const uint8_t * src,
                            size_t size) {
    llama_synchronize(ctx);
    ctx->es_graph_changed();
    reader        in = { src, size };
    const int32_t rc = es_for_each_bank(*ctx, { seq, part }, false, [&](es_bank & bank) -> int32_t {
        return read_block(*ctx, bank, { seq, part }, pos, in);
    });
    return rc == ES_BANK_OK && in.at != size ? (int32_t) ES_BANK_FORMAT : rc;
}
