// Recalling: a block of tokens between sinks and window, which moves with the sinks.
#include "bank.h"
#include "error.h"
#include "stream.h"

#include <algorithm>
#include <string>

bool es_stream::can_recall() const {
    return !stateful && (ctx ? mover && mover->can_recall() : decoder.can_recall);
}

int32_t es_stream::check_recall(size_t n) const {
    if (!can_recall()) {
        return es_fail(ES_ERR_UNSUPPORTED, "nothing can be recalled: %s",
                       stateful ? "the state of the model's recurrent layers cannot take in what came before"
                       : ctx    ? "it needs the sink bank, which this llama.cpp lacks or --sink-move redecode replaces"
                                : "this decoder holds sinks and window only");
    }
    if (window.n_sinks() < window.params().n_keep) {
        return es_fail(ES_ERR_INVALID, "nothing can be recalled before the stream holds its %u sinks",
                       window.params().n_keep);
    }
    if (n > window.n_recall_max()) {
        return es_fail(ES_ERR_INVALID, "cannot recall %zu tokens: at most %u, a quarter of the window", n,
                       window.n_recall_max());
    }
    return ES_OK;
}

int32_t es_stream::recall(const llama_token * tokens, size_t n) {
    int32_t rc = check_tokens(tokens, n);
    if (rc == ES_OK) {
        rc = check_recall(n);
    }
    const std::vector<llama_token> & held = window.recalled();
    if (rc != ES_OK || (held.size() == n && std::equal(held.begin(), held.end(), tokens))) {
        return rc;
    }
    const uint32_t m = (uint32_t) n;
    if ((rc = unrecall()) != ES_OK) {
        return rc;
    }
    settle();
    if (const uint32_t n_evict = window.to_evict(m)) {
        rc = slide(n_evict);
    }
    if (rc == ES_OK && window.pos_sinks() < (llama_pos) m) { // positions below the sinks' are needed
        const uint32_t up = m - (uint32_t) window.pos_sinks();
        rc                = shift(-(llama_pos) up);
        window.raise(rc == ES_OK ? up : 0);
    }
    if (rc != ES_OK) {
        return rc;
    }
    const llama_pos from = window.pos_sinks();
    window.recall(tokens, m);
    rc     = mover->commit(from, window.pos_sinks());
    broken = rc != ES_OK;
    if (rc == ES_OK && (rc = read_recalled()) != ES_OK) {
        const std::string why = es_last_error();
        (void) unrecall();
        return es_fail(rc, "%s", why.c_str());
    }
    return rc;
}

int32_t es_stream::unrecall() {
    if (broken || !mover) {
        return es_fail(ES_ERR_INTERNAL, "the stream's cache is undefined after an earlier failure: reset it");
    }
    if (window.n_recalled() == 0) {
        return ES_OK;
    }
    settle();
    remove(window.pos_recalled(), window.pos_window());
    mover->forget_recalled();
    const llama_pos from = window.pos_sinks();
    window.forget_recalled();
    const int32_t rc = window.n_sinks() > 0 ? mover->commit(from, window.pos_sinks()) : (int32_t) ES_OK;
    broken           = rc != ES_OK; // the sinks stayed behind
    return rc;
}

// Fills the cells of what is recalled: from a copy, or by decoding it.
int32_t es_stream::read_recalled() {
    const auto kept = std::find_if(kept_blocks.begin(), kept_blocks.end(),
                                   [&](const kept_block & b) { return b.tokens == window.recalled(); });
    if (kept == kept_blocks.end()) {
        const int32_t rc = decode_recalled();
        if (rc == ES_OK) {
            keep_recalled();
        }
        return rc;
    }
    kept_block block = std::move(*kept);
    kept_blocks.erase(kept);
    kept_blocks.push_back(std::move(block));
    return mover->paste_recalled(kept_blocks.back().copy, window.pos_recalled());
}

int32_t es_stream::decode_recalled() {
    const std::vector<llama_token> & block  = window.recalled();
    const uint32_t                   n      = window.n_recalled();
    const llama_pos                  first  = window.pos_recalled();
    const llama_pos                  follow = window.pos_window();
    for (uint32_t i = 0; i < n;) {
        const uint32_t  m    = std::min(window.params().n_batch, n - i);
        const llama_pos pos  = first + (llama_pos) i;
        es_decoder_step step = now();
        step.n_recalled      = i;
        step.recalls         = true;

        int32_t rc = mover->before_recalled(n, m, pos, follow);
        if (rc == ES_OK) {
            rc = decode(block.data() + i, m, pos, step, false);
        }
        if (rc == ES_OK && ctx) {
            llama_synchronize(ctx);
            rc = es_check_devices(ctx);
        }
        const int32_t done = mover->after_recalled(rc == ES_OK ? m : 0);
        if (rc != ES_OK || done != ES_OK) {
            return rc != ES_OK ? rc : done;
        }
        i += m;
    }
    mover->decoded(); // the sinks' keys are where they belong
    return ES_OK;
}

// Keeps a copy of what is recalled, the newest within the space there is for them.
void es_stream::keep_recalled() {
    const uint64_t most = params.n_recall_bytes;
    kept_block     block;
    if (most > 0) {
        block = { window.recalled(), mover->copy_recalled() };
    }
    if (block.copy.empty() || block.copy.size() > most) {
        return;
    }
    uint64_t n_bytes = block.copy.size();
    kept_blocks.push_back(std::move(block));
    for (size_t i = kept_blocks.size() - 1; i-- > 0;) {
        n_bytes += kept_blocks[i].copy.size();
        if (n_bytes > most) {
            kept_blocks.erase(kept_blocks.begin(), kept_blocks.begin() + (ptrdiff_t) i + 1);
            break;
        }
    }
}
