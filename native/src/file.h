// Files: closed by themselves, replaced as a whole, checked.
#pragma once

#include <cstdint>
#include <cstdio>
#include <functional>
#include <memory>
#include <string>

struct es_file_closer {
    void operator()(FILE * f) const { fclose(f); }
};
using es_file = std::unique_ptr<FILE, es_file_closer>;

// CRC-32 (ISO-HDLC), as in zip and PNG; crc: of what came before, 0 at first.
uint32_t es_crc32(uint32_t crc, const void * data, size_t n);

// es_fail with errno as the reason. what: "cannot write session".
int32_t es_io_error(const char * what, const std::string & path);

// Writes path.tmp-PID, fsyncs, renames: path holds the old file or the new one. A link is followed; what is no regular
// file (a folder, a device, a pipe) is refused. What a process that was killed was writing there is removed. put:
// writes the content; false on failure. is_private: for the owner.
int32_t es_replace_file(const char * path, const char * what, const std::function<bool(FILE *)> & put,
                        bool is_private = false);
