// The sampler behind the C API.
#pragma once

#include "edge_stream.h"
#include "chat/rules.h"
#include "llama-cpp.h"
#include "sampler_state.h"

#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <vector>

struct es_sampler {
    using state = es_sampler_state;

    void  accept(llama_token token);
    state get_state() const;
    void  set_state(const state & s);

    es_sampler_params             params = {};
    state                         rng;
    std::deque<llama_token>       last;
    llama_sampler_ptr             chain;   // logit bias, penalties, top-k, top-p, min-p, temperature
    std::unique_ptr<es_rules>     rules;   // never null
    std::vector<llama_token_data> candidates;
    size_t                        n_candidates = 0; // of them, that the last token was chosen from
    const llama_vocab *           vocab = nullptr;
    std::string                   piece; // of the token that was described last
};
