// Whether logits are what can be sampled from or compared.
#pragma once

#include <cmath>
#include <cstdint>

// False if one is NaN or +infinity, or none is more than -infinity, which stands for a token that cannot be. Counted,
// so that compilers make vectors of it: 16 us of 152,000 logits, and 98 with GCC if truth values are combined.
inline bool es_are_numbers(const float * logits, int32_t n_vocab) {
    int32_t n_numbers = 0, n_possible = 0;
    for (int32_t i = 0; i < n_vocab; ++i) {
        n_numbers += logits[i] < INFINITY; // NaN is not
        n_possible += logits[i] > -INFINITY;
    }
    return n_numbers == n_vocab && n_possible > 0;
}
