// How long a grammar may take for one token. llama.cpp follows every way through it at once, and for a token that it
// refuses every sequence of them: "."* a hundred times takes a minute.
#pragma once

#include <chrono>
#include <cstddef>
#include <ctime>
#include <stdexcept>
#include <string>

#ifndef ES_GRAMMAR_SECONDS
#define ES_GRAMMAR_SECONDS 2
#endif

struct es_grammar_budget {
    size_t n   = 0; // work since the last look at the clock
    double end = now() + ES_GRAMMAR_SECONDS;

    // Seconds of this thread's work: other programs may be busy.
    static double now() {
#ifdef CLOCK_THREAD_CPUTIME_ID
        timespec t;
        if (clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t) == 0) {
            return (double) t.tv_sec + 1e-9 * (double) t.tv_nsec;
        }
#endif
        return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
    }

    static es_grammar_budget *& current() {
        thread_local es_grammar_budget * of_thread = nullptr;
        return of_thread;
    }
    es_grammar_budget() { current() = this; }
    ~es_grammar_budget() { current() = nullptr; }
    es_grammar_budget(const es_grammar_budget &)             = delete;
    es_grammar_budget & operator=(const es_grammar_budget &) = delete;
};

// One step of this thread's token, with a pass over `n` things. Throws std::overflow_error when the time is over.
inline void es_grammar_step(size_t n) {
    es_grammar_budget * const b = es_grammar_budget::current();
    if (b && (b->n += 16 + n) > (1 << 15)) {
        b->n = 0;
        if (es_grammar_budget::now() > b->end) {
            throw std::overflow_error(
                "the grammar was stopped: it has too many ways to go on, one token was not done after " +
                std::to_string(ES_GRAMMAR_SECONDS) + " seconds");
        }
    }
}
