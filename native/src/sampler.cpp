#include "sampler.h"

#include "aborts.h"
#include "error.h"
#include "logits.h"
#include "stream.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <iterator>
#include <random>

static constexpr const char * breakers[] = { "\n", ":", "\"", "*" };

es_sampler_params es_sampler_default_params(void) {
    es_sampler_params p       = {};
    p.seed                    = LLAMA_DEFAULT_SEED;
    p.temp                    = 0.8f;
    p.top_k                   = 40;
    p.top_p                   = 0.95f;
    p.min_p                   = 0.05f;
    p.typical_p               = 1.0f;
    p.top_n_sigma             = -1.0f;
    p.xtc_threshold           = 0.1f;
    p.dynatemp_exponent       = 1.0f;
    p.repeat_penalty          = 1.0f;
    p.repeat_last_n           = 64;
    p.dry_base                = 1.75f;
    p.dry_allowed_length      = 2;
    p.dry_penalty_last_n      = 64;
    p.mirostat_tau            = 5.0f;
    p.mirostat_eta            = 0.1f;
    p.adaptive_target         = -1.0f;
    p.adaptive_decay          = 0.9f;
    p.dry_sequence_breakers   = breakers;
    p.n_dry_sequence_breakers = std::size(breakers);
    return p;
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

// XTC's draws are far away from those of tokens.
constexpr uint64_t xtc_draws = (uint64_t) 1 << 63;

const llama_token_data * best_of(const llama_token_data_array & c) {
    const auto less = [](const llama_token_data & a, const llama_token_data & b) { return a.logit < b.logit; };
    return std::max_element(c.data, c.data + c.size, less);
}

// A candidate drawn from their logits. u is uniform in [0, 1).
const llama_token_data * draw(const llama_token_data_array & c, double u) {
    const auto best = best_of(c);
    double     sum  = 0;
    for (size_t i = 0; i < c.size; ++i) {
        sum += std::exp((double) c.data[i].logit - best->logit);
    }
    double rest = u * sum;
    for (size_t i = 0; i < c.size; ++i) {
        rest -= std::exp((double) c.data[i].logit - best->logit);
        if (rest < 0) {
            return &c.data[i];
        }
    }
    return best;
}

llama_token_data_array fill(std::vector<llama_token_data> & candidates, const float * logits, int32_t n_vocab) {
    candidates.resize(n_vocab);
    for (llama_token id = 0; id < n_vocab; ++id) {
        candidates[id] = { id, logits[id], 0.0f };
    }
    return { candidates.data(), candidates.size(), -1, false };
}

} // namespace

std::vector<float> es_sampler::first_aim() const {
    const float span = 1.0f - params.adaptive_decay;
    if (chain.is_greedy()) {
        return {};
    }
    if (params.mirostat > 0) {
        return { 2.0f * params.mirostat_tau };
    }
    return chain.is_adaptive() ? std::vector<float>{ params.adaptive_target / span, 1.0f / span }
                               : std::vector<float>();
}

// llama.cpp's mirostat and adaptive-p keep what they aim at, and draw with a generator, where neither can be saved. So
// new ones are made for each token, which aim where ours has moved, and their draw is left aside: they only transform.
es_sampler::choice es_sampler::choose(llama_token_data_array & c, uint64_t n) const {
    chain.apply(c, uniform(rng.seed, n + xtc_draws));
    const double u    = uniform(rng.seed, n);
    const auto   once = [&](llama_sampler * sampler) { llama_sampler_apply(llama_sampler_ptr(sampler).get(), &c); };
    if (chain.is_greedy()) {
        return { best_of(c)->id, {} };
    }
    if (params.mirostat > 0) {
        const float mu = rng.aim[0];
        once(params.mirostat == 1 ? llama_sampler_init_mirostat(llama_vocab_n_tokens(vocab), 0, mu / 2.0f, 0.0f, 100)
                                  : llama_sampler_init_mirostat_v2(0, mu / 2.0f, 0.0f));
        const llama_token_data * drawn = draw(c, u);
        return { drawn->id,
                 { mu - params.mirostat_eta * (-std::log2(std::max(drawn->p, FLT_MIN)) - params.mirostat_tau) } };
    }
    if (!chain.is_adaptive()) {
        return { draw(c, u)->id, {} };
    }
    // its average is of the probabilities before they are transformed
    const float        best = best_of(c)->logit;
    std::vector<float> p(c.size);
    float              sum = 0.0f;
    for (size_t i = 0; i < c.size; ++i) {
        sum += p[i] = std::exp(c.data[i].logit - best);
    }
    const float target = std::min(params.adaptive_target, 1.0f);
    once(llama_sampler_init_adaptive_p(std::clamp(2.0f * target - rng.aim[0] / rng.aim[1], 0.0f, 1.0f), 0.0f, 0));
    const llama_token_data * drawn = draw(c, u);
    const float              decay = params.adaptive_decay;
    return { drawn->id, { p[drawn - c.data] / sum + decay * rng.aim[0], 1.0f + decay * rng.aim[1] } };
}

