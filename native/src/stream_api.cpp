// The C interface of a stream (edge_stream.h).
#include "aborts.h"
#include "error.h"
#include "stream.h"

#include <algorithm>

es_stream_params es_stream_default_params(void) {
    es_stream_params p = {};
    p.scratch_seq_id   = 1;
    p.n_keep           = 4;
    p.sink_move        = ES_SINK_MOVE_AUTO;
    p.n_recall_bytes   = 64 << 20;
    return p;
}

int32_t es_stream_init(llama_context * ctx, es_stream_params params, es_stream ** out) {
    ES_REQUIRE(ctx);
    ES_REQUIRE(out);
    *out = nullptr;
    return es_guard([&]() -> int32_t {
        const es_abort_scope scope; // the bank makes a graph

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

int32_t es_stream_feed(es_stream * stream, const llama_token * tokens, size_t n_tokens, es_logits_callback on_logits,
                       void * user) {
    ES_REQUIRE(stream);
    return es_guard([&] { return stream->feed(tokens, n_tokens, on_logits, user); });
}

int32_t es_stream_set_draft(es_stream * stream, es_stream * draft) {
    ES_REQUIRE(stream);
    ES_REQUIRE(draft);
    return es_guard([&] { return stream->set_draft(draft); });
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
    ES_REQUIRE(out);
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
    out->n_drafts       = stream->n_drafts;
    out->n_drafted      = stream->n_drafted;
    out->n_accepted     = stream->n_accepted;
    out->n_recalled     = w.n_recalled();
    out->n_recall_max   = stream->can_recall() ? w.n_recall_max() : 0;
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

int32_t es_stream_set_n_past(es_stream * stream, int64_t n_past) {
    ES_REQUIRE(stream);
    return es_guard([&]() -> int32_t {
        es_window & w = stream->window;
        if (w.n_free() > 0 || n_past < w.n_past()) {
            return es_fail(ES_ERR_INVALID,
                           "n_past can be set once its cache is full, and not before where it is: %lld of "
                           "%u cells, %lld tokens",
                           (long long) w.n_used(), w.params().n_ctx, (long long) w.n_past());
        }
        w.age(n_past - w.n_past());
        stream->forget_states();
        return ES_OK;
    });
}

int32_t es_stream_recall(es_stream * stream, const llama_token * tokens, size_t n_tokens) {
    ES_REQUIRE(stream);
    return es_guard([&] { return stream->recall(tokens, n_tokens); });
}

int32_t es_stream_unrecall(es_stream * stream) {
    ES_REQUIRE(stream);
    return es_guard([&] { return stream->unrecall(); });
}

int32_t es_stream_reset(es_stream * stream) {
    ES_REQUIRE(stream);
    return es_guard([&] { return stream->reset(); });
}
