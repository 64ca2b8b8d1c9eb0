// What a token's logits go through before one is drawn: llama.cpp's own samplers, in the order that was asked for.
#pragma once

#include "edge_stream.h"
#include "llama-cpp.h"

#include <vector>

// llama.cpp's samplers by name, in its default order; the last two are added by name only.
enum class es_link {
    bias,
    penalties,
    dry,
    top_n_sigma,
    top_k,
    typ_p,
    top_p,
    min_p,
    xtc,
    temperature,
    infill,
    adaptive_p
};

class es_sampler_chain {
public:
    // Everything that can be wrong with the parameters; sets es_last_error.
    static int32_t check(const es_sampler_params & params, int32_t n_vocab);

    // params: checked, without -1 for the context's size. Sets es_last_error.
    int32_t init(const llama_vocab * vocab, const es_sampler_params & params);

    void accept(llama_token token);
    void reset();

    // Transforms the candidates. u decides whether XTC acts, uniform in [0, 1).
    void apply(llama_token_data_array & candidates, double u) const;

    bool is_greedy() const { return is_greedy_; } // the best candidate is the token
    bool is_adaptive() const { return is_adaptive_; }

private:
    struct link {
        es_link           kind;
        llama_sampler_ptr sampler;
    };
    llama_sampler * make(es_link kind, const llama_vocab * vocab, const es_sampler_params & params) const;

    std::vector<link> links_;
    float             xtc_probability_ = 0.0f;
    bool              is_greedy_ = false, is_adaptive_ = false;
};
