#include "es-bank.h"

#include <algorithm>

es_bank & es_kv_cache::bank() const {
    if (!kv->es) {
        kv->es = std::make_shared<es_bank>(*this);
    }
    return *kv->es;
}

//
// graph building
//

ggml_tensor * es_bank::capture(ggml_context * ctx, ggml_tensor * k_cur, int32_t il) {
    rotations[il] = es_key_rotation::of(k_cur, pos_per_row(), kv.n_embd_head_k(il));
    for (auto & [key, b] : blocks) {
        const auto it = b.k.find(il);
        // reserve passes build graphs of other sizes: only the announced decode is captured
        if (b.n_capture == 0 || k_cur->ne[1] != b.n_capture || it == b.k.end()) {
            continue;
        }
        ggml_tensor * rows =
            ggml_view_2d(ctx, it->second, k_cur->ne[0], b.n_capture, it->second->nb[1], b.n_filled * it->second->nb[1]);
        ggml_tensor * rot = b.in.at(il).rot;
        // the Hadamard matrix is its own inverse
        ggml_tensor * plain = rot ? llama_mul_mat_hadamard(ctx, k_cur, rot) : k_cur;

        // the cache is filled from the copy, so that the copy is part of the graph
        k_cur = ggml_cpy(ctx, plain, rows);
        if (rot) {
            k_cur = llama_mul_mat_hadamard(ctx, k_cur, rot);
        }
        b.capture_built = true;
    }
    return k_cur;
}

ggml_tensor * es_bank::place(ggml_context * ctx, ggml_tensor * k, ggml_tensor * stored, int32_t il) const {
    for (const auto & [key, b] : blocks) {
        const auto it = b.k.find(il);
        // a key that is not rotated is the same at every position
        if (!(b.moving || reserving) || it == b.k.end() || !rotations.at(il).rotated) {
            continue;
        }
        const auto &  in       = b.in.at(il);
        const int64_t n_head   = kv.n_head_kv(il);
        const int64_t n_embd_h = kv.n_embd_head_k(il);

        // On devices each row is a position: the CUDA and Vulkan backends fuse ROPE, VIEW, SET_ROWS of these shapes. On
        // the CPU all rows are heads of one position, which takes a single row of angles.
        const int64_t n_pos = in.delta->ne[0] / pos_per_row();
        ggml_tensor * cur   = ggml_reshape_3d(ctx, it->second, n_embd_h, n_head * b.n_rows / n_pos, n_pos);
        // only for the order: the new keys are stored first, so that their rotation and store stay adjacent. Ordering
        // through the destination would keep Vulkan from fusing: no other node may write it.
        cur->src[1] = stored;
        cur         = rotations.at(il).rotate(ctx, cur, in.delta, n_pos);
        if (in.rot) {
            cur = llama_mul_mat_hadamard(ctx, cur, in.rot);
        }
        cur    = ggml_view_2d(ctx, cur, n_embd_h * n_head, b.n_rows, ggml_row_size(cur->type, n_embd_h * n_head), 0);
        stored = ggml_set_rows(ctx, k, cur, in.cells);
    }
    return stored;
}

//
// blocks
//

int32_t es_bank::alloc(es_bank_key key, uint32_t n_rows) {
    es_bank_block b;
    b.n_rows = n_rows;
    b.delta.resize(n_rows * pos_per_row());

    std::vector<float> hadamard;
    int64_t            n_rot = 0;
    for (const auto & [il, r] : rotations) {
        n_rot = std::max(n_rot, r.n_hadamard); // all layers that have one have the same
    }
    if (n_rot > 0) {
        hadamard = kv.hadamard(n_rot);
    }

    std::map<ggml_backend_buffer_type_t, std::vector<uint32_t>> by_buft; // -> model layers
    for (const auto & layer : kv.layers()) {
        by_buft[ggml_backend_buffer_get_type(layer.k->buffer)].push_back(layer.il);
    }

    for (const auto & [buft, layers] : by_buft) {
        ggml_init_params params = { (layers.size() + 3) * ggml_tensor_overhead(), nullptr, /*no_alloc =*/true };
        ggml_context_ptr ctx{ ggml_init(params) };
        if (!ctx) {
            return ES_BANK_NO_MEMORY;
        }
        es_bank_block::inputs in = {
            ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I32,
                               (ggml_backend_buft_is_host(buft) ? 1 : n_rows) * pos_per_row()),
            ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I64, n_rows),
            n_rot ? ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, n_rot, n_rot) : nullptr,
        };
        for (const uint32_t il : layers) {
            b.k[il]       = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, kv.n_embd_k_gqa(il), n_rows);
            b.in[il]      = in;
            const auto it = rotations.find(il); // a layer that the graph leaves out (MTP) has none
            if (it == rotations.end() || it->second.n_hadamard == 0) {
                b.in[il].rot = nullptr;
            }
            ggml_format_name(b.k[il], "es_bank_k_l%u", il);
        }
        ggml_backend_buffer_ptr buf{ ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), buft) };
        if (!buf) {
            return ES_BANK_NO_MEMORY;
        }
        ggml_backend_buffer_clear(buf.get(), 0);
        if (in.rot) {
            ggml_backend_tensor_set(in.rot, hadamard.data(), 0, ggml_nbytes(in.rot));
        }
        b.bufs.emplace_back(std::move(ctx), std::move(buf));
    }

    blocks[key] = std::move(b);
    return ES_BANK_OK;
}

