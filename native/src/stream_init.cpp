// Creates a stream: checks its parameters against model and context.
#include "bank.h"
#include "error.h"
#include "stream.h"

#include <algorithm>
#include <limits>
#include <new>

static constexpr uint32_t n_window_min = 4; // chunks are at most a quarter of the window

// float32 RoPE angles lose precision in proportion to the position (measured in docs/architecture.md). With 4 n_ctx, at
// least 3 n_ctx tokens lie between two rebases, so that a key is re-rotated at most once in its life.
static constexpr int32_t rebase_at_min = 4096;

static constexpr uint32_t n_slide_drafts = 16;

static constexpr uint32_t n_match_default = 2;
static constexpr uint32_t n_match_max     = 64; // tokens that es_drafter compares
static constexpr uint32_t n_draft_max     = 64;

// a decoder's angles may be exact at any position; this bound only keeps positions within 32 bits
static constexpr int32_t rebase_at_decoder = 1 << 30;

es_stream::es_stream(llama_context * ctx, const es_stream_params & params)
    : model(llama_get_model(ctx)), ctx(ctx), mem(llama_get_memory(ctx)), params(params),
      stateful(llama_model_is_hybrid(model) || llama_model_is_recurrent(model)) {}

es_stream::es_stream(const llama_model * vocab, const es_decoder & decoder, const es_stream_params & params)
    : model(vocab), decoder(decoder), params(params), stateful(false) {}

es_stream::~es_stream() {
    mover.reset();
    remove(-1, -1);
}

// Validates p against the context and derives the effective window.
int32_t es_stream::check(const es_stream_params & p, es_window_params & out) const {
    const uint32_t n_cells  = ctx ? llama_n_ctx_seq(ctx) : decoder.n_cells;
    const bool     redecode = p.sink_move == ES_SINK_MOVE_REDECODE;
    const uint32_t n_extra  = redecode ? p.n_keep : 0; // the sinks are held twice during a move
    const uint32_t n_batch  = ctx ? std::min(llama_n_batch(ctx), llama_n_ubatch(ctx)) : decoder.n_batch;

    if (redecode && p.n_keep > 0 &&
        (p.scratch_seq_id < 0 || p.scratch_seq_id == p.seq_id || (uint32_t) p.scratch_seq_id >= llama_n_seq_max(ctx))) {
        return es_fail(ES_ERR_INVALID, "scratch_seq_id = %d must be another of the context's %u sequences",
                       p.scratch_seq_id, llama_n_seq_max(ctx));
    }
    if (p.n_keep > n_cells) {
        return es_fail(ES_ERR_INVALID, "n_keep = %u is larger than the cache of %u tokens", p.n_keep, n_cells);
    }
    if (p.n_ctx > n_cells || (uint64_t) p.n_ctx + n_extra > n_cells) {
        return es_fail(ES_ERR_INVALID, "n_ctx = %u%s does not fit the context's cache of %u tokens", p.n_ctx,
                       n_extra ? " (plus n_keep for moving the sinks by redecoding)" : "", n_cells);
    }
    const uint32_t n_ctx = p.n_ctx ? p.n_ctx : n_cells - n_extra;
    if (p.n_keep >= n_ctx || n_ctx - p.n_keep < n_window_min) {
        return es_fail(ES_ERR_INVALID, "n_keep = %u leaves less than %u window tokens of n_ctx = %u", p.n_keep,
                       n_window_min, n_ctx);
    }
    const uint32_t n_window = n_ctx - p.n_keep;

    if (n_ctx > (uint32_t) std::numeric_limits<int32_t>::max() / 4) {
        return es_fail(ES_ERR_INVALID, "n_ctx = %u is too large", n_ctx);
    }
    out.n_ctx  = n_ctx;
    out.n_keep = p.n_keep;
    // a draft must fit the room there is, so that with drafts evictions make some
    const uint32_t n_least = redecode ? n_window / 16 : p.n_draft ? std::min(n_slide_drafts, n_window / 4) : 1;
    out.n_slide            = std::min(p.n_slide ? p.n_slide : std::max(1u, n_least), n_window);
    out.n_batch            = n_batch;
    out.n_chunk            = std::min({ p.n_chunk ? p.n_chunk : n_window, n_window / 4, n_batch });
    out.n_boundary         = std::min(p.n_boundary, n_window);
    out.rebase_at          = p.rebase_at ? p.rebase_at
                             : ctx       ? std::max(rebase_at_min, (int32_t) (4 * n_ctx))
                                         : rebase_at_decoder;
    if (out.rebase_at <= (int32_t) n_ctx) {
        return es_fail(ES_ERR_INVALID, "rebase_at = %d must be larger than n_ctx = %u", out.rebase_at, n_ctx);
    }
    const char *  why   = nullptr;
    const int32_t limit = ctx ? es_position_limit(model, &why) : std::numeric_limits<int32_t>::max();
    if (out.rebase_at > limit) {
        // at least a third of the limit lies between two rebases, so that a key is re-rotated at most twice in its life
        const uint32_t largest = (uint32_t) limit / 3 * 2;
        if (n_ctx > largest) {
            return es_fail(
                ES_ERR_UNSUPPORTED,
                "the model cannot stream with n_ctx = %u: %s changes with absolute positions from %d on, so %u "
                "is the largest n_ctx (-c) that is exact",
                n_ctx, why, limit, largest);
        }
        if (p.rebase_at) {
            return es_fail(ES_ERR_INVALID, "rebase_at = %d must be at most %d for this model: there %s changes",
                           p.rebase_at, limit, why);
        }
        out.rebase_at = limit;
    }
    return ES_OK;
}

