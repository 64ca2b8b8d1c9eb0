// The C interface of the bank (llama-es-bank.h): each call acts on every cache of the context.
#include "es-bank.h"

#include <algorithm>
#include <cstdio>

// Why a cache cannot have a bank, whatever its graph, or null. n_cells: of the context's first cache.
static const char * unsuitable(const es_kv_cache & kv, uint32_t n_cells) {
    if (kv.has_learned_positions()) {
        return "it has no rotary positions but learned absolute ones";
    }
    if (kv.shares_cells()) {
        return "its cache shares the cells of another context";
    }
    if (kv.n_cells() != n_cells) {
        return "its sliding-window layers have a smaller cache (swa_full is off)";
    }
    return nullptr;
}

static bool has_learned(const es_kv_cache & kv) {
    return kv.layers().empty() || !kv.bank().rotations.empty();
}

// Why the keys that the graph stores cannot be moved, or null.
static const char * unknown_rotation(const es_kv_cache & kv) {
    static thread_local char text[160];
    for (const auto & [il, r] : kv.bank().rotations) {
        if (r.unknown) {
            snprintf(text, sizeof(text),
                     r.rotated ? "its keys are changed after their rotation (by %s)"
                               : "how its keys are made is not understood (their graph has %s)",
                     r.unknown);
            return text;
        }
    }
    return nullptr;
}

// Builds worst-case graphs, from which banks learn the rotations, and reserves compute buffers for them.
static bool build_graphs(llama_context * ctx) {
    try {
        ctx->es_reserve();
        return true;
    } catch (const std::exception & e) {
        LLAMA_LOG_ERROR("%s: %s\n", __func__, e.what());
        return false;
    }
}

int32_t llama_es_bank_check(llama_context * ctx, const char ** why_not) {
    const char * why    = nullptr;
    const auto   caches = es_caches_of(*ctx);
    if (caches.empty()) {
        why = "its memory is of a kind that edge-stream does not know (sparse or indexed attention)";
    } else if (!ctx->get_cparams().causal_attn) {
        why = "its attention is not causal: it is an encoder or an embedding model";
    }
    bool learned = true;
    for (size_t i = 0; i < caches.size() && !why; ++i) {
        why = unsuitable(caches[i], caches[0].n_cells());
        (void) caches[i].bank(); // from now on no cell is freed for being outside the SWA
        learned = learned && has_learned(caches[i]);
    }
    if (!why && !learned && !build_graphs(ctx)) {
        why = "its graph cannot be built";
    }
    for (size_t i = 0; i < caches.size() && !why; ++i) {
        why = has_learned(caches[i]) ? unknown_rotation(caches[i]) : "its graph stores no keys (an embedding model)";
    }
    if (why_not) {
        *why_not = why;
    }
    return why ? ES_BANK_UNSUPPORTED : ES_BANK_OK;
}

// Reserves compute buffers for graphs that move sinks, so that none has to grow in the middle of a stream.
static int32_t reserve(llama_context * ctx) {
    const auto caches = es_caches_of(*ctx);
    // the same sequences have blocks in every cache
    es_bank & first = caches[0].bank();
    uint32_t  n     = 0;
    for (const auto & [key, b] : first.blocks) {
        n += b.n_rows;
    }
    if (n <= first.n_reserved) {
        return ES_BANK_OK;
    }
    for (const es_kv_cache & kv : caches) {
        kv.bank().reserving = true;
    }
    const bool done = build_graphs(ctx);
    for (const es_kv_cache & kv : caches) {
        kv.bank().reserving = false;
    }
    first.n_reserved = done ? n : first.n_reserved;
    return done ? ES_BANK_OK : ES_BANK_NO_MEMORY;
}

static bool has_pending_shift(llama_context * ctx) {
    const auto caches = es_caches_of(*ctx);
    return std::any_of(caches.begin(), caches.end(), [](const es_kv_cache & kv) { return kv.has_pending_shift(); });
}

int32_t llama_es_bank_alloc(llama_context * ctx, llama_seq_id seq, int32_t part, uint32_t n_rows) {
    if (n_rows == 0) {
        return ES_BANK_INVALID;
    }
    const int32_t rc = llama_es_bank_check(ctx, nullptr);
    if (rc != ES_BANK_OK) {
        return rc;
    }
    llama_synchronize(ctx); // an old block's buffers may be in use
    ctx->es_graph_changed();
    const auto    alloc = [&](es_bank & bank) -> int32_t { return bank.alloc({ seq, part }, n_rows); };
    const int32_t done  = es_for_each_bank(*ctx, { seq, part }, false, alloc);
    return done == ES_BANK_OK ? reserve(ctx) : done;
}

void llama_es_bank_free(llama_context * ctx, llama_seq_id seq, int32_t part) {
    llama_synchronize(ctx);
    ctx->es_graph_changed();
    (void) es_for_each_bank(*ctx, { seq, part }, true, [&](es_bank & bank) -> int32_t {
        bank.blocks.erase({ seq, part });
        return ES_BANK_OK;
    });
}

