#include "app_stream.h"

#include "error.h"
#include "sampler_chain.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <thread>

namespace {

constexpr uint32_t n_max_ctx  = 1 << 28;
constexpr size_t   least_step = 64;

struct cache_type {
    const char * name;
    ggml_type    type;
};
constexpr cache_type cache_types[] = {
    { "f32", GGML_TYPE_F32 },   { "f16", GGML_TYPE_F16 },   { "bf16", GGML_TYPE_BF16 },
    { "q8_0", GGML_TYPE_Q8_0 }, { "q5_1", GGML_TYPE_Q5_1 }, { "q5_0", GGML_TYPE_Q5_0 },
    { "q4_1", GGML_TYPE_Q4_1 }, { "q4_0", GGML_TYPE_Q4_0 }, { "iq4_nl", GGML_TYPE_IQ4_NL },
};

int32_t find_cache_type(const char * name, ggml_type & out) {
    for (const cache_type & t : cache_types) {
        if (strcmp(name ? name : "f16", t.name) == 0) {
            out = t.type;
            return ES_OK;
        }
    }
    return es_fail(ES_ERR_INVALID, "cache type %s is unknown (f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0, iq4_nl)",
                   name);
}

// Parameters of a sampler as bytes: with the same ones it can be continued.
std::string key_of(const es_app_answer_params & params) {
    const es_sampler_params & p = params.sampling;
    std::string key((const char *) &p, offsetof(es_sampler_params, n_ctx)); // numbers of 4 bytes, without gaps
    key += params.ignore_eos ? '1' : '0';
    if (p.n_logit_bias > 0) {
        key.append((const char *) p.logit_bias, p.n_logit_bias * sizeof(es_logit_bias));
    }
    key += p.samplers ? p.samplers : "";
    for (size_t i = 0; i < p.n_dry_sequence_breakers; ++i) {
        key.append(p.dry_sequence_breakers[i], strlen(p.dry_sequence_breakers[i]) + 1);
    }
    return key;
}

} // namespace

uint32_t es_context_params::n_spare() const {
    return es_bank_available() ? 0 : n_keep;
}

int32_t es_context_params::init(const es_app_session_params & params, uint32_t ctx, uint32_t keep) {
    n_ctx            = ctx;
    n_keep           = keep;
    const int32_t rc = find_cache_type(params.cache_type_k, type_k);
    if (rc != ES_OK) {
        return rc;
    }
    if (params.n_batch < 1 || params.n_batch > n_max_ctx || n_ctx < 1 || n_ctx > n_max_ctx) {
        return es_fail(ES_ERR_INVALID, "n_ctx = %u and n_batch = %u must be between 1 and %u", n_ctx, params.n_batch,
                       n_max_ctx);
    }
    if (params.flash_attn < -1 || params.flash_attn > 1) {
        return es_fail(ES_ERR_INVALID, "flash_attn = %d must be -1, 0 or 1", params.flash_attn);
    }
    return find_cache_type(params.cache_type_v, type_v);
}

llama_context * es_make_context(llama_model * model, const es_app_session_params & params,
                                const es_context_params & sizes, ggml_abort_callback abort, void * abort_data) {
    const uint32_t       n_cores = std::max(1u, std::thread::hardware_concurrency());
    llama_context_params p       = llama_context_default_params();
    p.n_ctx                      = sizes.n_ctx + sizes.n_spare();
    p.n_batch                    = params.n_batch;
    p.n_ubatch                   = params.n_batch;
    p.n_seq_max                  = es_bank_available() ? 1 : 2; // redecoding needs a second sequence
    p.kv_unified                 = true;
    p.swa_full                   = true;
    p.type_k                     = sizes.type_k;
    p.type_v                     = sizes.type_v;
    p.flash_attn_type            = (llama_flash_attn_type) params.flash_attn;
    // flash attention rounds a float32 cache to float16; a quantised V needs it all the same
    const bool is_exact = p.type_k == GGML_TYPE_F32 || p.type_v == GGML_TYPE_F32;
    if (params.flash_attn == -1 && is_exact && !ggml_is_quantized(p.type_v)) {
        p.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
    }
    p.n_threads           = (int32_t) std::min(params.n_threads ? params.n_threads : n_cores, 1024u);
    p.n_threads_batch     = p.n_threads;
    p.no_perf             = true;
    p.abort_callback      = abort;
    p.abort_callback_data = abort_data;
    llama_context * ctx   = es_context_init(model, p);
    if (!ctx) {
        es_fail(ES_ERR_MEMORY, "llama.cpp cannot create a cache of %u tokens%s", sizes.n_ctx, es_log_hint().c_str());
    }
    return ctx;
}

es_app_stream::~es_app_stream() {
    es_sampler_free(sampler_);
    es_stream_free(stream_);
    llama_free(ctx_);
}

int32_t es_app_stream::init(const es_app_session_params & params, const es_context_params & sizes,
                            uint32_t n_boundary) {
    sizes_           = sizes;
    const auto abort = [](void * data) {
        const auto * self = (const es_app_stream *) data;
        return self->may_abort_ && self->stop_;
    };
    ctx_ = es_make_context(model_->model, params, sizes, abort, this);
    if (!ctx_) {
        return ES_ERR_MEMORY;
    }
    es_stream_params p = es_stream_default_params();
    p.n_ctx            = sizes.n_ctx;
    p.n_keep           = sizes.n_keep;
    p.n_boundary       = n_boundary;
    p.model_tag        = model_->tag;
    int32_t rc         = es_stream_init(ctx_, p, &stream_);
    // once per loaded model, unless positions now get further
    const int32_t distance = rc == ES_OK ? es_stream_proof_distance(stream_) : 0;
    if (distance > model_->proven) {
        es_proof proof;
        if ((rc = es_stream_prove(stream_, &proof)) == ES_OK) {
            model_->proven = distance;
        }
    }
    return rc;
}

