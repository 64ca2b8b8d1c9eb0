#include "sampler.h"

#include "error.h"
#include "stream.h"

#include <algorithm>
#include <cmath>
#include <random>

static constexpr int32_t repeat_last_n_max = 4096;

es_sampler_params es_sampler_default_params(void) {
    es_sampler_params p = {};
    p.seed              = LLAMA_DEFAULT_SEED;
    p.temp              = 0.8f;
    p.top_k             = 40;
    p.top_p             = 0.95f;
    p.min_p             = 0.05f;
    p.repeat_penalty    = 1.0f;
    p.repeat_last_n     = 64;
    return p;
}

void es_sampler::accept(llama_token token) {
    llama_sampler_accept(chain.get(), token);
    last.push_back(token);
    while (last.size() > (size_t) params.repeat_last_n) {
        last.pop_front();
    }
}

es_sampler::state es_sampler::get_state() const {
    return { rng.seed, rng.n_draw, { last.begin(), last.end() } };
}

void es_sampler::set_state(const state & s) {
    rng = { s.seed, s.n_draw, {} };
    last.clear();
    llama_sampler_reset(chain.get());
    for (const llama_token token : s.last) {
        accept(token);
    }
}

namespace {

// A counter-based generator (the splitmix64 finaliser, Steele et al. 2014): its whole state is seed and count.
double uniform(uint32_t seed, uint64_t n) {
    uint64_t z = ((uint64_t) seed << 32 | 0x9e3779b9u) + (n + 1) * 0x9e3779b97f4a7c15u;
    z          = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z          = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    z ^= z >> 31;
    return (double) (z >> 11) * 0x1.0p-53;
}

// Samples from candidates that went through the chain. u is uniform in [0, 1).
llama_token choose(const llama_token_data_array & c, bool greedy, double u) {
    const auto less = [](const llama_token_data & a, const llama_token_data & b) { return a.logit < b.logit; };
    const auto best = std::max_element(c.data, c.data + c.size, less);
    if (greedy) {
        return best->id;
    }
    double sum = 0;
    for (size_t i = 0; i < c.size; ++i) {
        sum += std::exp((double) c.data[i].logit - best->logit);
    }
    double rest = u * sum;
    for (size_t i = 0; i < c.size; ++i) {
        rest -= std::exp((double) c.data[i].logit - best->logit);
        if (rest < 0) {
            return c.data[i].id;
        }
    }
    return best->id;
}

llama_token_data_array fill(std::vector<llama_token_data> & candidates, const float * logits, int32_t n_vocab) {
    candidates.resize(n_vocab);
    for (llama_token id = 0; id < n_vocab; ++id) {
        candidates[id] = { id, logits[id], 0.0f };
    }
    return { candidates.data(), candidates.size(), -1, false };
}

int32_t check(const es_sampler_params & p, int32_t n_vocab) {
    const auto finite = [](float x) { return std::isfinite(x); };
    if (!finite(p.temp) || !finite(p.top_p) || !finite(p.min_p) || !finite(p.frequency_penalty) ||
        !finite(p.presence_penalty)) {
        return es_fail(ES_ERR_INVALID, "sampling parameters must be finite numbers");
    }
    if (!finite(p.repeat_penalty) || p.repeat_penalty <= 0.0f) {
        return es_fail(ES_ERR_INVALID, "repeat_penalty = %g must be a positive number", (double) p.repeat_penalty);
    }
    if (p.repeat_last_n < 0 || p.repeat_last_n > repeat_last_n_max) {
        return es_fail(ES_ERR_INVALID, "repeat_last_n = %d must be between 0 and %d", p.repeat_last_n,
                       repeat_last_n_max);
    }
    if (p.n_logit_bias > 0 && !p.logit_bias) {
        return es_fail(ES_ERR_INVALID, "logit_bias must not be null");
    }
    for (size_t i = 0; i < p.n_logit_bias; ++i) {
        if (p.logit_bias[i].token < 0 || p.logit_bias[i].token >= n_vocab) {
            return es_fail(ES_ERR_INVALID, "logit_bias: token %d is not in the vocabulary of %d", p.logit_bias[i].token,
                           n_vocab);
        }
    }
    return ES_OK;
}

} // namespace