int32_t es_stream::init() {
    if (params.n_draft > 0) {
        if (stateful) {
            return es_fail(ES_ERR_UNSUPPORTED,
                           "the state of its recurrent layers cannot take tokens back: load it without drafts");
        }
        if (params.n_draft > n_draft_max || params.n_draft_min > params.n_draft || params.n_match > n_match_max) {
            return es_fail(ES_ERR_INVALID,
                           "n_draft = %u must be at most %u, n_draft_min = %u at most n_draft, and n_match = %u at "
                           "most %u",
                           params.n_draft, n_draft_max, params.n_draft_min, params.n_match, n_match_max);
        }
        drafter = std::make_unique<es_drafter>(params.n_draft, params.n_draft_min,
                                               params.n_match ? params.n_match : n_match_default);
    }
    if (!ctx) {
        params.sink_move = ES_SINK_MOVE_NONE;
        es_window_params wp;
        const int32_t    rc = check(params, wp);
        if (rc == ES_OK) {
            mover  = std::make_unique<es_sink_mover>();
            window = es_window(wp);
        }
        return rc;
    }
    char reason[256];
    if (!es_model_can_stream(model, reason, sizeof(reason))) {
        return es_fail(ES_ERR_UNSUPPORTED, "the model cannot stream: %s", reason);
    }
    if (!mem) {
        return es_fail(ES_ERR_UNSUPPORTED,
                       "the model cannot stream: it keeps no cache (an encoder or an embedding model)");
    }
    if (params.seq_id < 0 || (uint32_t) params.seq_id >= llama_n_seq_max(ctx)) {
        return es_fail(ES_ERR_INVALID, "seq_id = %d is not one of the context's %u sequences", params.seq_id,
                       llama_n_seq_max(ctx));
    }
    if (params.sink_move < ES_SINK_MOVE_AUTO || params.sink_move > ES_SINK_MOVE_REDECODE) {
        return es_fail(ES_ERR_INVALID, "sink_move = %d is unknown", params.sink_move);
    }
    if (llama_model_is_recurrent(model)) {
        params.sink_move = ES_SINK_MOVE_NONE;
    } else if (params.sink_move == ES_SINK_MOVE_AUTO) {
        params.sink_move = es_bank_available() ? ES_SINK_MOVE_BANK : ES_SINK_MOVE_REDECODE;
    }
    es_window_params wp;
    int32_t          rc = check(params, wp);
    if (rc != ES_OK) {
        return rc;
    }
    mover = es_sink_mover_init(ctx, params, &rc);
    if (!mover) {
        return rc;
    }
    batch = std::make_unique<es_batch>(wp.n_batch);
    if (!batch->allocated()) {
        return es_fail(ES_ERR_MEMORY, "out of memory");
    }
    llama_memory_seq_rm(mem, params.seq_id, -1, -1);
    window = es_window(wp);
    return ES_OK;
}

int32_t es_stream::resize(const es_stream_params & wanted, const es_window::state & state) {
    es_window_params wp;
    int32_t          rc = check(wanted, wp);
    if (rc != ES_OK) {
        return rc;
    }
    es_window next(wp);
    if (!next.set_state(state)) {
        return es_fail(ES_ERR_FORMAT, "the session is damaged: its positions contradict each other");
    }
    // it takes its memory for sinks with the first of them, when the old one's is free
    std::unique_ptr<es_sink_mover> made = ctx ? es_sink_mover_init(ctx, wanted, &rc) : nullptr;
    if (ctx && !made) {
        return rc;
    }
    // from here on nothing fails
    (void) reset();
    params = wanted;
    window = std::move(next);
    if (made) {
        mover = std::move(made);
    }
    if (drafter) {
        try {
            drafter->push(state.tokens.data(), state.tokens.size());
        } catch (const std::bad_alloc &) { // what it does not know it does not draft
            drafter->clear();
        }
    }
    return ES_OK;
}