int32_t es_bank::find_cells(es_bank_key key) {
    auto &       b     = blocks.at(key);
    const auto & cells = kv.cells_of(key.first);

    b.cells.clear();
    std::vector<int64_t> rows;
    for (const auto & [pos, idx] : cells.seq_pos_get(key.first)) {
        if (pos == b.pos + (llama_pos) b.cells.size() && b.cells.size() < b.n_rows) {
            b.cells.push_back(idx);
            rows.push_back((int64_t) kv.stream_of(key.first) * kv.n_cells() + idx);
        }
    }
    if (b.cells.size() != b.n_rows) {
        return ES_BANK_INVALID;
    }
    const ggml_tensor * last = nullptr;
    for (const auto & [il, in] : b.in) {
        if (in.cells != last) {
            ggml_backend_tensor_set(in.cells, rows.data(), 0, ggml_nbytes(in.cells));
            last = in.cells;
        }
    }
    return ES_BANK_OK;
}

int32_t es_bank::take_cells(es_bank_key key) {
    const auto & b     = blocks.at(key);
    auto &       cells = kv.cells_of(key.first);
    uint32_t     n     = 0;
    for (uint32_t i = 0; i < cells.size() && n < b.n_rows; ++i) {
        if (cells.is_empty(i)) {
            cells.pos_set(i, b.pos + (llama_pos) n++);
            cells.seq_add(i, key.first);
        }
    }
    return find_cells(key); // fails if there were too few
}

// The backend whose default buffer type this is, or null (such as for the CPU with pinned memory of a GPU).
static ggml_backend_t backend_of(ggml_backend_sched_t sched, ggml_backend_buffer_type_t buft) {
    for (int i = 0; i < ggml_backend_sched_get_n_backends(sched); ++i) {
        const ggml_backend_t backend = ggml_backend_sched_get_backend(sched, i);
        if (ggml_backend_get_default_buffer_type(backend) == buft) {
            return backend;
        }
    }
    return nullptr;
}

// Positions of text in the layout of M-RoPE: section by section, where the fourth is 0
// (llm_graph_input_pos::set_input).
void es_bank::spread(int32_t * out, const int32_t * pos, int64_t n) const {
    for (int64_t section = 0; section < pos_per_row(); ++section) {
        for (int64_t i = 0; i < n; ++i) {
            out[section * n + i] = section < 3 ? pos[i] : 0;
        }
    }
}

void es_bank::write_delta(llama_context & ctx, es_bank_block & b) const {
    // one for host buffers, n_rows for devices, which may read b.delta asynchronously: it must stay unchanged meanwhile
    const std::vector<int32_t> deltas(b.n_rows, b.pos - b.pos0);
    int32_t                    host[GGML_MROPE_SECTIONS] = {};
    spread(host, deltas.data(), 1);
    spread(b.delta.data(), deltas.data(), b.n_rows);
    const ggml_tensor * last = nullptr;
    for (const auto & [il, in] : b.in) {
        if (in.delta == last) {
            continue;
        }
        last             = in.delta;
        const auto buft  = ggml_backend_buffer_get_type(in.delta->buffer);
        const auto owner = backend_of(ctx.get_sched(), buft);
        if (owner && !ggml_backend_buft_is_host(buft)) {
            // queued on the backend: nothing waits, and a decode in flight still reads the old value
            ggml_backend_tensor_set_async(owner, in.delta, b.delta.data(), 0, ggml_nbytes(in.delta));
            continue;
        }
        if (!owner) {
            ctx.synchronize();
        } // else: the CPU, which is done when llama_decode returns
        const bool one = in.delta->ne[0] == pos_per_row();
        ggml_backend_tensor_set(in.delta, one ? host : b.delta.data(), 0, ggml_nbytes(in.delta));
    }
}

int32_t es_bank::move(llama_context & ctx, es_bank_key key, llama_pos pos) {
    auto & b     = blocks.at(key);
    auto & cells = kv.cells_of(key.first);

    for (uint32_t i = 0; i < b.n_rows; ++i) {
        const uint32_t idx = b.cells[i];
        if (cells.is_empty(idx) || !cells.seq_has(idx, key.first) || cells.pos_get(idx) != b.pos + (llama_pos) i) {
            return ES_BANK_INVALID;
        }
    }
    for (const uint32_t idx : b.cells) {
        cells.pos_add(idx, pos - b.pos);
    }
    // the keys come from the bank: llama.cpp must not shift them
    cells.reset_shift();
    b.pos = pos;
    write_delta(ctx, b);
    return ES_BANK_OK;
}
