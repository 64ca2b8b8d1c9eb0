#include "sink_mover.h"

#include "error.h"
#include "llama-es-bank.h"

#include <algorithm>

#include <cstring>
#include <limits>
#include <string>

// A stock libllama has no bank: these stay null then. (llama-es-bank.h declares them as ordinary functions
// for libllama; here every reference is weak.)
#pragma weak llama_es_bank_check
#pragma weak llama_es_bank_alloc
#pragma weak llama_es_bank_free
#pragma weak llama_es_bank_capture_begin
#pragma weak llama_es_bank_capture_end
#pragma weak llama_es_bank_move
#pragma weak llama_es_bank_settle
#pragma weak llama_es_bank_shift_window
#pragma weak llama_es_bank_state_get
#pragma weak llama_es_bank_state_set
#pragma weak llama_es_lost_device
#pragma weak llama_es_position_limit
#pragma weak llama_es_bytes_per_token
#pragma weak llama_es_state_add
#pragma weak llama_es_memory_use

bool es_bank_available(void) {
    return llama_es_bank_check != nullptr;
}

int32_t es_check_devices(llama_context * ctx) {
    const char * lost = ctx && llama_es_lost_device ? llama_es_lost_device(ctx) : nullptr;
    return lost ? es_fail(
                      ES_ERR_DECODE,
                      "the RPC server at %s stopped answering: its part of the stream is lost, a saved session is not",
                      lost)
                : (int32_t) ES_OK;
}

int32_t es_position_limit(const llama_model * model, const char ** why) {
    *why = nullptr;
    return llama_es_position_limit ? llama_es_position_limit(model, why) : std::numeric_limits<int32_t>::max();
}

void es_state_add(llama_context * ctx, llama_seq_id seq, llama_pos delta) {
    if (llama_es_state_add) {
        llama_es_state_add(ctx, seq, delta);
    } else {
        llama_memory_seq_add(llama_get_memory(ctx), seq, -1, -1, delta); // it has nothing but states
    }
}

uint64_t es_model_bytes_per_token(const llama_model * model, int32_t type_k, int32_t type_v) {
    return model && llama_es_bytes_per_token ? llama_es_bytes_per_token(model, type_k, type_v) : 0;
}

void es_context_memory(llama_context * ctx, uint64_t * cache, uint64_t * state) {
    *cache = *state = 0;
    if (ctx && llama_es_memory_use) {
        llama_es_memory_use(ctx, cache, state);
    }
}

int32_t es_bank_supported(llama_context * ctx) {
    if (!es_bank_available()) {
        return es_fail(ES_ERR_UNSUPPORTED, "the loaded libllama does not carry edge-stream's sink bank");
    }
    const char * why = nullptr;
    if (llama_es_bank_check(ctx, &why) != ES_BANK_OK) {
        return es_fail(ES_ERR_UNSUPPORTED, "the model cannot stream: %s", why);
    }
    return ES_OK;
}

namespace {

int32_t from_bank(int32_t rc, const char * what) {
    switch (rc) {
    case ES_BANK_OK: return ES_OK;
    case ES_BANK_UNSUPPORTED: return es_fail(ES_ERR_UNSUPPORTED, "%s: this memory has no sink bank", what);
    case ES_BANK_NO_MEMORY: return es_fail(ES_ERR_MEMORY, "%s: out of memory", what);
    case ES_BANK_PENDING_SHIFT:
        return es_fail(ES_ERR_INVALID, "%s: the context has a pending K-shift of somebody else's", what);
    case ES_BANK_COMPUTE: return es_fail(ES_ERR_DECODE, "%s: the backend failed", what);
    case ES_BANK_FORMAT: return es_fail(ES_ERR_FORMAT, "%s: the saved sinks do not fit this model", what);
    default: return es_fail(ES_ERR_INTERNAL, "%s: the cache does not hold the sinks", what);
    }
}

class bank_mover : public es_sink_mover {
public:
    bank_mover(llama_context * ctx, const es_stream_params & p) : ctx(ctx), seq(p.seq_id), n_keep(p.n_keep) {}
    ~bank_mover() override {
        if (allocated) {
            llama_es_bank_free(ctx, seq);
        }
    }

