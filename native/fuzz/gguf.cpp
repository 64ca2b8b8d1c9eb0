// GGUF files, from the check of their header to a few decoded tokens. Mutations change values of the metadata more
// often than bytes, and nothing behind the header: weights are numbers, whatever they are. Seeds: make_seeds.py.
#include "fuzz.h"

#include <algorithm>
#include <cstring>
#include <random>
#include <unistd.h>
#include <vector>

extern "C" size_t LLVMFuzzerMutate(uint8_t * data, size_t size, size_t max_size);

namespace {

struct span {
    size_t at, n;
};

// Values of a file's metadata and of its tensors' descriptions; long arrays are one span of a few elements.
struct walk {
    const uint8_t *   data;
    size_t            size, at = 24;
    bool              ok = true;
    std::vector<span> spans;

    template <typename T>
    T get() {
        T value{};
        if (!ok || sizeof(T) > size - at) {
            ok = false;
            return value;
        }
        memcpy(&value, data + at, sizeof(T));
        at += sizeof(T);
        return value;
    }
    void skip(uint64_t n) {
        ok = ok && n <= size - at;
        at += ok ? n : 0;
    }
    void value(uint32_t type, bool in_array) {
        static constexpr size_t sizes[] = { 1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8 };
        if (type == 8) {
            const uint64_t n = get<uint64_t>();
            if (!in_array && ok && n > 0) {
                spans.push_back({ at, (size_t) std::min<uint64_t>(n, size - at) });
            }
            skip(n);
        } else if (type == 9) {
            spans.push_back({ at, 4 });
            const uint32_t inner = get<uint32_t>();
            spans.push_back({ at, 8 });
            const uint64_t n = get<uint64_t>();
            for (uint64_t i = 0; ok && i < n; ++i) {
                value(inner, i >= 8);
            }
        } else if (type < std::size(sizes)) {
            if (!in_array) {
                spans.push_back({ at, sizes[type] });
            }
            skip(sizes[type]);
        } else {
            ok = false;
        }
    }
};

walk look(const uint8_t * data, size_t size) {
    walk w{ data, size };
    if (size < 24) {
        w.ok = false;
        return w;
    }
    w.at                = 8;
    const auto n_tensor = w.get<uint64_t>(), n_kv = w.get<uint64_t>();
    for (uint64_t i = 0; w.ok && i < n_kv; ++i) {
        const auto n = w.get<uint64_t>();
        w.spans.push_back({ w.at, (size_t) std::min<uint64_t>(n, w.ok ? size - w.at : 0) });
        w.skip(n);
        const auto type = w.get<uint32_t>();
        w.value(type, false);
    }
    for (uint64_t i = 0; w.ok && i < n_tensor; ++i) {
        w.skip(w.get<uint64_t>());
        const size_t from = w.at;
        const auto   n    = w.get<uint32_t>();
        w.spans.push_back({ from, 4 });
        for (uint32_t k = 0; w.ok && k < n && k < 8; ++k) {
            w.spans.push_back({ w.at, 8 });
            w.skip(8);
        }
        w.spans.push_back({ w.at, 4 }); // type
        w.skip(4);
        w.spans.push_back({ w.at, 8 }); // offset
        w.skip(8);
    }
    return w;
}

} // namespace

void fuzz_seeds() {} // make_seeds.py writes them

extern "C" size_t LLVMFuzzerCustomMutator(uint8_t * data, size_t size, size_t max_size, unsigned int seed) {
    std::minstd_rand rng(seed);
    const walk       w = look(data, size);
    if (w.spans.empty() || rng() % 8 == 0) {
        const size_t header = std::min(size, std::max<size_t>(w.at, 24));
        if (rng() % 4 == 0) {
            return rng() % size; // cut
        }
        (void) LLVMFuzzerMutate(data, header, header);
        return std::min(size, max_size);
    }
    for (unsigned n = 1 + rng() % 3; n > 0; --n) {
        const span s = w.spans[rng() % w.spans.size()];
        if (s.n == 0) {
            continue;
        }
        if (s.n == 4 || s.n == 8) {
            static constexpr int64_t ints[]   = { 0,          1,        2,     3,       4,
                                                  5,          7,        8,     16,      31,
                                                  32,         64,       100,   127,     256,
                                                  1000,       65535,    65536, 1 << 24, 1 << 30,
                                                  0x7fffffff, -1,       -2,    -32,     (int64_t) 1 << 33,
                                                  INT64_MAX,  INT64_MIN };
            static constexpr float   floats[] = { 0, -0.0f, 1, -1, 1e-30f, 1e30f, 3.5f };
            int64_t                  value    = 0;
            memcpy(&value, data + s.at, s.n);
            switch (rng() % 4) {
            case 0: value = (int64_t) ((uint64_t) value + rng() % 5 - 2); break;
            case 1: memcpy(&value, &floats[rng() % std::size(floats)], 4); break;
            case 2: {
                const span other = w.spans[rng() % w.spans.size()];
                memcpy(&value, data + other.at, std::min({ s.n, other.n, sizeof(value) }));
                break;
            }
            default: value = ints[rng() % std::size(ints)];
            }
            memcpy(data + s.at, &value, s.n);
        } else {
            (void) LLVMFuzzerMutate(data + s.at, s.n, s.n);
        }
    }
    return size;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    const fuzz_watch watch;

    (void) fuzz_model(); // llama.cpp's backend, and its log
    es_log_set(false);
    const std::string path = fuzz_file("model.gguf", data, size);
    // some files are cut
    if (size % 8 != 1 && truncate(path.c_str(), 1 << 23) != 0) {
        return 0;
    }
    uint32_t number;
    (void) es_model_file_number(path.c_str(), "edge_stream.n_ctx", &number);
    char reason[512];
    if (!es_model_file_check(path.c_str(), reason, sizeof(reason))) {
        return 0;
    }
    llama_model_params p = llama_model_default_params();
    p.load_mode          = LLAMA_LOAD_MODE_NONE;
    llama_model * model  = es_model_load(path.c_str(), p);
    if (!model) {
        return 0;
    }
    if (es_model_can_stream(model, reason, sizeof(reason))) {
        llama_context_params c = llama_context_default_params();
        c.n_ctx                = 32;
        c.n_batch = c.n_ubatch = 16;
        c.kv_unified           = true;
        c.swa_full             = true;
        c.n_threads = c.n_threads_batch = 1;
        llama_context * ctx             = es_context_init(model, c);
        es_stream *     stream          = nullptr;
        if (ctx && es_stream_init(ctx, es_stream_default_params(), &stream) == ES_OK) {
            const llama_token tokens[] = { 1, 2, 3, 4, 5, 6, 7, 8 };
            (void) es_stream_feed(stream, tokens, std::size(tokens), nullptr, nullptr);
            es_stream_free(stream);
        }
        llama_free(ctx);
    }
    es_chat * chat = nullptr;
    if (es_chat_init(model, nullptr, &chat) == ES_OK) {
        es_chat_free(chat);
    }
    (void) es_model_fingerprint(model);
    llama_model_free(model);
    return 0;
}
