// Rebasing: the only time that keys of the window are rotated again.
#include "es-bank.h"

#include <algorithm>

// Keys are converted to float32 in slices of this many cells, to save memory; slices of very large caches are larger,
// to keep the graph small.
static int64_t slice_size(int64_t n_cells) {
    return std::max<int64_t>(256, (n_cells + 63) / 64);
}

int32_t es_bank::rotate_cells(llama_context & ctx, const std::vector<int32_t> & shift) {
    const int64_t n_cells = shift.size();
    const int64_t n_slice = slice_size(n_cells);
    const int64_t per_row = pos_per_row();
    if (std::all_of(shift.begin(), shift.end(), [](int32_t d) { return d == 0; })) {
        return ES_BANK_OK;
    }
    std::vector<int32_t> positions(n_cells * per_row); // slice by slice
    for (int64_t i = 0; i < n_cells; i += n_slice) {
        spread(positions.data() + i * per_row, shift.data() + i, std::min(n_slice, n_cells - i));
    }

    ggml_backend_sched_t sched = ctx.get_sched();
    auto *               res   = ctx.get_gf_res_reserve();

    for (const auto & layer : kv.layers()) {
        const uint32_t il = layer.il;
        const auto     it = rotations.find(il);
        if (it == rotations.end() || !it->second.rotated) {
            continue;
        }
        const int64_t n_head   = kv.n_head_kv(il);
        const int64_t n_embd_h = kv.n_embd_head_k(il);

        res->reset();
        auto * gctx = res->get_ctx();
        auto * gf   = res->get_gf();

        ggml_tensor * pos = ggml_new_tensor_1d(gctx, GGML_TYPE_I32, n_cells * per_row);
        ggml_set_input(pos);
        ggml_tensor * rot = it->second.n_hadamard ? kv.new_hadamard_input(gctx) : nullptr;

        for (int64_t i = 0; i < n_cells; i += n_slice) {
            const int64_t n   = std::min(n_slice, n_cells - i);
            bool          any = false;
            for (int64_t j = i; j < i + n; ++j) {
                any = any || shift[j] != 0;
            }
            if (!any) {
                continue;
            }
            ggml_tensor * k   = ggml_view_3d(gctx, layer.k, n_embd_h, n_head, n, ggml_row_size(layer.k->type, n_embd_h),
                                             ggml_row_size(layer.k->type, n_embd_h * n_head),
                                             i * ggml_row_size(layer.k->type, n_embd_h * n_head));
            ggml_tensor * p   = ggml_view_1d(gctx, pos, n * per_row, i * per_row * sizeof(int32_t));
            ggml_tensor * cur = ggml_cast(gctx, k, GGML_TYPE_F32);
            if (rot) {
                cur = llama_mul_mat_hadamard(gctx, cur, rot);
            }
            cur = it->second.rotate(gctx, cur, p, n);
            if (rot) {
                cur = llama_mul_mat_hadamard(gctx, cur, rot);
            }
            ggml_build_forward_expand(gf, ggml_cpy(gctx, cur, k));
        }

        ggml_backend_sched_reset(sched);
        if (!ggml_backend_sched_alloc_graph(sched, gf)) {
            return ES_BANK_COMPUTE;
        }
        ggml_backend_tensor_set(pos, positions.data(), 0, ggml_nbytes(pos));
        if (rot && rot->buffer) {
            kv.set_hadamard_input(rot);
        }
        if (ctx.graph_compute(gf, true) != GGML_STATUS_SUCCESS) {
            return ES_BANK_COMPUTE;
        }
        ctx.synchronize();
    }
    return ES_BANK_OK;
}

int32_t es_bank::shift_window(llama_context & ctx, llama_seq_id seq, llama_pos delta) {
    auto &       cells = kv.cells_of(seq);
    const size_t first = (size_t) kv.stream_of(seq) * kv.n_cells();

    std::vector<uint32_t> pinned;
    for (const auto & [key, b] : blocks) {
        if (key.first == seq) {
            pinned.insert(pinned.end(), b.cells.begin(), b.cells.end());
        }
    }

    std::vector<int32_t>  shift((size_t) kv.n_cells() * kv.n_streams(), 0);
    std::vector<uint32_t> idxs;
    for (const auto & [pos, idx] : cells.seq_pos_get(seq)) {
        if (std::find(pinned.begin(), pinned.end(), idx) != pinned.end()) {
            continue;
        }
        // a cell shared with other sequences has only one key
        if (pos + delta < 0 || cells.seq_count(idx) != 1) {
            return ES_BANK_INVALID;
        }
        idxs.push_back(idx);
        shift[first + idx] = delta;
    }
    const int32_t rc = rotate_cells(ctx, shift);
    if (rc != ES_BANK_OK) {
        return rc;
    }
    for (const uint32_t idx : idxs) {
        cells.pos_add(idx, delta);
    }
    cells.reset_shift();
    return ES_BANK_OK;
}
