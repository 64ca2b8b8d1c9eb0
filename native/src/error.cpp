#include "error.h"

#include <cstdarg>
#include <cstdio>

void es_one_line(char * text) {
    for (; *text; ++text) {
        if ((unsigned char) *text < 0x20 || *text == 0x7f) {
            *text = '?';
        }
    }
}

static thread_local char last_error[1024] = "";

int32_t es_fail(int32_t status, const char * format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(last_error, sizeof(last_error), format, args);
    va_end(args);
    es_one_line(last_error);
    return status;
}

const char * es_last_error(void) {
    return last_error;
}

const char * es_version(void) {
    return ES_VERSION;
}

const char * es_status_name(int32_t status) {
    switch (status) {
    case ES_OK: return "ok";
    case ES_ERR_INVALID: return "invalid argument";
    case ES_ERR_UNSUPPORTED: return "unsupported";
    case ES_ERR_MEMORY: return "out of memory";
    case ES_ERR_DECODE: return "decode failed";
    case ES_ERR_STOPPED: return "stopped";
    case ES_ERR_IO: return "input/output error";
    case ES_ERR_NO_SPACE: return "no space left";
    case ES_ERR_FORMAT: return "damaged file";
    case ES_ERR_VERSION: return "newer version";
    case ES_ERR_MODEL: return "other model";
    case ES_ERR_INTERNAL: return "internal error";
    default: return "unknown status";
    }
}