void es_sampler::accept(llama_token token) {
    chain.accept(token);
    last.push_back(token);
    while (last.size() > (size_t) std::max(params.repeat_last_n, params.dry_penalty_last_n)) {
        last.pop_front();
    }
}

es_sampler::state es_sampler::get_state() const {
    return { rng.seed, rng.n_draw, { last.begin(), last.end() }, rng.aim };
}

void es_sampler::set_state(const state & s) {
    const std::vector<float> first = first_aim();
    rng                            = { s.seed, s.n_draw, {}, s.aim.size() == first.size() ? s.aim : first };
    last.clear();
    chain.reset();
    for (const llama_token token : s.last) {
        accept(token);
    }
}

int32_t es_sampler_init(const llama_model * model, es_sampler_params p, es_sampler ** out) {
    ES_REQUIRE(model);
    ES_REQUIRE(out);
    *out = nullptr;
    return es_guard([&]() -> int32_t {
        const es_abort_scope scope; // llama.cpp's parser of grammars asserts

        const llama_vocab * vocab = llama_model_get_vocab(model);
        int32_t             rc    = es_sampler_chain::check(p, llama_vocab_n_tokens(vocab));
        if (rc != ES_OK) {
            return rc;
        }
        p.repeat_last_n      = p.repeat_last_n < 0 ? (int32_t) p.n_ctx : p.repeat_last_n;
        p.dry_penalty_last_n = p.dry_penalty_last_n < 0 ? (int32_t) p.n_ctx : p.dry_penalty_last_n;
        auto s               = std::make_unique<es_sampler>();
        s->params            = p;
        s->vocab             = vocab;
        if ((rc = s->chain.init(vocab, p)) != ES_OK) {
            return rc;
        }
        s->rng = { p.seed != LLAMA_DEFAULT_SEED ? p.seed : std::random_device{}(), 0, {}, s->first_aim() };
        try {
            s->rules = std::make_unique<es_rules>(vocab, p.grammar, p.grammar_root, p.chat);
        } catch (const std::bad_alloc &) {
            throw;
        } catch (const std::exception & e) {
            return es_fail(ES_ERR_INVALID, "%s", e.what());
        }
        // pointers to the caller's memory
        s->params.logit_bias            = nullptr;
        s->params.dry_sequence_breakers = nullptr;
        s->params.samplers              = nullptr;
        s->params.grammar               = nullptr;
        s->params.grammar_root          = nullptr;
        s->params.chat                  = nullptr;
        *out                            = s.release();
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

int32_t es_sampler_begin(es_sampler * sampler, es_stream * stream) {
    ES_REQUIRE(sampler);
    ES_REQUIRE(stream);
    if (es_sampler_restore(sampler, stream)) {
        return ES_OK;
    }
    return es_guard([&]() -> int32_t {
        const es_sampler_params & p      = sampler->params;
        const auto                cached = stream->window.get_state().tokens;
        const size_t              n = std::min(cached.size(), (size_t) std::max(p.repeat_last_n, p.dry_penalty_last_n));
        std::for_each(cached.end() - (ptrdiff_t) n, cached.end(), [&](llama_token token) { sampler->accept(token); });
        return ES_OK;
    });
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
        if (!es_are_numbers(logits, n_vocab)) {
            return es_fail(ES_ERR_DECODE,
                           "the model computed no numbers (NaN or infinity): its weights are damaged, or its values "
                           "exceed the type that they are computed in");
        }
        auto candidates = fill(s->candidates, logits, n_vocab);
        s->rules->apply_budget(candidates);
        auto chosen = s->choose(candidates, s->rng.n_draw);

        // applying a grammar to the whole vocabulary is slow, so it checks the sampled token first
        if (s->rules->applies() && !s->rules->allows(chosen.token)) {
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
            chosen          = s->choose(candidates, s->rng.n_draw);
        }
        // XTC drops the first ones
        std::copy(candidates.data, candidates.data + candidates.size, s->candidates.begin());
        s->n_candidates         = candidates.size;
        const llama_token token = chosen.token;
        s->rules->accept(token);
        s->rng.aim = std::move(chosen.aim);
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
    std::vector<llama_token_data> data(sampler->candidates.begin(),
                                       sampler->candidates.begin() + sampler->n_candidates);
    const auto more = [](const llama_token_data & a, const llama_token_data & b) { return a.logit > b.logit; };
    std::sort(data.begin(), data.end(), more);
    if (sampler->chain.is_greedy() && !data.empty()) {
        data.resize(1);
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
