#include "app_model.h"

#include "chat/template.h"
#include "edge_stream.h"
#include "error.h"
#include "support.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <vector>

namespace {

void init_once() {
    static std::once_flag once;
    std::call_once(once, llama_backend_init);
    es_log_set(false); // forgets the errors of the load before
}

struct load_progress {
    es_app_progress call;
    void *          user;
    bool            stopped = false;
};

bool on_load_progress(float done, void * user) {
    auto * p   = (load_progress *) user;
    p->stopped = p->stopped || (p->call && !p->call(p->user, (uint64_t) (done * 1000), 1000));
    return !p->stopped;
}

} // namespace

std::string es_log_hint() {
    const std::string last = es_log_last_error();
    return last.empty() ? last : ": " + last;
}

es_loaded_model::~es_loaded_model() {
    llama_model_free(model);
}

es_tokens es_loaded_model::tokenize(const std::string & text, bool add_bos, bool special) const {
    es_tokens     out(text.size() + 2);
    const int32_t n =
        llama_tokenize(vocab, text.data(), (int32_t) text.size(), out.data(), (int32_t) out.size(), add_bos, special);
    if (n < 0) {
        out.resize((size_t) -n);
        llama_tokenize(vocab, text.data(), (int32_t) text.size(), out.data(), -n, add_bos, special);
        return out;
    }
    out.resize((size_t) n);
    return out;
}

uint32_t es_loaded_model::recommended(const char * key, uint32_t otherwise) const {
    const long long n = atoll(es_model_meta(model, key).c_str());
    return n > 0 && n <= INT32_MAX ? (uint32_t) n : otherwise;
}

// This machine's GPUs, NULL at the end, if the process has used an RPC server: without a list, llama.cpp would use that
// too. Empty where its choice is right.
static std::vector<ggml_backend_dev_t> local_gpus() {
    std::vector<ggml_backend_dev_t> discrete, integrated;
    bool                            has_rpc = false;
    for (size_t i = 0; i < ggml_backend_dev_count(); ++i) {
        const ggml_backend_dev_t dev  = ggml_backend_dev_get(i);
        const auto               type = ggml_backend_dev_type(dev);
        if (strcmp(ggml_backend_reg_name(ggml_backend_dev_backend_reg(dev)), "RPC") == 0) {
            has_rpc = true;
        } else if (type == GGML_BACKEND_DEVICE_TYPE_GPU) {
            discrete.push_back(dev);
        } else if (type == GGML_BACKEND_DEVICE_TYPE_IGPU) {
            integrated.push_back(dev);
        }
    }
    std::vector<ggml_backend_dev_t> out;
    if (has_rpc) {
        out = discrete.empty() ? integrated : discrete;
        out.push_back(nullptr);
    }
    return out;
}

int32_t es_load_model(const char * path, const es_app_model_params & params, bool measure,
                      std::shared_ptr<const es_loaded_model> & out) {
    init_once();
    auto          loaded = std::make_shared<es_loaded_model>();
    const int32_t rc     = es_weights_tag(path, loaded->tag); // fails for files that cannot be read
    if (rc != ES_OK) {
        return rc;
    }
    load_progress      progress{ params.on_progress, params.user };
    llama_model_params p                    = llama_model_default_params();
    p.n_gpu_layers                          = params.n_gpu_layers;
    p.progress_callback                     = on_load_progress;
    p.progress_callback_user_data           = &progress;
    std::vector<ggml_backend_dev_t> devices = local_gpus();
    p.devices                               = devices.empty() ? nullptr : devices.data();
    if (measure) {
        p.no_alloc = true;
    }
    if (measure || !params.use_mmap) {
        p.load_mode = LLAMA_LOAD_MODE_NONE;
    }
    char reason[512];
    if (!es_model_file_check(path, reason, sizeof(reason))) {
        return es_fail(ES_ERR_UNSUPPORTED, "%s is damaged: %s", path, reason);
    }
    loaded->model = es_model_load(path, p);
    if (!loaded->model) {
        return progress.stopped ? es_fail(ES_ERR_STOPPED, "loading was stopped")
                                : es_fail(ES_ERR_MEMORY, "llama.cpp cannot load %s%s", path, es_log_hint().c_str());
    }
    if (!es_model_can_stream(loaded->model, reason, sizeof(reason))) {
        return es_fail(ES_ERR_UNSUPPORTED, "the model cannot stream: %s", reason);
    }
    loaded->vocab = llama_model_get_vocab(loaded->model);
    out           = std::move(loaded);
    return ES_OK;
}

