#include "loop_guard.h"

#include "error.h"

#include <algorithm>
#include <memory>
#include <vector>

es_loop es_loop_guard::add(llama_token token) {
    const llama_token * newest   = newest_.data() + at_;
    uint32_t            is_cycle = 0;
    for (uint32_t i = 0; i < n_max_period; ++i) {
        n_equal_[i] = newest[i] == token ? n_equal_[i] + 1 : 0;
        is_cycle |= n_equal_[i] + (i + 1) >= bound(i + 1) ? 1 : 0;
    }
    at_          = (at_ + n_max_period - 1) % n_max_period;
    newest_[at_] = newest_[at_ + n_max_period] = token;
    for (uint32_t period = 1; is_cycle && period <= n_max_period; ++period) {
        const uint32_t n_tokens = n_equal_[period - 1] + period;
        if (n_tokens >= bound(period)) {
            return { period, n_tokens };
        }
    }
    return { 0, 0 };
}

int32_t es_loop_guard_init(es_loop_guard ** out) {
    ES_REQUIRE(out);
    *out = nullptr;
    return es_guard([&]() -> int32_t {
        *out = std::make_unique<es_loop_guard>().release();
        return ES_OK;
    });
}

void es_loop_guard_free(es_loop_guard * guard) {
    delete guard;
}

es_loop es_loop_guard_add(es_loop_guard * guard, llama_token token) {
    return guard ? guard->add(token) : es_loop{ 0, 0 };
}

int32_t es_stream_unloop(es_stream * stream, es_loop loop, size_t * n_taken) {
    ES_REQUIRE(stream);
    ES_REQUIRE(n_taken);
    *n_taken = 0;
    return es_guard([&]() -> int32_t {
        es_stream_stats stats;
        int32_t         rc    = es_stream_get_stats(stream, &stats);
        const uint32_t  known = std::min(loop.n_tokens, stats.n_window);
        if (rc != ES_OK || loop.period == 0 || known <= loop.period) {
            return rc;
        }
        // a period stays, and the stream ends where a period does
        uint32_t n = known - loop.period;
        n -= std::min(n, (loop.period - (loop.n_tokens - n) % loop.period) % loop.period);
        std::vector<llama_token> cached(stats.n_sinks + stats.n_window);
        es_stream_tokens(stream, cached.data(), cached.size());
        // the last token that stays is read again, so that there are logits
        if (n == 0 || es_stream_rewind(stream, n + 1) != ES_OK) {
            return ES_OK;
        }
        *n_taken = n;
        return es_stream_feed(stream, &cached[cached.size() - n - 1], 1, nullptr, nullptr);
    });
}
