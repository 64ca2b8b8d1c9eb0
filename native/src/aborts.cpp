#include "aborts.h"

#include "edge_stream.h"
#include "error_log.h"

#include <cstdio>
#include <mutex>
#include <stdexcept>
#include <string>

namespace {

thread_local int      depth    = 0;
ggml_abort_callback_t previous = nullptr;

// "/a/b/llama-model.cpp:12: GGML_ASSERT(n > 0) failed" -> "GGML_ASSERT(n > 0) failed (llama-model.cpp:12)"
std::string in_words(const std::string & message) {
    const size_t end = message.find(": ");
    if (end == std::string::npos) {
        return message;
    }
    const size_t slash = message.rfind('/', end);
    const size_t start = slash == std::string::npos ? 0 : slash + 1;
    return message.substr(end + 2) + " (" + message.substr(start, end - start) + ")";
}

void on_abort(const char * message) {
    if (depth > 0) {
        throw std::runtime_error(in_words(message));
    }
    if (previous) {
        previous(message);
    } else {
        fprintf(stderr, "%s\n", message);
    }
}

template <typename F>
auto made(F && make) -> decltype(make()) {
    try {
        const es_abort_scope scope;
        return make();
    } catch (const std::bad_alloc &) {
        es_log_error("out of memory");
    } catch (const std::exception & e) {
        es_log_error(e.what());
    } catch (...) {
        es_log_error("unexpected error");
    }
    return nullptr;
}

} // namespace

es_abort_scope::es_abort_scope() {
    static std::once_flag once;
    std::call_once(once, [] { previous = ggml_set_abort_callback(on_abort); });
    ++depth;
}

es_abort_scope::~es_abort_scope() {
    --depth;
}

llama_model * es_model_load(const char * path, llama_model_params params) {
    return made([&] { return llama_model_load_from_file(path, params); });
}

llama_context * es_context_init(llama_model * model, llama_context_params params) {
    return made([&] { return llama_init_from_model(model, params); });
}