    int32_t before_sinks(uint32_t n, llama_pos pos) override {
        int32_t rc = allocated ? (int32_t) ES_BANK_OK : llama_es_bank_alloc(ctx, seq, n_keep);
        if (rc == ES_BANK_OK) {
            allocated = true;
            rc        = llama_es_bank_capture_begin(ctx, seq, n, pos);
        }
        return from_bank(rc, "pinning the sinks");
    }
    int32_t after_sinks(const llama_token *, uint32_t n) override {
        return from_bank(llama_es_bank_capture_end(ctx, seq, n > 0), "pinning the sinks");
    }
    int32_t prepare(llama_pos) override { return ES_OK; }
    int32_t commit(llama_pos, llama_pos to) override {
        armed   = true;
        written = false;
        return from_bank(llama_es_bank_move(ctx, seq, to), "moving the sinks");
    }
    void decoded() override { written = true; }
    bool can_save() const override { return true; } // a restored bank writes its keys anew
    bool can_rebase_idle() const override { return true; }
    void settle() override {
        if (armed && written) {
            armed = false;
            (void) llama_es_bank_settle(ctx, seq);
        }
    }
    int32_t rebase(llama_pos from, llama_pos delta) override {
        const int32_t rc = from_bank(llama_es_bank_shift_window(ctx, seq, -delta), "rebasing");
        return rc != ES_OK || !allocated ? rc : commit(from, from - delta);
    }
    int32_t reset() override {
        if (allocated) {
            llama_es_bank_free(ctx, seq);
        }
        allocated = armed = false;
        return ES_OK;
    }
    int32_t get_state(std::vector<uint8_t> & out) override {
        out.clear();
        if (allocated) {
            out.resize(llama_es_bank_state_get(ctx, seq, nullptr, 0));
            if (out.empty() || llama_es_bank_state_get(ctx, seq, out.data(), out.size()) != out.size()) {
                return es_fail(ES_ERR_INVALID, "the sinks are not all decoded yet");
            }
        }
        return ES_OK;
    }
    int32_t set_state(const std::vector<uint8_t> & state, const std::vector<llama_token> &) override {
        reset();
        if (state.empty()) {
            return ES_OK;
        }
        allocated = armed = true;
        written           = false;
        return from_bank(llama_es_bank_state_set(ctx, seq, state.data(), state.size()), "restoring the sinks");
    }

private:
    llama_context * ctx;
    llama_seq_id    seq;
    uint32_t        n_keep;
    bool            allocated = false;
    bool            armed     = false; // decodes write the sinks' keys
    bool            written   = true;  // and one did so since the last move
};

class redecode_mover : public es_sink_mover {
public:
    redecode_mover(llama_context * ctx, const es_stream_params & p)
        : ctx(ctx), mem(llama_get_memory(ctx)), seq(p.seq_id), scratch(p.scratch_seq_id), has_scratch(p.n_keep > 0) {
        clear_scratch();
    }
    ~redecode_mover() override { clear_scratch(); }

    int32_t before_sinks(uint32_t, llama_pos) override { return ES_OK; }
    int32_t after_sinks(const llama_token * tokens, uint32_t n) override {
        sinks.insert(sinks.end(), tokens, tokens + n);
        return ES_OK;
    }
    int32_t prepare(llama_pos to) override {
        const uint32_t n_max = llama_n_batch(ctx);
        for (uint32_t i = 0; i < sinks.size();) {
            const uint32_t n     = std::min<uint32_t>(n_max, (uint32_t) sinks.size() - i);
            llama_batch    batch = llama_batch_init((int32_t) n, 0, 1);
            if (!batch.token) {
                return es_fail(ES_ERR_MEMORY, "out of memory");
            }
            batch.n_tokens = (int32_t) n;
            for (uint32_t j = 0; j < n; ++j) {
                batch.token[j]     = sinks[i + j];
                batch.pos[j]       = to + (llama_pos) (i + j);
                batch.n_seq_id[j]  = 1;
                batch.seq_id[j][0] = scratch;
                batch.logits[j]    = false;
            }
            const int32_t rc = llama_decode(ctx, batch);
            llama_batch_free(batch);
            if (rc != 0) {
                llama_memory_seq_rm(mem, scratch, -1, -1);
                return es_fail(ES_ERR_DECODE,
                               "decoding the sinks at their new positions failed (llama_decode returned %d)", rc);
            }
            i += n;
        }
        return ES_OK;
    }
    int32_t commit(llama_pos from, llama_pos) override {
        llama_memory_seq_rm(mem, seq, from, from + (llama_pos) sinks.size());
        llama_memory_seq_cp(mem, scratch, seq, -1, -1);
        llama_memory_seq_rm(mem, scratch, -1, -1);
        return ES_OK;
    }
    void    decoded() override { pending = false; }
    bool    can_save() const override { return !pending; }
    bool    can_rebase_idle() const override { return false; }
    void    settle() override {}
    int32_t rebase(llama_pos, llama_pos delta) override {
        pending = true;
        llama_memory_seq_add(mem, seq, -1, -1, -delta); // llama.cpp's own K-shift, at its next decode
        return ES_OK;
    }
    int32_t reset() override {
        clear_scratch();
        sinks.clear();
        pending = false;
        return ES_OK;
    }
    int32_t get_state(std::vector<uint8_t> & out) override {
        out.clear();
        return ES_OK;
    }
    int32_t set_state(const std::vector<uint8_t> &, const std::vector<llama_token> & tokens) override {
        sinks = tokens;
        return ES_OK;
    }

private:
    llama_context *          ctx;
    llama_memory_t           mem;
    llama_seq_id             seq;
    llama_seq_id             scratch;
    std::vector<llama_token> sinks;
    bool                     has_scratch;     // no sinks, no scratch sequence
    bool                     pending = false; // a K-shift that llama.cpp applies at its next decode

