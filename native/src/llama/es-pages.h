// Pages of a model's file, mapped by llama.cpp: read tensor by tensor while the model loads, and given back where a
// tensor has been copied (repacked, or to a device). Included by llama-model-loader.cpp alone
// (native/patches/0008-mapped-pages.patch).
//
// llama.cpp reads the whole file before the first tensor, in a call that reports no progress and cannot be interrupted,
// and keeps all of it mapped: of a file whose weights are repacked twice its size is resident then.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>

constexpr bool ES_PAGES = true;

// Read the pages of [data, data + size) into memory, and map them. Without Linux 5.14 they are mapped at first use.
inline void es_pages_read(const void * data, size_t size) {
    constexpr int   populate_read = 22; // MADV_POPULATE_READ, which older headers lack
    const uintptr_t page          = (uintptr_t) sysconf(_SC_PAGESIZE);
    const uintptr_t begin         = (uintptr_t) data & ~(page - 1);
    const size_t    length        = (uintptr_t) data + size - begin;
    if (madvise((void *) begin, length, populate_read) != 0) {
        madvise((void *) begin, length, MADV_WILLNEED);
    }
}

// [data, data + size) is not needed any more. Whoever reads it all the same (a tensor that is tied to another one)
// finds it in the file again. Pages that are locked in memory stay.
inline void es_pages_release(const void * data, size_t size) {
    const uintptr_t page  = (uintptr_t) sysconf(_SC_PAGESIZE);
    const uintptr_t begin = ((uintptr_t) data + page - 1) & ~(page - 1);
    const uintptr_t end   = ((uintptr_t) data + size) & ~(page - 1);
    if (begin < end) {
        madvise((void *) begin, end - begin, MADV_DONTNEED);
    }
}
#else
constexpr bool ES_PAGES = false;

inline void es_pages_read(const void *, size_t) {}
inline void es_pages_release(const void *, size_t) {}
#endif
