// What the fuzzers share: a folder in memory, a tiny model with a context, seeds.
#pragma once

#include "edge_stream_chat.h"

#include <cstddef>
#include <cstdint>
#include <functional>
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

// If ES_FUZZ_SEEDS names a folder: adds an input to it. fuzz_seeds: calls make and ends the process then.
void fuzz_seed(const std::string & name, const std::string & bytes);
void fuzz_seeds(const std::function<void()> & make);
