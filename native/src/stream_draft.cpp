// Drafting: tokens that are decoded ahead of the stream, on the guess that they follow.
#include "draft_model.h"
#include "error.h"
#include "stream.h"

#include <algorithm>
#include <cstring>

void es_stream::push(const llama_token * tokens, uint32_t m) {
    window.push(tokens, m);
    if (drafter) {
        drafter->push(tokens, m);
    }
}

void es_stream::settle() const {
    if (ahead.n_used < ahead.tokens.size()) {
        remove(window.pos_next(), -1);
    }
    ahead.tokens.clear();
    ahead.rows.clear();
    ahead.n_used = 0;
}

// The sinks are captured in decodes of their own.
bool es_stream::can_draft() const {
    return drafter && window.n_sinks() == window.params().n_keep;
}

bool es_stream::take_draft(llama_token token) {
    if (ahead.n_used == ahead.tokens.size() || ahead.tokens[ahead.n_used] != token) {
        return false;
    }
    const size_t  n   = (size_t) n_vocab();
    const float * row = ahead.rows.data() + n * ahead.n_used;
    last_logits.assign(row, row + n);
    push(&token, 1);
    ahead.n_used++;
    n_accepted++;
    return true;
}

// The most tokens of a batch that is, token by token, what it would be without drafts: at the token after it may come
// the next eviction or rebase, or llama.cpp may read more cells, of which it takes so many at a time. Other kernels may
// be chosen for these, which round in another way.
uint32_t es_stream::room_ahead() const {
    constexpr uint32_t       n_step = 256;
    const es_window_params & p      = window.params();
    const uint32_t           n_left = (uint32_t) std::max(1, p.rebase_at - window.pos_next());
    return std::min({ window.n_free(), p.n_batch, n_left, n_step - window.n_used() % n_step });
}

// Sizes may differ by unused entries at the end.
static int32_t check_same_tokens(const llama_model * one, const llama_model * other) {
    const llama_vocab * v = llama_model_get_vocab(one);
    const llama_vocab * w = llama_model_get_vocab(other);
    const int32_t       n = std::min(llama_vocab_n_tokens(v), llama_vocab_n_tokens(w));
    for (llama_token t = 0; t < n; ++t) {
        if (std::strcmp(llama_vocab_get_text(v, t), llama_vocab_get_text(w, t)) != 0) {
            return es_fail(ES_ERR_UNSUPPORTED, "the draft model has another vocabulary: token %d is %.40s, not %.40s",
                           t, llama_vocab_get_text(w, t), llama_vocab_get_text(v, t));
        }
    }
    return ES_OK;
}

int32_t es_stream::set_draft(es_stream * draft) {
    if (!drafter) {
        return es_fail(ES_ERR_INVALID, "the stream has no drafts: n_draft is 0");
    }
    if (draft == this || draft->drafter || draft->window.n_past() > 0) {
        return es_fail(ES_ERR_INVALID, "a draft model's stream must be an empty one without drafts of its own");
    }
    if (draft->stateful) {
        return es_fail(ES_ERR_UNSUPPORTED,
                       "the draft model has recurrent layers, whose state cannot take wrong guesses back");
    }
    const int32_t rc = check_same_tokens(model, draft->model);
    if (rc == ES_OK) {
        drafter->use(std::make_unique<es_draft_model>(draft, n_vocab()));
    }
    return rc;
}

int32_t es_stream::feed_one(llama_token token) {
    if (take_draft(token)) {
        return ES_OK;
    }
    settle();
    int32_t rc = make_room(1);
    if (rc != ES_OK) {
        return rc;
    }
    last_logits.clear();

    std::vector<llama_token> next = { token };
    drafter->push(&token, 1);
    drafter->draft(room_ahead() - 1, next);

    const uint32_t n_rows = (uint32_t) next.size();
    const int64_t  t0     = llama_time_us();
    if ((rc = decode(next.data(), n_rows, n_rows > 1)) != ES_OK) {
        drafter->rewind(1);
        return rc;
    }
    mover->decoded();
    window.push(&token, 1);
    rc = keep_logits(0);
    for (uint32_t i = 1; i < n_rows; ++i) {
        const float * logits = row((int32_t) i);
        if (rc != ES_OK || !logits) { // without logits there is no draft
            break;
        }
        ahead.tokens.push_back(next[i]);
        ahead.rows.insert(ahead.rows.end(), logits, logits + n_vocab());
    }
    if (ahead.tokens.size() + 1 < n_rows) {
        remove(window.pos_next() + (llama_pos) ahead.tokens.size(), -1);
    }
    n_drafts += !ahead.tokens.empty();
    n_drafted += (int64_t) ahead.tokens.size();
    drafter->timed(n_rows, llama_time_us() - t0);
    return rc;
}