int32_t es_sampler_init(const llama_model * model, es_sampler_params p, es_sampler ** out) {
    ES_REQUIRE(model);
    ES_REQUIRE(out);
    *out = nullptr;
    return es_guard([&]() -> int32_t {
        const llama_vocab * vocab   = llama_model_get_vocab(model);
        const int32_t       n_vocab = llama_vocab_n_tokens(vocab);
        const int32_t       rc      = check(p, n_vocab);
        if (rc != ES_OK) {
            return rc;
        }
        auto s      = std::make_unique<es_sampler>();
        s->params   = p;
        s->vocab    = vocab;
        s->rng.seed = p.seed != LLAMA_DEFAULT_SEED ? p.seed : std::random_device{}();
        s->chain.reset(llama_sampler_chain_init(llama_sampler_chain_default_params()));

        std::vector<llama_logit_bias> bias;
        for (size_t i = 0; i < p.n_logit_bias; ++i) {
            bias.push_back({ p.logit_bias[i].token, p.logit_bias[i].bias });
        }
        const auto add = [&](llama_sampler * link) { llama_sampler_chain_add(s->chain.get(), link); };
        if (!bias.empty()) {
            add(llama_sampler_init_logit_bias(n_vocab, (int32_t) bias.size(), bias.data()));
        }
        if (p.repeat_last_n > 0) {
            add(llama_sampler_init_penalties(n_vocab, p.repeat_last_n, p.repeat_penalty, p.frequency_penalty,
                                             p.presence_penalty));
        }
        if (p.temp > 0.0f) {
            if (p.top_k > 0) {
                add(llama_sampler_init_top_k(p.top_k));
            }
            if (p.top_p < 1.0f) {
                add(llama_sampler_init_top_p(p.top_p, 1));
            }
            if (p.min_p > 0.0f) {
                add(llama_sampler_init_min_p(p.min_p, 1));
            }
            add(llama_sampler_init_temp(p.temp));
        }
        try {
            s->rules = std::make_unique<es_rules>(vocab, p.grammar, p.grammar_root, p.chat);
        } catch (const std::bad_alloc &) {
            throw;
        } catch (const std::exception & e) {
            return es_fail(ES_ERR_INVALID, "%s", e.what());
        }
        // pointers to the caller's memory
        s->params.logit_bias   = nullptr;
        s->params.grammar      = nullptr;
        s->params.grammar_root = nullptr;
        s->params.chat         = nullptr;
        *out                   = s.release();
        return ES_OK;
    });
}

void es_sampler_free(es_sampler * sampler) {
    delete sampler;
}

int32_t es_sampler_accept(es_sampler * sampler, llama_token token) {
    ES_REQUIRE(sampler);
    return es_guard([&]() -> int32_t {
        sampler->accept(token);
        return ES_OK;
    });
}

uint32_t es_sampler_seed(const es_sampler * sampler) {
    return sampler ? sampler->rng.seed : 0;
}

bool es_sampler_restore(es_sampler * sampler, es_stream * stream) {
    if (!sampler || !stream || !stream->saved_sampler) {
        return false;
    }
    if (sampler->params.seed != LLAMA_DEFAULT_SEED && sampler->params.seed != stream->saved_sampler->seed) {
        return false;
    }
    return es_guard([&]() -> int32_t {
               sampler->set_state(*stream->saved_sampler);
               stream->saved_sampler.reset();
               return ES_OK;
           }) == ES_OK;
}

int32_t es_sampler_sample(es_sampler * sampler, es_stream * stream, llama_token * out, float * logprob) {
    ES_REQUIRE(sampler);
    ES_REQUIRE(stream);
    ES_REQUIRE(out);
    es_sampler * const s      = sampler;
    const float *      logits = es_stream_logits(stream);
    if (!logits) {
        return es_fail(ES_ERR_INVALID, "there are no logits to sample from: feed tokens first");
    }
    return es_guard([&]() -> int32_t {
        const int32_t n_vocab = stream->n_vocab();
        const bool    greedy  = s->params.temp <= 0.0f;
        const double  u       = greedy ? 0.0 : uniform(s->rng.seed, s->rng.n_draw);

        auto candidates = fill(s->candidates, logits, n_vocab);
        s->rules->apply_budget(candidates);
        llama_sampler_apply(s->chain.get(), &candidates);
        llama_token token = choose(candidates, greedy, u);

        // applying a grammar to the whole vocabulary is slow, so it checks the sampled token first
        if (s->rules->applies() && !s->rules->allows(token)) {
            candidates = fill(s->candidates, logits, n_vocab);
            s->rules->apply_budget(candidates);
            s->rules->apply_grammar(candidates);
            size_t n_allowed = 0;
            for (size_t i = 0; i < candidates.size; ++i) {
                if (std::isfinite(candidates.data[i].logit)) {
                    candidates.data[n_allowed++] = candidates.data[i];
                }
            }
            if (n_allowed == 0) {
                return es_fail(ES_ERR_INVALID, "the grammar allows no token here");
            }
            candidates.size = n_allowed;
            llama_sampler_apply(s->chain.get(), &candidates);
            token = choose(candidates, greedy, u);
        }
        s->n_candidates = candidates.size;
        s->rules->accept(token);
        s->rng.n_draw++;
        s->accept(token);

        if (logprob) {
            const float max = *std::max_element(logits, logits + n_vocab);
            double      sum = 0;
            for (int32_t i = 0; i < n_vocab; ++i) {
                sum += std::exp((double) logits[i] - max);
            }
            *logprob = (float) ((double) logits[token] - max - std::log(sum));
        }
        *out = token;
        return ES_OK;
    });
}

int32_t es_sampler_candidates(const es_sampler * sampler, es_candidate * out, int32_t n) {
    if (!sampler || !out || n < 0) {
        return 0;
    }
    std::vector<llama_token_data> data(sampler->candidates.begin(), sampler->candidates.begin() + sampler->n_candidates);
    const auto more = [](const llama_token_data & a, const llama_token_data & b) { return a.logit > b.logit; };
    std::sort(data.begin(), data.end(), more);
    if (sampler->params.temp <= 0.0f && !data.empty()) {
        data.resize(1); // greedy
    }
    double sum = 0;
    for (const auto & one : data) {
        sum += std::exp((double) one.logit - data[0].logit);
    }
    n = std::min<int32_t>(n, data.size());
    for (int32_t i = 0; i < n; ++i) {
        out[i] = { data[i].id, (float) (std::exp((double) data[i].logit - data[0].logit) / sum) };
    }
    return n;
}
