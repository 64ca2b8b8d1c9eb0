// The container of a session: a file of sections with checksums. Little-endian:
//   magic[8] version:u32 n_sections:u32
//   per section: tag:u32 crc:u32 size:u64 bytes[size]     (crc over tag, size and bytes)
#pragma once

#include <cstdint>
#include <map>
#include <vector>

constexpr uint32_t es_session_version = 3; // 2: nothing is recalled; 1: the sampler's state has no aim

using es_bytes    = std::vector<uint8_t>;
using es_sections = std::map<uint32_t, es_bytes>; // by tag

struct es_section {
    uint32_t     tag;
    const void * data;
    uint64_t     size;
};

// Reads the first n sections, or all of them (0), and verifies what it reads. Sets es_last_error, as the next one.
int32_t es_session_read(const char * path, uint32_t n, es_sections & out);

// See es_replace_file.
int32_t es_session_write(const char * path, const std::vector<es_section> & sections);

// Bytes of such a file.
uint64_t es_session_size(const std::vector<es_section> & sections);
