// Everything that edge-stream uses of llama.cpp's internals. No other file of ours includes its private headers, but
// for its staging API (llama-ext.h) in app.cpp and support.cpp.
//
// If a newer llama.cpp changes one of these, an assertion below names it. The comments say what the types cannot show
// and must be checked by reading. Private members of llama_kv_cache are used by es_kv_cache alone, which
// native/patches/0001-sink-bank.patch makes its friend.
#pragma once

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-cache-iswa.h"
#include "llama-kv-cache.h"
#include "llama-memory-hybrid-iswa.h"
#include "llama-memory-hybrid.h"
#include "llama-memory-recurrent.h"
#include "llama-model.h"

#include <memory>
#include <type_traits>
#include <typeinfo>
#include <vector>

class es_bank;

// The type of a data member, or of a pointer to a member function, is what this code expects.
#define ES_EXPECT(what, ...)                                                                                           \
    static_assert(std::is_same_v<decltype(what), __VA_ARGS__>,                                                         \
                  "llama.cpp changed " #what ": adapt native/src/llama/es-llama-access.h")

// Cells: which positions and sequences they hold. seq_pos_get lists a sequence's (position, cell) pairs by position.
// pos_add also notes a shift, which llama.cpp would apply to the keys at the next update; reset_shift forgets it.
ES_EXPECT(&llama_kv_cells::size, uint32_t (llama_kv_cells::*)() const);
ES_EXPECT(&llama_kv_cells::is_empty, bool (llama_kv_cells::*)(uint32_t) const);
ES_EXPECT(&llama_kv_cells::seq_has, bool (llama_kv_cells::*)(uint32_t, llama_seq_id) const);
ES_EXPECT(&llama_kv_cells::seq_count, int (llama_kv_cells::*)(uint32_t) const);
ES_EXPECT(&llama_kv_cells::seq_pos_get,
          const std::set<std::pair<llama_pos, uint32_t>> & (llama_kv_cells::*) (llama_seq_id) const);
ES_EXPECT(&llama_kv_cells::pos_get, llama_pos (llama_kv_cells::*)(uint32_t) const);
ES_EXPECT(&llama_kv_cells::pos_add, bool (llama_kv_cells::*)(uint32_t, llama_pos));
ES_EXPECT(&llama_kv_cells::pos_set, void (llama_kv_cells::*)(uint32_t, llama_pos));
ES_EXPECT(&llama_kv_cells::seq_add, void (llama_kv_cells::*)(uint32_t, llama_seq_id));
ES_EXPECT(&llama_kv_cells::seq_rm, bool (llama_kv_cells::*)(uint32_t, llama_seq_id));
ES_EXPECT(&llama_kv_cells::reset_shift, void (llama_kv_cells::*)());

// A KV cache (an iSWA memory has two). It may be divided into streams of get_size() cells each; a sequence lives in
// one of them, and a stream's cells follow one another in the layers' tensors.
class es_kv_cache {
public:
    struct layer {
        uint32_t      il; // of the model
        ggml_tensor * k;  // [n_embd_k_gqa, n_cells, n_streams], as v
        ggml_tensor * v;  // null with MLA
    };

    explicit es_kv_cache(llama_kv_cache & kv) : kv(&kv) {}

    // the cache's bank, created on first use; the patch calls it while graphs are built
    es_bank & bank() const;

    uint32_t n_cells() const { return kv->get_size(); } // of one stream
    uint32_t n_streams() const { return kv->n_stream; }
    bool     has_seq(llama_seq_id seq) const {
        return seq >= 0 && (size_t) seq < kv->seq_to_stream.size() && (uint32_t) seq < kv->n_seq_max;
    }
    uint32_t         stream_of(llama_seq_id seq) const { return kv->seq_to_stream[seq]; }
    llama_kv_cells & cells_of(llama_seq_id seq) const { return kv->v_cells[stream_of(seq)]; }
    bool             has_pending_shift() const { return kv->get_has_shift(); }
    bool             shares_cells() const { return kv->other != nullptr; } // with a cache of another context

    std::vector<layer> layers() const {
        std::vector<layer> out;
        for (const auto & l : kv->layers) {
            out.push_back({ l.il, l.k, l.v });
        }
        return out;
    }
    int64_t n_embd_head_k(int32_t il) const { return kv->hparams.n_embd_head_k(il); }
    int64_t n_embd_k_gqa(int32_t il) const { return kv->hparams.n_embd_k_gqa(il); }
    bool    v_trans() const { return kv->v_trans; } // values are stored transposed: a cell's are n_cells apart
    bool    has_cell_ext() const { return kv->has_cell_ext(); } // cells know more than positions and sequences
    int64_t n_head_kv(int32_t il) const { return kv->hparams.n_head_kv(il); }
    int64_t n_pos_per_token() const { return kv->hparams.n_pos_per_embd(); } // 4 with M-RoPE, else 1
    bool    has_learned_positions() const { return kv->model.pos_embd != nullptr; }

    // Quantised keys are stored multiplied by a Hadamard matrix, which is its own inverse: [n, n] f32, by n; and the
    // input of a graph that holds it.
    const std::vector<float> & hadamard(int64_t n) const { return kv->attn_rot_hadamard.at(n); }
    ggml_tensor *              new_hadamard_input(ggml_context * ctx) const { return kv->build_input_k_rot(ctx); }
    void                       set_hadamard_input(ggml_tensor * t) const { kv->set_input_k_rot(t); }

private:
    llama_kv_cache * kv;

    ES_EXPECT(llama_kv_cache::es, std::shared_ptr<es_bank>); // the patch's
    ES_EXPECT(llama_kv_cache::model, const llama_model &);
    ES_EXPECT(llama_kv_cache::hparams, const llama_hparams &);
    ES_EXPECT(llama_kv_cache::other, llama_kv_cache *);
    ES_EXPECT(llama_kv_cache::v_trans, bool);
    ES_EXPECT(llama_kv_cache::n_stream, const uint32_t);
    ES_EXPECT(llama_kv_cache::n_seq_max, const uint32_t);
    ES_EXPECT(llama_kv_cache::seq_to_stream, std::vector<uint32_t>);
    ES_EXPECT(llama_kv_cache::v_cells, std::vector<llama_kv_cells> &);
    ES_EXPECT(llama_kv_cache::layers, std::vector<llama_kv_cache::kv_layer>);
    ES_EXPECT(llama_kv_cache::kv_layer::il, uint32_t);
    ES_EXPECT(llama_kv_cache::kv_layer::k, ggml_tensor *);
    ES_EXPECT(llama_kv_cache::kv_layer::v, ggml_tensor *);
    ES_EXPECT(llama_kv_cache::attn_rot_hadamard, std::unordered_map<int64_t, std::vector<float>>);
    ES_EXPECT(&llama_kv_cache::get_size, uint32_t (llama_kv_cache::*)() const);
    ES_EXPECT(&llama_kv_cache::has_cell_ext, bool (llama_kv_cache::*)() const);
    ES_EXPECT(&llama_kv_cache::get_has_shift, bool (llama_kv_cache::*)() const);
    ES_EXPECT(&llama_kv_cache::build_input_k_rot, ggml_tensor * (llama_kv_cache::*) (ggml_context *) const);
    ES_EXPECT(&llama_kv_cache::set_input_k_rot, void (llama_kv_cache::*)(ggml_tensor *) const);
};

// Matches the exact class of a memory: a class derived from it holds more (indexes, compressed keys), which would not
// be moved.
template <typename T>
T * es_memory_as(llama_context & ctx) {
    llama_memory_t mem = ctx.get_memory();
    return mem && typeid(*mem) == typeid(T) ? static_cast<T *>(mem) : nullptr;
}
ES_EXPECT(&llama_context::get_memory, llama_memory_t (llama_context::*)() const);
ES_EXPECT(&llama_kv_cache_iswa::get_base, llama_kv_cache * (llama_kv_cache_iswa::*) () const);
ES_EXPECT(&llama_kv_cache_iswa::get_swa, llama_kv_cache * (llama_kv_cache_iswa::*) () const);
ES_EXPECT(&llama_memory_hybrid::get_mem_attn, llama_kv_cache * (llama_memory_hybrid::*) () const);
ES_EXPECT(&llama_memory_hybrid::get_mem_recr, llama_memory_recurrent * (llama_memory_hybrid::*) () const);
ES_EXPECT(&llama_memory_hybrid_iswa::get_mem_attn, llama_kv_cache_iswa * (llama_memory_hybrid_iswa::*) () const);
ES_EXPECT(&llama_memory_hybrid_iswa::get_mem_recr, llama_memory_recurrent * (llama_memory_hybrid_iswa::*) () const);

// The caches of a context; empty if its memory is of another kind.
inline std::vector<es_kv_cache> es_caches_of(llama_context & ctx) {
    const auto both = [](const llama_kv_cache_iswa & kv) {
        return std::vector<es_kv_cache>{ es_kv_cache(*kv.get_base()), es_kv_cache(*kv.get_swa()) };
    };
    if (auto * kv = es_memory_as<llama_kv_cache>(ctx)) {
        return { es_kv_cache(*kv) };
    }
    if (auto * kv = es_memory_as<llama_kv_cache_iswa>(ctx)) {
        return both(*kv);
    }
    if (auto * hybrid = es_memory_as<llama_memory_hybrid>(ctx)) {
        return { es_kv_cache(*hybrid->get_mem_attn()) };
    }
    if (auto * hybrid = es_memory_as<llama_memory_hybrid_iswa>(ctx)) {
        return both(*hybrid->get_mem_attn());
    }
    return {};
}

// The memory of recurrent layers, or null. Nothing is evicted from it. r_l, s_l: its tensors per layer, null in
// between.
inline llama_memory_recurrent * es_recurrent_of(llama_context & ctx) {
    if (auto * recurrent = es_memory_as<llama_memory_recurrent>(ctx)) {
        return recurrent;
    }
    if (auto * hybrid = es_memory_as<llama_memory_hybrid>(ctx)) {
        return hybrid->get_mem_recr();
    }
    auto * hybrid = es_memory_as<llama_memory_hybrid_iswa>(ctx);
    return hybrid ? hybrid->get_mem_recr() : nullptr;
}
ES_EXPECT(llama_memory_recurrent::r_l, std::vector<ggml_tensor *>);
ES_EXPECT(llama_memory_recurrent::s_l, std::vector<ggml_tensor *>);
ES_EXPECT(&llama_memory_recurrent::seq_pos_max, llama_pos (llama_memory_recurrent::*)(llama_seq_id) const);
ES_EXPECT(&llama_memory_recurrent::seq_add,
          void (llama_memory_recurrent::*)(llama_seq_id, llama_pos, llama_pos, llama_pos));

// Context. The last two llama_context members are the patch's: the next decode builds its graph anew; worst-case graphs
// are built and measured again. graph_compute and the graph of get_gf_res_reserve serve llama.cpp for its own K-shift.
ES_EXPECT(&llama_context::get_sched, ggml_backend_sched_t (llama_context::*)() const);
ES_EXPECT(&llama_context::get_cparams, const llama_cparams & (llama_context::*) () const);
ES_EXPECT(&llama_context::synchronize, void (llama_context::*)());
ES_EXPECT(&llama_context::get_gf_res_reserve, llm_graph_result * (llama_context::*) () const);
ES_EXPECT(&llama_context::graph_compute, ggml_status (llama_context::*)(ggml_cgraph *, bool));
ES_EXPECT(&llama_context::es_graph_changed, void (llama_context::*)());
ES_EXPECT(&llama_context::es_reserve, void (llama_context::*)());
ES_EXPECT(&llm_graph_result::reset, void (llm_graph_result::*)());
ES_EXPECT(&llm_graph_result::get_ctx, ggml_context * (llm_graph_result::*) () const);
ES_EXPECT(&llm_graph_result::get_gf, ggml_cgraph * (llm_graph_result::*) () const);
ES_EXPECT(&llama_mul_mat_hadamard, ggml_tensor * (*) (ggml_context *, ggml_tensor *, ggml_tensor *) );
ES_EXPECT(llama_cparams::causal_attn, bool);

// Model. The attention temperature of a position is what llm_graph_input_attn_temp::set_input computes from
// f_attn_temp_*: constant below n_attn_temp_floor_scale - f_attn_temp_offset. Chunks (Llama 4) are n_swa long.
ES_EXPECT(&llm_arch_is_recurrent, bool (*)(const llm_arch &));
ES_EXPECT(llama_model::arch, llm_arch);
ES_EXPECT(llama_model::hparams, llama_hparams);
ES_EXPECT(llama_model::pos_embd, ggml_tensor *);
ES_EXPECT(llama_hparams::f_attn_temp_scale, float);
ES_EXPECT(llama_hparams::f_attn_temp_offset, float);
ES_EXPECT(llama_hparams::n_attn_temp_floor_scale, uint32_t);
ES_EXPECT(llama_hparams::swa_type, llama_swa_type);
ES_EXPECT(llama_hparams::n_swa, uint32_t);
ES_EXPECT(&llama_hparams::n_layer, uint32_t (llama_hparams::*)() const);
ES_EXPECT(&llama_hparams::n_pos_per_embd, uint32_t (llama_hparams::*)() const);
ES_EXPECT(&llama_hparams::is_mla, bool (llama_hparams::*)() const);
ES_EXPECT(&llama_hparams::is_recr, bool (llama_hparams::*)(uint32_t) const);
ES_EXPECT(&llama_hparams::has_kv, bool (llama_hparams::*)(uint32_t) const);
ES_EXPECT(&llama_hparams::n_head_kv, uint32_t (llama_hparams::*)(uint32_t) const);
ES_EXPECT(&llama_hparams::n_embd_head_k, uint32_t (llama_hparams::*)(uint32_t) const);
ES_EXPECT(&llama_hparams::n_embd_k_gqa, uint32_t (llama_hparams::*)(uint32_t) const);
ES_EXPECT(&llama_hparams::n_embd_v_gqa, uint32_t (llama_hparams::*)(uint32_t) const);

// Where ggml_rope_impl puts the parameters of GGML_OP_ROPE in op_params.
enum es_rope_param {
    ES_ROPE_N_DIMS      = 1,
    ES_ROPE_MODE        = 2,
    ES_ROPE_FREQ_BASE   = 5,
    ES_ROPE_FREQ_SCALE  = 6,
    ES_ROPE_EXT_FACTOR  = 7,
    ES_ROPE_ATTN_FACTOR = 8,
    ES_ROPE_OFFSET      = 15
};
static_assert(GGML_MAX_OP_PARAMS == 16 * sizeof(int32_t) && GGML_MROPE_SECTIONS == 4,
              "ggml changed the parameters of its operations: adapt native/src/llama/es-llama-access.h");

#undef ES_EXPECT
