#include "file.h"

#include "error.h"

#include <array>
#include <cerrno>
#include <cstring>
#include <dirent.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

namespace {

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

std::string folder_of(const std::string & path) {
    const size_t slash = path.rfind('/');
    return slash == std::string::npos ? "./" : path.substr(0, slash + 1);
}

// A rename is durable only once the folder is synced.
void sync_folder(const std::string & path) {
    const int fd = open(folder_of(path).c_str(), O_RDONLY);
    if (fd >= 0) {
        (void) fsync(fd);
        close(fd);
    }
}

const char * const temporary = ".tmp-"; // then the process

// Removes what processes that were killed had begun to write: the files of others are locked.
void remove_abandoned(const std::string & target) {
    const std::string folder = folder_of(target);
    const std::string prefix = target.substr(target.rfind('/') + 1) + temporary; // npos + 1 is 0
    DIR *             names  = opendir(folder.c_str());
    while (const dirent * entry = names ? readdir(names) : nullptr) {
        if (std::string(entry->d_name).rfind(prefix, 0) != 0) {
            continue;
        }
        const std::string path = folder + entry->d_name;
        const int         fd   = open(path.c_str(), O_RDONLY | O_NOFOLLOW | O_NONBLOCK);
        if (fd >= 0) {
            if (flock(fd, LOCK_EX | LOCK_NB) == 0) {
                (void) unlink(path.c_str());
            }
            close(fd);
        }
    }
    if (names) {
        closedir(names);
    }
}

} // namespace

// By eight bytes per step ("slicing by 8", Kounavis and Berry 2005), since a server checksums a cache of many MiB after
// every turn.
uint32_t es_crc32(uint32_t crc, const void * data, size_t n) {
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

int32_t es_io_error(const char * what, const std::string & path) {
    const int e = errno;
    if (e == ENOSPC || e == EDQUOT || e == EFBIG) {
        return es_fail(ES_ERR_NO_SPACE, "%s %s: the disk is full", what, path.c_str());
    }
    return es_fail(ES_ERR_IO, "%s %s: %s", what, path.c_str(), strerror(e));
}

int32_t es_replace_file(const char * path, const char * what, const std::function<bool(FILE *)> & put,
                        bool is_private) {
    struct stat st;
    if (stat(path, &st) != 0) {
        if (errno != ENOENT) {
            return es_io_error(what, path);
        }
    } else if (!S_ISREG(st.st_mode)) {
        return es_fail(ES_ERR_IO, "%s %s: not a regular file", what, path);
    }
    const std::string target = follow_links(path);
    const std::string tmp    = target + temporary + std::to_string(getpid());
    remove_abandoned(target);
    es_file f{ fopen(tmp.c_str(), "wb") };
    if (!f) {
        return es_io_error(what, path);
    }
    (void) flock(fileno(f.get()), LOCK_EX | LOCK_NB);
    const bool ok = (!is_private || fchmod(fileno(f.get()), S_IRUSR | S_IWUSR) == 0) && put(f.get()) &&
                    fflush(f.get()) == 0 && fsync(fileno(f.get())) == 0;
    if (!ok || fclose(f.release()) != 0 || rename(tmp.c_str(), target.c_str()) != 0) {
        const int32_t rc = es_io_error(what, path);
        unlink(tmp.c_str());
        return rc;
    }
    sync_folder(target);
    return ES_OK;
}
