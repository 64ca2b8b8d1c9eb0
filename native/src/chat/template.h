// A chat template and the tokenizer it is read with.
#pragma once

#include "chat.h"
#include "llama.h"

#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <vector>

using es_tokens = std::vector<llama_token>;

struct es_chat {
    const llama_vocab *       vocab = nullptr;
    common_chat_templates_ptr templates;
    std::string               source;
    bool                      is_fallback  = false; // the model has none
    bool                      is_builtin   = false; // one of llama.cpp's own, by name: no Jinja, no tools, no thinking
    bool                      is_plain     = false; // common has no handler for it that rewrites messages
    bool                      space_prefix = false; // the tokenizer puts a space before the first word
    bool                      add_bos      = false;
    size_t                    n_call_id    = 0;       // characters of a call's id that the template insists on; 0: any
    bool                      supports_tools = false; // calls can be told from text
    std::string               eos_text;
    std::string               info;

    mutable std::mutex                                mutex;
    mutable std::map<std::string, common_chat_params> params; // of the kinds of requests seen

    int32_t init(const llama_model * model, const char * chat_template);

    es_tokens tokenize(const std::string & text) const;
    es_tokens tokenize_within(const std::string & text) const; // as what follows other text
    bool      is_control(llama_token token) const;

    // The text that tokens first..last of a stream stand for, as a template would have written it.
    std::string text(const llama_token * tokens, size_t first, size_t last) const;
    std::string piece(const llama_token * tokens, size_t i) const;
};

// Runs f, which runs a template, within limits of time and memory. Sets es_last_error, ES_ERR_INVALID.
int32_t es_with_template(size_t n_input, const std::function<void()> & f);
