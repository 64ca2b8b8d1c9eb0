#include "sampler_chain.h"

#include "error.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>

namespace {

constexpr int32_t n_max_last    = 1 << 20;
constexpr size_t  n_max_breaker = 40; // bytes, beyond which llama.cpp would cut it

// Names without "_" and "-"; llama.cpp knows each with either, and without.
struct {
    const char * name;
    es_link      kind;
} const names[] = {
    { "penalties", es_link::penalties }, { "dry", es_link::dry },       { "topnsigma", es_link::top_n_sigma },
    { "topk", es_link::top_k },          { "typp", es_link::typ_p },    { "typ", es_link::typ_p },
    { "typicalp", es_link::typ_p },      { "topp", es_link::top_p },    { "nucleus", es_link::top_p },
    { "minp", es_link::min_p },          { "xtc", es_link::xtc },       { "temperature", es_link::temperature },
    { "temp", es_link::temperature },    { "infill", es_link::infill }, { "adaptivep", es_link::adaptive_p },
};

constexpr const char * default_order = "penalties;dry;top_n_sigma;top_k;typ_p;top_p;min_p;xtc;temperature";

int32_t parse(const char * text, std::vector<es_link> & out) {
    for (const char * at = text; *at != '\0';) {
        const size_t n = strcspn(at, ";");
        std::string  name;
        for (const char c : std::string(at, n)) {
            if (c != '_' && c != '-') {
                name += (char) (c >= 'A' && c <= 'Z' ? c - 'A' + 'a' : c);
            }
        }
        const auto known =
            std::find_if(std::begin(names), std::end(names), [&](const auto & k) { return name == k.name; });
        if (known == std::end(names)) {
            return es_fail(ES_ERR_INVALID, "there is no sampler named %.*s, only %s, infill and adaptive_p",
                           (int) std::min<size_t>(n, 64), at, default_order);
        }
        out.push_back(known->kind);
        at += n + (at[n] == ';');
    }
    return ES_OK;
}

// They drop candidates, but never the best one.
bool keeps_best(es_link kind) {
    return kind == es_link::top_n_sigma || kind == es_link::top_k || kind == es_link::top_p || kind == es_link::min_p;
}

// Candidates that an earlier link or a bias has ruled out: their probability of 0 has no logarithm.
void drop_impossible(llama_token_data_array & c) {
    const auto end = std::remove_if(c.data, c.data + c.size, [](const auto & t) { return t.logit == -INFINITY; });
    if (end != c.data) {
        c.size = (size_t) (end - c.data);
    }
}

} // namespace

