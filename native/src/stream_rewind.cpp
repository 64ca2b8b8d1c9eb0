// Rewinding: frees cells, and restores the state of recurrent layers.
#include "bank.h"
#include "error.h"
#include "stream.h"

// recurrent states kept; each may take many MiB
static constexpr size_t n_checkpoints = 4;

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
    settle();
    window.rewind((uint32_t) n);
    remove(window.pos_next(), -1);
    if (drafter) {
        drafter->rewind(n);
    }
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
    // a state is useless once a token after it was evicted
    while (checkpoints.size() > n_checkpoints ||
           checkpoints.front().n_past < window.n_past() - (int64_t) window.n_window()) {
        checkpoints.pop_front();
    }
    return ES_OK;
}

int32_t es_stream::to_state_of(int64_t n_past) {
    const int64_t in_window = window.n_past() - (int64_t) window.n_window(); // index of the window's first token
    size_t        n_known   = checkpoints.size();                            // those before n_past
    while (n_known > 0 && checkpoints[n_known - 1].n_past > n_past) {
        --n_known;
    }
    const bool known = n_known > 0 && checkpoints[n_known - 1].n_past >= in_window;
    if (!known && window.n_evicted() > 0) {
        return es_fail(
            ES_ERR_INVALID,
            "cannot go back to token %lld: the recurrent state there was not kept; reset the stream and feed "
            "it again",
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
            broken = true; // tokens are missing
            return rc;
        }
    }
    last_logits.clear();
    return ES_OK;
}
