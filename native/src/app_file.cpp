// What tells one model file from another: hashes of all of it, and of parts.
#include "app_model.h"
#include "error.h"
#include "file.h"

#include <cerrno>
#include <cstring>

extern "C" {
#include "sha256/sha256.h" // of llama.cpp's vendor folder, plain C
}

static int32_t open_file(const char * path, es_file & f, uint64_t & size) {
    f.reset(fopen(path, "rb"));
    if (!f || fseeko(f.get(), 0, SEEK_END) != 0) {
        return es_fail(ES_ERR_IO, "cannot open %s: %s", path, strerror(errno));
    }
    size = (uint64_t) ftello(f.get());
    rewind(f.get());
    return ES_OK;
}

int32_t es_weights_tag(const char * path, uint64_t & out) {
    constexpr uint64_t n_blocks = 64, block = 1 << 16;
    es_file            f;
    uint64_t           size = 0;
    const int32_t      rc   = open_file(path, f, size);
    if (rc != ES_OK) {
        return rc;
    }
    sha256_t             hash;
    std::vector<uint8_t> buf(block);
    sha256_init(&hash);
    for (int i = 0; i < 8; ++i) {
        buf[i] = (uint8_t) (size >> 8 * i);
    }
    sha256_update(&hash, buf.data(), 8);
    for (uint64_t i = 0; i < n_blocks; ++i) {
        const uint64_t at = (size > block ? size - block : 0) * i / (n_blocks - 1);
        if (fseeko(f.get(), (off_t) at, SEEK_SET) != 0) {
            return es_fail(ES_ERR_IO, "cannot read %s: %s", path, strerror(errno));
        }
        sha256_update(&hash, buf.data(), fread(buf.data(), 1, block, f.get()));
    }
    uint8_t digest[SHA256_DIGEST_SIZE];
    sha256_final(&hash, digest);
    out = 0;
    for (int i = 0; i < 8; ++i) {
        out |= (uint64_t) digest[i] << 8 * i;
    }
    return ES_OK;
}

int32_t es_app_file_sha256(const char * path, es_app_progress on_progress, void * user, char out[65]) {
    ES_REQUIRE(path);
    ES_REQUIRE(out);
    return es_guard([&]() -> int32_t {
        es_file       f;
        uint64_t      size = 0, done = 0;
        const int32_t rc = open_file(path, f, size);
        if (rc != ES_OK) {
            return rc;
        }
        sha256_t hash;
        sha256_init(&hash);
        std::vector<uint8_t> buf(1 << 20);
        while (const size_t n = fread(buf.data(), 1, buf.size(), f.get())) {
            sha256_update(&hash, buf.data(), n);
            done += n;
            if (on_progress && !on_progress(user, done, size)) {
                return es_fail(ES_ERR_STOPPED, "hashing was stopped");
            }
        }
        if (ferror(f.get())) {
            return es_fail(ES_ERR_IO, "cannot read %s: %s", path, strerror(errno));
        }
        uint8_t digest[SHA256_DIGEST_SIZE];
        sha256_final(&hash, digest);
        for (int i = 0; i < SHA256_DIGEST_SIZE; ++i) {
            snprintf(out + 2 * i, 3, "%02x", digest[i]);
        }
        return ES_OK;
    });
}
