// The file, little-endian: magic[8] version:u32, then a record per entry, of which the file is only ever appended to or
// replaced:
//   n:u32 crc:u32 turn_kind:u32 when:u32 text[n]     (crc over everything after it)
// An entry without text stands for a turn of which there is nothing: it was empty, or is forgotten.
#include "log.h"

#include "error.h"
#include "file.h"
#include "utf8.h"
#include "words.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

namespace {

constexpr char     magic[8]  = { 'E', 'D', 'G', 'E', 'S', 'L', 'O', 'G' };
constexpr uint32_t version   = 1;
constexpr size_t   n_header  = sizeof(magic) + sizeof(version);
constexpr size_t   n_record  = 4 * sizeof(uint32_t);
constexpr size_t   n_entry   = 160;                // bytes of an entry's text
constexpr uint64_t max_space = (uint64_t) 1 << 30; // offsets have 32 bits
constexpr uint64_t usual     = (uint64_t) 64 << 20;
constexpr int64_t  max_turns = (int64_t) 1 << 30;

std::string record(uint32_t turn_kind, uint32_t when, std::string_view text) {
    const uint32_t head[] = { turn_kind, when };
    const uint32_t n      = (uint32_t) text.size();
    const uint32_t crc    = es_crc32(es_crc32(0, head, sizeof(head)), text.data(), n);
    std::string    out(n_record, '\0');
    memcpy(&out[0], &n, 4);
    memcpy(&out[4], &crc, 4);
    memcpy(&out[8], head, 8);
    return out.append(text);
}

std::string header() {
    return std::string(magic, sizeof(magic)).append((const char *) &version, sizeof(version));
}

std::string_view trimmed(std::string_view s) {
    const size_t first = s.find_first_not_of(" \t\r\n");
    return first == std::string_view::npos ? std::string_view()
                                           : s.substr(first, s.find_last_not_of(" \t\r\n") - first + 1);
}

// Lines, and long ones in parts.
std::vector<std::string_view> parts_of(std::string_view text) {
    std::vector<std::string_view> out;
    while (!text.empty()) {
        const size_t     end  = std::min(text.find('\n'), text.size());
        std::string_view line = trimmed(text.substr(0, end));
        text.remove_prefix(std::min(end + 1, text.size()));
        while (line.size() > n_entry) {
            const std::string_view head = line.substr(0, n_entry);
            size_t                 at   = std::string_view::npos;
            for (const char * mark : { ". ", "! ", "? ", "; " }) {
                const size_t found = head.rfind(mark);
                if (found != std::string_view::npos && found > n_entry / 4) {
                    at = at == std::string_view::npos ? found + 2 : std::max(at, found + 2);
                }
            }
            if (at == std::string_view::npos) {
                at = head.rfind(' ');
            }
            if (at == std::string_view::npos || at == 0) {
                at = n_entry;
                while (at > n_entry - 4 && ((uint8_t) line[at] & 0xC0) == 0x80) { // not within a character
                    --at;
                }
            }
            out.push_back(trimmed(line.substr(0, at)));
            line = trimmed(line.substr(at));
        }
        if (!line.empty()) {
            out.push_back(line);
        }
    }
    return out;
}

} // namespace

std::string es_log_text(std::string_view text) {
    std::string out = es_utf8_valid(std::string(text));
    out.erase(std::remove(out.begin(), out.end(), '\0'), out.end()); // an entry ends at a zero
    return out;
}

es_log::~es_log() {
    if (fd_ >= 0) {
        close(fd_);
    }
}

std::string_view es_log::text_of(size_t i) const {
    const size_t from = i ? entries_[i - 1].text : 0;
    return std::string_view(text_).substr(from, entries_[i].text - from - 1);
}

void es_log::add(uint32_t turn_kind, uint32_t when, std::string_view text) {
    const std::vector<uint32_t> found = es_words(text);
    words_.insert(words_.end(), found.begin(), found.end());
    text_.append(text).push_back('\0');
    entries_.push_back({ (uint32_t) text_.size(), (uint32_t) words_.size(), turn_kind, when });
    n_bytes_ += n_record + text.size();
}

