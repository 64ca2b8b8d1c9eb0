// A generated token in one call: chosen, described, fed back.
#include "error.h"
#include "sampler.h"
#include "stream.h"
#include "support.h"

int32_t es_sampler_choose(es_sampler * sampler, es_stream * stream, bool special, bool logprob, es_token * out) {
    if (!out) {
        return es_fail(ES_ERR_INVALID, "out must not be null");
    }
    *out             = {};
    const int32_t rc = es_sampler_sample(sampler, stream, &out->token, logprob ? &out->logprob : nullptr);
    return rc != ES_OK ? rc : es_guard([&]() -> int32_t {
        sampler->piece = es_piece(sampler->vocab, out->token, special); // kept until the sampler's next token
        out->is_eog    = llama_vocab_is_eog(sampler->vocab, out->token);
        out->piece     = sampler->piece.data();
        out->n_piece   = sampler->piece.size();
        return ES_OK;
    });
}

int32_t es_stream_next(es_stream * stream, es_sampler * sampler, bool special, bool logprob, es_token * out) {
    int32_t rc = es_sampler_choose(sampler, stream, special, logprob, out);
    if (rc == ES_OK) {
        rc = es_stream_feed(stream, &out->token, 1, nullptr, nullptr);
    }
    es_stream_stats stats;
    if (rc == ES_OK) {
        rc = es_stream_get_stats(stream, &stats);
    }
    if (rc == ES_OK) {
        out->n_past   = stats.n_past;
        out->n_cached = stats.n_sinks + stats.n_window;
    }
    return rc;
}
