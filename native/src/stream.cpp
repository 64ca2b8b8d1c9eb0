#include "stream.h"

#include "error.h"

#include <algorithm>
#include <limits>

static constexpr uint32_t n_window_min = 4; // chunks are at most a quarter of the window

// float32 RoPE angles lose precision in proportion to the position: docs/architecture.md holds the measurement. At
// 4 n_ctx a rebase comes every 3 n_ctx tokens or more, so that a key is re-rotated at most once in its life.
static constexpr int32_t rebase_at_min = 4096;

// a decoder's angles may be exact at any position; this bound only keeps positions within 32 bits
static constexpr int32_t rebase_at_decoder = 1 << 30;

// states kept to come back to; one may take many MiB
static constexpr size_t n_checkpoints = 4;

es_stream::es_stream(llama_context * ctx, const es_stream_params & params)
    : model(llama_get_model(ctx)), ctx(ctx), mem(llama_get_memory(ctx)), params(params),
      stateful(llama_model_is_hybrid(model) || llama_model_is_recurrent(model)) {}

es_stream::es_stream(const llama_model * vocab, const es_decoder & decoder, const es_stream_params & params)
    : model(vocab), decoder(decoder), params(params), stateful(false) {}

es_stream::~es_stream() {
    mover.reset();
    if (batch.token) {
        llama_batch_free(batch);
    }
    remove(-1, -1);
}

// Frees cells. A decoder is told what is cached at its next step.
void es_stream::remove(llama_pos from, llama_pos to) const {
    if (mem) {
        llama_memory_seq_rm(mem, params.seq_id, from, to);
    }
}

int32_t es_stream::n_vocab() const {
    return llama_vocab_n_tokens(llama_model_get_vocab(model));
}

es_decoder_step es_stream::now() const {
    es_decoder_step step = {};
    step.n_ctx           = window.params().n_ctx;
    step.n_keep          = window.params().n_keep;
    step.n_sinks         = window.n_sinks();
    step.n_window        = window.n_window();
    step.pos_sinks       = window.pos_sinks();
    return step;
}

