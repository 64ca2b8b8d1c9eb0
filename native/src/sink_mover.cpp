#include "sink_mover.h"

#include "bank.h"
#include "batch.h"
#include "error.h"
#include "support.h"

#include <algorithm>

namespace {

int32_t from_bank(int32_t rc, const char * what) {
    switch (rc) {
    case ES_BANK_OK: return ES_OK;
    case ES_BANK_UNSUPPORTED: return es_fail(ES_ERR_UNSUPPORTED, "%s: this memory has no sink bank", what);
    case ES_BANK_NO_MEMORY: return es_fail(ES_ERR_MEMORY, "%s: out of memory", what);
    case ES_BANK_PENDING_SHIFT:
        return es_fail(ES_ERR_INVALID, "%s: the context has a pending K-shift that is not edge-stream's", what);
    case ES_BANK_COMPUTE: return es_fail(ES_ERR_DECODE, "%s: the backend failed", what);
    case ES_BANK_FORMAT: return es_fail(ES_ERR_FORMAT, "%s: the saved sinks do not fit this model", what);
    default: return es_fail(ES_ERR_INTERNAL, "%s: the cache does not hold the sinks", what);
    }
}

class bank_mover : public es_sink_mover {
public:
    bank_mover(llama_context * ctx, const es_stream_params & p) : ctx(ctx), seq(p.seq_id), n_keep(p.n_keep) {}
    ~bank_mover() override { reset(); }

    int32_t before_sinks(uint32_t n, llama_pos pos) override {
        return from_bank(begin(ES_BANK_SINKS, n_keep, n, pos), "pinning the sinks");
    }
    int32_t after_sinks(const llama_token *, uint32_t n) override {
        return from_bank(llama_es_bank_capture_end(ctx, seq, ES_BANK_SINKS, n > 0), "pinning the sinks");
    }

    bool    can_recall() const override { return true; }
    int32_t before_recalled(uint32_t n_block, uint32_t n, llama_pos pos, llama_pos window) override {
        const int32_t rc = llama_es_bank_hide(ctx, seq, window);
        hidden           = rc == ES_BANK_OK;
        return from_bank(hidden ? begin(ES_BANK_RECALLED, n_block, n, pos) : rc, "recalling");
    }
    int32_t after_recalled(uint32_t n) override {
        const int32_t rc = llama_es_bank_capture_end(ctx, seq, ES_BANK_RECALLED, n > 0);
        if (hidden) {
            (void) llama_es_bank_unhide(ctx, seq);
        }
        hidden = false;
        return n > 0 ? from_bank(rc, "recalling") : (int32_t) ES_OK;
    }
    void forget_recalled() override {
        if (has[ES_BANK_RECALLED]) {
            llama_es_bank_free(ctx, seq, ES_BANK_RECALLED);
        }
        has[ES_BANK_RECALLED] = false;
    }
    std::vector<uint8_t> copy_recalled() override {
        std::vector<uint8_t> out(llama_es_bank_copy(ctx, seq, ES_BANK_RECALLED, nullptr, 0));
        (void) llama_es_bank_copy(ctx, seq, ES_BANK_RECALLED, out.data(), out.size());
        return out;
    }
    int32_t paste_recalled(const std::vector<uint8_t> & copy, llama_pos pos) override {
        has[ES_BANK_RECALLED] = moving = true;
        written                        = false;
        return from_bank(llama_es_bank_paste(ctx, seq, ES_BANK_RECALLED, pos, copy.data(), copy.size()), "recalling");
    }