int32_t es_sampler_chain::check(const es_sampler_params & p, int32_t n_vocab) {
    const float numbers[] = {
        p.temp,
        p.top_p,
        p.min_p,
        p.typical_p,
        p.top_n_sigma,
        p.xtc_probability,
        p.xtc_threshold,
        p.dynatemp_range,
        p.repeat_penalty,
        p.dynatemp_exponent,
        p.frequency_penalty,
        p.presence_penalty,
        p.dry_multiplier,
        p.dry_base,
        p.mirostat_tau,
        p.mirostat_eta,
        p.adaptive_target,
        p.adaptive_decay,
    };
    if (!std::all_of(std::begin(numbers), std::end(numbers), [](float x) { return std::isfinite(x); })) {
        return es_fail(ES_ERR_INVALID, "sampling parameters must be finite numbers");
    }
    if (p.repeat_penalty <= 0.0f || !std::isfinite(1.0f / p.repeat_penalty)) {
        return es_fail(ES_ERR_INVALID, "repeat_penalty = %g must be a positive number", (double) p.repeat_penalty);
    }
    const struct {
        const char * name;
        int32_t      value, least, most;
    } counts[] = {
        { "repeat_last_n", p.repeat_last_n, -1, n_max_last },
        { "dry_penalty_last_n", p.dry_penalty_last_n, -1, n_max_last },
        { "dry_allowed_length", p.dry_allowed_length, 0, n_max_last },
        { "min_keep", p.min_keep, 0, INT32_MAX },
        { "mirostat", p.mirostat, 0, 2 },
    };
    for (const auto & c : counts) {
        if (c.value < c.least || c.value > c.most) {
            return es_fail(ES_ERR_INVALID, "%s = %d must be between %d and %d", c.name, c.value, c.least, c.most);
        }
    }
    if ((p.repeat_last_n < 0 || p.dry_penalty_last_n < 0) && (p.n_ctx == 0 || p.n_ctx > (uint32_t) n_max_last)) {
        return es_fail(ES_ERR_INVALID, "repeat_last_n = -1 and dry_penalty_last_n = -1 need an n_ctx of at most %d",
                       n_max_last);
    }
    if (p.adaptive_decay < 0.0f || p.adaptive_decay > 0.99f) {
        return es_fail(ES_ERR_INVALID, "adaptive_decay = %g must be between 0 and 0.99", (double) p.adaptive_decay);
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
    for (size_t i = 0; i < p.n_dry_sequence_breakers; ++i) {
        if (!p.dry_sequence_breakers || !p.dry_sequence_breakers[i]) {
            return es_fail(ES_ERR_INVALID, "dry_sequence_breakers must not be null");
        }
        if (strlen(p.dry_sequence_breakers[i]) > n_max_breaker) {
            return es_fail(ES_ERR_INVALID, "dry_sequence_breakers: %.40s... has more than %zu bytes",
                           p.dry_sequence_breakers[i], n_max_breaker);
        }
    }
    return ES_OK;
}

// Null: it changes nothing.
llama_sampler * es_sampler_chain::make(es_link kind, const llama_vocab * vocab, const es_sampler_params & p) const {
    const int32_t n_vocab  = llama_vocab_n_tokens(vocab);
    const size_t  min_keep = (size_t) p.min_keep;
    switch (kind) {
    case es_link::bias: {
        std::vector<llama_logit_bias> bias;
        for (size_t i = 0; i < p.n_logit_bias; ++i) {
            bias.push_back({ p.logit_bias[i].token, p.logit_bias[i].bias });
        }
        return bias.empty() ? nullptr : llama_sampler_init_logit_bias(n_vocab, (int32_t) bias.size(), bias.data());
    }
    case es_link::penalties:
        return p.repeat_last_n == 0 ? nullptr
                                    : llama_sampler_init_penalties(n_vocab, p.repeat_last_n, p.repeat_penalty,
                                                                   p.frequency_penalty, p.presence_penalty);
    case es_link::dry: {
        std::vector<const char *> breakers;
        for (size_t i = 0; i < p.n_dry_sequence_breakers; ++i) {
            if (p.dry_sequence_breakers[i][0] != '\0') {
                breakers.push_back(p.dry_sequence_breakers[i]);
            }
        }
        return p.dry_multiplier == 0.0f || p.dry_base < 1.0f || p.dry_penalty_last_n == 0
                   ? nullptr
                   : llama_sampler_init_dry(vocab, p.dry_multiplier, p.dry_base, p.dry_allowed_length,
                                            p.dry_penalty_last_n, breakers.data(), breakers.size());
    }
    case es_link::top_n_sigma: return p.top_n_sigma > 0.0f ? llama_sampler_init_top_n_sigma(p.top_n_sigma) : nullptr;
    case es_link::top_k: return p.top_k > 0 ? llama_sampler_init_top_k(p.top_k) : nullptr;
    case es_link::typ_p: return p.typical_p < 1.0f ? llama_sampler_init_typical(p.typical_p, min_keep) : nullptr;
    case es_link::top_p: return p.top_p < 1.0f ? llama_sampler_init_top_p(p.top_p, min_keep) : nullptr;
    case es_link::min_p: return p.min_p > 0.0f ? llama_sampler_init_min_p(p.min_p, min_keep) : nullptr;
    case es_link::xtc: // it always acts: whether it does is drawn in apply, since its generator cannot be restored
        return p.xtc_probability > 0.0f && p.xtc_threshold <= 0.5f
                   ? llama_sampler_init_xtc(1.0f, p.xtc_threshold, min_keep, 0)
                   : nullptr;
    case es_link::temperature:
        return p.mirostat > 0 ? llama_sampler_init_temp(p.temp)
                              : llama_sampler_init_temp_ext(p.temp, p.dynatemp_range, p.dynatemp_exponent);
    case es_link::infill: return llama_sampler_init_infill(vocab);
    case es_link::adaptive_p: break;
    }
    return nullptr;
}

int32_t es_sampler_chain::init(const llama_vocab * vocab, const es_sampler_params & p) {
    std::vector<es_link> order;
    const int32_t        rc = parse(p.samplers ? p.samplers : default_order, order);
    if (rc != ES_OK) {
        return rc;
    }
    if (p.mirostat > 0) { // it stands for all others
        order = { es_link::temperature };
    }
    order.insert(order.begin(), es_link::bias);
    for (const es_link kind : order) {
        if (kind == es_link::temperature && p.temp <= 0.0f && (p.dynatemp_range <= 0.0f || p.mirostat > 0)) {
            is_greedy_ = true;
            break;
        }
        is_adaptive_ = is_adaptive_ || (kind == es_link::adaptive_p && p.adaptive_target >= 0.0f);
        if (llama_sampler * made = make(kind, vocab, p)) {
            links_.push_back({ kind, llama_sampler_ptr(made) });
        }
    }
    // sorting for nothing would also choose another one among equals
    while (is_greedy_ && !links_.empty() && keeps_best(links_.back().kind)) {
        links_.pop_back();
    }
    is_adaptive_     = is_adaptive_ && !is_greedy_;
    xtc_probability_ = p.xtc_probability;
    return ES_OK;
}

void es_sampler_chain::accept(llama_token token) {
    for (const link & l : links_) {
        llama_sampler_accept(l.sampler.get(), token);
    }
}

void es_sampler_chain::reset() {
    for (const link & l : links_) {
        llama_sampler_reset(l.sampler.get());
    }
}

void es_sampler_chain::apply(llama_token_data_array & candidates, double u) const {
    for (const link & l : links_) {
        if (l.kind == es_link::xtc && u >= xtc_probability_) {
            continue;
        }
        if (l.kind == es_link::typ_p) {
            drop_impossible(candidates);
        }
        llama_sampler_apply(l.sampler.get(), &candidates);
    }
}