// Validates params against the context and derives the effective window.
int32_t es_stream::check(es_window_params & out) const {
    const uint32_t n_cells  = ctx ? llama_n_ctx_seq(ctx) : decoder.n_cells;
    const bool     redecode = params.sink_move == ES_SINK_MOVE_REDECODE;
    const uint32_t n_extra  = redecode ? params.n_keep : 0; // the sinks exist twice for a moment
    const uint32_t n_batch  = ctx ? std::min(llama_n_batch(ctx), llama_n_ubatch(ctx)) : decoder.n_batch;

    if (redecode && params.n_keep > 0 &&
        (params.scratch_seq_id < 0 || params.scratch_seq_id == params.seq_id ||
         (uint32_t) params.scratch_seq_id >= llama_n_seq_max(ctx))) {
        return es_fail(ES_ERR_INVALID, "scratch_seq_id = %d must be another of the context's %u sequences",
                       params.scratch_seq_id, llama_n_seq_max(ctx));
    }
    if (params.n_keep > n_cells) {
        return es_fail(ES_ERR_INVALID, "n_keep = %u is larger than the cache of %u tokens", params.n_keep, n_cells);
    }
    if (params.n_ctx > n_cells || (uint64_t) params.n_ctx + n_extra > n_cells) {
        return es_fail(ES_ERR_INVALID, "n_ctx = %u%s does not fit the context's cache of %u tokens", params.n_ctx,
                       n_extra ? " (plus n_keep for moving the sinks by redecoding)" : "", n_cells);
    }
    const uint32_t n_ctx = params.n_ctx ? params.n_ctx : n_cells - n_extra;
    if (params.n_keep >= n_ctx || n_ctx - params.n_keep < n_window_min) {
        return es_fail(ES_ERR_INVALID, "n_keep = %u leaves less than %u window tokens of n_ctx = %u", params.n_keep,
                       n_window_min, n_ctx);
    }
    const uint32_t n_window = n_ctx - params.n_keep;

    if (n_ctx > (uint32_t) std::numeric_limits<int32_t>::max() / 4) {
        return es_fail(ES_ERR_INVALID, "n_ctx = %u is too large", n_ctx);
    }
    out.n_ctx      = n_ctx;
    out.n_keep     = params.n_keep;
    out.n_slide    = params.n_slide ? std::min(params.n_slide, n_window) : (redecode ? std::max(1u, n_window / 16) : 1);
    out.n_batch    = n_batch;
    out.n_chunk    = std::min({ params.n_chunk ? params.n_chunk : n_window, n_window / 4, n_batch });
    out.n_boundary = std::min(params.n_boundary, n_window);
    out.rebase_at  = params.rebase_at ? params.rebase_at
                     : ctx            ? std::max(rebase_at_min, (int32_t) (4 * n_ctx))
                                      : rebase_at_decoder;
    if (out.rebase_at <= (int32_t) n_ctx) {
        return es_fail(ES_ERR_INVALID, "rebase_at = %d must be larger than n_ctx = %u", out.rebase_at, n_ctx);
    }
    const char *  why   = nullptr;
    const int32_t limit = ctx ? es_position_limit(model, &why) : std::numeric_limits<int32_t>::max();
    if (out.rebase_at > limit) {
        // a third of the limit stays between two rebases, so that a key is rotated twice in its life at most
        const uint32_t largest = (uint32_t) limit / 3 * 2;
        if (n_ctx > largest) {
            return es_fail(
                ES_ERR_UNSUPPORTED,
                "the model cannot stream with n_ctx = %u: %s changes with absolute positions from %d on, so %u "
                "is the largest n_ctx (-c) that is exact",
                n_ctx, why, limit, largest);
        }
        if (params.rebase_at) {
            return es_fail(ES_ERR_INVALID, "rebase_at = %d must be at most %d for this model: there %s changes",
                           params.rebase_at, limit, why);
        }
        out.rebase_at = limit;
    }
    return ES_OK;
}

