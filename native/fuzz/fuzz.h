// What the fuzzers share: a folder in memory, a tiny model with a context, seeds.
#pragma once

#include "edge_stream_chat.h"

#include <cstddef>
#include <cstdint>
#include <string>

// Writes bytes to a file of this process's folder, which is removed at exit; returns its path.
std::string fuzz_file(const char * name, const uint8_t * data, size_t size);

// A path in that folder.
std::string fuzz_path(const char * name);

std::string fuzz_read(const std::string & path);

// CRC-32 as es_crc32 has it, which libedge_stream does not export.
uint32_t fuzz_crc(uint32_t crc, const void * data, size_t n);

// The tiny model of the native tests, loaded once.
llama_model * fuzz_model();

// A context of 64 cells of that model, with f32 keys and values.
llama_context * fuzz_context();

// From here to the end of the block an input has 10 s of CPU time (libFuzzer's -timeout counts time in which the
// machine had other work): then it ends as a crash.
class fuzz_watch {
public:
    fuzz_watch();
    ~fuzz_watch();
};

// What each program has: its first inputs. Called, and the process ended, if ES_FUZZ_SEEDS names a folder for them.
void fuzz_seeds();

void fuzz_seed(const std::string & name, const std::string & bytes);

template <size_t N>
void fuzz_seed_each(const std::string & name, const char * const (&texts)[N]) {
    for (size_t i = 0; i < N; ++i) {
        fuzz_seed(name + "-" + std::to_string(i), texts[i]);
    }
}
