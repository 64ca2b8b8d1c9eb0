#include "es-bank.h"

#include "llama-context.h"
#include "llama-es-bank.h"
#include "llama-impl.h"
#include "llama-kv-cache-iswa.h"
#include "llama-kv-cache.h"
#include "llama-memory-hybrid-iswa.h"
#include "llama-memory-hybrid.h"
#include "llama-memory-recurrent.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <typeinfo>

//
// graph building
//

int64_t es_bank::pos_per_row() const {
    return kv.hparams.n_pos_per_embd();
}

ggml_tensor * es_bank::capture(ggml_context * ctx, ggml_tensor * k_cur, int32_t il) {
    rotations[il] = es_key_rotation::of(k_cur, pos_per_row(), kv.hparams.n_embd_head_k(il));
    for (auto & [seq, b] : blocks) {
        const auto it = b.k.find(il);
        // reserve passes build graphs of other sizes: only the announced decode is the capture
        if (b.n_capture == 0 || k_cur->ne[1] != b.n_capture || it == b.k.end()) {
            continue;
        }
        ggml_tensor * rows =
            ggml_view_2d(ctx, it->second, k_cur->ne[0], b.n_capture, it->second->nb[1], b.n_filled * it->second->nb[1]);
        ggml_tensor * rot = b.in.at(il).rot;
        // the Hadamard matrix is its own inverse
        ggml_tensor * plain = rot ? llama_mul_mat_hadamard(ctx, k_cur, rot) : k_cur;

        // the cache gets its rows from the copy, so that the copy is part of the graph
        k_cur = ggml_cpy(ctx, plain, rows);
        if (rot) {
            k_cur = llama_mul_mat_hadamard(ctx, k_cur, rot);
        }
        b.capture_built = true;
    }
    return k_cur;
}

