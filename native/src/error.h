// Error reporting of the C API: a status code, and a message per thread.
#pragma once

#include "edge_stream.h"

#include <exception>
#include <new>
#include <stdexcept>

// Sets es_last_error() and returns status: `return es_fail(...)`.
#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
int32_t
es_fail(int32_t status, const char * format, ...);

// Replaces control characters: a message may have parts of a hostile file, and goes to terminals and logs.
void es_one_line(char * text);

#define ES_REQUIRE(pointer)                                                                                            \
    if (!(pointer)) {                                                                                                  \
        return es_fail(ES_ERR_INVALID, "%s must not be null", #pointer);                                               \
    }

// Runs f() and turns any exception into a status: none may cross the C boundary.
template <typename F>
int32_t es_guard(F && f) noexcept {
    try {
        return f();
    } catch (const std::bad_alloc &) {
        return es_fail(ES_ERR_MEMORY, "out of memory");
    } catch (const std::overflow_error & e) { // native/src/llama/es-grammar-budget.h
        return es_fail(ES_ERR_STOPPED, "%s", e.what());
    } catch (const std::exception & e) {
        return es_fail(ES_ERR_INTERNAL, "unexpected error: %s", e.what());
    } catch (...) {
        return es_fail(ES_ERR_INTERNAL, "unexpected error");
    }
}
