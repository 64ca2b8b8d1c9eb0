// The log of edge_stream_recall.h. Entries are in memory as they are in the file, and their words as hashes beside
// them.
#pragma once

#include "edge_stream_recall.h"

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

// A text as a log has it: valid UTF-8, without zeros.
std::string es_log_text(std::string_view text);

struct es_log {

    ~es_log();

    int32_t open(const char * path, uint64_t max_bytes);
    int32_t append(int64_t turn, int32_t kind, int64_t when, std::string_view text);
    int32_t sync();
    int32_t fork(const char * path, int64_t n_turns, es_log & out) const;

    int32_t truncate(int64_t n_turns); // keeps the turns before
    int32_t forget(int64_t turn);

    es_log_stats     stats() const;
    size_t           size() const { return entries_.size(); }
    int64_t          turn_of(size_t i) const { return entries_[i].turn_kind >> 2; }
    int32_t          kind_of(size_t i) const { return (int32_t) (entries_[i].turn_kind & 3); }
    int64_t          when_of(size_t i) const { return entries_[i].when; }
    std::string_view text_of(size_t i) const; // 0-terminated
    const uint32_t * words_of(size_t i) const { return words_.data() + (i ? entries_[i - 1].words : 0); }
    size_t           n_words(size_t i) const { return entries_[i].words - (i ? entries_[i - 1].words : 0); }

private:
    struct entry {
        uint32_t text, words; // where they end below
        uint32_t turn_kind;   // turn << 2 | kind
        uint32_t when;
    };

    size_t  start_of(int64_t turn) const; // the first entry of it or a later one
    void    add(uint32_t turn_kind, uint32_t when, std::string_view text);
    void    drop(size_t first, size_t last);
    int32_t read(const std::string & file);
    int32_t rewrite();
    int32_t attach(bool may_create);

    std::string           path_; // empty: in memory
    uint64_t              max_bytes_ = 0, n_bytes_ = 0;
    int64_t               n_dropped_ = 0;
    int                   fd_        = -1;
    std::vector<entry>    entries_;
    std::string           text_;
    std::vector<uint32_t> words_;
};
