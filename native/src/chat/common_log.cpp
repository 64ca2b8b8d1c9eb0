// The log of llama.cpp's common, which this library is silent about: errors come back as exceptions.
#include "log.h"

int common_log_get_verbosity_thold() {
    return LOG_LEVEL_OUTPUT - 1;
}

struct common_log * common_log_main() {
    return nullptr;
}

void common_log_add(struct common_log *, enum ggml_log_level, const char *, ...) {}
