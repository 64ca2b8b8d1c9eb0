// The file, little-endian: magic[8] version:u32, then a record per entry, of which the file is only ever appended to or
// replaced:
//   n_text:u16 n_words:u16 crc:u32 turn_kind:u32 when:u32 words[n_words]:u32 text[n_text] zeros
// crc: over everything else of the record. zeros: 1 to 4, up to a multiple of 4. An entry without text stands for a
// turn of which there is nothing: it was empty, or is forgotten.
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
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

namespace {

constexpr char     magic[8]  = { 'E', 'D', 'G', 'E', 'S', 'L', 'O', 'G' };
constexpr uint32_t version   = 2;
constexpr size_t   n_header  = sizeof(magic) + sizeof(version);
constexpr size_t   n_record  = 4 * sizeof(uint32_t);
constexpr size_t   n_entry   = 160;         // bytes of an entry's text
constexpr size_t   n_hashes  = 2 * n_entry; // of its words, at most: a character gives two
constexpr uint64_t max_space = (uint64_t) 1 << 30;
constexpr uint64_t usual     = (uint64_t) 64 << 20;
constexpr int64_t  max_turns = (int64_t) 1 << 30;

struct record_head {
    uint16_t n_text, n_words;
    uint32_t crc, turn_kind, when;
};
static_assert(sizeof(record_head) == n_record, "no padding");

size_t size_of(const record_head & h) {
    return n_record + 4 * (size_t) h.n_words + (h.n_text / 4 + 1) * 4;
}

uint32_t crc_of(const record_head & h, const char * body) {
    const uint32_t head = es_crc32(es_crc32(0, &h, 4), &h.turn_kind, 8);
    return es_crc32(head, body, size_of(h) - n_record);
}

std::string record(uint32_t turn_kind, uint32_t when, std::string_view text) {
    const std::vector<uint32_t> words = es_words(text);
    record_head                 h     = { (uint16_t) text.size(), (uint16_t) words.size(), 0, turn_kind, when };
    std::string                 out(size_of(h), '\0');
    if (h.n_words > 0) {
        memcpy(&out[n_record], words.data(), 4 * (size_t) h.n_words);
    }
    text.copy(&out[n_record + 4 * (size_t) h.n_words], text.size());
    h.crc = crc_of(h, out.data() + n_record);
    memcpy(&out[0], &h, n_record);
    return out;
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

//
// looking at entries
//

es_log_entries::es_log_entries(const es_log & log) {
    if (log.path_.empty()) {
        data_ = log.memory_.data();
        size_ = log.memory_.size();
        return;
    }
    void * at = mmap(nullptr, (size_t) log.n_bytes_, PROT_READ, MAP_SHARED, log.fd_, 0);
    if (at != MAP_FAILED) {
        data_ = (const char *) at;
        size_ = n_mapped_ = (size_t) log.n_bytes_;
    }
}

es_log_entries::~es_log_entries() {
    if (n_mapped_ > 0) {
        munmap((void *) data_, n_mapped_);
    }
}

size_t es_log_entries::begin() {
    return n_header;
}

bool es_log_entries::entry_at(size_t at, es_log_entry & out) const {
    record_head h;
    memcpy(&h, data_ + at, n_record);
    const char * words = data_ + at + n_record;
    out                = { (int64_t) (h.turn_kind >> 2),
                           (int32_t) (h.turn_kind & 3),
                           h.when,
                           { words + 4 * (size_t) h.n_words, h.n_text },
                           (const uint32_t *) words,
                           h.n_words,
                           at,
                           at + size_of(h) };
    return out.end <= size_; // always, unless somebody else has written to the file
}

//
// the file
//

es_log::~es_log() {
    if (fd_ >= 0) {
        close(fd_);
    }
}

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
    n_bytes_ = (uint64_t) st.st_size;
    return ES_OK;
}

int32_t es_log::open(const char * path, uint64_t max_bytes) {
    if (max_bytes > max_space) {
        return es_fail(ES_ERR_INVALID, "a log may have at most %llu bytes", (unsigned long long) max_space);
    }
    max_bytes_ = max_bytes ? max_bytes : usual;
    if (!path) {
        memory_  = header();
        n_bytes_ = memory_.size();
        return ES_OK;
    }
    path_            = path;
    const int32_t rc = attach(true);
    if (rc != ES_OK) {
        return rc;
    }
    if (n_bytes_ > max_space + n_hashes * n_record) {
        return es_fail(ES_ERR_FORMAT, "log %s is larger than %llu bytes", path, (unsigned long long) max_space);
    }
    return read();
}

// Checks all of the file. What a crash has cut is taken off.
int32_t es_log::read() {
    const auto damaged = [&](const char * how) {
        return es_fail(ES_ERR_FORMAT, "log %s is damaged: %s", path_.c_str(), how);
    };
    const std::string head = header();
    std::string       start((size_t) std::min<uint64_t>(n_bytes_, n_header), '\0');
    if (pread(fd_, &start[0], start.size(), 0) != (ssize_t) start.size()) {
        return es_io_error("cannot read log", path_);
    }
    if (n_bytes_ < n_header && head.compare(0, start.size(), start) == 0) { // new, or cut by a crash at once
        n_bytes_ = 0;
        return replace(0, 0, head);
    }
    if (start.compare(0, sizeof(magic), magic, sizeof(magic)) != 0) {
        return es_fail(ES_ERR_FORMAT, "%s is not a log of edge-stream", path_.c_str());
    }
    uint32_t v;
    memcpy(&v, &start[sizeof(magic)], sizeof(v));
    if (v != version) {
        return es_fail(v > version ? ES_ERR_VERSION : ES_ERR_FORMAT,
                       "log %s is of version %u; this edge-stream reads version %u", path_.c_str(), v, version);
    }
    size_t at = n_header;
    {
        const es_log_entries file(*this);
        if (!file.is_there()) {
            return es_io_error("cannot read log", path_);
        }
        int64_t turn = 0;
        while (n_bytes_ - at >= n_record) {
            record_head h;
            memcpy(&h, file.data() + at, n_record);
            if (h.n_text > n_entry || h.n_words > n_hashes) {
                return damaged("an entry is too long");
            }
            const size_t end = at + size_of(h);
            if (end > n_bytes_) {
                break;
            }
            if (crc_of(h, file.data() + at + n_record) != h.crc) {
                if (end == n_bytes_) {
                    break;
                }
                return damaged("a checksum does not match");
            }
            if ((int64_t) (h.turn_kind >> 2) < turn || (h.turn_kind & 3) > ES_LOG_ASSISTANT) {
                return damaged("its entries have no order");
            }
            turn = h.turn_kind >> 2;
            at   = end;
        }
    }
    // a crash can cut the end of what was being appended
    if (at < n_bytes_ && ftruncate(fd_, (off_t) at) != 0) {
        return es_io_error("cannot write log", path_);
    }
    n_bytes_ = at;
    count();
    return ES_OK;
}

// Puts other bytes in place of those from `from` to `to`. On failure nothing changes.
int32_t es_log::replace(size_t from, size_t to, const std::string & by) {
    if (path_.empty()) {
        memory_.replace(from, to - from, by);
        n_bytes_ = memory_.size();
        count();
        return ES_OK;
    }
    if (n_bytes_ == 0) {
        const auto put = [&](FILE * f) { return fwrite(by.data(), 1, by.size(), f) == by.size(); };
        int32_t    rc  = es_replace_file(path_.c_str(), "cannot write log", put, true);
        return rc == ES_OK ? attach(false) : rc;
    }
    {
        const es_log_entries old(*this);
        if (!old.is_there()) {
            return es_io_error("cannot read log", path_);
        }
        const auto put = [&](FILE * f) {
            const size_t n_after = (size_t) n_bytes_ - to;
            return fwrite(old.data(), 1, from, f) == from && fwrite(by.data(), 1, by.size(), f) == by.size() &&
                   fwrite(old.data() + to, 1, n_after, f) == n_after;
        };
        const int32_t rc = es_replace_file(path_.c_str(), "cannot write log", put, true);
        if (rc != ES_OK) {
            return rc;
        }
    }
    const int32_t rc = attach(false);
    count();
    return rc;
}

void es_log::count() {
    n_entries_ = 0;
    last_turn_ = -1;
    const es_log_entries entries(*this);
    if (entries.is_there()) {
        entries.each([&](const es_log_entry & e) {
            n_entries_ += !e.text.empty();
            last_turn_ = e.turn;
            return true;
        });
    }
}

//
// changes
//

int32_t es_log::append(int64_t turn, int32_t kind, int64_t when, std::string_view text) {
    if (kind < ES_LOG_TEXT || kind > ES_LOG_ASSISTANT || turn < 0 || turn >= max_turns) {
        return es_fail(ES_ERR_INVALID, "turn %lld of kind %d is none", (long long) turn, kind);
    }
    if (turn < last_turn_) {
        return es_fail(ES_ERR_INVALID, "turn %lld is before the log's newest", (long long) turn);
    }
    const std::string clean     = es_log_text(text);
    const uint32_t    turn_kind = (uint32_t) turn << 2 | (uint32_t) kind;
    std::string       bytes;
    auto              parts = parts_of(clean);
    const size_t      n     = parts.size();
    if (parts.empty()) {
        parts.emplace_back();
    }
    for (const std::string_view part : parts) {
        bytes += record(turn_kind, (uint32_t) when, part);
    }
    const uint64_t end = n_bytes_;
    if (end + bytes.size() > max_space) {
        return es_fail(ES_ERR_INVALID, "the text is too long for the log");
    }
    if (path_.empty()) {
        memory_ += bytes;
    }
    for (size_t done = 0; !path_.empty() && done < bytes.size();) {
        const ssize_t written = ::write(fd_, bytes.data() + done, bytes.size() - done);
        if (written < 0 && errno != EINTR) {
            const int32_t rc = es_io_error("cannot write log", path_);
            (void) !ftruncate(fd_, (off_t) end);
            return rc;
        }
        done += written > 0 ? (size_t) written : 0;
    }
    n_bytes_ += bytes.size();
    n_entries_ += (int64_t) n;
    const int64_t before = last_turn_;
    last_turn_           = turn;
    if (n_bytes_ <= max_bytes_) {
        return ES_OK;
    }
    size_t  cut       = n_header; // the oldest quarter, but nothing of what was added
    int64_t n_dropped = 0;
    {
        const es_log_entries entries(*this);
        if (entries.is_there()) {
            entries.each([&](const es_log_entry & e) {
                if (e.at >= end || n_bytes_ - (cut - n_header) <= max_bytes_ / 4 * 3) {
                    return false;
                }
                cut = e.end;
                ++n_dropped;
                return true;
            });
        }
    }
    const int32_t rc = replace(n_header, cut, "");
    if (rc == ES_OK) {
        n_dropped_ += n_dropped;
        return rc;
    }
    const std::string why = es_last_error(); // nothing was added
    n_bytes_ -= bytes.size();
    n_entries_ -= (int64_t) n;
    last_turn_ = before;
    (void) !ftruncate(fd_, (off_t) end);
    return es_fail(rc, "%s", why.c_str());
}

int32_t es_log::sync() {
    return fd_ >= 0 && fsync(fd_) != 0 ? es_io_error("cannot write log", path_) : (int32_t) ES_OK;
}

int32_t es_log::truncate(int64_t n_turns) {
    if (last_turn_ < n_turns) {
        return ES_OK;
    }
    size_t  keep      = n_header;
    int64_t n_entries = 0, last = -1;
    {
        const es_log_entries entries(*this);
        if (!entries.is_there()) {
            return es_io_error("cannot read log", path_);
        }
        entries.each([&](const es_log_entry & e) {
            if (e.turn >= n_turns) {
                return false;
            }
            keep = e.end;
            last = e.turn;
            n_entries += !e.text.empty();
            return true;
        });
    }
    if (path_.empty()) {
        memory_.resize(keep);
    } else if (ftruncate(fd_, (off_t) keep) != 0) {
        return es_io_error("cannot write log", path_);
    }
    n_bytes_   = keep;
    n_entries_ = n_entries;
    last_turn_ = last;
    return ES_OK;
}

int32_t es_log::forget(int64_t turn) {
    size_t from = 0, to = 0;
    bool   is_empty = true;
    {
        const es_log_entries entries(*this);
        if (!entries.is_there()) {
            return es_io_error("cannot read log", path_);
        }
        entries.each([&](const es_log_entry & e) {
            if (e.turn == turn) {
                from     = from ? from : e.at;
                to       = e.end;
                is_empty = is_empty && e.text.empty();
            }
            return e.turn <= turn;
        });
    }
    if (is_empty) {
        return es_fail(ES_ERR_INVALID, "the log has nothing of turn %lld", (long long) turn);
    }
    return replace(from, to, record((uint32_t) turn << 2 | ES_LOG_TEXT, 0, ""));
}

int32_t es_log::fork(const char * path, int64_t n_turns, es_log & out) const {
    const int32_t rc = out.open(path, max_bytes_);
    if (rc != ES_OK) {
        return rc;
    }
    if (out.n_bytes_ > n_header) {
        return es_fail(ES_ERR_INVALID, "log %s holds another conversation", path);
    }
    std::string kept;
    {
        const es_log_entries entries(*this);
        if (!entries.is_there()) {
            return es_io_error("cannot read log", path_);
        }
        entries.each([&](const es_log_entry & e) {
            if (e.turn < n_turns) {
                kept.append(entries.data() + e.at, e.end - e.at);
            }
            return e.turn < n_turns;
        });
    }
    return out.replace(n_header, n_header, kept);
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