    void clear_scratch() {
        if (has_scratch) {
            llama_memory_seq_rm(mem, scratch, -1, -1);
        }
    }
};

class none_mover : public es_sink_mover {
public:
    int32_t before_sinks(uint32_t, llama_pos) override { return ES_OK; }
    int32_t after_sinks(const llama_token *, uint32_t) override { return ES_OK; }
    int32_t prepare(llama_pos) override { return ES_OK; }
    int32_t commit(llama_pos, llama_pos) override { return ES_OK; }
    void    decoded() override {}
    bool    can_save() const override { return true; }
    bool    can_rebase_idle() const override { return false; } // nothing is gained by it
    void    settle() override {}
    int32_t rebase(llama_pos, llama_pos) override { return ES_OK; }
    int32_t reset() override { return ES_OK; }
    int32_t get_state(std::vector<uint8_t> & out) override {
        out.clear();
        return ES_OK;
    }
    int32_t set_state(const std::vector<uint8_t> &, const std::vector<llama_token> &) override { return ES_OK; }
};

// A model of recurrent layers only: there are no sinks in it, and its positions are mere numbers.
class state_mover : public none_mover {
public:
    state_mover(llama_context * ctx, const es_stream_params & p) : ctx(ctx), seq(p.seq_id) {}
    int32_t rebase(llama_pos, llama_pos delta) override {
        es_state_add(ctx, seq, -delta);
        return ES_OK;
    }

private:
    llama_context * ctx;
    llama_seq_id    seq;
};

// The window's rebase goes through llama.cpp's K-shift, which would apply a YaRN magnitude a second time.
bool is_yarn(const llama_model * model) {
    char arch[128], value[64];
    if (llama_model_meta_val_str(model, "general.architecture", arch, sizeof(arch)) < 0) {
        return false;
    }
    const std::string key = std::string(arch) + ".rope.scaling.type";
    return llama_model_meta_val_str(model, key.c_str(), value, sizeof(value)) >= 0 && strcmp(value, "yarn") == 0;
}

int32_t redecode_supported(llama_context * ctx, const es_stream_params & p) {
    if (const char * why = es_model_needs_bank(llama_get_model(ctx))) {
        return es_fail(ES_ERR_UNSUPPORTED, "the model cannot stream without the sink bank: %s", why);
    }
    if (!llama_memory_can_shift(llama_get_memory(ctx))) {
        return es_fail(ES_ERR_UNSUPPORTED, "the model cannot stream: its positions cannot be shifted in the cache");
    }
    if (p.n_keep > 0 && (llama_n_seq_max(ctx) < 2 || llama_n_ctx_seq(ctx) != llama_n_ctx(ctx))) {
        return es_fail(ES_ERR_UNSUPPORTED,
                       "moving the sinks by redecoding needs a context with a unified KV cache and n_seq_max >= 2");
    }
    if (llama_model_n_swa(llama_get_model(ctx)) > 0) {
        return es_fail(
            ES_ERR_UNSUPPORTED,
            "a model with sliding-window layers needs the sink bank: llama.cpp reuses cells outside of them");
    }
    if (is_yarn(llama_get_model(ctx))) {
        return es_fail(ES_ERR_UNSUPPORTED,
                       "a YaRN-scaled model needs the sink bank: llama.cpp's own K-shift would scale its keys twice");
    }
    return ES_OK;
}

} // namespace

std::unique_ptr<es_sink_mover> es_sink_mover_none() {
    return std::make_unique<none_mover>();
}

std::unique_ptr<es_sink_mover> es_sink_mover_init(llama_context * ctx, const es_stream_params & p, int32_t * status) {
    if (p.sink_move == ES_SINK_MOVE_NONE) {
        *status = ES_OK;
        return std::make_unique<state_mover>(ctx, p);
    }
    const bool bank = p.sink_move == ES_SINK_MOVE_BANK;
    *status         = bank ? es_bank_supported(ctx) : redecode_supported(ctx, p);
    if (*status != ES_OK) {
        return nullptr;
    }
    if (bank) {
        return std::make_unique<bank_mover>(ctx, p);
    }
    return std::make_unique<redecode_mover>(ctx, p);
}