int32_t es_stream::init() {
    if (!ctx) {
        params.sink_move = ES_SINK_MOVE_NONE;
        es_window_params wp;
        const int32_t    rc = check(wp);
        if (rc == ES_OK) {
            mover  = es_sink_mover_none();
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
    int32_t          rc = check(wp);
    if (rc != ES_OK) {
        return rc;
    }
    mover = es_sink_mover_init(ctx, params, &rc);
    if (!mover) {
        return rc;
    }
    batch = llama_batch_init((int32_t) wp.n_batch, 0, 1);
    if (!batch.token) {
        return es_fail(ES_ERR_MEMORY, "out of memory");
    }
    llama_memory_seq_rm(mem, params.seq_id, -1, -1);
    window = es_window(wp);
    return ES_OK;
}

int32_t es_stream::resize(const es_window_params & wanted, const es_window::state & state) {
    const es_stream_params old = params;
    params.n_ctx               = wanted.n_ctx;
    params.n_keep              = wanted.n_keep;
    params.n_slide             = wanted.n_slide;
    params.n_chunk             = wanted.n_chunk;
    params.n_boundary          = wanted.n_boundary;
    params.rebase_at           = wanted.rebase_at;
    es_window_params wp;
    int32_t          rc = check(wp);
    es_window        next;
    if (rc == ES_OK) {
        next = es_window(wp);
        if (!next.set_state(state)) {
            rc = es_fail(ES_ERR_FORMAT, "the session is damaged: its positions contradict each other");
        }
    }
    if (rc != ES_OK) {
        params = old;
        return rc;
    }
    rc = reset();
    if (ctx) {
        mover.reset(); // the old bank goes first
        mover = es_sink_mover_init(ctx, params, &rc);
    }
    window = std::move(next);
    return rc;
}

const float * es_stream::logits() const {
    return last_logits.empty() ? nullptr : last_logits.data();
}

const float * es_stream::row(int32_t i) const {
    if (ctx) {
        return llama_get_logits_ith(ctx, i);
    }
    return rows ? rows + (size_t) n_vocab() * (i < 0 ? n_rows - 1 : (uint32_t) i) : nullptr;
}

// Copies row i of the last decode's batch (-1: the last row).
int32_t es_stream::keep_logits(int32_t i) {
    const float * logits = row(i); // waits for the backends
    if (es_check_devices(ctx) != ES_OK) {
        return ES_ERR_DECODE;
    }
    if (!logits) {
        return es_fail(ES_ERR_INTERNAL, "there are no logits for token %d of the batch", i);
    }
    last_logits.assign(logits, logits + n_vocab());
    return ES_OK;
}

int32_t es_stream::reset() {
    remove(-1, -1);
    window.clear();
    last_logits.clear();
    broken = state_lost = false;
    checkpoints.clear();
    saved_sampler.reset();
    n_slides = n_rebases = t_slide_us = t_rebase_us = t_decode_us = 0;
    if (!mover) {
        int32_t rc = ES_OK;
        mover      = es_sink_mover_init(ctx, params, &rc);
        return rc;
    }
    return mover->reset();
}

// Evict the oldest window tokens and let the sinks follow. On failure of prepare nothing has changed.
int32_t es_stream::slide(uint32_t n_evict) {
    const int64_t   t0   = llama_time_us();
    const llama_pos from = window.pos_sinks();
    const llama_pos to   = from + (llama_pos) n_evict;
    const bool      move = window.n_sinks() > 0;

    int32_t rc = move ? mover->prepare(to) : (int32_t) ES_OK;
    if (rc != ES_OK) {
        return rc;
    }
    remove(window.pos_window(), window.pos_window() + (llama_pos) n_evict);
    window.evict(n_evict);
    if (move) {
        rc     = mover->commit(from, to);
        broken = rc != ES_OK; // evicted, but the sinks stayed behind
    }
    n_slides++;
    t_slide_us += llama_time_us() - t0;
    return rc;
}

int32_t es_stream::rebase() {
    if (broken || !mover) {
        return es_fail(ES_ERR_INTERNAL, "the stream's cache is undefined after an earlier failure: reset it");
    }
    if (window.pos_sinks() == 0) {
        return ES_OK;
    }
    const int64_t   t0   = llama_time_us();
    const llama_pos from = window.pos_sinks();
    int32_t         rc   = mover->rebase(from, from);
    if (rc == ES_OK && !ctx) {
        const es_decoder_step step = now();
        if (!decoder.rebase(decoder.user, &step, from)) {
            rc = es_fail(ES_ERR_DECODE, "the decoder could not bring its positions back");
        }
    }
    if (rc != ES_OK) {
        broken = true; // keys may be rotated in part
        return rc;
    }
    window.rebase();
    n_rebases++;
    t_rebase_us += llama_time_us() - t0;
    return ES_OK;
}

void es_stream::add_to_batch(llama_batch & out, const llama_token * tokens, uint32_t m, bool all_logits) const {
    for (uint32_t i = 0; i < m; ++i) {
        const int32_t k  = out.n_tokens++;
        out.token[k]     = tokens[i];
        out.pos[k]       = window.pos_next() + (llama_pos) i;
        out.n_seq_id[k]  = 1;
        out.seq_id[k][0] = params.seq_id;
        out.logits[k]    = all_logits || i + 1 == m;
    }
}

static int32_t decode_error(llama_context * ctx, int32_t rc, uint32_t m) {
    if (es_check_devices(ctx) != ES_OK) {
        return ES_ERR_DECODE;
    }
    return rc == 2 ? es_fail(ES_ERR_STOPPED, "the decode was aborted")
                   : es_fail(ES_ERR_DECODE, "llama_decode returned %d for %u tokens", rc, m);
}

int32_t es_stream::decode(const llama_token * tokens, uint32_t m, bool all_logits) {
    const int64_t t0 = llama_time_us();
    if (!ctx) {
        es_decoder_step step = now();
        step.tokens          = tokens;
        step.n_tokens        = m;
        step.all_logits      = all_logits;
        rows                 = decoder.decode(decoder.user, &step);
        n_rows               = all_logits ? m : 1;
        t_decode_us += llama_time_us() - t0;
        return rows ? (int32_t) ES_OK : es_fail(ES_ERR_DECODE, "the decoder failed on %u tokens", m);
    }
    batch.n_tokens = 0;
    add_to_batch(batch, tokens, m, all_logits);
    const int32_t rc = llama_decode(ctx, batch);
    t_decode_us += llama_time_us() - t0;
    if (rc != 0) {
        // llama.cpp removes the failed part of a batch; the stream keeps whole chunks only
        remove(window.pos_next(), -1);
        state_lost = stateful;
        return decode_error(ctx, rc, m);
    }
    return ES_OK;
}

int32_t es_stream::check_tokens(const llama_token * tokens, size_t n_tokens) const {
    if (broken || !mover) {
        return es_fail(ES_ERR_INTERNAL, "the stream's cache is undefined after an earlier failure: reset it");
    }
    if (n_tokens == 0 || !tokens) {
        return es_fail(ES_ERR_INVALID, "there are no tokens to feed");
    }
    const int32_t n = n_vocab();
    for (size_t i = 0; i < n_tokens; ++i) {
        if (tokens[i] < 0 || tokens[i] >= n) {
            return es_fail(ES_ERR_INVALID, "token %d is not in the vocabulary of %d", tokens[i], n);
        }
    }
    return ES_OK;
}

// Whatever must happen before a decode of m tokens.
int32_t es_stream::make_room(uint32_t m) {
    const uint32_t n_evict = window.to_evict(m);
    int32_t        rc      = ES_OK;
    if (n_evict > 0) {
        rc = slide(n_evict);
    } else {
        mover->settle();
    }
    if (rc == ES_OK && window.must_rebase(m)) {
        rc = rebase();
    }
    return rc;
}

int32_t es_stream::feed(const llama_token * tokens, size_t n_tokens, es_logits_callback on_logits, void * user) {
    int32_t rc = check_tokens(tokens, n_tokens);
    if (rc == ES_OK && state_lost) {
        rc = to_state_of(window.n_past());
    }
    if (rc != ES_OK) {
        return rc;
    }

    for (size_t i = 0; i < n_tokens;) {
        const uint32_t m = window.next_chunk(n_tokens - i);

        if ((rc = make_room(m)) != ES_OK) {
            return rc;
        }
        const bool sinks = window.n_sinks() < window.params().n_keep;
        last_logits.clear();
        if (stateful && on_logits && m > 1 && window.n_past() > 0 && (rc = keep_state()) != ES_OK) {
            return rc; // what the callback may stop at
        }
        if (sinks) {
            rc = mover->before_sinks(m, window.pos_next());
        }
        if (rc == ES_OK) {
            rc = decode(tokens + i, m, on_logits != nullptr);
        }
        if (sinks) {
            if (rc != ES_OK) {
                (void) mover->after_sinks(tokens + i, 0);
            } else if ((rc = mover->after_sinks(tokens + i, m)) != ES_OK) {
                remove(window.pos_next(), -1);
            }
        }
        if (rc != ES_OK) {
            return rc;
        }
        const int64_t index = window.n_past();
        mover->decoded();
        window.push(tokens + i, m);
        i += m;

        if (on_logits && ctx) {
            llama_synchronize(ctx);
            if ((rc = es_check_devices(ctx)) != ES_OK) {
                return rc;
            }
        }
        for (uint32_t j = 0; on_logits && j < m; ++j) {
            if (!on_logits(user, index + j, row((int32_t) j))) {
                const uint32_t n_after = m - j - 1;
                if (n_after == 0) {
                    (void) keep_logits(-1);
                } else if (n_after <= window.n_window()) {
                    const int32_t undone = rewind(n_after);
                    if (undone != ES_OK) {
                        return undone;
                    }
                }
                return es_fail(ES_ERR_STOPPED, "stopped by the callback");
            }
        }
    }
    return keep_logits(-1);
}

int32_t es_stream::feed_each(es_stream * const * streams, const llama_token * tokens, size_t n) {
    llama_context * ctx = streams[0]->ctx;
    if (!ctx) {
        return es_fail(ES_ERR_UNSUPPORTED, "this engine decodes one stream at a time");
    }
    for (size_t i = 0; i < n; ++i) {
        const es_stream & s = *streams[i];
        if (s.ctx != ctx) {
            return es_fail(ES_ERR_INVALID, "the streams belong to different contexts");
        }
        for (size_t j = 0; j < i; ++j) {
            if (streams[j]->params.seq_id == s.params.seq_id) {
                return es_fail(ES_ERR_INVALID, "two of the streams are the same sequence, %d", s.params.seq_id);
            }
        }
        int32_t rc = s.check_tokens(tokens + i, 1);
        if (rc == ES_OK && s.state_lost) {
            rc = streams[i]->to_state_of(s.window.n_past());
        }
        if (rc != ES_OK) {
            return rc;
        }
        if (s.window.n_sinks() < s.window.params().n_keep) {
            return es_fail(ES_ERR_INVALID, "stream %zu holds only %u of its %u sinks: feed them on their own first", i,
                           s.window.n_sinks(), s.window.params().n_keep);
        }
    }
    if (n > std::min(llama_n_batch(ctx), llama_n_ubatch(ctx))) {
        return es_fail(ES_ERR_INVALID, "%zu streams do not fit the context's batch", n);
    }
    for (size_t i = 0; i < n; ++i) {
        const int32_t rc = streams[i]->make_room(1);
        if (rc != ES_OK) {
            return rc;
        }
    }

    llama_batch & batch = streams[0]->batch; // every stream's batch has room for the context's n_ubatch
    batch.n_tokens      = 0;
    const int64_t t0    = llama_time_us();
    for (size_t i = 0; i < n; ++i) {
        streams[i]->last_logits.clear();
        streams[i]->add_to_batch(batch, tokens + i, 1, false);
    }
    const int32_t rc = llama_decode(ctx, batch);
    // every stream waited that long
    const int64_t t = llama_time_us() - t0;
    for (size_t i = 0; i < n; ++i) {
        es_stream & s = *streams[i];
        s.t_decode_us += t;
        if (rc != 0) {
            s.remove(s.window.pos_next(), -1);
            s.state_lost = s.stateful;
            continue;
        }
        s.mover->decoded();
        s.window.push(tokens + i, 1);
    }
    if (rc != 0) {
        return decode_error(ctx, rc, (uint32_t) n);
    }
    int32_t kept = ES_OK;
    for (size_t i = 0; i < n && kept == ES_OK; ++i) {
        kept = streams[i]->keep_logits((int32_t) i);
    }
    return kept;
}

int32_t es_stream::rewind(size_t n) {
    if (n > window.n_window()) {
        return es_fail(ES_ERR_INVALID, "cannot rewind %zu tokens: only %u are in the window", n, window.n_window());
    }
    if (n == 0) {
        return ES_OK;
    }
    if (stateful) {
        return to_state_of(window.n_past() - (int64_t) n);
    }
    last_logits.clear();
    window.rewind((uint32_t) n);
    remove(window.pos_next(), -1);
    return ES_OK;
}

int32_t es_stream::mark() {
    window.mark();
    return stateful && !state_lost && window.n_past() > 0 ? keep_state() : (int32_t) ES_OK;
}

int32_t es_stream::keep_state() {
    if (!stateful) {
        return ES_OK;
    }
    checkpoint c;
    c.n_past = window.n_past();
    c.pos    = window.pos_next() - 1;
    if (!checkpoints.empty() && checkpoints.back().n_past == c.n_past) {
        return ES_OK;
    }
    c.data.resize(llama_state_seq_get_size_ext(ctx, params.seq_id, LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY));
    if (llama_state_seq_get_data_ext(ctx, c.data.data(), c.data.size(), params.seq_id,
                                     LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY) != c.data.size()) {
        return es_fail(ES_ERR_INTERNAL, "the recurrent state could not be kept");
    }
    checkpoints.push_back(std::move(c));
    // what has left the window cannot be read again from there
    while (checkpoints.size() > n_checkpoints ||
           checkpoints.front().n_past < window.n_past() - (int64_t) window.n_window()) {
        checkpoints.pop_front();
    }
    return ES_OK;
}

int32_t es_stream::to_state_of(int64_t n_past) {
    const int64_t in_window = window.n_past() - (int64_t) window.n_window(); // index of the window's first token
    size_t        n_known   = checkpoints.size();                            // those that are not too late
    while (n_known > 0 && checkpoints[n_known - 1].n_past > n_past) {
        --n_known;
    }
    const bool known = n_known > 0 && checkpoints[n_known - 1].n_past >= in_window;
    if (!known && window.n_evicted() > 0) {
        return es_fail(ES_ERR_INVALID,
                       "cannot go back to token %lld: the recurrent state there is not kept; reset the stream and read "
                       "what it should hold",
                       (long long) n_past);
    }
    std::vector<llama_token> again;
    if (known) {
        checkpoints.resize(n_known);
        const checkpoint & c = checkpoints.back();
        again.assign(window.window().begin() + (c.n_past - in_window), window.window().begin() + (n_past - in_window));
        window.rewind((uint32_t) (window.n_past() - c.n_past));
        if (llama_state_seq_set_data_ext(ctx, c.data.data(), c.data.size(), params.seq_id,
                                         LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY) != c.data.size()) {
            broken = true;
            return es_fail(ES_ERR_INTERNAL, "the recurrent state could not be restored: reset the stream");
        }
        es_state_add(ctx, params.seq_id, window.pos_next() - 1 - c.pos);
        remove(window.pos_next(), -1);
    } else {
        again = window.sinks();
        again.insert(again.end(), window.window().begin(), window.window().end());
        again.resize((size_t) n_past);
        const int32_t rc = reset();
        if (rc != ES_OK) {
            return rc;
        }
    }
    state_lost = false;
    if (!again.empty()) {
        const int32_t rc = feed(again.data(), again.size(), nullptr, nullptr);
        if (rc != ES_OK) {
            broken = true; // it holds less than the caller knows of
            return rc;
        }
    }
    last_logits.clear();
    return ES_OK;
}

//
// C interface
//

es_stream_params es_stream_default_params(void) {
    es_stream_params p = {};
    p.scratch_seq_id   = 1;
    p.n_keep           = 4;
    p.sink_move        = ES_SINK_MOVE_AUTO;
    return p;
}

int32_t es_stream_init(llama_context * ctx, es_stream_params params, es_stream ** out) {
    if (!ctx || !out) {
        return es_fail(ES_ERR_INVALID, "ctx and out must not be null");
    }
    *out = nullptr;
    return es_guard([&]() -> int32_t {
        auto          stream = std::make_unique<es_stream>(ctx, params);
        const int32_t rc     = stream->init();
        if (rc != ES_OK) {
            stream->mem = nullptr; // a failed init leaves the context as it was
            return rc;
        }
        *out = stream.release();
        return ES_OK;
    });
}

int32_t es_stream_init_decoder(const llama_model * vocab, es_decoder d, es_stream_params params, es_stream ** out) {
    if (!vocab || !out || !d.decode || !d.rebase || !d.state_size || !d.state_get || !d.state_set || d.n_batch == 0) {
        return es_fail(ES_ERR_INVALID, "vocab, out and the decoder's functions must not be null");
    }
    *out = nullptr;
    return es_guard([&]() -> int32_t {
        auto          stream = std::make_unique<es_stream>(vocab, d, params);
        const int32_t rc     = stream->init();
        if (rc == ES_OK) {
            *out = stream.release();
        }
        return rc;
    });
}

void es_stream_free(es_stream * stream) {
    (void) es_guard([&]() -> int32_t {
        delete stream;
        return ES_OK;
    });
}

#define ES_REQUIRE(stream)                                                                                             \
    if (!(stream)) {                                                                                                   \
        return es_fail(ES_ERR_INVALID, "the stream must not be null");                                                 \
    }

int32_t es_stream_feed(es_stream * stream, const llama_token * tokens, size_t n_tokens, es_logits_callback on_logits,
                       void * user) {
    ES_REQUIRE(stream);
    return es_guard([&] { return stream->feed(tokens, n_tokens, on_logits, user); });
}

int32_t es_streams_feed(es_stream * const * streams, const llama_token * tokens, size_t n_streams) {
    if (!streams || !tokens || n_streams == 0 ||
        std::any_of(streams, streams + n_streams, [](const es_stream * s) { return !s; })) {
        return es_fail(ES_ERR_INVALID, "streams and tokens must not be null or empty");
    }
    return es_guard([&] { return es_stream::feed_each(streams, tokens, n_streams); });
}

const float * es_stream_logits(es_stream * stream) {
    return stream ? stream->logits() : nullptr;
}

int32_t es_stream_get_stats(const es_stream * stream, es_stream_stats * out) {
    ES_REQUIRE(stream);
    if (!out) {
        return es_fail(ES_ERR_INVALID, "out must not be null");
    }
    const es_window & w = stream->window;
    *out                = {};
    out->n_past         = w.n_past();
    out->n_evicted      = w.n_evicted();
    out->n_slides       = stream->n_slides;
    out->n_rebases      = stream->n_rebases;
    out->t_slide_us     = stream->t_slide_us;
    out->t_rebase_us    = stream->t_rebase_us;
    out->t_decode_us    = stream->t_decode_us;
    out->n_ctx          = w.params().n_ctx;
    out->n_keep         = w.params().n_keep;
    out->n_sinks        = w.n_sinks();
    out->n_window       = w.n_window();
    out->n_chunk        = w.params().n_chunk;
    out->n_slide        = w.params().n_slide;
    out->pos_next       = w.pos_next();
    out->pos_sinks      = w.pos_sinks();
    out->sink_move      = stream->params.sink_move;
    return ES_OK;
}

size_t es_stream_tokens(const es_stream * stream, llama_token * out, size_t n_max) {
    if (!stream) {
        return 0;
    }
    const es_window & w = stream->window;
    for (size_t i = 0; out && i < std::min<size_t>(n_max, w.n_cached()); ++i) {
        out[i] = i < w.n_sinks() ? w.sinks()[i] : w.window()[i - w.n_sinks()];
    }
    return w.n_cached();
}

int32_t es_stream_mark(es_stream * stream) {
    ES_REQUIRE(stream);
    return es_guard([&]() -> int32_t { return stream->mark(); });
}

int32_t es_stream_rewind(es_stream * stream, size_t n) {
    ES_REQUIRE(stream);
    return es_guard([&] { return stream->rewind(n); });
}

int32_t es_stream_rebase(es_stream * stream) {
    ES_REQUIRE(stream);
    return es_guard([&]() -> int32_t {
        const es_window & w   = stream->window;
        const bool        due = w.pos_sinks() >= (int32_t) w.params().n_ctx && stream->mover->can_rebase_idle();
        return due ? stream->rebase() : (int32_t) ES_OK;
    });
}

int32_t es_stream_place(es_stream * stream, int64_t n_past) {
    ES_REQUIRE(stream);
    return es_guard([&]() -> int32_t {
        es_window & w = stream->window;
        if (w.n_cached() < w.params().n_ctx || n_past < w.n_past()) {
            return es_fail(
                ES_ERR_INVALID,
                "a stream can be placed at a depth once its cache is full, and not before where it is: %lld of "
                "%u cells, %lld tokens",
                (long long) w.n_cached(), w.params().n_ctx, (long long) w.n_past());
        }
        w.age(n_past - w.n_past());
        stream->forget_states();
        return ES_OK;
    });
}

int32_t es_stream_reset(es_stream * stream) {
    ES_REQUIRE(stream);
    return es_guard([&] { return stream->reset(); });
}
