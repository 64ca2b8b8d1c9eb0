#include "stream.h"

#include "bank.h"
#include "error.h"

#include <algorithm>

// Frees cells. An es_decoder learns what is cached at its next step.
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
    step.n_recalled      = window.n_recalled();
    return step;
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
    ahead = {};
    if (drafter) {
        drafter->clear();
    }
    last_logits.clear();
    broken = state_lost = false;
    checkpoints.clear();
    kept_blocks.clear();
    saved_sampler.reset();
    n_slides = n_rebases = n_drafts = n_drafted = n_accepted = t_slide_us = t_rebase_us = t_decode_us = 0;
    if (!mover) {
        int32_t rc = ES_OK;
        mover      = es_sink_mover_init(ctx, params, &rc);
        return rc;
    }
    return mover->reset();
}

// Evicts the oldest window tokens and moves the sinks up. If prepare fails, nothing has changed.
int32_t es_stream::slide(uint32_t n_evict) {
    const int64_t   t0   = llama_time_us();
    const llama_pos from = window.pos_sinks();
    const llama_pos to   = from + (llama_pos) n_evict;
    const bool      move = window.n_sinks() + window.n_recalled() > 0;

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
    settle();
    const int64_t t0 = llama_time_us();
    const int32_t rc = shift(window.pos_sinks());
    if (rc == ES_OK) {
        window.rebase();
        n_rebases++;
        t_rebase_us += llama_time_us() - t0;
    }
    return rc;
}

// Lowers the positions of all that is cached.
int32_t es_stream::shift(llama_pos fall) {
    int32_t rc = mover->rebase(window.pos_sinks(), fall);
    if (rc == ES_OK && !ctx) {
        const es_decoder_step step = now();
        if (!decoder.rebase(decoder.user, &step, fall)) {
            rc = es_fail(ES_ERR_DECODE, "the decoder could not bring its positions back");
        }
    }
    broken = rc != ES_OK; // some keys may be rotated already
    return rc;
}

void es_stream::add_to_batch(es_batch & out, const llama_token * tokens, uint32_t m, llama_pos pos,
                             bool all_logits) const {
    for (uint32_t i = 0; i < m; ++i) {
        out.add(tokens[i], pos + (llama_pos) i, params.seq_id, all_logits || i + 1 == m);
    }
}

static int32_t decode_error(llama_context * ctx, int32_t rc, uint32_t m) {
    if (es_check_devices(ctx) != ES_OK) {
        return ES_ERR_DECODE;
    }
    return rc == 2 ? es_fail(ES_ERR_STOPPED, "the decode was aborted")
                   : es_fail(ES_ERR_DECODE, "llama_decode returned %d for %u tokens", rc, m);
}

// pos: of the first token; step: what is cached.
int32_t es_stream::decode(const llama_token * tokens, uint32_t m, llama_pos pos, es_decoder_step step,
                          bool all_logits) {
    const int64_t t0 = llama_time_us();
    if (!ctx) {
        step.tokens     = tokens;
        step.n_tokens   = m;
        step.all_logits = all_logits;
        rows            = decoder.decode(decoder.user, &step);
        n_rows          = all_logits ? m : 1;
        t_decode_us += llama_time_us() - t0;
        return rows ? (int32_t) ES_OK : es_fail(ES_ERR_DECODE, "the decoder failed on %u tokens", m);
    }
    batch->clear();
    add_to_batch(*batch, tokens, m, pos, all_logits);
    const int32_t rc = batch->decode(ctx);
    t_decode_us += llama_time_us() - t0;
    if (rc != 0) {
        // llama.cpp removes the failed part of a batch; the stream only keeps whole chunks
        remove(pos, -1);
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

// Evicts and rebases as a decode of m tokens requires.
int32_t es_stream::make_room(uint32_t m) {
    const uint32_t n_evict = window.to_evict(m);
    int32_t        rc      = ES_OK;
    if (n_evict > 0) {
        rc = slide(n_evict);
    } else {
        mover->end_move();
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
    if (n_tokens == 1 && !on_logits && can_draft()) {
        return feed_one(tokens[0]);
    }
    settle();

    for (size_t i = 0; i < n_tokens;) {
        const uint32_t m = window.next_chunk(n_tokens - i);

        if ((rc = make_room(m)) != ES_OK) {
            return rc;
        }
        const bool sinks = window.n_sinks() < window.params().n_keep;
        last_logits.clear();
        if (stateful && on_logits && m > 1 && window.n_past() > 0 && (rc = keep_state()) != ES_OK) {
            return rc; // in case the callback stops within the chunk
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
        push(tokens + i, m);
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
        streams[i]->settle();
        const int32_t rc = streams[i]->make_room(1);
        if (rc != ES_OK) {
            return rc;
        }
    }

    es_batch & batch = *streams[0]->batch; // every stream's batch holds up to n_ubatch tokens
    batch.clear();
    const int64_t t0 = llama_time_us();
    for (size_t i = 0; i < n; ++i) {
        streams[i]->last_logits.clear();
        streams[i]->add_to_batch(batch, tokens + i, 1, streams[i]->window.pos_next(), false);
    }
    const int32_t rc = batch.decode(ctx);
    const int64_t t  = llama_time_us() - t0;
    for (size_t i = 0; i < n; ++i) {
        es_stream & s = *streams[i];
        s.t_decode_us += t;
        if (rc != 0) {
            s.remove(s.window.pos_next(), -1);
            s.state_lost = s.stateful;
            continue;
        }
        s.mover->decoded();
        s.push(tokens + i, 1);
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
