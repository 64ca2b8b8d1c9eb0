// Huge pages for what the CPU reads again with every token: packed weights, the KV cache, work buffers. Included by
// ggml.c alone (native/patches/0010-huge-pages.patch).
//
// Where the system gives them only to who asks (Linux' default, "madvise"), llama.cpp's buffers lie in pages of 4 KiB,
// 40,000 of them for a token of a small model at n_ctx 4096. Measured by `python benchmarks/speed.py`.
//
// EDGE_STREAM_HUGE_PAGES=off asks for none.
#pragma once

#include <stddef.h>

#if defined(__linux__)
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

// Ask that [data, data + size), new and not yet touched, lies in huge pages as far as it spans whole ones.
static inline void es_huge_pages(void * data, size_t size) {
    const uintptr_t huge  = (uintptr_t) 2 << 20;
    const uintptr_t begin = ((uintptr_t) data + huge - 1) & ~(huge - 1);
    const uintptr_t end   = ((uintptr_t) data + size) & ~(huge - 1);
    const char *    wish  = getenv("EDGE_STREAM_HUGE_PAGES");
    if (begin < end && (wish == NULL || strcmp(wish, "off") != 0)) {
        madvise((void *) begin, end - begin, MADV_HUGEPAGE); // a wish: without it, all is as before
    }
}
#else
static inline void es_huge_pages(void * data, size_t size) {
    (void) data;
    (void) size;
}
#endif