void es_log::drop(size_t first, size_t last) {
    const uint32_t text = first ? entries_[first - 1].text : 0, words = first ? entries_[first - 1].words : 0;
    const uint32_t n_text  = last > first ? entries_[last - 1].text - text : 0;
    const uint32_t n_words = last > first ? entries_[last - 1].words - words : 0;
    n_bytes_ -= n_text + (last - first) * (n_record - 1);
    text_.erase(text, n_text);
    words_.erase(words_.begin() + words, words_.begin() + words + n_words);
    entries_.erase(entries_.begin() + (ptrdiff_t) first, entries_.begin() + (ptrdiff_t) last);
    for (size_t i = first; i < entries_.size(); ++i) {
        entries_[i].text -= n_text;
        entries_[i].words -= n_words;
    }
}

//
// the file
//

// Opens the file and locks it. Not created: it may have been replaced.
int32_t es_log::attach(bool may_create) {
    if (fd_ >= 0) {
        close(fd_);
    }
    fd_ = ::open(path_.c_str(), O_RDWR | O_APPEND | O_CLOEXEC | (may_create ? O_CREAT : 0), S_IRUSR | S_IWUSR);
    struct stat st;
    if (fd_ < 0 || fstat(fd_, &st) != 0) {
        return es_io_error("cannot open log", path_);
    }
    if (!S_ISREG(st.st_mode)) {
        return es_fail(ES_ERR_IO, "cannot open log %s: not a regular file", path_.c_str());
    }
    if (flock(fd_, LOCK_EX | LOCK_NB) != 0) {
        return es_fail(ES_ERR_IO, "log %s is in use by another conversation", path_.c_str());
    }
    return ES_OK;
}

int32_t es_log::open(const char * path, uint64_t max_bytes) {
    if (max_bytes > max_space) {
        return es_fail(ES_ERR_INVALID, "a log may have at most %llu bytes", (unsigned long long) max_space);
    }
    max_bytes_ = max_bytes ? max_bytes : usual;
    n_bytes_   = n_header;
    if (!path) {
        return ES_OK;
    }
    path_            = path;
    const int32_t rc = attach(true);
    if (rc != ES_OK) {
        return rc;
    }
    std::string file;
    char        buffer[1 << 16];
    for (ssize_t n; (n = ::read(fd_, buffer, sizeof(buffer))) != 0;) {
        if (n < 0) {
            return es_io_error("cannot read log", path_);
        }
        file.append(buffer, (size_t) n);
        if (file.size() > max_space + n_entry * n_record) {
            return es_fail(ES_ERR_FORMAT, "log %s is larger than %llu bytes", path, (unsigned long long) max_space);
        }
    }
    return read(file);
}

int32_t es_log::read(const std::string & file) {
    const auto damaged = [&](const char * how) {
        return es_fail(ES_ERR_FORMAT, "log %s is damaged: %s", path_.c_str(), how);
    };
    const std::string head = header();
    if (file.size() < n_header && head.compare(0, file.size(), file) == 0) { // new, or cut by a crash at once
        return rewrite();
    }
    if (file.compare(0, sizeof(magic), magic, sizeof(magic)) != 0) {
        return es_fail(ES_ERR_FORMAT, "%s is not a log of edge-stream", path_.c_str());
    }
    uint32_t v;
    memcpy(&v, &file[sizeof(magic)], sizeof(v));
    if (v != version) {
        return es_fail(v > version ? ES_ERR_VERSION : ES_ERR_FORMAT,
                       "log %s is of version %u; this edge-stream reads version %u", path_.c_str(), v, version);
    }
    size_t  at   = n_header;
    int64_t turn = 0;
    while (file.size() - at >= n_record) {
        uint32_t h[4];
        memcpy(h, &file[at], sizeof(h));
        if (h[0] > n_entry) {
            return damaged("an entry is too long");
        }
        if (h[0] > file.size() - at - n_record) {
            break;
        }
        const std::string_view text = std::string_view(file).substr(at + n_record, h[0]);
        if (es_crc32(es_crc32(0, &h[2], 8), text.data(), text.size()) != h[1]) {
            if (at + n_record + h[0] == file.size()) {
                break;
            }
            return damaged("a checksum does not match");
        }
        if ((int64_t) (h[2] >> 2) < turn || (h[2] & 3) > ES_LOG_ASSISTANT) {
            return damaged("its entries have no order");
        }
        turn = h[2] >> 2;
        add(h[2], h[3], text);
        at += n_record + h[0];
    }
    // a crash can cut the end of what was being appended
    if (at < file.size() && ftruncate(fd_, (off_t) at) != 0) {
        return es_io_error("cannot write log", path_);
    }
    return ES_OK;
}

