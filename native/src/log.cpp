// llama.cpp's log: off the terminal unless asked for; its last error belongs in our sentences.
#include "edge_stream.h"

#include <atomic>
#include <cstdio>
#include <mutex>
#include <string>

namespace {

std::atomic<bool> is_verbose{ false };
std::mutex        mutex;
std::string       last_error;

void keep(ggml_log_level level, const char * text, void *) {
    if (is_verbose) {
        std::fputs(text, stderr);
        std::fflush(stderr);
    }
    if (level == GGML_LOG_LEVEL_ERROR) {
        const std::string line = text;
        const size_t      end  = line.find_last_not_of(" \n");

        const std::lock_guard<std::mutex> lock(mutex);
        last_error = line.substr(0, end == std::string::npos ? 0 : end + 1);
    }
}

} // namespace

void es_log_set(bool verbose) {
    is_verbose = verbose;
    {
        const std::lock_guard<std::mutex> lock(mutex);
        last_error.clear();
    }
    llama_log_set(keep, nullptr);
}

const char * es_log_last_error(void) {
    static thread_local std::string   copy;
    const std::lock_guard<std::mutex> lock(mutex);
    copy = last_error;
    return copy.c_str();
}