ggml_tensor * es_bank::place(ggml_context * ctx, ggml_tensor * k, ggml_tensor * stored, int32_t il) const {
    for (const auto & [seq, b] : blocks) {
        const auto it = b.k.find(il);
        // a key that is not rotated is the same at every position
        if (!(b.armed || reserving) || it == b.k.end() || !rotations.at(il).rotated) {
            continue;
        }
        const auto &  in       = b.in.at(il);
        const int64_t n_head   = kv.hparams.n_head_kv(il);
        const int64_t n_embd_h = kv.hparams.n_embd_head_k(il);

        // On a device every row is a position: ROPE, VIEW, SET_ROWS with these shapes are what the CUDA and Vulkan
        // backends run as one. On the CPU all rows are heads of one position, which needs one row of angles.
        const int64_t n_pos = in.delta->ne[0] / pos_per_row();
        ggml_tensor * cur   = ggml_reshape_3d(ctx, it->second, n_embd_h, n_head * b.n_rows / n_pos, n_pos);
        // no more than an order: the new keys are stored first, so that their rotation and store stay neighbours.
        // Through the destination it would keep Vulkan from fusing: it must not be what another node writes.
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

int32_t es_bank::alloc(llama_seq_id seq, uint32_t n_rows) {
    es_bank_block b;
    b.n_rows = n_rows;
    b.delta.resize(n_rows * pos_per_row());

    std::vector<float> hadamard;
    int64_t            n_rot = 0;
    for (const auto & [il, r] : rotations) {
        n_rot = std::max(n_rot, r.n_hadamard); // all layers that have one have the same
    }
    if (n_rot > 0) {
        hadamard = kv.attn_rot_hadamard.at(n_rot);
    }

    std::map<ggml_backend_buffer_type_t, std::vector<size_t>> by_buft; // -> indices of kv.layers
    for (size_t i = 0; i < kv.layers.size(); ++i) {
        by_buft[ggml_backend_buffer_get_type(kv.layers[i].k->buffer)].push_back(i);
    }

    for (const auto & [buft, idxs] : by_buft) {
        ggml_init_params params = { (idxs.size() + 3) * ggml_tensor_overhead(), nullptr, /*no_alloc =*/true };
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
        for (const size_t i : idxs) {
            const uint32_t il = kv.layers[i].il;
            b.k[il]           = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, kv.hparams.n_embd_k_gqa(il), n_rows);
            b.in[il]          = in;
            const auto it     = rotations.find(il); // a layer that the graph leaves out (MTP) has none
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

    blocks[seq] = std::move(b);
    return ES_BANK_OK;
}

int32_t es_bank::find_cells(llama_seq_id seq) {
    auto &       b     = blocks.at(seq);
    const auto   strm  = kv.seq_to_stream[seq];
    const auto & cells = kv.v_cells[strm];

    b.cells.clear();
    std::vector<int64_t> rows;
    for (const auto & [pos, idx] : cells.seq_pos_get(seq)) {
        if (pos == b.pos + (llama_pos) b.cells.size() && b.cells.size() < b.n_rows) {
            b.cells.push_back(idx);
            rows.push_back((int64_t) strm * cells.size() + idx);
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

// The backend that computes in buffers of this type, if it is the type's own (not the CPU with pinned memory of a GPU).
static ggml_backend_t backend_of(ggml_backend_sched_t sched, ggml_backend_buffer_type_t buft) {
    for (int i = 0; i < ggml_backend_sched_get_n_backends(sched); ++i) {
        const ggml_backend_t backend = ggml_backend_sched_get_backend(sched, i);
        if (ggml_backend_get_default_buffer_type(backend) == buft) {
            return backend;
        }
    }
    return nullptr;
}

// Positions of a text as M-RoPE takes them: all of the first section, of the second, of the third; the fourth stays 0
// (llm_graph_input_pos::set_input).
static void spread(int32_t * out, const int32_t * pos, int64_t n, int64_t per_row) {
    for (int64_t section = 0; section < per_row; ++section) {
        for (int64_t i = 0; i < n; ++i) {
            out[section * n + i] = section < 3 ? pos[i] : 0;
        }
    }
}

void es_bank::write_delta(llama_context & ctx, es_bank_block & b) const {
    // one for a host's buffer, n_rows for a device's: both may read from the same array, which must stay as it is
    // while a device does
    const std::vector<int32_t> deltas(b.n_rows, b.pos - b.pos0);
    int32_t                    host[GGML_MROPE_SECTIONS] = {};
    spread(host, deltas.data(), 1, pos_per_row());
    spread(b.delta.data(), deltas.data(), b.n_rows, pos_per_row());
    const ggml_tensor * last = nullptr;
    for (const auto & [il, in] : b.in) {
        if (in.delta == last) {
            continue;
        }
        last             = in.delta;
        const auto buft  = ggml_backend_buffer_get_type(in.delta->buffer);
        const auto owner = backend_of(ctx.get_sched(), buft);
        if (owner && !ggml_backend_buft_is_host(buft)) {
            // in the order of the backend's own work: nobody waits, a decode in flight still reads the old value
            ggml_backend_tensor_set_async(owner, in.delta, b.delta.data(), 0, ggml_nbytes(in.delta));
            continue;
        }
        if (!owner) {
            ctx.synchronize();
        } // else it is the CPU, which is done when llama_decode returns
        const bool one = in.delta->ne[0] == pos_per_row();
        ggml_backend_tensor_set(in.delta, one ? host : b.delta.data(), 0, ggml_nbytes(in.delta));
    }
}

int32_t es_bank::move(llama_context & ctx, llama_seq_id seq, llama_pos pos) {
    auto & b     = blocks.at(seq);
    auto & cells = kv.v_cells[kv.seq_to_stream[seq]];

    for (uint32_t i = 0; i < b.n_rows; ++i) {
        const uint32_t idx = b.cells[i];
        if (cells.is_empty(idx) || !cells.seq_has(idx, seq) || cells.pos_get(idx) != b.pos + (llama_pos) i) {
            return ES_BANK_INVALID;
        }
    }
    for (const uint32_t idx : b.cells) {
        cells.pos_add(idx, pos - b.pos);
    }
    // the keys come from the bank: llama.cpp must not shift them as well
    cells.reset_shift();
    b.pos = pos;
    write_delta(ctx, b);
    return ES_BANK_OK;
}

//
// rebase
//

// The type conversions go through float32 slices of this many cells, so that a rebase needs little memory; with
// very large caches slices grow, so that the graph stays small.
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
        spread(positions.data() + i * per_row, shift.data() + i, std::min(n_slice, n_cells - i), per_row);
    }

    ggml_backend_sched_t sched = ctx.get_sched();
    auto *               res   = ctx.get_gf_res_reserve();

    for (const auto & layer : kv.layers) {
        const uint32_t il = layer.il;
        const auto     it = rotations.find(il);
        if (it == rotations.end() || !it->second.rotated) {
            continue;
        }
        const int64_t n_head   = kv.hparams.n_head_kv(il);
        const int64_t n_embd_h = kv.hparams.n_embd_head_k(il);

        res->reset();
        auto * gctx = res->get_ctx();
        auto * gf   = res->get_gf();

        ggml_tensor * pos = ggml_new_tensor_1d(gctx, GGML_TYPE_I32, n_cells * per_row);
        ggml_set_input(pos);
        ggml_tensor * rot = it->second.n_hadamard ? kv.build_input_k_rot(gctx) : nullptr;

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
            kv.set_input_k_rot(rot);
        }
        if (ctx.graph_compute(gf, true) != GGML_STATUS_SUCCESS) {
            return ES_BANK_COMPUTE;
        }
        ctx.synchronize();
    }
    return ES_BANK_OK;
}

int32_t es_bank::shift_window(llama_context & ctx, llama_seq_id seq, llama_pos delta) {
    const auto strm  = kv.seq_to_stream[seq];
    auto &     cells = kv.v_cells[strm];

    const auto                  it     = blocks.find(seq);
    const std::vector<uint32_t> pinned = it != blocks.end() ? it->second.cells : std::vector<uint32_t>();

    std::vector<int32_t>  shift((size_t) cells.size() * kv.n_stream, 0);
    std::vector<uint32_t> idxs;
    for (const auto & [pos, idx] : cells.seq_pos_get(seq)) {
        if (std::find(pinned.begin(), pinned.end(), idx) != pinned.end()) {
            continue;
        }
        // a cell that other sequences share has one key for all of them
        if (pos + delta < 0 || cells.seq_count(idx) != 1) {
            return ES_BANK_INVALID;
        }
        idxs.push_back(idx);
        shift[(size_t) strm * cells.size() + idx] = delta;
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

//
// C interface
//

// A class derived from these keeps more than they do (indexes, compressed keys), which nobody would move.
template <typename T>
static T * exactly(llama_memory_t mem) {
    return mem && typeid(*mem) == typeid(T) ? static_cast<T *>(mem) : nullptr;
}

static std::vector<llama_kv_cache *> caches_of(llama_context * ctx) {
    llama_memory_t mem = ctx->get_memory();
    if (auto * kv = exactly<llama_kv_cache>(mem)) {
        return { kv };
    }
    if (auto * kv = exactly<llama_kv_cache_iswa>(mem)) {
        return { kv->get_base(), kv->get_swa() };
    }
    if (auto * hybrid = exactly<llama_memory_hybrid>(mem)) {
        return { hybrid->get_mem_attn() };
    }
    if (auto * hybrid = exactly<llama_memory_hybrid_iswa>(mem)) {
        return { hybrid->get_mem_attn()->get_base(), hybrid->get_mem_attn()->get_swa() };
    }
    return {};
}

// The memory of recurrent layers, which nothing is evicted from.
static llama_memory_recurrent * state_of(llama_context * ctx) {
    llama_memory_t mem = ctx->get_memory();
    if (auto * recurrent = exactly<llama_memory_recurrent>(mem)) {
        return recurrent;
    }
    if (auto * hybrid = exactly<llama_memory_hybrid>(mem)) {
        return hybrid->get_mem_recr();
    }
    if (auto * hybrid = exactly<llama_memory_hybrid_iswa>(mem)) {
        return hybrid->get_mem_recr();
    }
    return nullptr;
}

// a door of the patch: the class's private members stay private to everyone but es_bank
struct es_bank_access {
    static const char * why_not(const llama_kv_cache & kv, uint32_t size) {
        if (kv.model.pos_embd) {
            return "it has no rotary positions but learned absolute ones";
        }
        if (kv.other) {
            return "its cache shares the cells of another context";
        }
        if (kv.get_size() != size) {
            return "its sliding-window layers have a smaller cache (swa_full is off)";
        }
        return nullptr;
    }
    // a layer whose keys the walk could not follow, or null
    static const es_key_rotation * unknown(const llama_kv_cache & kv) {
        for (const auto & [il, r] : kv.es->rotations) {
            if (r.unknown) {
                return &r;
            }
        }
        return nullptr;
    }
    static bool   learned(const llama_kv_cache & kv) { return kv.layers.empty() || !kv.es->rotations.empty(); }
    static size_t bytes(const llama_kv_cache & kv) {
        size_t n = 0;
        for (const auto & layer : kv.layers) {
            n += ggml_nbytes(layer.k) + (layer.v ? ggml_nbytes(layer.v) : 0);
        }
        return n;
    }
    static bool seq_ok(const llama_kv_cache & kv, llama_seq_id seq) {
        return seq >= 0 && (size_t) seq < kv.seq_to_stream.size() && (uint32_t) seq < kv.n_seq_max;
    }
    static es_bank & bank(llama_kv_cache & kv) {
        if (!kv.es) {
            kv.es = std::make_shared<es_bank>(kv);
        }
        return *kv.es;
    }
};

// Calls f(bank, kv) on each cache of ctx until one fails; no exception leaves.
template <typename F>
static int32_t for_each_bank(llama_context * ctx, llama_seq_id seq, bool need_block, F && f) {
    try {
        const auto caches = caches_of(ctx);
        if (caches.empty()) {
            return ES_BANK_UNSUPPORTED;
        }
        for (auto * kv : caches) {
            if (!es_bank_access::seq_ok(*kv, seq)) {
                return ES_BANK_INVALID;
            }
            auto & bank = es_bank_access::bank(*kv);
            if (need_block && bank.blocks.find(seq) == bank.blocks.end()) {
                return ES_BANK_INVALID;
            }
        }
        for (auto * kv : caches) {
            const int32_t rc = f(es_bank_access::bank(*kv), *kv);
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

int32_t llama_es_bank_check(llama_context * ctx, const char ** why_not) {
    const char * why    = nullptr;
    const auto   caches = caches_of(ctx);
    if (caches.empty()) {
        why = "its memory is of a kind that edge-stream does not know (sparse or indexed attention)";
    }
    if (!why && !ctx->get_cparams().causal_attn) {
        why = "its attention is not causal: it is an encoder or an embedding model";
    }
    bool learned = true;
    for (size_t i = 0; i < caches.size() && !why; ++i) {
        why = es_bank_access::why_not(*caches[i], caches[0]->get_size());
        (void) es_bank_access::bank(*caches[i]); // from now on no cell is given up for being outside of the SWA
        learned = learned && es_bank_access::learned(*caches[i]);
    }
    if (!why && !learned) {
        try {
            ctx->es_reserve(); // builds the graph, from which the banks learn
        } catch (const std::exception & e) {
            LLAMA_LOG_ERROR("%s: %s\n", __func__, e.what());
            why = "its graph cannot be built";
        }
    }
    for (size_t i = 0; i < caches.size() && !why; ++i) {
        if (!es_bank_access::learned(*caches[i])) {
            why = "its graph stores no keys (an embedding model)";
        } else if (const es_key_rotation * r = es_bank_access::unknown(*caches[i])) {
            static thread_local char text[160];
            snprintf(text, sizeof(text),
                     r->rotated ? "its keys are changed after their rotation (by %s)"
                                : "how its keys are made is not understood (their graph has %s)",
                     r->unknown);
            why = text;
        }
    }
    if (why_not) {
        *why_not = why;
    }
    return why ? ES_BANK_UNSUPPORTED : ES_BANK_OK;
}

// Makes room in the compute buffers for graphs that slide, so that none of them has to grow in the middle of a stream.
static int32_t reserve(llama_context * ctx) {
    const auto caches = caches_of(ctx);
    // the same sequences have blocks in every cache
    auto &   first = es_bank_access::bank(*caches[0]);
    uint32_t n     = 0;
    for (const auto & [seq, b] : first.blocks) {
        n += b.n_rows;
    }
    if (n <= first.n_reserved) {
        return ES_BANK_OK;
    }
    int32_t rc = ES_BANK_OK;
    for (auto * kv : caches) {
        es_bank_access::bank(*kv).reserving = true;
    }
    try {
        ctx->es_reserve();
        first.n_reserved = n;
    } catch (const std::exception & e) {
        LLAMA_LOG_ERROR("%s: %s\n", __func__, e.what());
        rc = ES_BANK_NO_MEMORY;
    }
    for (auto * kv : caches) {
        es_bank_access::bank(*kv).reserving = false;
    }
    return rc;
}

int32_t llama_es_bank_alloc(llama_context * ctx, llama_seq_id seq, uint32_t n_rows) {
    if (n_rows == 0) {
        return ES_BANK_INVALID;
    }
    const int32_t rc = llama_es_bank_check(ctx, nullptr);
    if (rc != ES_BANK_OK) {
        return rc;
    }
    llama_synchronize(ctx); // an old block's buffers may be in use
    ctx->es_graph_changed();
    const auto    alloc = [&](es_bank & bank, llama_kv_cache &) { return bank.alloc(seq, n_rows); };
    const int32_t done  = for_each_bank(ctx, seq, false, alloc);
    return done == ES_BANK_OK ? reserve(ctx) : done;
}

void llama_es_bank_free(llama_context * ctx, llama_seq_id seq) {
    llama_synchronize(ctx);
    ctx->es_graph_changed();
    (void) for_each_bank(ctx, seq, true, [&](es_bank & bank, llama_kv_cache &) {
        bank.blocks.erase(seq);
        return ES_BANK_OK;
    });
}

int32_t llama_es_bank_capture_begin(llama_context * ctx, llama_seq_id seq, uint32_t n, llama_pos pos) {
    ctx->es_graph_changed();
    return for_each_bank(ctx, seq, true, [&](es_bank & bank, llama_kv_cache &) {
        auto & b = bank.blocks.at(seq);
        if (n == 0 || n > b.n_rows - b.n_filled || (b.n_filled > 0 && pos != b.pos + (llama_pos) b.n_filled)) {
            return (int32_t) ES_BANK_INVALID;
        }
        if (b.n_filled == 0) {
            b.pos0 = b.pos = pos;
        }
        b.n_capture     = n;
        b.capture_built = false;
        return (int32_t) ES_BANK_OK;
    });
}

int32_t llama_es_bank_capture_end(llama_context * ctx, llama_seq_id seq, bool keep) {
    llama_synchronize(ctx);
    ctx->es_graph_changed();
    int32_t       res = ES_BANK_OK;
    const int32_t rc  = for_each_bank(ctx, seq, true, [&](es_bank & bank, llama_kv_cache &) {
        auto & b = bank.blocks.at(seq);
        if (!keep) {
            b.n_capture = 0;
            return ES_BANK_OK;
        }
        if (b.n_capture == 0 || !b.capture_built) {
            res = ES_BANK_INVALID;
        } else {
            b.n_filled += b.n_capture;
            if (b.n_filled == b.n_rows && bank.find_cells(seq) != ES_BANK_OK) {
                b.n_filled -= b.n_capture;
                res = ES_BANK_INVALID;
            }
        }
        b.n_capture = 0;
        return ES_BANK_OK;
    });
    return rc != ES_BANK_OK ? rc : res;
}

int32_t llama_es_bank_move(llama_context * ctx, llama_seq_id seq, llama_pos pos) {
    for (auto * kv : caches_of(ctx)) {
        if (kv->get_has_shift()) {
            return ES_BANK_PENDING_SHIFT;
        }
    }
    if (pos < 0) {
        return ES_BANK_INVALID;
    }
    return for_each_bank(ctx, seq, true, [&](es_bank & bank, llama_kv_cache &) {
        auto & b = bank.blocks.at(seq);
        if (b.n_filled != b.n_rows) {
            return (int32_t) ES_BANK_INVALID;
        }
        const int32_t rc = bank.move(*ctx, seq, pos);
        if (rc == ES_BANK_OK && !b.armed) {
            b.armed = true;
            ctx->es_graph_changed();
        }
        return rc;
    });
}

int32_t llama_es_bank_settle(llama_context * ctx, llama_seq_id seq) {
    return for_each_bank(ctx, seq, true, [&](es_bank & bank, llama_kv_cache &) {
        auto & b = bank.blocks.at(seq);
        if (b.armed) {
            b.armed = false;
            ctx->es_graph_changed();
        }
        return ES_BANK_OK;
    });
}

int32_t llama_es_bank_shift_window(llama_context * ctx, llama_seq_id seq, llama_pos delta) {
    for (auto * kv : caches_of(ctx)) {
        if (kv->get_has_shift()) {
            return ES_BANK_PENDING_SHIFT;
        }
    }
    llama_synchronize(ctx);
    ctx->es_graph_changed(); // the scheduler is about to be used for other graphs
    const int32_t rc = for_each_bank(
        ctx, seq, false, [&](es_bank & bank, llama_kv_cache &) { return bank.shift_window(*ctx, seq, delta); });
    if (rc == ES_BANK_OK) {
        llama_es_state_add(ctx, seq, delta);
    }
    return rc;
}

llama_pos llama_es_position_limit(const llama_model * model, const char ** what) {
    const llama_hparams & h     = model->hparams;
    int64_t               limit = std::numeric_limits<llama_pos>::max();
    const auto            lower = [&](int64_t to, const char * why) {
        if (to < limit) {
            limit = to;
            *what = why;
        }
    };
    *what = nullptr;
    if (h.f_attn_temp_scale != 0.0f && h.n_attn_temp_floor_scale > 0) { // llm_graph_input_attn_temp::set_input
        lower((int64_t) h.n_attn_temp_floor_scale - (int64_t) ceilf(h.f_attn_temp_offset), "its attention temperature");
    }
    if (h.swa_type == LLAMA_SWA_TYPE_CHUNKED) {
        lower(h.n_swa, "its chunked attention");
    }
    return (llama_pos) limit;
}

uint64_t llama_es_bytes_per_token(const llama_model * model, int32_t type_k, int32_t type_v) {
    if (llm_arch_is_recurrent(model->arch)) {
        return 0;
    }
    const llama_hparams & h    = model->hparams;
    bool                  both = true; // every layer has attention and a state (Falcon-H1)
    for (uint32_t il = 0; il < h.n_layer(); ++il) {
        both = both && h.is_recr(il) && h.n_head_kv(il) > 0;
    }
    uint64_t n = 0;
    for (uint32_t il = 0; il < h.n_layer(); ++il) {
        if (h.has_kv(il) && (both || !h.is_recr(il))) {
            n += ggml_row_size((ggml_type) type_k, h.n_embd_k_gqa(il));
            n += h.is_mla() ? 0 : ggml_row_size((ggml_type) type_v, h.n_embd_v_gqa(il));
        }
    }
    return n;
}

void llama_es_state_add(llama_context * ctx, llama_seq_id seq, llama_pos delta) {
    if (auto * state = state_of(ctx)) {
        state->seq_add(seq, -1, -1, delta);
    }
}

void llama_es_memory_use(llama_context * ctx, uint64_t * cache, uint64_t * state) {
    *cache = *state = 0;
    for (const auto * kv : caches_of(ctx)) {
        *cache += es_bank_access::bytes(*kv);
    }
    if (const auto * memory = state_of(ctx)) {
        for (const auto * list : { &memory->r_l, &memory->s_l }) {
            for (const ggml_tensor * t : *list) {
                *state += t ? ggml_nbytes(t) : 0;
            }
        }
    }
}

const char * llama_es_lost_device(llama_context * ctx) {
    const ggml_backend_sched_t sched = ctx->get_sched();
    for (int i = 0; i < ggml_backend_sched_get_n_backends(sched); ++i) {
        const ggml_backend_t     backend = ggml_backend_sched_get_backend(sched, i);
        const ggml_backend_dev_t dev     = ggml_backend_get_device(backend);
        const auto               lost    = (bool (*)(ggml_backend_t)) ggml_backend_reg_get_proc_address(
            ggml_backend_dev_backend_reg(dev), "es_rpc_lost");
        if (lost && lost(backend)) {
            return ggml_backend_dev_description(dev);
        }
    }
    return nullptr;
}

//
// state: per cache { n_rows, pos0, pos, n_layers } then per layer in ascending order { il, n_embd, rows as f32 }
//

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

static std::map<int32_t, ggml_tensor *> sorted_layers(const es_bank_block & b) {
    return { b.k.begin(), b.k.end() };
}

size_t llama_es_bank_state_get(llama_context * ctx, llama_seq_id seq, uint8_t * dst, size_t size) {
    llama_synchronize(ctx);
    size_t        total = 0;
    const int32_t rc    = for_each_bank(ctx, seq, true, [&](es_bank & bank, llama_kv_cache &) {
        const auto & b = bank.blocks.at(seq);
        if (b.n_filled != b.n_rows) {
            return (int32_t) ES_BANK_INVALID;
        }
        const auto put = [&](const void * src, size_t n) {
            if (dst && total + n <= size) {
                memcpy(dst + total, src, n);
            }
            total += n;
        };
        const block_header h = { b.n_rows, b.pos0, b.pos, (uint32_t) b.k.size() };
        put(&h, sizeof(h));
        for (const auto & [il, t] : sorted_layers(b)) {
            const layer_header lh = { il, (uint32_t) t->ne[0] };
            put(&lh, sizeof(lh));
            if (dst && total + ggml_nbytes(t) <= size) {
                ggml_backend_tensor_get(t, dst + total, 0, ggml_nbytes(t));
            }
            total += ggml_nbytes(t);
        }
        return (int32_t) ES_BANK_OK;
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
    const int32_t rc = for_each_bank(ctx, seq, false, [&](es_bank & bank, llama_kv_cache & kv) {
        block_header h;
        if (!get(&h, sizeof(h)) || h.n_rows == 0 || h.n_rows > kv.get_size() || h.pos < 0 || h.pos0 < 0 ||
            h.pos > std::numeric_limits<int32_t>::max() / 2) {
            return (int32_t) ES_BANK_FORMAT;
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
            return (int32_t) ES_BANK_FORMAT;
        }
        for (const auto & [il, t] : sorted_layers(b)) {
            layer_header lh;
            if (!get(&lh, sizeof(lh)) || lh.il != il || (int64_t) lh.n_embd != t->ne[0] ||
                ggml_nbytes(t) > size - off) {
                return (int32_t) ES_BANK_FORMAT;
            }
            ggml_backend_tensor_set(t, src + off, 0, ggml_nbytes(t));
            off += ggml_nbytes(t);
        }
        bank.write_delta(*ctx, b);
        b.armed = true; // the saved cells may be older than the last move
        return bank.find_cells(seq);
    });
    return rc == ES_BANK_OK && off != size ? (int32_t) ES_BANK_FORMAT : rc;
}
