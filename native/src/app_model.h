// A loaded model of the app facade: metadata, tokenizer, chat template.
#pragma once

#include "edge_stream_app.h"
#include "llama.h"

#include <atomic>
#include <memory>
#include <string>
#include <vector>

using es_tokens = std::vector<llama_token>;

struct es_loaded_model {
    llama_model *       model = nullptr;
    const llama_vocab * vocab = nullptr;
    uint64_t            tag   = 0; // of the file, see es_app_model_info

    es_loaded_model()                                    = default;
    es_loaded_model(const es_loaded_model &)             = delete;
    es_loaded_model & operator=(const es_loaded_model &) = delete;
    ~es_loaded_model();

    // special: text that spells a control token becomes that token
    es_tokens                    tokenize(const std::string & text, bool add_bos, bool special) const;
    uint32_t                     recommended(const char * key, uint32_t otherwise) const; // number in the file
    mutable std::atomic<int32_t> proven{ 0 }; // es_stream_prove succeeded for positions up to this
};

// 64 bits of the SHA-256 of the file's size and 64 evenly spaced blocks, as in the Python package.
int32_t es_weights_tag(const char * path, uint64_t & out);

struct es_app_model {
    std::shared_ptr<const es_loaded_model> loaded; // sessions hold it too
};

// Loads a model that can stream. measure: metadata and vocabulary only, for es_app_memory_need.
int32_t es_load_model(const char * path, const es_app_model_params & params, bool measure,
                      std::shared_ptr<const es_loaded_model> & out);

// The last error that llama.cpp logged, as the end of a sentence (": ..."); empty if none.
std::string es_log_hint();