    int32_t commit(llama_pos, llama_pos to) override {
        moving     = true;
        written    = false;
        int32_t rc = ES_BANK_OK;
        for (const int32_t part : { ES_BANK_SINKS, ES_BANK_RECALLED }) {
            if (rc == ES_BANK_OK && has[part]) {
                rc = llama_es_bank_move(ctx, seq, part, part == ES_BANK_SINKS ? to : to + (llama_pos) n_keep);
            }
        }
        return from_bank(rc, "moving the sinks");
    }
    void decoded() override { written = true; }
    bool can_rebase_idle() const override { return true; }
    void end_move() override {
        if (moving && written) {
            moving = false;
            for (const int32_t part : { ES_BANK_SINKS, ES_BANK_RECALLED }) {
                if (has[part]) {
                    (void) llama_es_bank_move_end(ctx, seq, part);
                }
            }
        }
    }
    int32_t rebase(llama_pos from, llama_pos delta) override {
        const int32_t rc = from_bank(llama_es_bank_shift_window(ctx, seq, -delta), "rebasing");
        return rc != ES_OK ? rc : commit(from, from - delta);
    }
    int32_t reset() override {
        forget_recalled();
        if (has[ES_BANK_SINKS]) {
            llama_es_bank_free(ctx, seq, ES_BANK_SINKS);
        }
        has[ES_BANK_SINKS] = moving = false;
        return ES_OK;
    }
    int32_t get_state(std::vector<uint8_t> & out) override {
        out.clear();
        if (has[ES_BANK_SINKS] || has[ES_BANK_RECALLED]) {
            out.resize(llama_es_bank_state_get(ctx, seq, nullptr, 0));
            if (out.empty() || llama_es_bank_state_get(ctx, seq, out.data(), out.size()) != out.size()) {
                return es_fail(ES_ERR_INVALID, "the sinks are not all decoded yet");
            }
        }
        return ES_OK;
    }
    int32_t set_state(const std::vector<uint8_t> & state, const std::vector<llama_token> & sinks,
                      uint32_t n_recalled) override {
        reset();
        if (state.empty()) {
            return ES_OK;
        }
        has[ES_BANK_SINKS]    = !sinks.empty();
        has[ES_BANK_RECALLED] = n_recalled > 0;
        moving                = true;
        written               = false;
        return from_bank(llama_es_bank_state_set(ctx, seq, state.data(), state.size()), "restoring the sinks");
    }

private:
    llama_context * ctx;
    llama_seq_id    seq;
    uint32_t        n_keep;
    bool            has[2]  = { false, false }; // blocks, by es_bank_part
    bool            hidden  = false;            // the window is, see before_recalled
    bool            moving  = false;            // decodes write the pinned keys
    bool            written = true;             // a decode has written them since the last move

    // Announces the capture of n rows of a block of n_block.
    int32_t begin(es_bank_part part, uint32_t n_block, uint32_t n, llama_pos pos) {
        const int32_t rc = has[part] ? (int32_t) ES_BANK_OK : llama_es_bank_alloc(ctx, seq, part, n_block);
        has[part]        = has[part] || rc == ES_BANK_OK;
        return rc == ES_BANK_OK ? llama_es_bank_capture_begin(ctx, seq, part, n, pos) : rc;
    }
};

class redecode_mover : public es_sink_mover {
public:
    redecode_mover(llama_context * ctx, const es_stream_params & p)
        : ctx(ctx), mem(llama_get_memory(ctx)), seq(p.seq_id), scratch(p.scratch_seq_id), has_scratch(p.n_keep > 0) {
        clear_scratch();
    }
    ~redecode_mover() override { clear_scratch(); }

    int32_t after_sinks(const llama_token * tokens, uint32_t n) override {
        sinks.insert(sinks.end(), tokens, tokens + n);
        return ES_OK;
    }
    int32_t prepare(llama_pos to) override {
        const uint32_t n_max = llama_n_batch(ctx);
        for (uint32_t i = 0; i < sinks.size();) {
            const uint32_t n = std::min<uint32_t>(n_max, (uint32_t) sinks.size() - i);
            es_batch       batch(n);
            if (!batch.allocated()) {
                return es_fail(ES_ERR_MEMORY, "out of memory");
            }
            for (uint32_t j = i; j < i + n; ++j) {
                batch.add(sinks[j], to + (llama_pos) j, scratch, false);
            }
            const int32_t rc = batch.decode(ctx);
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
    int32_t set_state(const std::vector<uint8_t> &, const std::vector<llama_token> & tokens, uint32_t) override {
        sinks = tokens;
        return ES_OK;
    }

private:
    llama_context *          ctx;
    llama_memory_t           mem;
    llama_seq_id             seq;
    llama_seq_id             scratch;
    std::vector<llama_token> sinks;
    bool                     has_scratch;     // false without sinks
    bool                     pending = false; // a K-shift that llama.cpp applies at its next decode

    void clear_scratch() {
        if (has_scratch) {
            llama_memory_seq_rm(mem, scratch, -1, -1);
        }
    }
};

// For models of recurrent layers only, which have no sinks: positions are just counted.
class state_mover : public es_sink_mover {
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
    return es_model_meta(model, es_model_meta(model, "general.architecture") + ".rope.scaling.type") == "yarn";
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
            "a model with sliding-window layers needs the sink bank: llama.cpp reuses cells outside the window");
    }
    if (is_yarn(llama_get_model(ctx))) {
        return es_fail(ES_ERR_UNSUPPORTED,
                       "a YaRN-scaled model needs the sink bank: llama.cpp's own K-shift would scale its keys twice");
    }
    return ES_OK;
}

} // namespace

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
