// What a session keeps of a sampler: the random generator is counter-based, so its state is two numbers;
// penalties are replayed from the last tokens; mirostat and adaptive-p aim at something that moves.
#pragma once

#include "llama.h"

#include <cstdint>
#include <vector>

struct es_sampler_state {
    uint32_t                 seed   = 0;
    uint64_t                 n_draw = 0; // tokens drawn with seed
    std::vector<llama_token> last;       // most recent accepted tokens, oldest first
    std::vector<float>       aim;        // mirostat: mu; adaptive-p: the sums of its average; else empty
};
