// llama.cpp's log: off the terminal unless asked for; its last error belongs in our sentences.
#include "error_log.h"

#include "edge_stream.h"
#include "error.h"

#include <atomic>
#include <cstdio>
#include <mutex>
#include <string>

namespace {

std::atomic<bool> is_verbose{ false };

struct error_log {
    std::mutex  mutex;
    std::string last;
};

// never destroyed: some backends log while the process ends
error_log & errors() {
    static auto * e = new error_log;
    return *e;
}

// The reason for these is in the line before; one of "failed to load model" may also follow a colon.
bool is_summary(const std::string & line) {
    return line.find("gguf_init_from_reader: failed to read") != std::string::npos ||
           line.find("failed to parse grammar") != std::string::npos ||
           (line.find("failed to load model") != std::string::npos &&
            line.find("failed to load model:") == std::string::npos);
}

void keep(ggml_log_level level, const char * text, void *) {
    if (is_verbose) {
        std::fputs(text, stderr);
        std::fflush(stderr);
    }
    if (level == GGML_LOG_LEVEL_ERROR) {
        const std::string line = text;
        const size_t      end  = line.find_last_not_of(" \n");

        const std::lock_guard<std::mutex> lock(errors().mutex);
        if (errors().last.empty() || !is_summary(line)) {
            errors().last = line.substr(0, end == std::string::npos ? 0 : end + 1);
            es_one_line(errors().last.data());
        }
    }
}

} // namespace

void es_log_error(const char * text) {
    keep(GGML_LOG_LEVEL_ERROR, text, nullptr);
}

void es_log_set(bool verbose) {
    is_verbose = verbose;
    {
        const std::lock_guard<std::mutex> lock(errors().mutex);
        errors().last.clear();
    }
    llama_log_set(keep, nullptr);
}

const char * es_log_last_error(void) {
    static thread_local std::string   copy;
    const std::lock_guard<std::mutex> lock(errors().mutex);
    copy = errors().last;
    return copy.c_str();
}