int32_t es_log::rewrite() {
    if (path_.empty()) {
        return ES_OK;
    }
    const int32_t rc = es_replace_file(
        path_.c_str(), "cannot write log",
        [&](FILE * f) {
            const std::string head = header();
            bool              ok   = fwrite(head.data(), 1, head.size(), f) == head.size();
            for (size_t i = 0; ok && i < entries_.size(); ++i) {
                const std::string r = record(entries_[i].turn_kind, entries_[i].when, text_of(i));
                ok                  = fwrite(r.data(), 1, r.size(), f) == r.size();
            }
            return ok;
        },
        true);
    return rc == ES_OK ? attach(false) : rc;
}

//
// changes
//

int32_t es_log::append(int64_t turn, int32_t kind, int64_t when, std::string_view text) {
    if (kind < ES_LOG_TEXT || kind > ES_LOG_ASSISTANT || turn < 0 || turn >= max_turns) {
        return es_fail(ES_ERR_INVALID, "turn %lld of kind %d is none", (long long) turn, kind);
    }
    if (!entries_.empty() && turn < turn_of(size() - 1)) {
        return es_fail(ES_ERR_INVALID, "turn %lld is before the log's newest", (long long) turn);
    }
    const std::string clean     = es_log_text(text);
    const uint32_t    turn_kind = (uint32_t) turn << 2 | (uint32_t) kind;
    std::string       bytes;
    const size_t      n_before = size();
    auto              parts    = parts_of(clean);
    if (parts.empty()) {
        parts.emplace_back();
    }
    for (const std::string_view part : parts) {
        bytes += record(turn_kind, (uint32_t) when, part);
    }
    if (n_bytes_ + bytes.size() > max_space) {
        return es_fail(ES_ERR_INVALID, "the text is too long for the log");
    }
    const off_t end = fd_ >= 0 ? lseek(fd_, 0, SEEK_END) : 0;
    for (size_t done = 0; fd_ >= 0 && done < bytes.size();) {
        const ssize_t n = ::write(fd_, bytes.data() + done, bytes.size() - done);
        if (n < 0 && errno != EINTR) {
            const int32_t rc = es_io_error("cannot write log", path_);
            (void) !ftruncate(fd_, end);
            return rc;
        }
        done += n > 0 ? (size_t) n : 0;
    }
    for (const std::string_view part : parts) {
        add(turn_kind, (uint32_t) when, part);
    }
    if (n_bytes_ <= max_bytes_) {
        return ES_OK;
    }
    size_t   n          = 0; // the oldest quarter, but nothing of this turn
    uint64_t bytes_left = n_bytes_;
    while (n < n_before && bytes_left > max_bytes_ / 4 * 3) {
        bytes_left -= n_record + text_of(n++).size();
    }
    n_dropped_ += (int64_t) n;
    drop(0, n);
    return rewrite();
}

int32_t es_log::sync() {
    return fd_ >= 0 && fsync(fd_) != 0 ? es_io_error("cannot write log", path_) : (int32_t) ES_OK;
}

