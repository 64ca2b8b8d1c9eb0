// Facts about models and contexts that llama.cpp's public API does not offer.
#include "es-llama-access.h"
#include "llama-es-bank.h"

#include <algorithm>
#include <cmath>
#include <limits>

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
    if (h.f_attn_temp_scale != 0.0f && h.n_attn_temp_floor_scale > 0) {
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
    if (auto * state = es_recurrent_of(*ctx)) {
        state->seq_add(seq, -1, -1, delta);
    }
}

bool llama_es_has_positions(llama_context * ctx, llama_seq_id seq, llama_pos p0, llama_pos p1) {
    const auto caches = es_caches_of(*ctx);
    for (const es_kv_cache & kv : caches) {
        const auto & cells = kv.cells_of(seq).seq_pos_get(seq); // (position, cell) in ascending order
        const auto   same  = [](const auto & a, const auto & b) { return a.first == b.first; };
        if (cells.empty() || cells.begin()->first < p0 || cells.rbegin()->first != p1 - 1 ||
            std::adjacent_find(cells.begin(), cells.end(), same) != cells.end()) {
            return false;
        }
        if (kv.n_cells() == caches[0].n_cells() && (int64_t) cells.size() != (int64_t) p1 - p0) {
            return false;
        }
    }
    const auto * state = es_recurrent_of(*ctx);
    return !state || state->seq_pos_max(seq) == p1 - 1;
}

void llama_es_memory_use(llama_context * ctx, uint64_t * cache, uint64_t * state) {
    *cache = *state = 0;
    for (const es_kv_cache & kv : es_caches_of(*ctx)) {
        for (const auto & layer : kv.layers()) {
            *cache += ggml_nbytes(layer.k) + (layer.v ? ggml_nbytes(layer.v) : 0);
        }
    }
    if (const auto * memory = es_recurrent_of(*ctx)) {
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
