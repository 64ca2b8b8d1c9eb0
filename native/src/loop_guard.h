// Finds exact cycles of tokens in an answer.
#pragma once

#include "edge_stream.h"

#include <array>
#include <cstdint>

// For every period up to n_max_period: how many of the newest tokens equal the one a period before them. Each token
// updates all of them, a fixed number of comparisons that compilers vectorise; benchmarks/loop_guard.py has the time.
// Unlike hashes of n-grams, this finds every cycle at the very token where it reaches the bound, and nothing else.
struct es_loop_guard {
    static constexpr uint32_t n_max_period = 512;

    // Tokens that a cycle must have. Rules, zeros and refrains are cycles too: see tests/loop_texts.py.
    static constexpr uint32_t bound(uint32_t period) { return 384 + 4 * period; }

    es_loop_guard() { newest_.fill(-1); }

    es_loop add(llama_token token); // period 0: no cycle

private:
    std::array<llama_token, 2 * n_max_period> newest_;       // newest first from at_ on; stored twice, to be contiguous
    std::array<uint32_t, n_max_period>        n_equal_ = {}; // of period i + 1
    uint32_t                                  at_      = 0;
};
