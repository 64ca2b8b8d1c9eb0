// The sampler behind the C API.
#pragma once

#include "chat/rules.h"
#include "edge_stream.h"
#include "sampler_chain.h"
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

    // The token, and what to aim at after it. n: the number of the draw.
    struct choice {
        llama_token        token;
        std::vector<float> aim;
    };
    choice choose(llama_token_data_array & candidates, uint64_t n) const;

    std::vector<float> first_aim() const;

    es_sampler_params             params = {}; // without pointers and -1
    state                         rng;         // last is empty
    std::deque<llama_token>       last;
    es_sampler_chain              chain;
    std::unique_ptr<es_rules>     rules; // never null
    std::vector<llama_token_data> candidates;
    size_t                        n_candidates = 0; // of them, that the last token was chosen from
    const llama_vocab *           vocab        = nullptr;
    std::string                   piece; // of the token that was described last
};