es_stream_stats es_app_stream::stats() const {
    es_stream_stats s = {};
    es_stream_get_stats(stream_, &s);
    return s;
}

//
// feeding
//

int32_t es_app_stream::feed(const es_tokens & tokens, es_app_progress on_progress, void * user) {
    const size_t step = std::max<size_t>(least_step, stats().n_chunk);
    for (size_t i = 0; i < tokens.size(); i += step) {
        const size_t end = std::min(tokens.size(), i + step);
        may_abort_       = true;
        const int32_t rc = es_stream_feed(stream_, tokens.data() + i, end - i, nullptr, nullptr);
        may_abort_       = false;
        if (rc != ES_OK) {
            return rc;
        }
        if (stop_ || (on_progress && !on_progress(user, end, tokens.size()))) {
            return es_fail(ES_ERR_STOPPED, "reading was stopped");
        }
    }
    return ES_OK;
}

//
// generating
//

// Makes a sampler, unless the last answer's can be continued. A grammar always starts anew.
int32_t es_app_stream::use_sampling(const es_app_answer_params & params) {
    es_sampler_params p = params.sampling;
    p.n_ctx             = sizes_.n_ctx;
    const int32_t n     = llama_vocab_n_tokens(model_->vocab);
    int32_t       rc    = es_sampler_chain::check(p, n);
    if (rc != ES_OK) {
        return rc;
    }
    const std::string key = p.grammar || p.chat ? std::string() : key_of(params);
    if (sampler_ && !key.empty() && key == sampler_key_) {
        return ES_OK;
    }
    std::vector<es_logit_bias> bias(p.logit_bias, p.logit_bias + p.n_logit_bias);
    for (llama_token token = 0; params.ignore_eos && token < n; ++token) {
        if (llama_vocab_is_eog(model_->vocab, token)) {
            bias.push_back({ token, -INFINITY });
        }
    }
    p.logit_bias      = bias.data();
    p.n_logit_bias    = bias.size();
    es_sampler * made = nullptr;
    if ((rc = es_sampler_init(model_->model, p, &made)) != ES_OK) {
        return rc;
    }
    es_sampler_free(sampler_);
    sampler_     = made;
    sampler_key_ = key;
    return es_sampler_begin(sampler_, stream_);
}

int32_t es_app_stream::begin(const es_app_answer_params & params) {
    const int32_t rc = use_sampling(params);
    if (rc != ES_OK) {
        return rc;
    }
    writing_    = true;
    ignore_eos_ = params.ignore_eos;
    max_tokens_ = params.max_tokens;
    n_written_  = 0;
    guard_      = params.loop_guard > 0 ? std::make_unique<es_loop_guard>() : nullptr;
    began_      = std::chrono::steady_clock::now();
    return ES_OK;
}

int32_t es_app_stream::next(bool special, es_app_token & out) {
    out             = {};
    out.token       = -1;
    out.bytes       = "";
    const auto tell = [&](int32_t finish) {
        const es_stream_stats s = stats();
        const double seconds    = std::chrono::duration<double>(std::chrono::steady_clock::now() - began_).count();
        out.finish              = finish;
        out.n_past              = s.n_past;
        out.n_cached            = s.n_sinks + s.n_window;
        out.tokens_per_s        = (float) ((double) n_written_ / std::max(seconds, 1e-9));
        return ES_OK;
    };
    if (stop_) {
        return tell(ES_APP_STOPPED);
    }
    if (max_tokens_ >= 0 && n_written_ >= max_tokens_) { // max_tokens = 0
        return tell(ES_APP_LENGTH);
    }
    es_token      token;
    const int32_t rc = es_stream_next(stream_, sampler_, special, false, &token);
    if (rc != ES_OK) {
        return rc;
    }
    out.token = token.token;
    n_written_++;
    if (token.is_eog && !ignore_eos_) {
        return tell(ES_APP_EOS);
    }
    out.bytes   = token.piece;
    out.n_bytes = token.n_piece;
    out.loop    = guard_ ? guard_->add(out.token) : es_loop{ 0, 0 };
    if (out.loop.period > 0) {
        size_t        n_taken = 0;
        const int32_t taken   = es_stream_unloop(stream_, out.loop, &n_taken);
        return taken == ES_OK ? tell(ES_APP_REPETITION) : taken;
    }
    return tell(n_written_ == max_tokens_ ? ES_APP_LENGTH : ES_APP_UNFINISHED);
}

//
// the whole stream
//

int32_t es_app_stream::reset() {
    es_sampler_free(sampler_);
    sampler_ = nullptr;
    writing_ = false;
    return es_stream_reset(stream_);
}

int32_t es_app_stream::save(const char * path, const std::string & user) const {
    return es_session_save(stream_, sampler_, sizes_.type_k, sizes_.type_v, path, user.data(), user.size());
}

int32_t es_app_stream::load(const char * path) {
    return es_session_load(stream_, sizes_.type_k, sizes_.type_v, path);
}