size_t es_log::start_of(int64_t turn) const {
    const auto is_before = [](const entry & e, int64_t t) { return (int64_t) (e.turn_kind >> 2) < t; };
    return (size_t) (std::lower_bound(entries_.begin(), entries_.end(), turn, is_before) - entries_.begin());
}

int32_t es_log::truncate(int64_t n_turns) {
    const size_t n = start_of(n_turns);
    if (n == size()) {
        return ES_OK;
    }
    drop(n, size());
    return fd_ < 0 || ftruncate(fd_, (off_t) n_bytes_) == 0 ? (int32_t) ES_OK : es_io_error("cannot write log", path_);
}

int32_t es_log::forget(int64_t turn) {
    const size_t first = start_of(turn), last = start_of(turn + 1);
    if (first == last || text_of(first).empty()) {
        return es_fail(ES_ERR_INVALID, "the log has nothing of turn %lld", (long long) turn);
    }
    drop(first, last);
    const uint32_t text = first ? entries_[first - 1].text : 0, words = first ? entries_[first - 1].words : 0;
    text_.insert(text, 1, '\0');
    entries_.insert(entries_.begin() + (ptrdiff_t) first, { text + 1, words, (uint32_t) turn << 2 | ES_LOG_TEXT, 0 });
    std::for_each(entries_.begin() + (ptrdiff_t) first + 1, entries_.end(), [](entry & e) { ++e.text; });
    n_bytes_ += n_record;
    return rewrite();
}

int32_t es_log::fork(const char * path, int64_t n_turns, es_log & out) const {
    const int32_t rc = out.open(path, max_bytes_);
    if (rc != ES_OK) {
        return rc;
    }
    if (out.size() > 0) {
        return es_fail(ES_ERR_INVALID, "log %s holds another conversation", path);
    }
    for (size_t i = 0; i < size() && turn_of(i) < n_turns; ++i) {
        out.add(entries_[i].turn_kind, entries_[i].when, text_of(i));
    }
    return out.rewrite();
}

es_log_stats es_log::stats() const {
    size_t n = 0;
    for (size_t i = 0; i < size(); ++i) {
        n += !text_of(i).empty();
    }
    return { entries_.empty() ? 0 : turn_of(size() - 1) + 1, (int64_t) n, n_dropped_, n_bytes_ };
}

//
// C interface
//

int32_t es_log_open(const char * path, uint64_t max_bytes, es_log ** out) {
    ES_REQUIRE(out);
    *out = nullptr;
    return es_guard([&]() -> int32_t {
        auto          log = std::make_unique<es_log>();
        const int32_t rc  = log->open(path, max_bytes);
        *out              = rc == ES_OK ? log.release() : nullptr;
        return rc;
    });
}

void es_log_close(es_log * log) {
    delete log;
}

int32_t es_log_append(es_log * log, int64_t turn, int32_t kind, int64_t when, const char * text, size_t n_text) {
    ES_REQUIRE(log);
    ES_REQUIRE(text);
    return es_guard([&] { return log->append(turn, kind, when, std::string_view(text, n_text)); });
}

int32_t es_log_sync(es_log * log) {
    ES_REQUIRE(log);
    return log->sync();
}

int32_t es_log_truncate(es_log * log, int64_t n_turns) {
    ES_REQUIRE(log);
    return es_guard([&] { return log->truncate(n_turns); });
}

int32_t es_log_fork(const es_log * log, const char * path, int64_t n_turns, es_log ** out) {
    ES_REQUIRE(log);
    ES_REQUIRE(out);
    *out = nullptr;
    return es_guard([&]() -> int32_t {
        auto          copy = std::make_unique<es_log>();
        const int32_t rc   = log->fork(path, n_turns, *copy);
        *out               = rc == ES_OK ? copy.release() : nullptr;
        return rc;
    });
}

int32_t es_log_forget(es_log * log, int64_t turn) {
    ES_REQUIRE(log);
    return es_guard([&] { return log->forget(turn); });
}

es_log_stats es_log_get_stats(const es_log * log) {
    return log ? log->stats() : es_log_stats{};
}
