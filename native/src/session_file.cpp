#include "session_file.h"

#include "error.h"
#include "file.h"

#include <array>
#include <cerrno>
#include <cstring>
#include <fcntl.h>
#include <string>
#include <sys/stat.h>
#include <unistd.h>

namespace {

constexpr char magic[8] = { 'E', 'D', 'G', 'E', 'S', 'E', 'S', 'S' };

// CRC-32 (ISO-HDLC), as in zip and PNG, by eight bytes per step ("slicing by 8", Kounavis and Berry 2005), since a
// server checksums a cache of many MiB after every turn.
uint32_t crc32(uint32_t crc, const void * data, size_t n) {
    using tables          = std::array<std::array<uint32_t, 256>, 8>;
    static const tables t = [] {
        tables out;
        for (uint32_t i = 0; i < 256; ++i) {
            uint32_t c = i;
            for (int k = 0; k < 8; ++k) {
                c = (c & 1) ? 0xedb88320u ^ (c >> 1) : c >> 1;
            }
            out[0][i] = c;
        }
        for (uint32_t i = 0; i < 256; ++i) {
            for (size_t k = 1; k < 8; ++k) {
                out[k][i] = out[0][out[k - 1][i] & 0xff] ^ (out[k - 1][i] >> 8);
            }
        }
        return out;
    }();
    const auto * p = (const uint8_t *) data;
    crc            = ~crc;
    for (; n >= 8; n -= 8, p += 8) {
        const uint32_t low =
            crc ^ ((uint32_t) p[0] | (uint32_t) p[1] << 8 | (uint32_t) p[2] << 16 | (uint32_t) p[3] << 24);
        crc = t[7][low & 0xff] ^ t[6][low >> 8 & 0xff] ^ t[5][low >> 16 & 0xff] ^ t[4][low >> 24] ^ t[3][p[4]] ^
              t[2][p[5]] ^ t[1][p[6]] ^ t[0][p[7]];
    }
    for (; n > 0; --n, ++p) {
        crc = t[0][(crc ^ *p) & 0xff] ^ (crc >> 8);
    }
    return ~crc;
}

uint32_t section_crc(uint32_t t, uint64_t size, const void * data) {
    uint32_t crc = crc32(0, &t, sizeof(t));
    crc          = crc32(crc, &size, sizeof(size));
    return crc32(crc, data, size);
}

int32_t io_error(const char * what, const std::string & path) {
    const int e = errno;
    if (e == ENOSPC || e == EDQUOT || e == EFBIG) {
        return es_fail(ES_ERR_NO_SPACE, "%s %s: the disk is full", what, path.c_str());
    }
    return es_fail(ES_ERR_IO, "%s %s: %s", what, path.c_str(), strerror(e));
}

bool put(FILE * f, const void * data, size_t n) {
    return n == 0 || fwrite(data, 1, n, f) == n;
}

bool put_section(FILE * f, const es_section & s) {
    const uint32_t crc = section_crc(s.tag, s.size, s.data);
    return put(f, &s.tag, sizeof(s.tag)) && put(f, &crc, sizeof(crc)) && put(f, &s.size, sizeof(s.size)) &&
           put(f, s.data, s.size);
}

// The file that a path leads to through links, whether it exists or not: a rename would replace the link itself.
std::string follow_links(std::string path) {
    std::array<char, 4096> to;
    for (int hops = 0; hops < 40; ++hops) { // as many as Linux follows; stat reports a loop
        const ssize_t n = readlink(path.c_str(), to.data(), to.size());
        if (n < 0 || (size_t) n == to.size()) {
            break;
        }
        const size_t slash = path.rfind('/');
        const bool   whole = to[0] == '/' || slash == std::string::npos;
        path               = (whole ? "" : path.substr(0, slash + 1)) + std::string(to.data(), (size_t) n);
    }
    return path;
}

// A rename is durable only once the folder is synced.
void sync_folder(const std::string & path) {
    const size_t      slash  = path.rfind('/');
    const std::string folder = slash == std::string::npos ? "." : path.substr(0, slash + 1);
    const int         fd     = open(folder.c_str(), O_RDONLY);
    if (fd >= 0) {
        (void) fsync(fd);
        close(fd);
    }
}

} // namespace

int32_t es_session_read(const char * path, uint32_t n, es_sections & out) {
    es_file     f{ fopen(path, "rb") };
    struct stat st;
    if (!f || fstat(fileno(f.get()), &st) != 0) {
        return io_error("cannot open session", path);
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
        return ferror(f.get()) ? io_error("cannot read session", path)
                               : es_fail(ES_ERR_FORMAT, "session %s is damaged: %s cut short", path, what);
    };
    char     m[sizeof(magic)] = {};
    uint32_t v = 0, n_sections = 0;
    if (!get(m, sizeof(m)) && ferror(f.get())) {
        return io_error("cannot read session", path);
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
    struct stat st;
    if (stat(path, &st) != 0) {
        if (errno != ENOENT) {
            return io_error("cannot write session", path);
        }
    } else if (!S_ISREG(st.st_mode)) {
        return es_fail(ES_ERR_IO, "cannot write session %s: not a regular file", path);
    }
    const std::string target = follow_links(path);
    const std::string tmp    = target + ".tmp-" + std::to_string(getpid());
    es_file           f{ fopen(tmp.c_str(), "wb") };
    if (!f) {
        return io_error("cannot write session", path);
    }
    const uint32_t n_sections = (uint32_t) sections.size();
    bool ok = put(f.get(), magic, sizeof(magic)) && put(f.get(), &es_session_version, sizeof(es_session_version)) &&
              put(f.get(), &n_sections, sizeof(n_sections));
    for (const es_section & s : sections) {
        ok = ok && put_section(f.get(), s);
    }
    ok = ok && fflush(f.get()) == 0 && fsync(fileno(f.get())) == 0;
    if (!ok || fclose(f.release()) != 0 || rename(tmp.c_str(), target.c_str()) != 0) {
        const int32_t rc = io_error("cannot write session", path);
        unlink(tmp.c_str());
        return rc;
    }
    sync_folder(target);
    return ES_OK;
}

uint64_t es_session_size(const std::vector<es_section> & sections) {
    uint64_t n = sizeof(magic) + 2 * sizeof(uint32_t);
    for (const es_section & s : sections) {
        n += sizeof(s.tag) + sizeof(uint32_t) + sizeof(s.size) + s.size;
    }
    return n;
}