int32_t llama_es_bank_capture_begin(llama_context * ctx, llama_seq_id seq, int32_t part, uint32_t n, llama_pos pos) {
    ctx->es_graph_changed();
    return es_for_each_bank(*ctx, { seq, part }, true, [&](es_bank & bank) -> int32_t {
        auto & b = bank.blocks.at({ seq, part });
        if (n == 0 || n > b.n_rows - b.n_filled || (b.n_filled > 0 && pos != b.pos + (llama_pos) b.n_filled)) {
            return ES_BANK_INVALID;
        }
        if (b.n_filled == 0) {
            b.pos0 = b.pos = pos;
        }
        b.n_capture     = n;
        b.capture_built = false;
        return ES_BANK_OK;
    });
}

int32_t llama_es_bank_capture_end(llama_context * ctx, llama_seq_id seq, int32_t part, bool keep) {
    llama_synchronize(ctx);
    ctx->es_graph_changed();
    int32_t       res = ES_BANK_OK;
    const int32_t rc  = es_for_each_bank(*ctx, { seq, part }, true, [&](es_bank & bank) -> int32_t {
        auto & b = bank.blocks.at({ seq, part });
        if (!keep) {
            b.n_capture = 0;
            return ES_BANK_OK;
        }
        if (b.n_capture == 0 || !b.capture_built) {
            res = ES_BANK_INVALID;
        } else {
            b.n_filled += b.n_capture;
            if (b.n_filled == b.n_rows && bank.find_cells({ seq, part }) != ES_BANK_OK) {
                b.n_filled -= b.n_capture;
                res = ES_BANK_INVALID;
            }
        }
        b.n_capture = 0;
        return ES_BANK_OK;
    });
    return rc != ES_BANK_OK ? rc : res;
}

int32_t llama_es_bank_move(llama_context * ctx, llama_seq_id seq, int32_t part, llama_pos pos) {
    if (has_pending_shift(ctx)) {
        return ES_BANK_PENDING_SHIFT;
    }
    if (pos < 0) {
        return ES_BANK_INVALID;
    }
    return es_for_each_bank(*ctx, { seq, part }, true, [&](es_bank & bank) -> int32_t {
        auto & b = bank.blocks.at({ seq, part });
        if (b.n_filled != b.n_rows) {
            return ES_BANK_INVALID;
        }
        const int32_t rc = bank.move(*ctx, { seq, part }, pos);
        if (rc == ES_BANK_OK && !b.moving) {
            b.moving = true;
            ctx->es_graph_changed();
        }
        return rc;
    });
}

int32_t llama_es_bank_move_end(llama_context * ctx, llama_seq_id seq, int32_t part) {
    return es_for_each_bank(*ctx, { seq, part }, true, [&](es_bank & bank) -> int32_t {
        auto & b = bank.blocks.at({ seq, part });
        if (b.moving) {
            b.moving = false;
            ctx->es_graph_changed();
        }
        return ES_BANK_OK;
    });
}

// Hidden cells belong to a sequence that no one else uses.
static constexpr llama_seq_id seq_hidden = LLAMA_MAX_SEQ - 1;

static void give(llama_kv_cells & cells, llama_seq_id from, llama_seq_id to, llama_pos p0) {
    const auto all = cells.seq_pos_get(from);
    for (const auto & [pos, idx] : all) {
        if (pos >= p0) {
            cells.seq_add(idx, to);
            cells.seq_rm(idx, from);
        }
    }
}

int32_t llama_es_bank_hide(llama_context * ctx, llama_seq_id seq, llama_pos from) {
    return es_for_each_bank(*ctx, { seq, 0 }, false, [&](es_bank & bank) -> int32_t {
        auto & cells = bank.kv.cells_of(seq);
        if (seq == seq_hidden || !cells.seq_pos_get(seq_hidden).empty()) {
            return ES_BANK_INVALID;
        }
        give(cells, seq, seq_hidden, from);
        return ES_BANK_OK;
    });
}

int32_t llama_es_bank_unhide(llama_context * ctx, llama_seq_id seq) {
    return es_for_each_bank(*ctx, { seq, 0 }, false, [&](es_bank & bank) -> int32_t {
        give(bank.kv.cells_of(seq), seq_hidden, seq, 0);
        return ES_BANK_OK;
    });
}

int32_t llama_es_bank_shift_window(llama_context * ctx, llama_seq_id seq, llama_pos delta) {
    if (has_pending_shift(ctx)) {
        return ES_BANK_PENDING_SHIFT;
    }
    llama_synchronize(ctx);
    ctx->es_graph_changed(); // the scheduler will compute other graphs
    const int32_t rc = es_for_each_bank(*ctx, { seq, 0 }, false,
                                        [&](es_bank & bank) -> int32_t { return bank.shift_window(*ctx, seq, delta); });
    if (rc == ES_BANK_OK) {
        llama_es_state_add(ctx, seq, delta);
    }
    return rc;
}