//
// C interface
//

es_app_model_params es_app_model_default_params(void) {
    es_app_model_params p = {};
    p.n_gpu_layers        = -1;
    p.use_mmap            = true;
    return p;
}

int32_t es_app_model_load(const char * path, es_app_model_params params, es_app_model ** out) {
    ES_REQUIRE(path);
    ES_REQUIRE(out);
    *out = nullptr;
    return es_guard([&]() -> int32_t {
        auto          model = std::make_unique<es_app_model>();
        const int32_t rc    = es_load_model(path, params, false, model->loaded);
        *out                = rc == ES_OK ? model.release() : nullptr;
        return rc;
    });
}

void es_app_model_free(es_app_model * model) {
    delete model;
}

int32_t es_app_model_get_info(const es_app_model * model, es_app_model_info * out) {
    ES_REQUIRE(model);
    ES_REQUIRE(out);
    return es_guard([&]() -> int32_t {
        const es_loaded_model & m = *model->loaded;
        *out                      = {};
        llama_model_desc(m.model, out->name, sizeof(out->name));
        out->n_params          = llama_model_n_params(m.model);
        out->n_bytes           = llama_model_size(m.model);
        out->fingerprint       = es_model_fingerprint(m.model);
        out->tag               = m.tag;
        out->n_vocab           = (uint32_t) llama_vocab_n_tokens(m.vocab);
        out->n_ctx_train       = (uint32_t) llama_model_n_ctx_train(m.model);
        out->n_ctx             = m.recommended("edge_stream.n_ctx", 4096);
        out->n_keep            = m.recommended("edge_stream.n_keep", 4);
        out->has_chat_template = llama_model_chat_template(m.model, nullptr) != nullptr;
        out->has_sink_bank     = es_bank_available();
        return ES_OK;
    });
}

bool es_app_model_can_chat(const es_app_model * model, const char * chat_template, char * reason, size_t n_reason) {
    std::string   note;
    const int32_t rc = es_guard([&]() -> int32_t {
        ES_REQUIRE(model);
        es_chat       chat;
        const int32_t status = chat.init(model->loaded->model, chat_template);
        note                 = chat.is_fallback ? "the model has no chat template: ChatML is used" : "";
        return status;
    });
    if (reason && n_reason > 0) {
        snprintf(reason, n_reason, "%s", rc == ES_OK ? note.c_str() : es_last_error());
    }
    return rc == ES_OK;
}

int64_t es_app_tokenize(const es_app_model * model, const char * text, bool add_bos, bool special, int32_t * out,
                        size_t n_max) {
    if (!model || !text || (n_max > 0 && !out)) {
        es_fail(ES_ERR_INVALID, "model, text and out must not be null");
        return -1;
    }
    int64_t       n  = -1;
    const int32_t rc = es_guard([&]() -> int32_t {
        const es_tokens tokens = model->loaded->tokenize(text, add_bos, special);
        std::copy_n(tokens.begin(), std::min(n_max, tokens.size()), out);
        n = (int64_t) tokens.size();
        return ES_OK;
    });
    return rc == ES_OK ? n : -1;
}

int32_t es_app_token_bytes(const es_app_model * model, int32_t token, char * out, size_t n_max) {
    if (!model || (n_max > 0 && !out) || token < 0 || token >= llama_vocab_n_tokens(model->loaded->vocab)) {
        es_fail(ES_ERR_INVALID, "token %d is not in the vocabulary, or model or out is null", token);
        return -1;
    }
    int32_t       n  = -1;
    const int32_t rc = es_guard([&]() -> int32_t {
        const std::string bytes = es_piece(model->loaded->vocab, token, false);
        std::copy_n(bytes.begin(), std::min(n_max, bytes.size()), out);
        n = (int32_t) bytes.size();
        return ES_OK;
    });
    return rc == ES_OK ? n : -1;
}
