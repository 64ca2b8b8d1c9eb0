#include "session_file.h"

#include "error.h"
#include "file.h"

#include <cstring>
#include <string>
#include <sys/stat.h>

namespace {

constexpr char magic[8] = { 'E', 'D', 'G', 'E', 'S', 'E', 'S', 'S' };

uint32_t section_crc(uint32_t t, uint64_t size, const void * data) {
    uint32_t crc = es_crc32(0, &t, sizeof(t));
    crc          = es_crc32(crc, &size, sizeof(size));
    return es_crc32(crc, data, size);
}

bool put(FILE * f, const void * data, size_t n) {
    return n == 0 || fwrite(data, 1, n, f) == n;
}

bool put_section(FILE * f, const es_section & s) {
    const uint32_t crc = section_crc(s.tag, s.size, s.data);
    return put(f, &s.tag, sizeof(s.tag)) && put(f, &crc, sizeof(crc)) && put(f, &s.size, sizeof(s.size)) &&
           put(f, s.data, s.size);
}

} // namespace

int32_t es_session_read(const char * path, uint32_t n, es_sections & out) {
    es_file     f{ fopen(path, "rb") };
    struct stat st;
    if (!f || fstat(fileno(f.get()), &st) != 0) {
        return es_io_error("cannot open session", path);
    }
    if (!S_ISREG(st.st_mode)) {
        return es_fail(ES_ERR_IO, "cannot open session %s: not a regular file", path);
    }
    uint64_t   left = (uint64_t) st.st_size;
    const auto get  = [&](void * dst, uint64_t n) {
        if (n > left || (n > 0 && fread(dst, 1, n, f.get()) != n)) {
            return false;
        }
        left -= n;
        return true;
    };
    // a file that cannot be read now is not a damaged one
    const auto cut_short = [&](const char * what) {
        return ferror(f.get()) ? es_io_error("cannot read session", path)
                               : es_fail(ES_ERR_FORMAT, "session %s is damaged: %s cut short", path, what);
    };
    char     m[sizeof(magic)] = {};
    uint32_t v = 0, n_sections = 0;
    if (!get(m, sizeof(m)) && ferror(f.get())) {
        return es_io_error("cannot read session", path);
    }
    if (memcmp(m, magic, sizeof(m)) != 0) {
        return es_fail(ES_ERR_FORMAT, "%s is not an edge-stream session", path);
    }
    if (!get(&v, sizeof(v)) || !get(&n_sections, sizeof(n_sections)) || v == 0) {
        return cut_short("its header is");
    }
    if (v > es_session_version) {
        return es_fail(ES_ERR_VERSION, "session %s is of version %u; this edge-stream reads up to version %u", path, v,
                       es_session_version);
    }
    for (uint32_t i = 0; i < n_sections && (n == 0 || i < n); ++i) {
        uint32_t t, crc;
        uint64_t size;
        if (!get(&t, sizeof(t)) || !get(&crc, sizeof(crc)) || !get(&size, sizeof(size)) || size > left) {
            return cut_short("it is");
        }
        es_bytes data(size);
        if (!get(data.data(), size)) {
            return cut_short("it is");
        }
        if (section_crc(t, size, data.data()) != crc) {
            return es_fail(ES_ERR_FORMAT, "session %s is damaged: a checksum does not match", path);
        }
        out[t] = std::move(data);
    }
    if (n == 0 && left != 0) {
        return es_fail(ES_ERR_FORMAT, "session %s is damaged: bytes follow its end", path);
    }
    return ES_OK;
}

int32_t es_session_write(const char * path, const std::vector<es_section> & sections) {
    return es_replace_file(path, "cannot write session", [&](FILE * f) {
        const uint32_t n_sections = (uint32_t) sections.size();
        bool           ok = put(f, magic, sizeof(magic)) && put(f, &es_session_version, sizeof(es_session_version)) &&
                  put(f, &n_sections, sizeof(n_sections));
        for (const es_section & s : sections) {
            ok = ok && put_section(f, s);
        }
        return ok;
    });
}

uint64_t es_session_size(const std::vector<es_section> & sections) {
    uint64_t n = sizeof(magic) + 2 * sizeof(uint32_t);
    for (const es_section & s : sections) {
        n += sizeof(s.tag) + sizeof(uint32_t) + sizeof(s.size) + s.size;
    }
    return n;
}
