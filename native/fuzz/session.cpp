// Session files. Sizes and checksums of sections are put right before reading, or no change would get further than
// them.
#include "fuzz.h"

#include <algorithm>
#include <cassert>
#include <cstring>

namespace {

constexpr size_t n_header = 16, n_section = 16;

std::string put_right(std::string file) {
    for (size_t at = n_header; at + n_section <= file.size();) {
        uint64_t size = 0;
        memcpy(&size, &file[at + 8], 8);
        size = std::min<uint64_t>(size, file.size() - at - n_section);
        memcpy(&file[at + 8], &size, 8);
        uint32_t tag = 0;
        memcpy(&tag, &file[at], 4);
        uint32_t crc = fuzz_crc(0, &tag, 4);
        crc          = fuzz_crc(crc, &size, 8);
        crc          = fuzz_crc(crc, file.data() + at + n_section, size);
        memcpy(&file[at + 4], &crc, 4);
        at += n_section + size;
    }
    return file;
}

es_stream * fresh(uint32_t n_keep = 4) {
    es_stream *      stream = nullptr;
    es_stream_params p      = es_stream_default_params();
    p.n_ctx                 = 32;
    p.n_keep                = n_keep;
    p.n_slide               = 1;
    assert(es_stream_init(fuzz_context(), p, &stream) == ES_OK);
    return stream;
}

void feed(es_stream * stream, llama_token n) {
    for (llama_token i = 0; i < n; ++i) {
        const llama_token token = 3 + i % 256;
        (void) es_stream_feed(stream, &token, 1, nullptr, nullptr);
    }
}

} // namespace

void fuzz_seeds() {
    for (const llama_token n : { 0, 3, 10, 100 }) {
        es_stream * stream = fresh();
        feed(stream, n);
        es_sampler * sampler = nullptr;
        assert(es_sampler_init(fuzz_model(), es_sampler_default_params(), &sampler) == ES_OK);
        const std::string path = fuzz_path("seed");
        assert(es_session_save(stream, n > 3 ? sampler : nullptr, GGML_TYPE_F32, GGML_TYPE_F32, path.c_str(), "user",
                               4) == ES_OK);
        fuzz_seed("session-" + std::to_string(n), fuzz_read(path));
        if (n == 100) {
            const llama_token back[] = { 40, 41, 42 };
            assert(es_stream_recall(stream, back, 3) == ES_OK);
            assert(es_session_save(stream, sampler, GGML_TYPE_F32, GGML_TYPE_F32, path.c_str(), nullptr, 0) == ES_OK);
            fuzz_seed("session-recalled", fuzz_read(path));
        }
        es_sampler_free(sampler);
        es_stream_free(stream);
    }
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    const fuzz_watch watch;

    const std::string bytes = put_right({ (const char *) data, size });
    const std::string path  = fuzz_file("session", (const uint8_t *) bytes.data(), bytes.size());
    es_session_info   info;
    char              user[64];
    (void) es_session_peek(path.c_str(), &info, user, sizeof(user));
    es_stream * stream = fresh();
    if (es_session_load(stream, GGML_TYPE_F32, GGML_TYPE_F32, path.c_str()) == ES_OK) {
        es_sampler * sampler = nullptr;
        assert(es_sampler_init(fuzz_model(), es_sampler_default_params(), &sampler) == ES_OK);
        (void) es_sampler_begin(sampler, stream);
        es_token token;
        (void) es_stream_next(stream, sampler, true, true, &token);
        feed(stream, 3);
        (void) es_session_save(stream, sampler, GGML_TYPE_F32, GGML_TYPE_F32, path.c_str(), nullptr, 0);
        es_sampler_free(sampler);
    } else {
        feed(stream, 1); // it is as it was, or empty, or says that it is broken
    }
    es_stream_free(stream);
    return 0;
}
