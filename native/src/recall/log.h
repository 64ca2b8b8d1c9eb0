// The log of edge_stream_recall.h. Its entries are in the file only, each with its words as hashes: they are mapped
// while they are looked at, so that a log takes no memory in between. Without a file, the same bytes are in memory.
#pragma once

#include "edge_stream_recall.h"

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

// A text as a log has it: valid UTF-8, without zeros.
std::string es_log_text(std::string_view text);

struct es_log_entry {
    int64_t          turn;
    int32_t          kind;
    int64_t          when;
    std::string_view text; // empty: of a turn of which there is nothing
    const uint32_t * words;
    size_t           n_words;
    size_t           at, end; // in the file
};

struct es_log {

    es_log() = default;
    ~es_log();
    es_log(const es_log &)             = delete;
    es_log & operator=(const es_log &) = delete;

    int32_t open(const char * path, uint64_t max_bytes);
    int32_t append(int64_t turn, int32_t kind, int64_t when, std::string_view text);
    int32_t sync();
    int32_t fork(const char * path, int64_t n_turns, es_log & out) const;

    int32_t truncate(int64_t n_turns); // keeps the turns before
    int32_t forget(int64_t turn);

    es_log_stats stats() const { return { last_turn_ + 1, n_entries_, n_dropped_, n_bytes_ }; }

    std::vector<std::string> found; // texts of the newest search

private:
    friend class es_log_entries;

    int32_t read();
    int32_t replace(size_t from, size_t to, const std::string & by);
    int32_t attach(bool may_create);
    void    count();

    std::string path_; // empty: in memory
    uint64_t    max_bytes_ = 0, n_bytes_ = 0;
    int64_t     n_dropped_ = 0, n_entries_ = 0, last_turn_ = -1;
    int         fd_ = -1;
    std::string memory_; // the file's content, where there is no file
};

// The entries of a log, in order, while it does not change.
class es_log_entries {
public:
    explicit es_log_entries(const es_log & log);
    ~es_log_entries();
    es_log_entries(const es_log_entries &)             = delete;
    es_log_entries & operator=(const es_log_entries &) = delete;

    bool         is_there() const { return data_ != nullptr; } // false: the file cannot be mapped; sets errno
    const char * data() const { return data_; }

    // All entries, or until see returns false.
    template <typename F>
    void each(F && see) const {
        es_log_entry entry;
        for (size_t at = begin(); at < size_ && entry_at(at, entry) && see((const es_log_entry &) entry);) {
            at = entry.end;
        }
    }

private:
    static size_t begin();
    bool          entry_at(size_t at, es_log_entry & out) const;

    const char * data_ = nullptr;
    size_t       size_ = 0, n_mapped_ = 0;
};
